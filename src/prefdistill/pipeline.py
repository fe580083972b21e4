"""The stages of a run, in order: which are done, which go on, how long is left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefdistill import ranks
from prefdistill.atomic import remove_unfinished
from prefdistill.config import RunConfig
from prefdistill.data.group_files import TABLE_FORMAT
from prefdistill.data.table import Groups
from prefdistill.errors import ConfigError
from prefdistill.evaluation.engine import check_vllm
from prefdistill.evaluation.judges import is_oracle, load_oracle, oracle_fingerprint
from prefdistill.lock import HOLDER, LOCK, held
from prefdistill.manifest import Manifest, StageRecord, file_fingerprint, fingerprint_of
from prefdistill.models.adapter_folders import is_adapter
from prefdistill.models.loading import check_classifier, load_config, reads_text_pairs
from prefdistill.models.precision import forward_seconds
from prefdistill.models.quantise import check_4bit
from prefdistill.progress import on_terminal, silent
from prefdistill.scoring import model_fingerprint
from prefdistill.stages import distill, draw, evaluate, members, prepare, reference, report, rewards
from prefdistill.stages.encoders import encoder_of
from prefdistill.stages.run import Run
from prefdistill.training.trackers import check_trackers

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
    """

    name: str
    does: str
    options: Any
    after: tuple[str, ...]
    cost: float
    work: Callable[[str], Outcome]
    alone: bool = False


def run(config: RunConfig, *, until: str | None = None) -> Path:
    """Runs what is missing of a run, in `config.output_dir`, and returns that directory.

    Args:
        until: the last stage to run: start, reward, score, distill, evaluate or report; None for all.

    Raises:
        ConfigError, DataError: an option or a row cannot be used; nothing was written if the run is new.
    """
    config.check()
    check_trackers(config.report_to)
    with ranks.joined(), contextlib.ExitStack() as stack:
        _check_batches(config)
        ranks.from_main(_check_output, config)
        job = Run(config, progress=on_terminal if ranks.is_main() else silent)
        if config.sample.engine == "vllm":
            check_vllm("sample.engine", [config.evaluate.temperature])
            if ranks.count() > 1:
                raise ConfigError(
                    "sample.engine: vllm has processes of its own; set sample.engine: own for a run in several, or run "
                    "it in one with sample.engine_arguments: {tensor_parallel_size: N}"
                )
        for option in config.in_4bit():
            check_4bit(option, job.device)
        # Bad data or a model that is not there must stop the run before its directory exists.
        _check_models(job)
        pairs, left_out = prepare.read_pairs(job)
        source = _data_fingerprint(config, job)
        groups, dropped = prepare.encode_pairs(job, pairs, left_out)
        ranks.from_main(lambda: stack.enter_context(held(job.root)))
        ranks.from_main(remove_unfinished, job.root, job.is_shared)
        return _run(job, until, lambda: prepare.make_data(job, groups, dropped, left_out), source, groups)


def _run(job: Run, until: str | None, make_data: Callable[[], Outcome], source: str, groups: Groups) -> Path:
    """What is missing of the stages, by processes of which the first holds the directory."""
    manifest = Manifest(job.root)
    stages = plan(job, manifest, make_data, source)
    stages = _up_to(stages, until, job)
    prints: dict[str, str] = {}
    for stage in stages:
        prints[stage.name] = fingerprint_of(stage.name, stage.options, [prints[a] for a in stage.after if a in prints])
    ranks.from_main(job.config.write, job.root / "config.yaml")
    if ranks.count() > 1:
        job.precision = ranks.from_main(lambda: job.precision)  # measured once, for all
    done = ranks.from_main(lambda: [s.name for s in stages if manifest.is_done(s.name, prints[s.name])])
    todo = [s for s in stages if s.name not in done]
    if not todo:
        _say(f"nothing to do: all {len(stages)} stages of {job.root} are done")
        return job.root
    began, spent, worked = time.monotonic(), 0.0, 0.0
    guess = _seconds_a_pass(job, groups.of("train"))
    for number, stage in enumerate(stages, start=1):
        if stage not in todo:
            _say(f"[{number}/{len(stages)}] {stage.name}: done before")
            continue
        rest = sum(s.cost for s in todo[todo.index(stage) :])
        # What this run has measured of itself counts once it is worth a pass; before that, what a forward should take.
        a_pass = spent / worked if worked > 1 else guess
        left = f", about {_minutes(a_pass * rest)} left in all" if a_pass else ""
        _say(f"[{number}/{len(stages)}] {stage.name}: {stage.does}{left}")
        seconds = _work(stage, prints[stage.name], manifest)
        spent, worked = spent + seconds, worked + stage.cost
    _say(f"done in {_minutes(time.monotonic() - began)}: {job.root}")
    return job.root


