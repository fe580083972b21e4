"""`python -m benchmarks`: every row's two sides in turn, in the precision that is faster on this machine for each."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch

from benchmarks.growth import growth
from benchmarks.rows import ROWS, Sizes, flops_once
from benchmarks.shapes import SIZES, config_of, device
from benchmarks.table import markdown, picture, reached
from benchmarks.trials import PRECISIONS, Trial, at_all_work, by_speed, groups_of, trials
from benchmarks.worker import Fallen, serve, worker
from prefdistill.models.precision import choose_precision
from prefdistill.report.canvas import svg_of

FOLDER = Path(__file__).parent
GROWTH = "growth"  # the tables under the rows'
RATE_ROWS, RATE_SECONDS = 2048, 1.5
# What tells CPUs of one name apart: the best products that they have.
PRODUCTS = (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--rows",
        help="only rows whose name holds one of these texts, a|b; others stay as they were. "
        f"Rows: {'; '.join([row.name for row in ROWS])}; {GROWTH}",
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument(
        "--warmup", type=int, default=3, help="steps before those; the first wait for the kernel's memory"
    )
    parser.add_argument("--model", default="135m", help=", ".join(SIZES))
    parser.add_argument("--prompt-tokens", type=int, default=360)
    parser.add_argument("--response-tokens", type=int, default=42)
    parser.add_argument("--batch-prompts", type=int, default=4)
    parser.add_argument("--precision", choices=PRECISIONS, help="try this one alone")
    parser.add_argument("--output", type=Path, default=FOLDER, help="where results.json and RESULTS.md go")
    parser.add_argument("--worker", nargs=3, metavar=("ROW", "SIDE", "PRECISION"), help=argparse.SUPPRESS)
    parser.add_argument("--trial", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model not in SIZES:
        parser.error(f"--model {options.model}: must be one of {', '.join(SIZES)}")

    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.ERROR)
    datasets.disable_progress_bars()
    sizes = Sizes(options.model, options.prompt_tokens, options.response_tokens, options.batch_prompts)
    if options.worker:
        serve(*options.worker, sizes, trial=options.trial)
        return 0
    order = [row.name for row in ROWS]
    names = asked_of([*order, GROWTH], options.rows)
    conditions = {"machine": _machine(), "versions": _versions(), "sizes": vars(sizes)}
    works = {row.name: row.work for row in ROWS}
    results = earlier_of(options.output, conditions, works, whole=len(names) > len(order))
    results["rate"] = max(results.get("rate", 0.0), _rate(sizes.model))
    for row in ROWS:
        if row.name in names:
            found = _measure(row, sizes, options)
            kept = [r for r in results["rows"] if r["name"] != row.name]
            results["rows"] = sorted([*kept, found], key=lambda r: order.index(r["name"]))
            # Again: other work on the machine can halve it for minutes.
            results["rate"] = max(results["rate"], _rate(sizes.model))
            for one in results["rows"]:
                if "flops" in one:
                    one["utilisation"] = one["flops"] / one["ours"] / results["rate"]
            print(_line(found), flush=True)
            _write(options.output, results)
    if GROWTH in names:
        precision = choose_precision(options.precision or "auto", config_of(sizes.model), device())
        results["growth"] = growth(sizes, precision)
        _write(options.output, results)
    return 0


def asked_of(names: list[str], texts: str | None) -> set[str]:
    """The names that hold one of the texts, a|b; all of them where none is given.

    Raises:
        SystemExit: no name holds a text.
    """
    if texts is None:
        return set(names)
    found: set[str] = set()
    for text in texts.split("|"):
        held = {name for name in names if text in name}
        if not held:
            raise SystemExit(f"--rows: no row's name holds {text!r}; rows are {'; '.join(names)}")
        found |= held
    return found


def earlier_of(folder: Path, conditions: dict[str, Any], works: dict[str, str], *, whole: bool) -> dict[str, Any]:
    """What an earlier call has measured under the same conditions, to which rows are added; nothing otherwise.

    A row whose work was another one then (`works` by its name) is left out, which is said.

    Args:
        whole: whether all rows are asked for, so that those of other conditions may go.

    Raises:
        SystemExit: some rows are asked for, and those there are of another machine, other versions or other sizes.
    """
    file = folder / "results.json"
    empty: dict[str, Any] = {"rows": [], "growth": None, **conditions}
    if not file.exists():
        return empty
    earlier: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    other = [f"{name} {earlier.get(name)}" for name, value in conditions.items() if earlier.get(name) != value]
    if other and not whole:
        raise SystemExit(f"{file} holds rows of {'; '.join(other)}: give another folder by --output, or remove it")
    if other:
        print(f"{file}: its rows are of {'; '.join(other)}; they are replaced", flush=True)
        return empty
    same = [r for r in earlier["rows"] if works.get(r["name"]) == r["work"]]
    for row in earlier["rows"]:
        if row not in same:
            print(f"{row['name']}: measured before as {row['work']!r}, which is another work now; left out", flush=True)
    return {**earlier, "rows": same}


def _write(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    remarks = remarks_of(folder, results)
    (folder / "RESULTS.md").write_text(markdown(results, picture="results.svg", remarks=remarks), encoding="utf-8")
    drawn = picture(results["rows"])
    if drawn is not None:
        (folder / "results.svg").write_text(svg_of(drawn), encoding="utf-8")


def remarks_of(folder: Path, results: dict[str, Any]) -> str:
    """shortfalls.md, written by hand after looking at a table, if its first line names this machine and these sizes."""
    file = folder / "shortfalls.md"
    if not file.exists():
        return ""
    machine = results["machine"]
    what = ", ".join([machine["gpu"] or machine["cpu"], *map(str, results["sizes"].values())])
    first, _, rest = file.read_text(encoding="utf-8").partition("\n")
    return rest.lstrip() if first == f"<!-- {what} -->" else ""


def _measure(row: Any, sizes: Any, options: Any) -> dict[str, Any]:
    """Tries sides alone, then lets ours and the fastest peers take turns; of these the faster one counts."""
    tried = {side: trials(row, side, sizes, options.precision) for side in row.sides}
    fastest = {side: min(found, key=lambda p: found[p]) for side, found in tried.items()}
    peers = {s: (p, tried[s][p]) for s, p in fastest.items() if s != "ours"}
    again = at_all_work(row, peers, sizes, also=row.memory_of)
    took = {side: trial.seconds for side, trial in again.items()}
    for group in groups_of(by_speed(peers, took), took):
        try:
            taken = _in_turn(row, {side: fastest[side] for side in ("ours", *group)}, sizes, options)
            break
        except Fallen:
            print(f"{row.name}: {' and '.join(group)} do not fit into memory beside ours", flush=True)
    else:
        raise SystemExit(f"{row.name}: no peer fits into memory beside ours; give a smaller --batch-prompts")
    seconds = {side: (sum if row.steps else statistics.median)(of.seconds) for side, of in taken.items()}
    peer = min(group, key=lambda side: seconds[side])
    mine, theirs, ours, other = taken["ours"], taken[peer], seconds["ours"], seconds[peer]
    if row.drawn:  # random weights end responses before they are full
        samples = sum(len(p.responses) for p in row.prompts(sizes))
        sizes = replace(sizes, response_tokens=round(statistics.mean(mine.returned) / samples))
    prompts = row.prompts(sizes)
    batch = prompts if row.whole else prompts[: sizes.batch_prompts]
    times = row.passes * (row.steps or 1)
    return {
        "name": row.name,
        "work": row.work,
        "peer_is": f"{row.peer} ({peer})" if len(row.sides) > 2 else row.peer,
        "ours": ours,
        "peer": other,
        "ratio": ours / other if row.at_most else other / ours,
        "target": row.target,
        "at_most": row.at_most,
        "precision": {"ours": fastest["ours"], "peer": fastest[peer]},
        "seconds": {side: of.seconds for side, of in taken.items()},
        "trials": {side: _finite(of) for side, of in tried.items()},
        "trials_of_all_work": _finite(took),
        "losses_differ_by": _most_apart(mine, [taken[side] for side in group]) if row.equal else None,
        "memory": memory_of(mine.peak, peer, theirs.peak, {s: again[s] for s in row.memory_of}),
        "memory_target": row.memory_target,
        "flops": times * flops_once(batch, sizes.model, training=row.training, head=row.head),
        "commit": _commit(),
    }


def memory_of(ours: float, peer: str, held: float, named: Mapping[str, Trial]) -> dict[str, Any]:
    """Peak gigabytes of both sides; a target counts against the faster one of the peer's variants that it names.

    Args:
        peer: the fastest of all variants, whose steps are compared with ours; `held` is its peak.
        named: trials of those that the target names; the peer itself counts where there is none, or none fits.
    """
    fits = {side: trial for side, trial in named.items() if trial.peak is not None}
    against = min(fits, key=lambda side: fits[side].seconds, default=peer)
    peak = fits[against].peak if against in fits else held
    assert peak is not None
    return {"ours": ours, "peer": held, "against": against, "against_peak": peak, "ratio": peak / ours}


def _finite(seconds: dict[str, float]) -> dict[str, float | None]:
    """As JSON has numbers: none where memory fell short."""
    return {of: took if math.isfinite(took) else None for of, took in seconds.items()}


@dataclass
class _Taken:
    """What a side's steps took and returned, all of these, and the most gigabytes that it held."""

    seconds: list[float] = field(default_factory=list)
    returned: list[float] = field(default_factory=list)
    peak: float = 0.0


