"""What a run is asked for: the YAML's keys, the command line's flags and the Python API are these dataclasses."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import transformers
import yaml

from prefdistill.data.bias import RESAMPLES
from prefdistill.errors import ConfigError
from prefdistill.models.loading import EMBEDDED_MODEL, EMBEDDED_POLICY
from prefdistill.training.methods import METHODS, method_named

EMBEDDED_DATA = "embedded"


@dataclass
class DatasetOptions:
    """How pairs are read, encoded and split.

    Attributes:
        split: the split of a hub data set.
        config_name: the configuration of a hub data set.
        limit: use only the first rows (null: all).
        on_bad_row: stop at the first row that cannot be used, or drop such rows into data/rejected.jsonl.
        max_prompt_tokens: longer prompts are cut from their left, and counted.
        max_response_tokens: pairs with a longer response are dropped, and counted.
        test_fraction: share of the prompts for the evaluation (unless the rows have a column `split`).
        validation_fraction: share of the prompts on which rewards are calibrated.
        judge_fraction: share of the prompts whose pairs train the held-out judge; 0 unless evaluate.judge is heldout.
        max_train_prompts: use at most so many prompts for training (null: all).
        max_validation_prompts: the same for validation.
        max_test_prompts: the same for the evaluation.
        drawn_from_reference: the data's responses were sampled from the starting policy, so forward KL can use them.
        rho: train and calibrate on D_rho only, a resample in which this fraction of the pairs prefers the longer
            response (null: all pairs); the test split stays as it is.
        rho_pairs: how many training pairs D_rho has (null: the most that rho allows without replacement).
    """

    split: str = "train"
    config_name: str | None = None
    limit: int | None = None
    on_bad_row: str = "stop"
    max_prompt_tokens: int = 512
    max_response_tokens: int = 512
    test_fraction: float = 0.15
    validation_fraction: float = 0.1
    judge_fraction: float = 0.25
    max_train_prompts: int | None = None
    max_validation_prompts: int | None = None
    max_test_prompts: int | None = None
    drawn_from_reference: bool = False
    rho: float | None = None
    rho_pairs: int | None = None


@dataclass
class SFTOptions:
    """The supervised start, which makes the reference from a base model.

    Attributes:
        enabled: whether to run it.
        on: "chosen" for the chosen responses, or the name of a column that holds demonstrations.
        epochs: passes over the training prompts.
        learning_rate: null: 2e-4 with LoRA, 2e-5 without.
        batch_prompts: prompts a step.
        lora_rank: 0 trains all weights.
    """

    enabled: bool = False
    on: str = "chosen"
    epochs: float = 1.0
    learning_rate: float | None = None
    batch_prompts: int = 8
    lora_rank: int = 16


@dataclass
class SampleOptions:
    """Responses sampled from the starting policy, which is the reference, for training prompts.

    Attributes:
        reference_per_prompt: how many; they are scored, joined to the trees as unlabelled responses (all pairs of a
            prompt's responses are distilled), and are what forward KL is estimated on. null: 2 where a method with a
            forward-KL term is asked for and the data's own responses are not drawn from the reference, else 0.
        max_new_tokens: bound on their length (at most dataset.max_response_tokens).
    """

    reference_per_prompt: int | None = None
    max_new_tokens: int = 128


@dataclass
class RewardOptions:
    """The ensemble of Bradley-Terry reward models.

    Attributes:
        members: K, how many to train.
        hold: head (linear, on the reference's frozen features), lora, or full.
        resample: each member's own draw of the training pairs: bootstrap, subsample, length-bias or all.
        fraction: of the pairs, for subsample.
        rho: for length-bias, each member's fraction of pairs that prefer the longer response, taken in turn.
        models: base models of the members, taken in turn (empty: the starting policy); not for hold: head.
        pretrained: folders or hub ids of reward models that stand in as further members.
        epochs: passes over the training prompts (lora, full).
        learning_rate: null: 2e-4 with lora, 1e-5 with full.
        batch_prompts: prompts a step.
        lora_rank: rank of lora members.
        adapters: save lora members as PEFT adapters with their heads, a few megabytes each on one base, instead of
            whole models.
        l2: penalty of heads (null: by cross-validation over prompts).
    """

    members: int = 3
    hold: str = "head"
    resample: str = "bootstrap"
    fraction: float = 0.7
    rho: list[float] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    pretrained: list[str] = field(default_factory=list)
    epochs: float = 1.0
    learning_rate: float | None = None
    batch_prompts: int = 8
    lora_rank: int = 16
    adapters: bool = False
    l2: float | None = None


@dataclass
class ScoreOptions:
    """Reference log-probs and rewards of every response, computed once.

    Attributes:
        token_budget: tokens in a forward, padding included; larger than training's, since nothing is kept for a
            backward pass.
        columns: folder that keeps the columns, to share them between runs (null: columns/ in the run directory).
    """

    token_budget: int = 4096
    columns: str | None = None


@dataclass
class DistillOptions:
    """Training of the policy.

    Attributes:
        beta: nats of reward a nat of log-ratio.
        tau: IPO's regularisation.
        label_smoothing: of cdpo and robust-dpo.
        reward_scale: of the rpo methods.
        kl_alpha: weight of KL(reference || policy) in p-dpo, dp-dpo and e-dpo.
        kl_estimator: of that term: plain (as in the paper) or control-variate (no gradient noise near the reference).
        pessimism: over the members, in e-dpo: the min for each pair or for the whole batch, or the exact worst case
            over their hull, one mixture for all prompts (hull) or one each (hull-per-prompt); hull-dpo is e-dpo with
            hull.
        members: which reward models a method distils, by number: those trained, then reward.pretrained (null: all).
        pairs: labelled pairs, or all pairs of a prompt's responses (methods that distil rewards).
        epochs: passes over the training prompts.
        learning_rate: null: 1e-4 with LoRA, 1e-5 without.
        batch_prompts: prompts a step, each with all its responses.
        lora_rank: 0 trains all weights.
        warmup_fraction: share of the steps in which the learning rate rises.
        logging_steps: steps between lines of the history.
        save_steps: steps between checkpoints, from which a stopped run goes on.
        training_arguments: anything else of transformers.TrainingArguments, by name.
        per_method: options of this section that differ for a method, e.g. {dpo: {learning_rate: 2.0e-4}}: what suits
            one loss can ruin another.
    """

    beta: float = 0.1
    tau: float = 0.1
    label_smoothing: float = 0.1
    reward_scale: float = 1.0
    kl_alpha: float = 0.01
    kl_estimator: str = "plain"
    pessimism: str = "pair"
    members: list[int] | None = None
    pairs: str = "all"
    epochs: float = 1.0
    learning_rate: float | None = None
    batch_prompts: int = 4
    lora_rank: int = 16
    warmup_fraction: float = 0.1
    logging_steps: int = 5
    save_steps: int = 50
    training_arguments: dict[str, Any] = field(default_factory=dict)
    per_method: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, method: str) -> DistillOptions:
        """The options of one method, its own put in."""
        return replace(self, per_method={}, **self.per_method.get(method, {}))


@dataclass
class EvaluateOptions:
    """Comparison with the reference on held-out prompts.

    Attributes:
        split: test, or validation while options are still being chosen: what was tuned on test prompts says nothing.
        judge: heldout (a reward model trained on pairs of its own, see dataset.judge_fraction), a folder or hub id of
            a sequence classifier with one label, or module:function of an oracle (rows, responses) -> scores.
        samples: responses a prompt from each policy.
        max_new_tokens: bound on their length.
        temperature: of sampling; KL is estimated on samples at temperature 1 and top_p 1 whatever is said here.
        top_p: of sampling.
        tie_margin: scores closer than this are a tie.
        chosen_prompts: training prompts on which the chosen log-prob is compared with the start's.
        shown: samples side by side in the report.
    """

    split: str = "test"
    judge: str = "heldout"
    samples: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    tie_margin: float = 0.0
    chosen_prompts: int = 48
    shown: int = 12


@dataclass
class RunConfig:
    """A run from preference pairs to a report.

    Attributes:
        data: a .jsonl, .json, .csv or .parquet file, a folder of them, a hub id, or "embedded".
        model: folder or hub id of the base policy, "smollm2-135m-instruct" or "embedded" (that with its start).
        output_dir: the run directory.
        methods: what to train and compare; see the table of methods in the README.
        seed: of everything that is drawn.
        precision: auto (measured), float32 or bfloat16.
        trust_remote_code: let a hub model run its own code.
        dataset: how pairs are read, encoded and split.
        sft: the supervised start.
        sample: responses sampled from the reference for training prompts.
        reward: the ensemble of reward models.
        score: columns.
        distill: training of the policy.
        evaluate: comparison with the reference.
    """

    data: str = EMBEDDED_DATA
    model: str = EMBEDDED_POLICY
    output_dir: str = "runs/default"
    methods: list[str] = field(default_factory=lambda: ["dpo", "e-dpo"])
    seed: int = 0
    precision: str = "auto"
    trust_remote_code: bool = False
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    sft: SFTOptions = field(default_factory=SFTOptions)
    sample: SampleOptions = field(default_factory=SampleOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    score: ScoreOptions = field(default_factory=ScoreOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)

    # -- derived ---------------------------------------------------------------------------------------------------

    @property
    def needs_rewards(self) -> bool:
        return any(METHODS[m].needs_rewards for m in self.methods)

    @property
    def reference_samples(self) -> int:
        """Responses a prompt to sample from the reference, see `SampleOptions`."""
        asked = self.sample.reference_per_prompt
        if asked is not None:
            return asked
        wanted = any(self._needs_reference_samples(m) for m in self.methods)
        return 2 if wanted and not self.dataset.drawn_from_reference else 0

    def _needs_reference_samples(self, method: str) -> bool:
        """For the forward-KL term, or for the weights of the hull."""
        row, options = METHODS[method], self.distill.of(method)
        hull = row.hull or (row.loss == "e_dpo" and options.pessimism.startswith("hull"))
        return hull or (row.forward_kl and options.kl_alpha > 0)

    @property
    def primary(self) -> str:
        """The method that the verdict is about: e-dpo where it was trained, else the last one."""
        return "e-dpo" if "e-dpo" in self.methods else self.methods[-1]

    # -- checks ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises ConfigError, naming the option, for values that no run can use."""
        self._check_values()
        for method, own in self.distill.per_method.items():
            try:
                replace(self, distill=self.distill.of(method))._check_values()
            except ConfigError as error:
                raise ConfigError(f"distill.per_method.{method} {own}: {error}") from error

    def _check_values(self) -> None:
        if not self.methods:
            raise ConfigError("methods is empty; name at least one, e.g. methods: [dpo, e-dpo]")
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"methods names one twice: {', '.join(self.methods)}")
        for method in self.methods:
            method_named(method)
        one_of = [
            ("precision", self.precision, ("auto", "float32", "bfloat16")),
            ("dataset.on_bad_row", self.dataset.on_bad_row, ("stop", "drop")),
            ("reward.hold", self.reward.hold, ("head", "lora", "full")),
            ("reward.resample", self.reward.resample, RESAMPLES),
            ("distill.pessimism", self.distill.pessimism, ("pair", "batch", "hull", "hull-per-prompt")),
            ("distill.pairs", self.distill.pairs, ("labelled", "all")),
            ("distill.kl_estimator", self.distill.kl_estimator, ("plain", "control-variate")),
            ("evaluate.split", self.evaluate.split, ("test", "validation")),
        ]
        for name, text, allowed in one_of:
            if text not in allowed:
                raise ConfigError(f"{name} is {text!r}; it must be one of {', '.join(allowed)}")
        fractions = {n: getattr(self.dataset, f"{n}_fraction") for n in ("test", "validation", "judge")}
        for name, share in fractions.items():
            if not 0 <= share < 1:
                raise ConfigError(f"dataset.{name}_fraction is {share}; it must lie in [0, 1)")
        if sum(fractions.values()) >= 1:
            raise ConfigError(f"dataset fractions {fractions} leave nothing to train on")
        if self.dataset.rho is not None and not 0 <= self.dataset.rho <= 1:
            raise ConfigError(f"dataset.rho is {self.dataset.rho}; it must lie in [0, 1]")
        if self.dataset.rho_pairs is not None and (self.dataset.rho is None or self.dataset.rho_pairs < 1):
            raise ConfigError(
                f"dataset.rho_pairs is {self.dataset.rho_pairs}; it needs dataset.rho, and at least 1 pair"
            )
        at_least = [
            ("reward.members", self.reward.members, 0),
            ("reward.batch_prompts", self.reward.batch_prompts, 1),
            ("sft.batch_prompts", self.sft.batch_prompts, 1),
            ("distill.batch_prompts", self.distill.batch_prompts, 1),
            ("distill.lora_rank", self.distill.lora_rank, 0),
            ("sft.lora_rank", self.sft.lora_rank, 0),
            ("reward.lora_rank", self.reward.lora_rank, 1),
            ("score.token_budget", self.score.token_budget, 1),
            ("evaluate.samples", self.evaluate.samples, 1),
            ("evaluate.max_new_tokens", self.evaluate.max_new_tokens, 1),
            ("evaluate.chosen_prompts", self.evaluate.chosen_prompts, 1),
            ("sample.max_new_tokens", self.sample.max_new_tokens, 1),
            ("distill.logging_steps", self.distill.logging_steps, 1),
            ("distill.save_steps", self.distill.save_steps, 1),
            ("seed", self.seed, 0),
            ("sample.reference_per_prompt", self.sample.reference_per_prompt or 0, 0),
            ("distill.warmup_fraction", self.distill.warmup_fraction, 0),
            ("evaluate.temperature", self.evaluate.temperature, 0),
            ("evaluate.tie_margin", self.evaluate.tie_margin, 0),
            ("evaluate.shown", self.evaluate.shown, 0),
        ]
        for name, number, least in at_least:
            if number < least:
                raise ConfigError(f"{name} is {number}; it must be at least {least}")
        positive = [
            ("distill.beta", self.distill.beta),
            ("distill.tau", self.distill.tau),
            ("distill.epochs", self.distill.epochs),
            ("reward.epochs", self.reward.epochs),
            ("sft.epochs", self.sft.epochs),
            ("distill.reward_scale", self.distill.reward_scale),
            ("evaluate.top_p", self.evaluate.top_p),
            ("reward.fraction", self.reward.fraction),
        ]
        optional = [
            ("distill.learning_rate", self.distill.learning_rate),
            ("reward.learning_rate", self.reward.learning_rate),
            ("reward.l2", self.reward.l2),
            ("sft.learning_rate", self.sft.learning_rate),
        ]
        positive += [(name, value) for name, value in optional if value is not None]
        at_most = [
            ("distill.warmup_fraction", self.distill.warmup_fraction, 1.0),
            ("evaluate.top_p", self.evaluate.top_p, 1.0),
            ("reward.fraction", self.reward.fraction, 1.0),
        ]
        for name, share, most in at_most:
            if share > most:
                raise ConfigError(f"{name} is {share}; it must be at most {most:g}")
        if not 0 <= self.distill.label_smoothing < 0.5:
            raise ConfigError(f"distill.label_smoothing is {self.distill.label_smoothing}; it must lie in [0, 0.5)")
        for name, value in positive:
            if not value > 0:
                raise ConfigError(f"{name} is {value}; it must be positive")
        if self.distill.kl_alpha < 0:
            raise ConfigError(f"distill.kl_alpha is {self.distill.kl_alpha}; it must not be negative")
        total = self.reward.members + len(self.reward.pretrained)
        for k in self.distill.members or []:
            if not 0 <= k < total:
                raise ConfigError(f"distill.members names {k}; there are {total} members, numbered from 0")
        if self.distill.members == []:
            raise ConfigError("distill.members is empty; name at least one member, or null for all")
        known = {f.name for f in fields(DistillOptions)} - {"per_method"}
        for method, own in self.distill.per_method.items():
            method_named(method)
            for name in own:
                if name not in known:
                    raise ConfigError(f"distill.per_method.{method} has an unknown option {name!r}")
                _check_type(f"distill.per_method.{method}.{name}", own[name], getattr(DistillOptions(), name))
        named = {f.name for f in fields(transformers.TrainingArguments)}
        for name in self.distill.training_arguments:
            if name not in named:
                raise ConfigError(
                    f"distill.training_arguments has {name!r}, which transformers.TrainingArguments does not know"
                )
        if self.reward.hold == "head" and self.reward.models:
            raise ConfigError("reward.models needs hold: lora or full; heads stand on the reference's features")
        if self.reward.adapters and self.reward.hold != "lora":
            raise ConfigError(f"reward.adapters is for hold: lora; with hold: {self.reward.hold} there is no adapter")
        if self.reward.resample == "length-bias" and not self.reward.rho:
            raise ConfigError("reward.resample: length-bias needs reward.rho, e.g. [0.2, 0.5, 0.8]")
        if self.needs_rewards and self.reward.members + len(self.reward.pretrained) < 1:
            raise ConfigError("methods that distil rewards need reward.members or reward.pretrained")

    def as_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)

    def write(self, path: Path) -> None:
        from prefdistill.atomic import write_text

        write_text(path, self.as_yaml())


def _check_type(name: str, value: Any, usual: Any) -> None:
    """Raises ConfigError for a text where a number belongs, and the like; options that may be null take numbers."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    wrong = {
        str: not isinstance(value, str),
        int: not isinstance(value, int) or isinstance(value, bool),
        float: not number,
        dict: not isinstance(value, dict),
    }.get(type(usual), value is not None and not (number or isinstance(value, list)))
    if wrong:
        raise ConfigError(f"{name} is {value!r}; it must be like {'a number' if usual is None else repr(usual)}")


__all__ = ["EMBEDDED_DATA", "EMBEDDED_MODEL", "RunConfig"]
