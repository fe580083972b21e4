"""A run: which of its stages are done, which go on, how long is left."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from prefdistill import ranks
from prefdistill.atomic import remove_unfinished
from prefdistill.config import RunConfig
from prefdistill.data.group_files import read_groups
from prefdistill.data.table import Groups
from prefdistill.errors import ConfigError
from prefdistill.evaluation.engine import check_vllm
from prefdistill.evaluation.judges import is_oracle, load_oracle
from prefdistill.lock import HOLDER, LOCK, held
from prefdistill.manifest import Manifest, StageRecord, fingerprint_of
from prefdistill.models.adapter_folders import is_adapter
from prefdistill.models.allocator import give_back_memory
from prefdistill.models.compiled import check_compiler
from prefdistill.models.loading import check_classifier, is_put_together, load_config, reads_text_pairs
from prefdistill.models.precision import forward_seconds
from prefdistill.models.quantise import check_4bit
from prefdistill.plan import Stage, data_options, plan
from prefdistill.progress import on_terminal, silent
from prefdistill.stages import prepare
from prefdistill.stages.encoders import check_readers, encoder_of
from prefdistill.stages.run import Run
from prefdistill.training.trackers import check_trackers


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
        _check_arguments(config)
        ranks.from_main(_check_output, config)
        job = Run(config, progress=on_terminal if ranks.is_main() else silent)
        if config.sample.engine == "vllm":
            check_vllm("sample.engine", [config.evaluate.temperature])
            if ranks.count() > 1:
                raise ConfigError(
                    "sample.engine: vllm has processes of its own; set sample.engine: own for a run in several, or run "
                    "it in one with sample.engine_arguments: {tensor_parallel_size: N}"
                )
        gpus = torch.cuda.device_count()
        if gpus > 1 and ranks.count() == 1:
            _say(f"one of {gpus} GPUs is used; for all: torchrun --nproc-per-node {gpus} -m prefdistill run ...")
        if config.compile:
            check_compiler(job.device)
        for option in config.in_4bit():
            check_4bit(option, job.device)
        # Bad data or a model that is not there must stop the run before its directory exists.
        _check_models(job)
        options = data_options(job)
        encoded = functools.cache(lambda: prepare.encoded(job))
        ranks.from_main(_read_if_new, job, options, encoded)
        ranks.from_main(lambda: stack.enter_context(held(job.root)))
        ranks.from_main(remove_unfinished, job.root, job.is_shared)
        return _run(job, until, encoded, options)


def _read_if_new(job: Run, options: list[Any], encoded: Callable[[], prepare.Encoded]) -> None:
    """Reads and encodes the rows, unless the stage `data` was done from the same rows and options."""
    record = Manifest(job.root).stages.get("data")
    if record is None or record.fingerprint != fingerprint_of("data", options, []):
        encoded()


def _run(job: Run, until: str | None, encoded: Callable[[], prepare.Encoded], options: list[Any]) -> Path:
    """What is missing of the stages, by processes of which the first holds the directory."""
    manifest = Manifest(job.root)
    stages = plan(job, manifest, lambda: prepare.make_data(job, *encoded()), options)
    prints: dict[str, str] = {}
    for stage in stages:
        prints[stage.name] = fingerprint_of(stage.name, stage.options, [prints[a] for a in stage.after if a in prints])
    stages = _up_to(stages, until, job)
    ranks.from_main(manifest.ask, prints)
    ranks.from_main(job.config.write, job.root / "config.yaml")
    if ranks.count() > 1:
        job.precision = ranks.from_main(lambda: job.precision)  # measured once, for all
    done = ranks.from_main(lambda: [s.name for s in stages if manifest.is_done(s.name, prints[s.name])])
    if ranks.is_main():
        for name in done:
            job.remove_work(prints[name])  # of a process that was killed before it could
    todo = [s for s in stages if s.name not in done]
    if not todo:
        _say(f"nothing to do: all {len(stages)} stages of {job.root} are done")
        return job.root
    began, spent, worked = time.monotonic(), 0.0, 0.0
    guess = None
    if ranks.is_main():
        if todo[0].name == "data":
            groups = encoded()[0]
        else:
            groups = read_groups(job.groups_path)
            check_readers(job, groups)  # of other options than when the rows were read
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
        seconds = _work(stage, prints[stage.name], manifest, job)
        if stage.trains:
            give_back_memory()
        spent, worked = spent + seconds, worked + stage.cost
    _say(f"done in {_minutes(time.monotonic() - began)}: {job.root}")
    return job.root


def _work(stage: Stage, fingerprint: str, manifest: Manifest, job: Run) -> float:
    """Does a stage and writes it down; returns its seconds."""
    start = time.monotonic()
    found = None if stage.alone else stage.work(fingerprint)

    def finish() -> float:
        outputs, said = stage.work(fingerprint) if found is None else found
        seconds = time.monotonic() - start
        manifest.finish(stage.name, StageRecord(fingerprint, round(seconds, 2), stage.cost, said=said), outputs)
        job.remove_work(fingerprint)
        _say(f"    {said} ({_minutes(seconds)})")
        return seconds

    return ranks.from_main(finish)


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
        ranks.share_of(option, prompts)


def _check_arguments(config: RunConfig) -> None:
    """Raises ConfigError for training_arguments that transformers would refuse in the middle of the run."""
    for method in config.methods:
        own = config.distill.of(method).training_arguments
        # What shards sets variables that every other training would read.
        plain = {k: v for k, v in own.items() if not k.startswith(("fsdp", "deepspeed"))}
        try:
            transformers.TrainingArguments(output_dir=config.output_dir, report_to="none", **plain)
        except (ValueError, TypeError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"distill.training_arguments of {method}: {reason}") from error


def _is_run(root: Path) -> bool:
    return any((root / name).exists() for name in ("config.yaml", "manifest.json"))


def _check_models(job: Run) -> None:
    """Raises ConfigError for a judge or a ready reward model that is not there or is none."""
    config = job.config
    for method in config.methods:
        own = config.distill.of(method)
        if own.adapters and not own.load_in_4bit:
            _check_base("distill.adapters", job.reference)
    if config.reward.adapters and not config.reward.load_in_4bit:
        bases = config.reward.models or [job.reference]
        for base in [
            *(bases if config.needs_rewards and config.reward.members else []),
            *([job.reference] if config.evaluate.judge == "heldout" else []),
        ]:
            _check_base("reward.adapters", base)
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


def _check_base(option: str, base: str) -> None:
    """Raises ConfigError for a base on which a saved adapter could not be loaded again."""
    if is_put_together(base):
        made = "itself an adapter" if is_adapter(base) else "put together from parts when it is read"
        raise ConfigError(
            f"{option}: the model {base!r} is {made}, and no adapter can stand on it; give it as an ordinary folder "
            f"(adapters merged), or leave {option} off"
        )


def _seconds_a_pass(job: Run, groups: Groups) -> float | None:
    config = load_config(job.config.model, trust_remote_code=job.config.trust_remote_code)
    return forward_seconds(config, sum(t.tokens for t in groups.trees), job.device, job.config.precision)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _say(text: str) -> None:
    if ranks.is_main():
        print(text, file=sys.stderr, flush=True)