def _most_apart(mine: _Taken, others: list[_Taken]) -> float:
    """How far a step's losses are from each other at most, relative to the larger one."""
    pairs = [pair for other in others for pair in zip(mine.returned, other.returned, strict=True)]
    return max(abs(one - other) / max(abs(one), abs(other), 1e-30) for one, other in pairs)


def _in_turn(row: Any, sides: dict[str, str], sizes: Any, options: Any) -> dict[str, _Taken]:
    """Sides, each in its precision, one step after the other, so that what else the machine does falls on all alike."""
    warmup, steps = (0, row.steps) if row.steps else (options.warmup, options.steps)
    with contextlib.ExitStack() as stack:
        started = {s: stack.enter_context(worker(row.name, s, p, sizes)) for s, p in sides.items()}
        found = {name: _Taken() for name in started}
        for number in range(warmup + steps):
            for name, side in started.items():
                took = side.step()
                found[name].seconds += [took] if number >= warmup else []
                found[name].returned.append(side.returned)
                found[name].peak = side.peak
        return found


def _rate(model: str) -> float:
    """The best matrix product of this machine now, on the model's own shape and a step's tokens, FLOP/s."""
    hidden, inner = SIZES[model]["hidden_size"], SIZES[model]["intermediate_size"]
    best = math.inf
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(RATE_ROWS, hidden, dtype=dtype, device=device())
        w = torch.randn(inner, hidden, dtype=dtype, device=device())
        began = time.perf_counter()
        while time.perf_counter() - began < RATE_SECONDS:
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            if device().type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    return 2 * RATE_ROWS * hidden * inner / best


def _line(row: dict[str, Any]) -> str:
    held = row["memory"]
    memory = f", memory {held['ratio']:.2f}x less than of {held['against']}" if row["memory_target"] else ""
    losses = "" if row["losses_differ_by"] is None else f"; losses differ by {row['losses_differ_by']:.0e} at most"
    return (
        f"{row['name']}: ours {row['ours']:.2f} s ({row['precision']['ours']}), {row['peer_is']} {row['peer']:.2f} s "
        f"({row['precision']['peer']}): {row['ratio']:.2f}x, target {'at most ' if row['at_most'] else ''}"
        f"{row['target']:g} {'reached' if reached(row) else 'MISSED'}{memory}; utilisation {row['utilisation']:.0%}"
        f"{losses}"
    )


def _machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        said = cpuinfo.read_text()
        models = [line for line in said.splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
        flags = set(said.split())
        name += next((f" with {told}" for flag, told in PRODUCTS if flag in flags), "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def _commit() -> str | None:
    """The state of the code that was measured, where git knows it."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or None


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("prefdistill", "torch", "transformers", "trl", "accelerate")}


if __name__ == "__main__":
    sys.exit(main())
