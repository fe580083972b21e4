"""Distillation: a policy trained from columns alone; no reward model and no reference model is loaded."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from prefdistill import losses
from prefdistill.data.tree import Tree, TreeBatch
from prefdistill.ensemble import Mixture
from prefdistill.errors import ConfigError, DataError
from prefdistill.training.degeneracy import degenerates
from prefdistill.training.methods import LossOptions, all_pairs, method_named, pair_losses, target_margins
from prefdistill.training.pessimism import HULLS, mixed, mixture_of
from prefdistill.training.trees import TreeTrainer, check_places

logger = logging.getLogger(__name__)

PESSIMISMS = ("pair", "batch", *HULLS)


@dataclass(frozen=True)
class DistillExample:
    """A prompt's tree with its columns.

    Attributes:
        tree: R responses.
        reference_logps: [R] log pi_ref(y|x), summed over tokens.
        rewards: [K, R]; K = 0 where the loss needs none. None for all members: not known, and the response is in no
            pair that rewards are distilled on.
        pairs: labelled pairs (chosen, rejected) as indices into the responses.
        from_reference: the responses that were drawn from pi_ref, over which forward KL is estimated.
        name: what errors call the prompt.

    Raises:
        DataError: a column has another length, or holds what is no finite number, a pair's rewards are not known, or
            there is no response at an index.
    """

    tree: Tree
    reference_logps: tuple[float, ...]
    rewards: tuple[tuple[float | None, ...], ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    from_reference: tuple[int, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        r = len(self.tree.responses)
        if len(self.reference_logps) != r or any(len(k) != r for k in self.rewards):
            raise DataError(f"a tree of {r} responses needs {r} reference log-probs and {r} rewards of each member")
        check_places(self.tree, self.pairs, self.name)
        check_places(self.tree, [(i,) for i in self.from_reference], self.name)
        labelled = {i for pair in self.pairs for i in pair}
        for what, values in [("reference log-prob", self.reference_logps), *(("reward", k) for k in self.rewards)]:
            for i, value in enumerate(values):
                unknown = value is None and what == "reward" and i not in labelled and i not in self.known
                if not unknown and (value is None or not math.isfinite(value)):
                    raise DataError(f"the {what} of response {i} is {value} ({self.name or 'a prompt without a name'})")

    @property
    def known(self) -> list[int]:
        """The responses that have a reward of some member; all, where there are no members."""
        return [i for i in range(len(self.tree.responses)) if all(k[i] is not None for k in self.rewards[:1])]


@dataclass
class DistillConfig(transformers.TrainingArguments):
    """TrainingArguments with the loss of the policy; a batch counts prompts, each with all its responses.

    Attributes:
        method: a row of the table of methods, see `prefdistill.training.methods`.
        beta: inverse scale of implicit rewards (nats of reward a nat of log-ratio).
        tau: IPO's regularisation.
        label_smoothing: of cDPO and robust DPO: the probability that a label is flipped.
        reward_scale: of reward-aware preference optimisation: factor on the explicit rewards.
        kl_alpha: weight of KL(pi_ref || pi_theta) in p-dpo, dp-dpo and e-dpo.
        kl_estimator: "plain" or "control-variate", see `prefdistill.losses.forward_kl`.
        pessimism: over the members of e-dpo: the min for each "pair" or for the whole "batch", or the exact worst case
            over their "hull", with one mixture for all prompts or one each ("hull-per-prompt"); hull-dpo is e-dpo with
            the latter two.
        pairs: "labelled" pairs, or "all" pairs of a prompt's responses; "all" needs a loss of rewards, not of labels.
    """

    method: str = field(default="e-dpo", metadata={"help": "which objective to train"})
    beta: float = 0.1
    tau: float = 0.1
    label_smoothing: float = 0.1
    reward_scale: float = 1.0
    kl_alpha: float = 0.01
    kl_estimator: str = "plain"
    pessimism: str = "pair"
    pairs: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        method = method_named(self.method)
        if self.pairs not in ("labelled", "all"):
            raise ConfigError(f"pairs is {self.pairs!r}; it must be labelled or all")
        if self.pessimism not in PESSIMISMS:
            raise ConfigError(f"pessimism is {self.pessimism!r}; it must be one of {', '.join(PESSIMISMS)}")
        if method.hull and self.pessimism not in HULLS:
            self.pessimism = "hull"
        if self.kl_estimator not in ("plain", "control-variate"):
            raise ConfigError(f"kl_estimator is {self.kl_estimator!r}; it must be plain or control-variate")
        if self.kl_alpha < 0:
            raise ConfigError(f"kl_alpha is {self.kl_alpha}; it must not be negative")
        if not method.needs_rewards:
            # Losses of labels have labelled pairs only.
            self.pairs = "labelled"

    @property
    def loss_options(self) -> LossOptions:
        over: Any = "batch" if self.pessimism == "batch" else "pair"
        return LossOptions(self.beta, self.tau, self.label_smoothing, self.reward_scale, over)


def join_columns(items: Sequence[Mapping[str, Any]], *, pairs: str) -> dict[str, Tensor]:
    """A batch's columns: reference_logps [R], rewards [K, R], pairs [P, 2], labelled [Q, 2], kl_samples [S]."""
    reference: list[float] = []
    rewards: list[Tensor] = []
    used: list[tuple[int, int]] = []
    labelled: list[tuple[int, int]] = []
    kl: list[int] = []
    for item in items:
        e: DistillExample = item["example"]
        start = len(reference)
        reference += e.reference_logps
        values = [[math.nan if r is None else r for r in k] for k in e.rewards]
        rewards.append(torch.tensor(values, dtype=torch.float64).reshape(len(e.rewards), len(e.reference_logps)))
        labelled += [(start + a, start + b) for a, b in e.pairs]
        known = e.known
        chosen = [(known[a], known[b]) for a, b in all_pairs(len(known))] if pairs == "all" else e.pairs
        used += [(start + a, start + b) for a, b in chosen]
        kl += [start + i for i in e.from_reference]
    return {
        "reference_logps": torch.tensor(reference, dtype=torch.float64),
        "rewards": torch.cat(rewards, dim=1),
        "pairs": torch.tensor(used, dtype=torch.long).reshape(-1, 2),
        "labelled": torch.tensor(labelled, dtype=torch.long).reshape(-1, 2),
        "kl_samples": torch.tensor(kl, dtype=torch.long),
    }


