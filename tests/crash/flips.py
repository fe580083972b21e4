"""`make flip-test N=200`: random damage to the files of a run is found, named, and what it held computed again.

Tiny runs are left finished, in the training of a member, in the training of a policy and in the choice among its
checkpoints. N times one of them is copied, a random file of it gets a flipped bit, is cut short or taken away, and the
same command is given again. The final weights, columns and figures must be those of an undisturbed run to the bit; or
the run is refused with an error that names the place, and after what the error says to do they are.

Damage may stay unnamed in three cases only: a file is gone, as in a run that was stopped before it was written; a
checkpoint is not the newest; or nothing reads the file any more, and if its name holds a checksum, that tells of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from crash.harness import asked, differences, prepare, result_of, start  # noqa: E402

DEADLINE = 300.0
COMMON = {
    "precision": "float32",
    "dataset.validation_fraction": 0.25,
    "sample.max_new_tokens": 4,
    "distill.batch_prompts": 2,
    "distill.logging_steps": 1,
    "distill.save_steps": 1,
    "distill.checkpoints": 2,
    "score.token_budget": 20,
    "evaluate.max_new_tokens": 4,
    "evaluate.samples": 2,
    "evaluate.chosen_prompts": 4,
}
KINDS_OF_RUN = {
    "heads": {**COMMON, "methods": "[dp-dpo]", "reward.members": 2},
    "adapted": {
        **COMMON,
        "methods": "[d-dpo]",
        "distill.checkpoints": 1,
        "reward.hold": "lora",
        "reward.lora_rank": 2,
        "reward.members": 2,
        "reward.batch_prompts": 4,
        "sft.enabled": True,
        "sft.batch_prompts": 8,
    },
}
# Where a run was left: which kind it is of, and where it was stopped.
STATES = {
    "finished": ("heads", None),
    "finished, adapted": ("adapted", None),
    "a member": ("adapted", "member"),
    "a training": ("heads", "training"),
    "a choice": ("heads", "choice"),
}
OUTCOMES = ("computed again", "refused", "not read", "missed")
UNREAD = ("config.yaml", ".lock")  # written anew from the options; empty
Launch = Callable[[Path, Path, Path, Any], int | None]


# --- running ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopping(where: str | None) -> Iterator[None]:
    """Stops what runs in the block: in the training of the second member, of a policy, or choosing its checkpoint."""
    from prefdistill.evaluation import sampling
    from prefdistill.stages import select
    from prefdistill.training.callbacks import ProgressCallback

    on_step, draw, best = ProgressCallback.on_step_end, sampling._sample_batch, select.best_checkpoint
    choosing: list[int] = []

    def step(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step(self, args, state, control, **kwargs)
        if where == "member" and "reward-1" in args.output_dir and state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        if where == "training" and "distill-" in args.output_dir and state.global_step == state.max_steps - 1:
            raise KeyboardInterrupt

    def batch(*arguments: Any) -> Any:
        choosing.append(1)
        if where == "choice" and choosing.count(0) and len(choosing) - choosing.index(0) > 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    def choose(*arguments: Any) -> Any:
        choosing.append(0)
        return best(*arguments)

    with contextlib.ExitStack() as patches:
        for owner, name, new in (
            (ProgressCallback, "on_step_end", step),
            (sampling, "_sample_batch", batch),
            (sys.modules["prefdistill.stages.distill"], "best_checkpoint", choose),
        ):
            patches.enter_context(mock.patch.object(owner, name, new))
        yield


def forked(config: Path, out: Path, log: Path, within: Any = contextlib.nullcontext) -> int | None:
    """A start in a process of its own; None: it did not come to an end."""
    return start(config, out, log, DEADLINE, within)


def here(config: Path, out: Path, log: Path, within: Any = contextlib.nullcontext) -> int | None:
    """A start in this process, for the test suite."""
    from prefdistill.cli import main

    with log.open("w") as said, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), within():
        handler = logging.StreamHandler(said)
        logging.getLogger("prefdistill").addHandler(handler)
        try:
            return main(["run", str(config), "--output-dir", str(out)])
        finally:
            logging.getLogger("prefdistill").removeHandler(handler)


# --- results ----------------------------------------------------------------------------------------------------------


def columns_of(out: Path) -> dict[str, bytes]:
    """Every value of every column, whichever shard it stands in."""
    values: dict[str, bytes] = {}
    for shard in sorted(out.glob("columns/**/shard-*.parquet")):
        if _is_damaged(shard):
            continue
        table = pq.read_table(shard)
        model = table.schema.metadata[b"fingerprint"].decode()
        name = shard.parent.relative_to(out).as_posix()
        for key, value in zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True):
            values[f"{name}: {model} {key}"] = repr(value).encode()
    return values


def outcome(out: Path) -> dict[str, bytes]:
    """Weights, data, figures and columns."""
    files = {name: content for name, content in result_of(out).items() if "shard-" not in name}
    return {**files, **columns_of(out)}


class Missed(Exception):
    """Damage that was not found, not named or not mended."""


# --- damage -----------------------------------------------------------------------------------------------------------


def kind_of(file: Path) -> str:
    """What a file of a run is called in the table; `file` is relative to its run."""
    name, parts = file.name, file.parts
    if name == "checksums.json":
        return "seal"
    if any(p.startswith("checkpoint-") for p in parts):
        return "checkpoint"
    told = (
        ("manifest.json", "manifest"),
        ("shard-", "column shard"),
        ("part-", "sample part"),
        ("step-", "kept weights"),
    )
    for beginning, kind in told:
        if name.startswith(beginning):
            return kind
    endings = {".safetensors": "weights", ".parquet": "Parquet", ".html": "report"}
    return endings.get(file.suffix, "evaluation" if parts[0] == "evaluation" else "other")


def damage(file: Path, how: str, draw: random.Random) -> None:
    """In place, so that hard links to a file share its damage, as they do on a disk."""
    size = file.stat().st_size
    if how == "gone":
        file.unlink()
    elif how == "cut":
        os.truncate(file, draw.randrange(size))
    else:
        place = draw.randrange(size)
        with file.open("r+b") as opened:
            opened.seek(place)
            (byte,) = opened.read(1)
            opened.seek(place)
            opened.write(bytes([byte ^ 1 << draw.randrange(8)]))


def may_be_silent(file: Path, how: str, out: Path) -> bool:
    """Whether nothing needs to be said of damage to this file, which the run has left behind as it is now."""
    kind = kind_of(file)
    if how == "gone":
        # A run that was stopped before it was written looks the same.
        return (
            kind in ("column shard", "sample part", "seal", "kept weights", "manifest")
            or file.name in UNREAD
            or _is_spare(file)
        )
    if file.name in UNREAD:
        return True
    # Unread by a run that is done; whoever reads it is told by its name.
    return kind == "column shard" and _is_damaged(out / file)


def _is_spare(file: Path) -> bool:
    """Whether a file is one more name of what the members' folders hold as well, for heads that are still to come."""
    return file.name.startswith("backbone-")


