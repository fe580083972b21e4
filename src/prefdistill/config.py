"""What a run is asked for: the YAML's keys, the command line's flags and the Python API are these dataclasses."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import transformers
import yaml

from prefdistill.data.bias import RESAMPLES
from prefdistill.errors import ConfigError
from prefdistill.models.loading import EMBEDDED_MODEL, EMBEDDED_POLICY
from prefdistill.option_checks import RUNS_OWN, check_no_secret, check_not_blank, check_type, check_variant
from prefdistill.options import (
    DatasetOptions,
    DistillOptions,
    EvaluateOptions,
    RewardOptions,
    SampleOptions,
    ScoreOptions,
    SFTOptions,
)
from prefdistill.training.methods import METHODS, Method, method_named

EMBEDDED_DATA = "embedded"


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
        compile: torch.compile the layers in training. The first step takes some seconds to half a minute
            longer. On CPUs for which the same is compiled without it (docs/speed.md) it won no time; elsewhere try it.
        gradient_checkpointing: auto (where the largest training step would not fit into free memory), always or never;
            the gradients are equal, the step takes a third longer.
        report_to: trackers that trainings report to, by transformers' names: tensorboard, wandb, mlflow, ...;
            TensorBoard and wandb write into logs/ of the run directory unless their own variables say where.
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
    compile: bool = False
    gradient_checkpointing: str = "auto"
    report_to: list[str] = field(default_factory=list)
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
        return any(self.row(m).needs_rewards for m in self.methods)

    def row(self, name: str) -> Method:
        """What a method or a variant of `distill.per_method` trains with."""
        return METHODS[self.distill.method_of(name)]

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
        return self._uses_hull(method) or (self.row(method).forward_kl and self.distill.of(method).kl_alpha > 0)

    def _uses_hull(self, method: str) -> bool:
        row = self.row(method)
        return row.hull or (row.loss == "e_dpo" and self.distill.of(method).pessimism.startswith("hull"))

    @property
    def primary(self) -> str:
        """The method that the verdict is about: the first e-dpo that was trained, else the last one."""
        return self._first("e-dpo") or self.methods[-1]

    @property
    def baseline(self) -> str | None:
        """The method that the primary one is held against: the first dpo that was trained."""
        return self._first("dpo")

    def _first(self, method: str) -> str | None:
        return next((name for name in self.methods if self.distill.method_of(name) == method), None)

    # -- checks ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises ConfigError, naming the option, for values that no run can use."""
        check_not_blank(self)
        for method, own in self.distill.per_method.items():
            check_variant(method, own)
        self._check_values()
        for method, own in self.distill.per_method.items():
            try:
                own_put_in = replace(self.distill.of(method), per_method=self.distill.per_method)
                replace(self, distill=own_put_in)._check_values()
            except ConfigError as error:
                raise ConfigError(f"distill.per_method.{method} {own}: {error}") from error

    def one_of(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Options whose values are words: name, value, and the words that it may be."""
        return [
            ("precision", self.precision, ("auto", "float32", "bfloat16")),
            ("gradient_checkpointing", self.gradient_checkpointing, ("auto", "always", "never")),
            ("dataset.on_bad_row", self.dataset.on_bad_row, ("stop", "drop")),
            ("dataset.both_orders", self.dataset.both_orders, ("stop", "keep")),
            ("sample.engine", self.sample.engine, ("own", "vllm")),
            ("reward.hold", self.reward.hold, ("head", "lora", "full")),
            ("reward.resample", self.reward.resample, RESAMPLES),
            ("distill.pessimism", self.distill.pessimism, ("pair", "batch", "hull", "hull-per-prompt")),
            ("distill.pairs", self.distill.pairs, ("labelled", "all")),
            ("distill.kl_estimator", self.distill.kl_estimator, ("plain", "control-variate")),
            ("evaluate.split", self.evaluate.split, ("test", "validation")),
        ]

    def _check_values(self) -> None:
        if not self.methods:
            raise ConfigError("methods is empty; name at least one, e.g. methods: [dpo, e-dpo]")
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"methods names one twice: {', '.join(self.methods)}")
        for name in self.methods:
            method_named(self.distill.method_of(name))
        for name, text, allowed in self.one_of():
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
            ("distill.checkpoints", self.distill.checkpoints, 1),
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
            if not number >= least:  # NaN too
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
            if not share <= most:
                raise ConfigError(f"{name} is {share}; it must be at most {most:g}")
        if not 0 <= self.distill.label_smoothing < 0.5:
            raise ConfigError(f"distill.label_smoothing is {self.distill.label_smoothing}; it must lie in [0, 0.5)")
        for name, value in positive:
            if not value > 0:
                raise ConfigError(f"{name} is {value}; it must be positive")
        if not self.distill.kl_alpha >= 0:
            raise ConfigError(f"distill.kl_alpha is {self.distill.kl_alpha}; it must not be negative")
        total = self.reward.members + len(self.reward.pretrained)
        for k in self.distill.members or []:
            if not (0 <= k < total or (self.reward.given is not None and k >= 0)):
                raise ConfigError(f"distill.members names {k}; there are {total} members, numbered from 0")
        if self.distill.members == []:
            raise ConfigError("distill.members is empty; name at least one member, or null for all")
        known = {f.name: str(f.type) for f in fields(DistillOptions) if f.name != "per_method"}
        for method, own in self.distill.per_method.items():
            for name in own.keys() - {"method"}:
                if name not in known:
                    raise ConfigError(f"distill.per_method.{method} has an unknown option {name!r}")
                check_type(
                    f"distill.per_method.{method}.{name}", own[name], known[name], getattr(DistillOptions(), name)
                )
        named = {f.name for f in fields(transformers.TrainingArguments)}
        for name in self.distill.training_arguments:
            if name not in named:
                raise ConfigError(
                    f"distill.training_arguments has {name!r}, which transformers.TrainingArguments does not know"
                )
            if name in RUNS_OWN:
                raise ConfigError(f"distill.training_arguments has {name!r}; {RUNS_OWN[name]}, so leave it out")
        check_no_secret("distill.training_arguments", self.distill.training_arguments)
        check_no_secret("sample.engine_arguments", self.sample.engine_arguments)
        self._check_adapters()
        if "model" in self.sample.engine_arguments:
            raise ConfigError(
                "sample.engine_arguments has model; what is sampled from is the run's to say, leave it out"
            )
        if self.sample.engine_arguments and self.sample.engine == "own":
            raise ConfigError("sample.engine_arguments are vllm.LLM's; set sample.engine: vllm, or leave them out")
        if self.reward.hold == "head" and self.reward.models:
            raise ConfigError("reward.models needs hold: lora or full; heads stand on the reference's features")
        if self.reward.adapters and self.reward.hold != "lora":
            raise ConfigError(f"reward.adapters is for hold: lora; with hold: {self.reward.hold} there is no adapter")
        if self.reward.resample == "length-bias" and not self.reward.rho:
            raise ConfigError("reward.resample: length-bias needs reward.rho, e.g. [0.2, 0.5, 0.8]")
        if not all(0 <= rho <= 1 for rho in self.reward.rho):
            raise ConfigError(f"reward.rho is {self.reward.rho}; every fraction must lie in [0, 1]")
        for method in self.methods:
            drawn = self.reference_samples or self.dataset.drawn_from_reference
            if self._needs_reference_samples(method) and not drawn:
                raise ConfigError(
                    f"{method} needs samples of the reference, for its forward-KL term or its hull; set "
                    "sample.reference_per_prompt to 2 say, dataset.drawn_from_reference: true if the pairs' own "
                    "responses were drawn from it, or distill.kl_alpha: 0 (no hull)"
                )
        if self.reward.given is not None:
            self._check_given_rewards()
        elif self.needs_rewards and self.reward.members + len(self.reward.pretrained) < 1:
            raise ConfigError("methods that distil rewards need reward.members, reward.pretrained or reward.given")

    def _check_given_rewards(self) -> None:
        name = self.reward.given
        if not name:
            raise ConfigError("reward.given is empty; name the columns, e.g. score for score_chosen and score_rejected")
        if self.reward.members or self.reward.pretrained:
            raise ConfigError(
                f"reward.given: {name} stands in place of reward models; set reward.members: 0 and no reward.pretrained"
            )
        for method in self.methods:
            if self._uses_hull(method):
                raise ConfigError(
                    f"{method}: the hull's weights need rewards of the reference's samples, which the data does not "
                    "give; train members, or name reward models in reward.pretrained"
                )

    def _check_adapters(self) -> None:
        for section in ("sft", "distill", "reward"):
            options = getattr(self, section)
            if section == "reward":
                lora, remedy = options.hold == "lora", "set reward.hold: lora"
            else:
                lora, remedy = options.lora_rank > 0, f"set {section}.lora_rank, to 16 say"
            if options.use_dora and not lora:
                raise ConfigError(f"{section}.use_dora is a way of training an adapter; {remedy}, or leave it off")
            if section == "distill" and options.adapters and not lora:
                raise ConfigError(f"distill.adapters: all weights are trained, there is no adapter; {remedy}")
            if options.load_in_4bit and not lora:
                raise ConfigError(
                    f"{section}.load_in_4bit needs an adapter, since 4-bit weights cannot be trained; {remedy}, or "
                    "leave it off"
                )

    def in_4bit(self) -> list[str]:
        """The options of this run that ask for 4-bit weights."""
        wanted = [("sft.load_in_4bit", self.sft.enabled and self.sft.load_in_4bit)]
        members = self.reward.members if self.needs_rewards else 0
        trains = members > 0 or self.evaluate.judge == "heldout"
        wanted.append(("reward.load_in_4bit", trains and self.reward.load_in_4bit))
        wanted.append(("distill.load_in_4bit", self.policies_in_4bit))
        return [name for name, asked in wanted if asked]

    @property
    def policies_in_4bit(self) -> bool:
        """Whether some policy is trained as an adapter on the rounded reference."""
        return any(self.distill.of(m).load_in_4bit for m in self.methods)

    def as_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)

    def write(self, path: Path) -> None:
        from prefdistill.atomic import write_text

        write_text(path, self.as_yaml())


__all__ = ["EMBEDDED_DATA", "EMBEDDED_MODEL", "RunConfig"]