def with_pairs(examples: Sequence[DistillExample], pairs: str) -> list[DistillExample]:
    """The examples that a loss over "labelled" or "all" pairs has something to say about."""
    return [e for e in examples if (len(e.known) > 1 if pairs == "all" else e.pairs)]


class DistillTrainer(TreeTrainer):
    """Trains a policy, which must start at pi_ref, on columns that scoring wrote.

    Metrics have TRL's names (rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies, logps/chosen,
    logps/rejected), over labelled pairs, and: distillation/error (root mean square of the members' mean reward margin,
    reward_scale put in, less beta h, in reward units), ensemble/member_k (share of pairs for which e-DPO's min picks
    member k), kl/forward (plain estimate of KL(pi_ref || pi_theta)), logps/chosen_change and logps/level_change (mean
    log-prob of chosen, and of all, responses less the reference's, which is the start's).

    Raises:
        ConfigError: the method needs rewards, pairs or samples of pi_ref that the examples do not have, or they have
            rewards of different ensembles.
    """

    def __init__(
        self,
        model: nn.Module,
        args: DistillConfig,
        *,
        examples: Sequence[DistillExample],
        eval_examples: Sequence[DistillExample] | None = None,
        **kwargs: Any,
    ) -> None:
        self.method = method_named(args.method)
        self.loss_options = args.loss_options
        self.kl_estimator: Any = args.kl_estimator
        self.kl_alpha = args.kl_alpha if self.method.forward_kl else 0.0
        self._warned = False
        kept = with_pairs(examples, args.pairs)
        kept_eval = None if eval_examples is None else with_pairs(eval_examples, args.pairs)
        if not kept:
            raise ConfigError(f"no example has a pair to train {args.method} on (pairs: {args.pairs})")
        members = {len(e.rewards) for e in [*kept, *(kept_eval or [])]}
        if self.method.needs_rewards and 0 in members:
            raise ConfigError(f"{args.method} needs rewards, and some examples have none; score the pairs first")
        if len(members) > 1:
            raise ConfigError(f"examples have rewards of {sorted(members)} members; score all with the same ones")
        if self.kl_alpha > 0 and not any(e.from_reference for e in kept):
            raise ConfigError(
                f"{args.method} has a forward-KL term (kl_alpha {args.kl_alpha}), but no response is known to be drawn "
                "from the reference; sample some (sample.reference_per_prompt: 2), say that the pairs' own were "
                "(dataset.drawn_from_reference: true), or set kl_alpha: 0"
            )

        self.mixture: Mixture | None = None
        self.loss = self.method.loss
        if self.loss == "e_dpo" and args.pessimism in HULLS:
            if any(len(e.known) < len(e.tree.responses) for e in kept):
                raise ConfigError(f"{args.method} with pessimism {args.pessimism} needs rewards of all responses")
            per_prompt = args.pessimism == "hull-per-prompt"
            self.mixture = mixture_of(kept, beta=args.beta, per_prompt=per_prompt)
            if kept_eval is not None:
                own = mixture_of(kept_eval, beta=args.beta, per_prompt=True) if per_prompt else self.mixture
                kept_eval = mixed(kept_eval, own)
            kept = mixed(kept, self.mixture)
            self.loss = "d_dpo"

        def join(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
            return join_columns(items, pairs=args.pairs)

        super().__init__(
            model,
            args,
            train_items=[{"tree": e.tree, "example": e, "name": e.name} for e in kept],
            eval_items=None if kept_eval is None else [{"tree": e.tree, "example": e} for e in kept_eval],
            join=join,
            **kwargs,
        )

    def values_of(self, batch: TreeBatch) -> Tensor:
        return self.tree_model.logps(batch)

    def loss_of(self, values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        policy, reference, rewards = values, inputs["reference_logps"], inputs["rewards"]
        first, second = inputs["pairs"].unbind(1)
        h = losses.implicit_margin(policy[first], policy[second], reference[first], reference[second])
        margins = rewards[:, first] - rewards[:, second] if len(rewards) else None
        per_pair, member = pair_losses(self.loss, h, margins, self.loss_options)
        loss = per_pair.mean()
        kl_samples = inputs["kl_samples"]
        if len(kl_samples):
            sampled = policy[kl_samples], reference[kl_samples]
            self.record(**{"kl/forward": losses.forward_kl(*sampled).mean()})
            if self.kl_alpha:
                loss = loss + self.kl_alpha * losses.forward_kl(*sampled, estimator=self.kl_estimator).mean()
        self._record_levels(policy.detach(), inputs)
        if margins is not None:
            target = target_margins(self.loss, margins, self.loss_options)
            error = (target - self.loss_options.beta * h.detach()).square().mean().sqrt()
            self.record(**{"distillation/error": error})
        if member is not None and margins is not None:
            share = torch.bincount(member, minlength=len(margins)) / len(member)
            self.record(**{f"ensemble/member_{k}": s for k, s in enumerate(share)})
        return loss

    def _record_levels(self, policy: Tensor, inputs: Mapping[str, Any]) -> None:
        change = policy - inputs["reference_logps"]
        self.record(**{"logps/level_change": change.mean()})
        if not len(inputs["labelled"]):
            return
        chosen, rejected = inputs["labelled"].unbind(1)
        implicit = self.loss_options.beta * change
        self.record(
            **{
                "rewards/chosen": implicit[chosen].mean(),
                "rewards/rejected": implicit[rejected].mean(),
                "rewards/margins": (implicit[chosen] - implicit[rejected]).mean(),
                "rewards/accuracies": (implicit[chosen] > implicit[rejected]).double().mean(),
                "logps/chosen": policy[chosen].mean(),
                "logps/rejected": policy[rejected].mean(),
                "logps/chosen_change": change[chosen].mean(),
            }
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "logps/chosen_change" in logs and not self._warned:
            # Trainer's own history, since that of a resumed run goes back to its start.
            lines = [h for h in self.state.log_history if "logps/chosen_change" in h]
            if degenerates([(h["logps/chosen_change"], h["rewards/margins"]) for h in lines]):
                self._warned = True
                logger.warning(
                    "%s: the chosen responses' log-prob fell by %.1f nats since the start while the margins grew: the "
                    "policy moves its mass to responses outside the data. A pairwise loss leaves the common level "
                    "free; pin it with the forward-KL term (p-dpo, dp-dpo or e-dpo; larger kl_alpha), or train for "
                    "fewer steps or with a larger beta.",
                    self.args.method,
                    -logs["logps/chosen_change"],
                )
