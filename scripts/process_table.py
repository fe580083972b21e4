"""Two processes against one, measured: makes the table of docs/trust.md (`make process-table`).

What tests/test_processes.py holds against bounds is run here, and its differences are written down.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import test_processes as processes  # noqa: E402
from crash.harness import prepare  # noqa: E402
from prefdistill.atomic import write_text  # noqa: E402

PAGE = ROOT / "docs" / "trust.md"
TABLE = re.compile(r"(?<=<!-- table of scripts/process_table.py -->\n\n).*?(?=\n\n<!-- end of the table -->)", re.S)
KINDS = {"sft": "supervised start", "reward": "reward training", "distill": "distillation, e-DPO"}
HEAD = ("", "two processes by", "steps or rows", "loss or value", "gradient norm")
Row = tuple[str, str, str, float, float | None]


def off(one: Sequence[float], two: Sequence[float]) -> float:
    """The largest difference, against the mean size of what it is a difference of."""
    assert len(one) == len(two)
    return max(abs(a - b) for a, b in zip(one, two, strict=True)) / statistics.mean(map(abs, one))


def of_curves(what: str, launcher: str, one: list[dict], two: list[dict]) -> Row:
    losses, norms = ([[h.get(name) for h in curve] for curve in (one, two)] for name in ("loss", "grad_norm"))
    return what, launcher, f"{len(one)} steps", off(*losses), off(*norms) if norms[0][0] is not None else None


def trainings(folder: Path) -> list[Row]:
    one = processes.curves(folder, 1)
    found = {launcher: processes.curves(folder, 2, by) for launcher, by in processes.LAUNCHERS.items()}
    rows = [
        of_curves(what, launcher, one[kind]["curve"], two[kind]["curve"])
        for kind, what in KINDS.items()
        for launcher, two in found.items()
    ]
    by_hand = found["torchrun"]["fsdp2"]
    assert by_hand["sharded"]
    return [*rows, of_curves("FSDP2 by hand, e-DPO", "torchrun", one["fsdp2"]["curve"], by_hand["curve"])]


def scored(runs: dict[int, Path]) -> list[Row]:
    """Columns of the data's and the reference's responses: each row once, in the same order."""
    expected = sum(map(len, pq.read_table(runs[1] / "data" / "sampled.parquet")["responses"].to_pylist()))
    rows: list[Row] = []
    for column in ("reference-logps", "rewards-0", "rewards-1"):
        one, two = (processes.columns(run, column, expected) for run in runs.values())
        assert list(one) == list(two)
        assert len(one) == expected
        difference = off(list(one.values()), list(two.values()))
        rows.append((f"scoring, {column}", "torchrun", f"{expected} rows, each once, in order", difference, None))
    return rows


def sharded(run: Path, folder: Path) -> list[Row]:
    """examples/distributed.py with examples/accelerate/fsdp2.yaml, and zero3.yaml where deepspeed is installed."""
    rows = []
    for rank, what in ((0, "all weights"), (16, "an adapter")):
        copy = processes.with_rank(run, folder / f"rank-{rank}", rank)
        processes.example(1, copy, folder / f"one-{rank}")
        assert "sharded: 50%" in processes.sharded_example(copy, folder / f"two-{rank}")
        if find_spec("deepspeed"):
            processes.zero3_example(copy, folder / f"zero3-{rank}")
        one = processes.log_of(folder / f"one-{rank}")
        for kind, made in (("FSDP2 of accelerate", "two"), ("ZeRO-3 of DeepSpeed", "zero3")):
            if (folder / f"{made}-{rank}").exists():
                log = processes.log_of(folder / f"{made}-{rank}")
                rows.append(of_curves(f"{kind}, e-DPO, {what}", "accelerate launch", one, log))
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = [HEAD, ("---",) * len(HEAD)]
    for what, launcher, size, value, norm in rows:
        lines.append((what, launcher, size, _number(value), "" if norm is None else _number(norm)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        flags = processes.flags_of_run(folder, folder / "model")
        runs = {n: folder / str(n) for n in (1, 2)}
        for n, out in runs.items():
            processes.done(processes.launch(n, "run", *flags, f"--output_dir={out}"))
        made = table([*trainings(folder), *sharded(runs[1], folder), *scored(runs)])
    text, found = TABLE.subn(lambda _: made, PAGE.read_text(encoding="utf-8"))
    if found != 1:
        sys.exit(f"{PAGE} has no place for the table: put it between the two comments that name it")
    write_text(PAGE, text)
    print(made)


if __name__ == "__main__":
    main()
