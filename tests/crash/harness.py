"""`make crash-test N=50`: runs killed with SIGKILL at random instants and started again come out bit-identical.

A tiny model goes through every stage, with members and a judge that are heads (the default) or adapters (LoRA). Of each
kind one run is left alone. Others, of the kinds in turn, are killed, mostly several times each, until there were N
kills: every kill is aimed at a stage (or the start-up) that had the fewest so far, at an instant drawn over its length,
so that from some number on every stage of each kind has some, which is demanded. Then, for every run: the files that
make its result are those of the undisturbed one of its kind to the byte, no half file is left, and no stage that the
manifest called done before a kill ran again after it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

OPTIONS = {
    "methods": "[dpo,e-dpo]",
    "precision": "float32",
    "sft.enabled": True,
    "sft.epochs": 2,
    "sft.batch_prompts": 4,
    "sample.reference_per_prompt": 2,
    "sample.max_new_tokens": 6,
    "reward.members": 2,
    "distill.epochs": 3,
    "distill.batch_prompts": 4,
    "distill.logging_steps": 1,
    "distill.save_steps": 1,
    "distill.checkpoints": 2,
    "score.token_budget": 200,
    "evaluate.max_new_tokens": 6,
    "evaluate.samples": 2,
    "evaluate.chosen_prompts": 4,
    "evaluate.judge": "heldout",
}
KINDS = {
    "adapters": {
        **OPTIONS,
        "reward.hold": "lora",
        "reward.lora_rank": 2,
        "reward.epochs": 2,
        "reward.batch_prompts": 4,
    },
    "heads": OPTIONS,
}
# What a run leaves: not the manifest, which tells how long stages took, nor the report, which shows it.
RESULT = ("**/*.safetensors", "data/*.parquet", "columns/**/*.parquet", "evaluation/**/*.json", "policy/*/*.json")
ENOUGH = 1.5  # kills a stage, above which none may be spared: some fall between stages
STARTUP, BETWEEN, DONE = "start-up", "between", "done before"
STAGE = re.compile(r"^\[\d+/\d+\] (\S+): (.*)")


def start(
    config: Path,
    out: Path,
    log: Path,
    deadline: float | None,
    within=contextlib.nullcontext,
    *,
    stage: str | None = None,
) -> int | None:
    """The exit status of one start of the run in a forked process; None: it was killed after `deadline` seconds.

    Args:
        stage: these seconds count from when this stage begins, None: from the start.
    """
    log.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with log.open("w") as said:
                os.dup2(said.fileno(), 2)
                os.dup2(said.fileno(), 1)
            import torch

            from prefdistill.cli import main

            torch.set_num_threads(1)
            with within():
                status = main(["run", str(config), "--output-dir", str(out)])
        finally:
            os._exit(status)
    end = None if deadline is None or stage is not None else time.monotonic() + deadline
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and end is None and log.exists() and stages_of(log).get(stage, DONE) != DONE:
            end = time.monotonic() + deadline
        if end is not None and time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


def attempt(config: Path, out: Path, log: Path, deadline: float | None, stage: str | None = None) -> bool:
    """One start of the run, killed so many seconds into a stage (None: at all); whether it came to its end."""
    status = start(config, out, log, deadline, stage=stage)
    if status:
        raise SystemExit(f"a run ended with {status}:\n{log.read_text()[-3000:]}")
    return status is not None


def stages_of(log: Path) -> dict[str, str]:
    """Stage -> what its line said, of one start."""
    found = (STAGE.match(line) for line in log.read_text().splitlines())
    return {m[1]: m[2] for m in found if m}


def result_of(out: Path) -> dict[str, bytes]:
    files = {f for pattern in RESULT for f in out.glob(pattern) if f.is_file() and ".work" not in f.parts}
    return {f.relative_to(out).as_posix(): f.read_bytes() for f in sorted(files)}


def differences(whole: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in whole.keys() | other.keys() if whole.get(name) != other.get(name))


def prepare(folder: Path, options: dict | None = None, prompts: int = 40) -> Path:
    """Data, a tiny model and the configuration."""
    from tiny_runs import rows, save_model, write_rows

    data, model = folder / "pairs.jsonl", folder / "model"
    write_rows(data, rows(prompts))
    save_model(model)
    from prefdistill.cli import parse

    flags = {"data": data, "model": model, "output_dir": folder / "unused", **(options or OPTIONS)}
    config = folder / "config.yaml"
    config.write_text(parse("run", [f"--{k}={v}" for k, v in flags.items()]).as_yaml(), encoding="utf-8")
    return config


class Undisturbed:
    """A kind of run that nothing happens to: its configuration, length and result."""

    def __init__(self, kind: str, folder: Path, out: Path, log: Path, prompts: int) -> None:
        folder.mkdir()
        self.kind, self.config = kind, prepare(folder, KINDS[kind], prompts)
        began = time.monotonic()
        attempt(self.config, out, log, None)
        self.length = time.monotonic() - began
        records = json.loads((out / "manifest.json").read_text())["stages"]
        self.seconds = {name: record["seconds"] for name, record in records.items()}
        self.seconds[STARTUP] = max(0.0, self.length - sum(self.seconds.values()))
        self.files, self.stages = result_of(out), list(stages_of(log))
        shutil.rmtree(out)


def _least_struck(whole: Undisturbed, kept: list[str], struck: Counter, draw: random.Random) -> str | None:
    """One of the stages of this kind with the fewest kills so far; None: this run is beyond them, and may end."""
    fewest = min(struck[whole.kind, stage] for stage in whole.seconds)
    aims = [stage for stage in whole.seconds if struck[whole.kind, stage] == fewest and stage not in kept]
    return draw.choice(aims) if aims else None


def crash(kills: int, seed: int, folder: Path, say=print, *, prompts: int = 40) -> int:
    """Kills runs until there were so many kills; returns how many kills ended in a result that is not identical."""
    draw = random.Random(seed)
    log, out = folder / "log", folder / "run"  # one place for all: results name the members' folders
    kinds = [Undisturbed(kind, folder / kind, out, log, prompts) for kind in KINDS]
    for whole in kinds:
        say(f"undisturbed, {whole.kind}: {whole.length:.1f} s, {len(whole.stages)} stages, {len(whole.files)} files")
    done = bad = run = 0
    struck: Counter[tuple[str, str]] = Counter()
    while done < kills:
        if run > 20 + 10 * kills:
            raise SystemExit(f"{run} runs were started for {done} kills: stages end before they can be struck")
        whole = kinds[run % len(kinds)]
        run += 1
        finished, own = False, 0
        kept: list[str] = []
        while not finished:
            # No run has all kills, so that every kind has some.
            wanted = done < kills and own < -(-kills // len(kinds))
            aim = _least_struck(whole, kept, struck, draw) if wanted else None
            deadline = None if aim is None else draw.uniform(0.0, whole.seconds[aim])
            finished = attempt(whole.config, out, log, deadline, None if aim == STARTUP else aim)
            said = stages_of(log)
            again = [s for s in kept if s in said and said[s] != DONE]
            if again:
                say(f"run {run}: done before the kill and run again: {', '.join(again)}")
                bad += 1
            manifest = out / "manifest.json"
            kept = list(json.loads(manifest.read_text())["stages"]) if manifest.exists() else []
            if not finished:
                done, own = done + 1, own + 1
                where = next((s for s in reversed(said) if s not in kept), BETWEEN) if said else STARTUP
                struck[whole.kind, where] += 1
        wrong = differences(whole.files, result_of(out))
        left = [str(p.relative_to(out)) for form in ("*.part-*", "*.old-*", ".work/*") for p in out.rglob(form)]
        if wrong:
            say(f"run {run}, {own} kills: differs in {', '.join(wrong[:5])}")
            bad += own
        if left:
            say(f"run {run}: half files are left: {', '.join(left[:5])}")
            bad += 1
        shutil.rmtree(out)
    for whole in kinds:
        of_kind = {stage: struck[whole.kind, stage] for stage in (STARTUP, *whole.stages, BETWEEN)}
        say(f"kills by stage, {whole.kind}: " + ", ".join(f"{stage} {n}" for stage, n in of_kind.items()))
        spared = [stage for stage, n in of_kind.items() if not n and stage != BETWEEN]
        if spared and kills >= ENOUGH * sum(len(k.seconds) for k in kinds):
            say(f"no kill of {whole.kind} in: {', '.join(spared)}")
            bad += 1
    say(f"{done} kills, {done - bad} identical ({run} runs, seed {seed})")
    return bad


def asked(doc: str | None, what: str, default: int) -> argparse.Namespace:
    """The command line of a harness, in a process that is ready to be forked into runs."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument(what, type=int, nargs="?", default=default)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    import prefdistill.pipeline  # noqa: F401  (imported once, for all the forked runs)

    return options


def main() -> int:
    options = asked(__doc__, "kills", 50)
    with tempfile.TemporaryDirectory() as folder:
        return min(1, crash(options.kills, options.seed, Path(folder), lambda text: print(text, flush=True)))


if __name__ == "__main__":
    sys.exit(main())