def _is_older(file: Path) -> bool:
    """Whether a file belongs to a checkpoint before the newest, which is read only if that one is damaged."""
    own = next((p for p in file.parents if p.name.startswith("checkpoint-")), None)
    steps = [] if own is None else [int(p.name.split("-")[1]) for p in own.parent.glob("checkpoint-*")]
    return own is not None and int(own.name.split("-")[1]) < max(steps)


def _is_damaged(shard: Path) -> bool:
    from prefdistill.seals import checksum

    return shard.name.startswith("shard-") and shard.exists() and shard.stem.rpartition("-")[2] != checksum(shard)


def follow(said: str, out: Path) -> None:
    """Does what the refusal says."""
    if "manifest.json" in said:
        (out / "manifest.json").unlink()
    elif "remove that folder" in said:
        for folder in (out / ".work").iterdir():
            if str(folder) in said:
                shutil.rmtree(folder)
    else:
        raise Missed(f"refused with a remedy that is none:\n{said[-2000:]}")


def strike(file: Path, how: str, draw: random.Random, scene: Scene) -> str:
    """Damages a file of the copied run, runs it again, and says what came of it.

    Raises:
        Missed: no good.
    """
    out, log = scene.out, scene.log
    damage(out / file, how, draw)
    damaged = (out / file).read_bytes() if how != "gone" else None
    place = f"{scene.state}: {file} ({how})"
    status = scene.launch(scene.config, out, log, contextlib.nullcontext)
    said = log.read_text()
    refused = status == 2
    if refused:
        if "Traceback" in said or not _names(said.strip().splitlines()[-1], file):
            raise Missed(f"{place}: refused without its name:\n{said[-3000:]}")
        follow(said, out)
        status = scene.launch(scene.config, out, log, contextlib.nullcontext)
    if status != 0:
        raise Missed(f"{place}: ended with {status}:\n{log.read_text()[-3000:]}")
    found = outcome(out)
    wrong = differences(scene.whole, found)
    if (kind_of(file) == "column shard" and not (out / file).exists()) or _is_damaged(out / file):
        # What nothing reads any more stays lost until it is asked for.
        wrong = [name for name in wrong if name in found or not name.startswith("columns/")]
    if how == "gone" and _is_spare(file):
        wrong = [name for name in wrong if name != file.as_posix()]
    if wrong:
        raise Missed(f"{place}: the result differs in {', '.join(wrong[:5])}:\n{said[-3000:]}")
    if refused:
        return "refused"
    if any(_names(line, file) for line in said.splitlines() if _tells(line)):
        if (out / file).exists() and (out / file).read_bytes() == damaged:
            raise Missed(f"{place}: named, and left as it is:\n{said[-3000:]}")
        return "computed again"
    if not may_be_silent(file, how, out) and not _is_older(scene.kept / file):
        raise Missed(f"{place}: not named:\n{said[-3000:]}")
    return "not read"