def _work(stage: Stage, fingerprint: str, manifest: Manifest) -> float:
    """Does a stage and writes it down; returns its seconds."""
    start = time.monotonic()
    found = None if stage.alone else stage.work(fingerprint)

    def finish() -> float:
        outputs, said = stage.work(fingerprint) if found is None else found
        seconds = time.monotonic() - start
        manifest.finish(stage.name, StageRecord(fingerprint, round(seconds, 2), stage.cost, said=said), outputs)
        _say(f"    {said} ({_minutes(seconds)})")
        return seconds

    return ranks.from_main(finish)


def plan(job: Run, manifest: Manifest, make_data: Callable[[], Outcome], source: str) -> list[Stage]:
    """The stages of this run in order; each stage's options are all that its result hangs on."""
    config = job.config
    common = {"seed": config.seed, "precision": config.precision} | ({"compile": True} if config.compile else {})
    tokens = {"tokenizer": job.tokenizer_fingerprint, "ends": job.generation_end_ids}
    stages = [
        Stage(
            "data",
            f"reading, encoding and splitting {config.data}",
            [TABLE_FORMAT, asdict(config.dataset), source, tokens, config.seed, config.evaluate.judge == "heldout"]
            + ([config.reward.given] if config.reward.given and config.needs_rewards else []),
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


def _up_to(stages: list[Stage], until: str | None, job: Run) -> list[Stage]:
    if until is None:
        return stages
    # Stages of the evaluation are called after its split.
    name = {"evaluate": job.evaluates, "report": job.report_path.stem}.get(until, until)
    last = [i for i, s in enumerate(stages) if s.name.split(":")[0] == name]
    if not last:
        raise ConfigError(
            f"this run has no stage {until!r} (its methods or options do not need one); its stages are: "
            + ", ".join(s.name for s in stages)
        )
    # The name of evaluation names the sampling of each method and the summary; the last of them ends the run.
    return stages[: last[-1] + 1]


def _check_output(config: RunConfig) -> None:
    root = Path(config.output_dir)
    if root.exists() and not root.is_dir():
        raise ConfigError(f"output_dir {root} is a file; give a directory")
    ours = {LOCK, HOLDER}
    if root.is_dir() and any(p.name not in ours for p in root.iterdir()) and not _is_run(root):
        raise ConfigError(f"output_dir {root} holds files that are not a run's; give a new or empty directory")


def _check_batches(config: RunConfig) -> None:
    """Raises ConfigError where a batch cannot be divided among the processes."""
    batches = {"reward.batch_prompts": config.reward.batch_prompts} if config.reward.hold != "head" else {}
    batches |= {"sft.batch_prompts": config.sft.batch_prompts} if config.sft.enabled else {}
    batches |= {f"distill.batch_prompts of {m}": config.distill.of(m).batch_prompts for m in config.methods}
    for option, prompts in batches.items():
        if prompts % ranks.count():
            raise ConfigError(
                f"{option} is {prompts}; a batch is shared by the {ranks.count()} processes of this launch, so it must "
                "be a multiple of that"
            )


def _is_run(root: Path) -> bool:
    return any((root / name).exists() for name in ("config.yaml", "manifest.json"))


def _check_models(job: Run) -> None:
    """Raises ConfigError for a judge or a ready reward model that is not there or is none."""
    config = job.config
    for method in config.methods:
        own = config.distill.of(method)
        if own.adapters and not own.load_in_4bit and is_adapter(job.reference):
            raise ConfigError(
                f"distill.adapters: the model {job.reference!r} is itself an adapter, and none can stand on another; "
                "give it with its adapter merged, or leave distill.adapters off"
            )
    if is_oracle(config.evaluate.judge):
        load_oracle(config.evaluate.judge)
    elif config.evaluate.judge != "heldout":
        check_classifier(config.evaluate.judge, trust_remote_code=config.trust_remote_code)
        encoder_of(job, config.evaluate.judge)
    for name in config.reward.pretrained if config.needs_rewards else []:
        check_classifier(name, trust_remote_code=config.trust_remote_code)
        encoder_of(job, name)  # its tokenizer must read what it will be asked
    for name in config.reward.models if config.needs_rewards else []:
        if reads_text_pairs(name, trust_remote_code=config.trust_remote_code):
            raise ConfigError(
                f"reward.models: {name!r} is an encoder, on which no member can be trained here; give a causal model, "
                "or a ready encoder in reward.pretrained"
            )


def _data_fingerprint(config: RunConfig, job: Run) -> str:
    path = prepare.EMBEDDED_PAIRS if config.data == "embedded" else Path(config.data).expanduser()
    return file_fingerprint(path) if path.exists() else fingerprint_of(config.data, config.dataset.split)


def _seconds_a_pass(job: Run, groups: Groups) -> float | None:
    config = load_config(job.config.model, trust_remote_code=job.config.trust_remote_code)
    return forward_seconds(config, sum(t.tokens for t in groups.trees), job.device, job.config.precision)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _say(text: str) -> None:
    if ranks.is_main():
        print(text, file=sys.stderr, flush=True)
