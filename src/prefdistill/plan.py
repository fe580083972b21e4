"""The stages of a run, in order: what each hangs on, how much work it is, and what does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefdistill.config import RunConfig
from prefdistill.data.group_files import TABLE_FORMAT
from prefdistill.data.sources import files_of
from prefdistill.evaluation.judges import is_oracle, oracle_fingerprint
from prefdistill.manifest import Manifest, fingerprint_of
from prefdistill.scoring import model_fingerprint
from prefdistill.seals import checksum
from prefdistill.stages import distill, draw, evaluate, members, prepare, reference, report, rewards
from prefdistill.stages.run import Run

Outcome = tuple[list[Path], str]

# Work of a stage in passes over the training tokens, for the time left: a training step costs three forwards.
TRAIN_PASSES = 3.0
SAMPLE_PASSES = 2.0


@dataclass(frozen=True)
class Stage:
    """A stage: what it hangs on, how much work it is, and what does it.

    Attributes:
        name: as in the manifest.
        does: said when it starts.
        options: the options that its result hangs on.
        after: stages whose results it reads.
        cost: work in passes over the training tokens.
        work: given the stage's fingerprint; returns the files it wrote and a line to say.
        alone: whether the first of several processes does it while the others wait; they take part in the others.
        trains: whether a Trainer trains a model in it: they hang in cycles, and the next one may not fit beside it.
    """

    name: str
    does: str
    options: Any
    after: tuple[str, ...]
    cost: float
    work: Callable[[str], Outcome]
    alone: bool = False
    trains: bool = False


def data_options(job: Run) -> list[Any]:
    """All that the stage `data` hangs on."""
    config = job.config
    tokens = {"tokenizer": job.tokenizer_fingerprint, "ends": job.generation_end_ids}
    options = [TABLE_FORMAT, asdict(config.dataset), _rows_fingerprint(config), tokens, config.seed]
    options.append(config.evaluate.judge == "heldout")
    return options + ([config.reward.given] if config.reward.given and config.needs_rewards else [])


def plan(job: Run, manifest: Manifest, make_data: Callable[[], Outcome], options: list[Any]) -> list[Stage]:
    """The stages of this run in order; each stage's options are all that its result hangs on.

    Args:
        make_data: what the stage `data` does.
        options: what it hangs on, `data_options(job)`.
    """
    config = job.config
    common = {"seed": config.seed, "precision": config.precision} | ({"compile": True} if config.compile else {})
    stages = [
        Stage(
            "data",
            f"reading, encoding and splitting {config.data}",
            options,
            (),
            0.1,
            lambda _: make_data(),
            alone=True,
        )
    ]
    model = model_fingerprint(config.model)
    if job.makes_start:
        sft = config.sft
        stages.append(
            Stage(
                "start",
                "supervised start" if sft.enabled else "putting the starting policy into a folder",
                [model, asdict(sft), common] if sft.enabled else [model],
                ("data",) if sft.enabled else (),
                TRAIN_PASSES * sft.epochs if sft.enabled else 0.5,
                lambda fingerprint: prepare.make_start(job, fingerprint),
                trains=sft.enabled,
            )
        )
    base = ["data", "start"]
    if config.reference_samples:
        stages.append(
            Stage(
                "sample",
                f"{config.reference_samples} responses of the reference for each training prompt",
                [config.reference_samples, config.sample.max_new_tokens, common, model, *_engine(config)],
                tuple(base),
                SAMPLE_PASSES,
                lambda fingerprint: prepare.make_samples(job, fingerprint),
            )
        )
        base.append("sample")
    stages.append(
        Stage(
            "reference",
            "log-probs of every response under the reference, once",
            [model, common, reference.uses_features(job), config.score.columns, *(["nf4"] * config.policies_in_4bit)],
            tuple(base),
            1.5 * (1 + config.policies_in_4bit),
            lambda _: reference.make_reference(job),
        )
    )
    reward = asdict(config.reward)
    # Ready reward models are scored, not trained: another list of them leaves the members as they are.
    training = {name: value for name, value in reward.items() if name not in ("pretrained", "given")}
    training["models"] = [model_fingerprint(name) for name in config.reward.models]
    pretrained = [model_fingerprint(name) for name in config.reward.pretrained]
    judged_by = config.evaluate.judge
    if is_oracle(judged_by):
        judged_by += " " + oracle_fingerprint(judged_by)
    elif judged_by != "heldout":
        judged_by = model_fingerprint(judged_by)
    trained = 0.2 if config.reward.hold == "head" else (TRAIN_PASSES + 1) * config.reward.epochs
    if config.needs_rewards and config.reward.members:
        stages.append(
            Stage(
                "reward",
                f"training {config.reward.members} reward models",
                [training, common],
                ("reference",),
                trained * config.reward.members,
                lambda fingerprint: members.make_members(job, fingerprint),
            )
        )
    if config.needs_rewards:
        stages.append(
            Stage(
                "score",
                "rewards of every response by every member, once",
                [pretrained, common, config.score.columns],
                ("reference", "reward"),
                0.1 if config.reward.hold == "head" else 1.5 * config.reward.members,
                lambda _: rewards.make_rewards(job),
            )
        )
    if config.evaluate.judge == "heldout":
        stages.append(
            Stage(
                "judge",
                "training the judge on pairs of its own",
                [training, common],
                ("reference",),
                trained,
                lambda fingerprint: members.make_judge(job, fingerprint),
                trains=config.reward.hold != "head",
            )
        )
    for method in config.methods:
        stages.append(_distillation(job, method, common, judged_by))
    for method in ["reference", *config.methods]:
        stages.append(_drawing(job, method, common))
    stages += [
        Stage(
            job.evaluates,
            "scores, log-probs and statistics",
            [asdict(config.evaluate), judged_by, common, config.methods],
            ("data", "reference", "score", "judge", *(f"{job.evaluates}:{m}" for m in ["reference", *config.methods])),
            0.5 * (1 + len(config.methods)),
            lambda _: evaluate.summarise(job),
            alone=True,
        ),
        Stage(
            job.report_path.stem,
            "writing the report",
            [],
            (job.evaluates,),
            0.1,
            lambda _: report.make_report(job, manifest),
            alone=True,
        ),
    ]
    return stages


def _distillation(job: Run, method: str, common: dict[str, Any], judged_by: str) -> Stage:
    config = job.config
    own = config.distill.of(method)
    hangs_on: list[Any] = [config.distill.method_of(method), asdict(own), common]
    after: tuple[str, ...] = ("reference", "score") if config.row(method).needs_rewards else ("reference",)
    cost, does = TRAIN_PASSES * own.epochs, f"training the policy with {method}"
    if own.checkpoints > 1:
        does += f", the best of {own.checkpoints} checkpoints on validation prompts"
        hangs_on += [*_sampling(config), judged_by]
        after += ("judge",)
        cost += 0.5 * SAMPLE_PASSES * own.checkpoints
    return Stage(
        f"distill:{method}",
        does,
        hangs_on,
        after,
        cost,
        lambda fingerprint: distill.train_policy(job, method, fingerprint),
        trains=True,
    )


def _sampling(config: RunConfig) -> list[Any]:
    """What samples hang on besides the policy and the prompts."""
    e = config.evaluate
    return [e.samples, e.max_new_tokens, e.temperature, e.top_p, *_engine(config)]


def _engine(config: RunConfig) -> list[Any]:
    """What draws: another engine, or one with other arguments, draws other samples."""
    return [] if config.sample.engine == "own" else [config.sample.engine, config.sample.engine_arguments]


def _drawing(job: Run, method: str, common: dict[str, Any]) -> Stage:
    return Stage(
        f"{job.evaluates}:{method}",
        f"sampling from {method} on held-out prompts",
        [job.config.evaluate.split, *_sampling(job.config), common],
        ("data", "reference" if method == "reference" else f"distill:{method}"),
        SAMPLE_PASSES * (2 if method == "reference" else 1) * 0.5,
        lambda fingerprint: draw.draw(job, method, fingerprint),
    )


def _rows_fingerprint(config: RunConfig) -> str:
    path = prepare.EMBEDDED_PAIRS if config.data == "embedded" else Path(config.data).expanduser()
    if not path.exists():
        return fingerprint_of(config.data, config.dataset.split)
    return fingerprint_of([(file.name, checksum(file)) for file in files_of(path)])
