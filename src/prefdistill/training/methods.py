"""Which loss a method's name means, and how it reads a batch's log-probs, reference columns and reward columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prefdistill import losses
from prefdistill.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """A row of the table of methods: `loss` of the pairs, with the forward-KL term or without.

    `hull`: the members are mixed before training, see `prefdistill.training.pessimism`.
    """

    loss: str
    forward_kl: bool
    needs_rewards: bool
    hull: bool = False


METHODS: dict[str, Method] = {
    "dpo": Method("dpo", False, False),
    "cdpo": Method("cdpo", False, False),
    "robust-dpo": Method("robust_dpo", False, False),
    "ipo": Method("ipo", False, False),
    "p-dpo": Method("dpo", True, False),
    "d-dpo": Method("d_dpo", False, True),
    "dp-dpo": Method("d_dpo", True, True),
    "e-dpo": Method("e_dpo", True, True),
    "hull-dpo": Method("e_dpo", True, True, hull=True),
    "rpo-sq": Method("rpo_sq", False, True),
    "rpo-fwd-kl": Method("rpo_fwd_kl", False, True),
    "rpo-bwd-kl": Method("rpo_bwd_kl", False, True),
}


# Options that only some losses read; the others concern the training and are read by all.
_OF_LABEL_NOISE, _REWARD_AWARE = ("cdpo", "robust_dpo"), ("rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl")


def reads(name: str, option: str) -> bool:
    """Whether training a method looks at an option of the `distill` section: IPO has no beta, DPO no kl_alpha."""
    row = method_named(name)
    known = {
        "beta": row.loss != "ipo",
        "tau": row.loss == "ipo",
        "label_smoothing": row.loss in _OF_LABEL_NOISE,
        "reward_scale": row.loss in _REWARD_AWARE,
        "kl_alpha": row.forward_kl,
        "kl_estimator": row.forward_kl,
        "pessimism": row.loss == "e_dpo",
        "members": row.needs_rewards,
        "pairs": row.needs_rewards,
    }
    return known.get(option, True)


def method_named(name: str) -> Method:
    """The method of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; use one of {', '.join(METHODS)}")
    return METHODS[name]


@dataclass(frozen=True)
class LossOptions:
    """Hyper-parameters of the losses, in nats; see `prefdistill.losses`."""

    beta: float = 0.1
    tau: float = 0.1
    label_smoothing: float = 0.1
    reward_scale: float = 1.0
    over: Literal["pair", "batch"] = "pair"


def pair_losses(
    loss: str, h: Tensor, reward_margins: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor | None]:
    """Loss of every pair [P], and for e-DPO the member that the min picks [P].

    Args:
        h: implicit margins [P].
        reward_margins: [K, P]; single-reward losses take the members' mean.
    """
    if loss == "dpo":
        return losses.dpo(h, beta=options.beta), None
    if loss == "cdpo":
        return losses.dpo(h, beta=options.beta, label_smoothing=options.label_smoothing), None
    if loss == "robust_dpo":
        return losses.robust_dpo(h, beta=options.beta, label_smoothing=options.label_smoothing), None
    if loss == "ipo":
        return losses.ipo(h, tau=options.tau), None
    if reward_margins is None:
        raise ConfigError(f"the loss {loss} needs reward columns; score the pairs first")
    if loss == "e_dpo":
        return losses.ensemble_dpo(h, reward_margins, beta=options.beta, over=options.over)
    mean = reward_margins.mean(0)
    if loss == "d_dpo":
        return losses.distilled_dpo(h, mean, beta=options.beta), None
    reward_aware = {
        "rpo_sq": losses.rpo_sq,
        "rpo_fwd_kl": losses.rpo_fwd_kl,
        "rpo_bwd_kl": losses.rpo_bwd_kl,
    }
    if loss not in reward_aware:
        raise ConfigError(f"unknown loss {loss!r}")
    return reward_aware[loss](h, mean, beta=options.beta, reward_scale=options.reward_scale), None


def target_margins(loss: str, reward_margins: Tensor, options: LossOptions) -> Tensor:
    """The margins [P] that beta h is drawn to without pessimism: the members' mean of [K, P], scaled as in the loss."""
    scale = options.reward_scale if loss.startswith("rpo_") else 1.0
    return scale * reward_margins.mean(0)


def all_pairs(responses: int) -> list[tuple[int, int]]:
    return [tuple(p) for p in torch.combinations(torch.arange(responses), 2).tolist()]