def _tells(line: str) -> bool:
    return any(word in line for word in ("is damaged", "is not as it was written", "is gone"))


def _names(line: str, file: Path) -> bool:
    """Whether a line names the file, or the folder that is used as a whole or not at all."""
    sealed = [p.as_posix() for p in file.parents if p.name.startswith(("checkpoint-", "member-"))]
    named = [file.as_posix(), *(f"{folder} is damaged ({file.name}" for folder in sealed)]
    if kind_of(file) == "seal":  # what it says of any other file may be what changed
        named += [f"{folder} is damaged" for folder in sealed]
    if kind_of(file) == "kept weights":
        named.append(file.parents[1].as_posix())
    return any(n in line for n in named)


# --- all of it --------------------------------------------------------------------------------------------------------


class Scene:
    """A run that was left somewhere, and what it comes to when nothing happens to it."""

    def __init__(self, folder: Path, state: str, launch: Launch, prompts: int, out: Path) -> None:
        kind, where = STATES[state]
        self.state, self.launch = state, launch
        self.log, self.kept = folder / "log", folder / state / "run"
        home = folder / kind
        self.config = home / "config.yaml"
        # One place for all: results name the members' folders.
        self.out = out
        if not self.config.exists():
            home.mkdir(parents=True)
            prepare(home, KINDS_OF_RUN[kind], prompts)
            self._run(0)
            shutil.move(self.out, home / "whole")
        self._copy(home / "whole", self.out)
        self.whole = outcome(self.out)
        if where is not None:
            shutil.rmtree(self.out)
            self._run(143 if where == "member" else 130, lambda: stopping(where))
        shutil.rmtree(self.kept, ignore_errors=True)
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(self.out, self.kept)
        files = [f.relative_to(self.kept) for f in sorted(self.kept.rglob("*")) if f.is_file() and f.stat().st_size]
        self.files: dict[str, list[Path]] = defaultdict(list)
        for file in files:
            self.files[kind_of(file)].append(file)

    def _run(self, expected: int, within: Any = contextlib.nullcontext) -> None:
        status = self.launch(self.config, self.out, self.log, within)
        if status != expected:
            raise SystemExit(f"{self.state}: ended with {status}:\n{self.log.read_text()[-3000:]}")

    @staticmethod
    def _copy(source: Path, to: Path) -> None:
        shutil.rmtree(to, ignore_errors=True)
        subprocess.run(["cp", "-a", str(source), str(to)], check=True)  # hard links stay links

    def fresh(self) -> None:
        self._copy(self.kept, self.out)


def flips(n: int, seed: int, folder: Path, *, launch: Launch, states=tuple(STATES), prompts=30, say=print) -> Counter:
    """Damages so many files; returns how often what came of which kind, "missed" among it."""
    draw = random.Random(seed)
    scenes = [Scene(folder, state, launch, prompts, folder / "run") for state in states]
    say("; ".join(f"{s.state}: {sum(map(len, s.files.values()))} files" for s in scenes))
    counts: Counter = Counter()
    for _ in range(n):
        scene = draw.choice(scenes)
        kind = draw.choice(sorted(scene.files))
        file, how = draw.choice(scene.files[kind]), draw.choice(["flip", "flip", "cut", "gone"])
        scene.fresh()
        try:
            counts[kind, strike(file, how, draw, scene)] += 1
        except Missed as error:
            say(f"{error}\n")
            counts[kind, "missed"] += 1
    return counts


def table(counts: Counter) -> str:
    lines = []
    for kind in sorted({k for k, _ in counts}):
        of = {
            what: counts[kind, what]
            for what in ("computed again", "refused", "not read", "missed")
            if counts[kind, what]
        }
        lines.append(f"{kind}: {sum(of.values())} damaged, " + ", ".join(f"{n} {what}" for what, n in of.items()))
    total = Counter[str]()
    for (_, what), n in counts.items():
        total[what] += n
    found = total["computed again"] + total["refused"]
    lines.append(f"{total.total()} damaged, {found} found, {total['not read']} not read, {total['missed']} missed")
    return "\n".join(lines)


def main() -> int:
    options = asked(__doc__, "damages", 200)
    with tempfile.TemporaryDirectory() as folder:
        counts = flips(
            options.damages, options.seed, Path(folder), launch=forked, say=lambda text: print(text, flush=True)
        )
    print(table(counts))
    return int(any(what == "missed" for _, what in counts))


if __name__ == "__main__":
    sys.exit(main())
