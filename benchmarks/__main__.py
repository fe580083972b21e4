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
import sys
import time
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.table import markdown, picture, reached
from benchmarks.worker import Fallen, serve, worker
from prefdistill.report.canvas import svg_of

FOLDER = Path(__file__).parent
PRECISIONS = ("float32", "bfloat16")
CLOSE = 1.3  # times the fastest peer's seconds in a trial of less work: the order can be another at all of it
RATE_ROWS, RATE_SECONDS = 2048, 1.5
# What tells CPUs of one name apart: the best products that they have.
PRODUCTS = (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rows", help="only rows whose name holds one of these texts, a|b; others stay as they were")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument(
        "--warmup", type=int, default=3, help="steps before those; the first wait for the kernel's memory"
    )
    parser.add_argument("--model", default="135m", help="tiny, 30m, 135m, 360m, 1b, 8b or 70b")
    parser.add_argument("--prompt-tokens", type=int, default=360)
    parser.add_argument("--response-tokens", type=int, default=42)
    parser.add_argument("--batch-prompts", type=int, default=4)
    parser.add_argument("--precision", choices=PRECISIONS, help="try this one alone")
    parser.add_argument("--output", type=Path, default=FOLDER, help="where results.json and RESULTS.md go")
    parser.add_argument("--worker", nargs=3, metavar=("ROW", "SIDE", "PRECISION"), help=argparse.SUPPRESS)
    parser.add_argument("--trial", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()

    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.ERROR)
    import datasets

    from benchmarks.rows import ROWS, Sizes
    from benchmarks.shapes import config_of

    datasets.disable_progress_bars()
    sizes = Sizes(options.model, options.prompt_tokens, options.response_tokens, options.batch_prompts)
    if options.worker:
        serve(*options.worker, sizes, trial=options.trial)
        return 0
    _rate(sizes.model)  # measured before anything else runs, and kept
    conditions = {"machine": _machine(), "versions": _versions(), "sizes": vars(sizes)}
    results = earlier_of(options.output, conditions, {row.name: row.work for row in ROWS})
    order = [row.name for row in ROWS]

    def asked(name: str) -> bool:
        return not options.rows or any(text in name for text in options.rows.split("|"))

    for row in ROWS:
        if asked(row.name):
            found = _measure(row, sizes, options)
            kept = [r for r in results["rows"] if r["name"] != row.name]
            results["rows"] = sorted([*kept, found], key=lambda r: order.index(r["name"]))
            print(_line(found), flush=True)
            _write(options.output, results)
    if asked("growth"):
        from benchmarks.growth import growth
        from prefdistill.models.precision import choose_precision

        results["growth"] = growth(sizes, choose_precision("auto", config_of(sizes.model)))
        _write(options.output, results)
    return 0


def earlier_of(folder: Path, conditions: dict[str, Any], works: dict[str, str]) -> dict[str, Any]:
    """What an earlier call has measured under the same conditions, to which rows are added; nothing otherwise.

    A row whose work was another one then (`works` by its name) is left out, which is said.
    """
    file = folder / "results.json"
    empty: dict[str, Any] = {"rows": [], "growth": None, **conditions}
    if not file.exists():
        return empty
    earlier: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if any(earlier.get(name) != value for name, value in conditions.items()):
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
    """Tries a row's sides, then lets ours and the fastest peer take their steps in turn."""
    from benchmarks.rows import flops_once

    trials = {side: _trials(row, side, sizes, options.precision) for side in row.sides}
    fastest = {side: min(found, key=lambda p: found[p]) for side, found in trials.items()}
    for peer in _by_speed(row, {s: (p, trials[s][p]) for s, p in fastest.items() if s != "ours"}, sizes):
        try:
            seconds, memory = _in_turn(row, {"ours": fastest["ours"], peer: fastest[peer]}, sizes, options)
            break
        except Fallen:
            print(f"{row.name}: {peer} does not fit into memory beside ours", flush=True)
    else:
        raise SystemExit(f"{row.name}: no peer fits into memory beside ours; give a smaller --batch-prompts")
    ours, theirs = ((sum if row.steps else statistics.median)(seconds[name]) for name in ("ours", peer))
    prompts = row.prompts(sizes)
    batch = prompts if row.whole else prompts[: sizes.batch_prompts]
    times = row.passes * (row.steps or 1)
    pairs = sum(len(p.pairs) for p in batch) * (row.steps or 1)
    return {
        "name": row.name,
        "work": row.work,
        "peer_is": f"{row.peer} ({peer})" if len(row.sides) > 2 else row.peer,
        "ours": ours,
        "peer": theirs,
        "ratio": ours / theirs if row.at_most else theirs / ours,
        "target": row.target,
        "at_most": row.at_most,
        "precision": {"ours": fastest["ours"], "peer": fastest[peer]},
        "pairs_a_second": {"ours": pairs / ours, "peer": pairs / theirs},
        "seconds": seconds,
        "trials": {s: {p: t if math.isfinite(t) else None for p, t in of.items()} for s, of in trials.items()},
        "memory": {"ours": memory["ours"], "peer": memory[peer], "ratio": memory[peer] / memory["ours"]},
        "memory_target": row.memory_target,
        "utilisation": times
        * flops_once(batch, sizes.model, training=row.training, head=row.head)
        / ours
        / _rate(sizes.model),
    }


def _in_turn(
    row: Any, sides: dict[str, str], sizes: Any, options: Any
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of the steps of sides, each in its precision, one after the other; and what each held at most.

    In turn, so that what else the machine does falls on all alike.
    """
    warmup, steps = (0, row.steps) if row.steps else (options.warmup, options.steps)
    with contextlib.ExitStack() as stack:
        started = {s: stack.enter_context(worker(row.name, s, p, sizes)) for s, p in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in started}
        for number in range(warmup + steps):
            for name, side in started.items():
                took = side.step()
                if number >= warmup:
                    seconds[name].append(took)
        return seconds, {name: side.peak for name, side in started.items()}


def _trials(row: Any, side: str, sizes: Any, precision: str | None) -> dict[str, float]:
    """Seconds of a side's step of less work in each precision, or in this one, alone on the machine.

    Infinite where memory falls short.
    """
    from benchmarks.rows import TRIAL_SHARE

    if not row.whole:
        sizes = replace(sizes, batch_prompts=max(1, sizes.batch_prompts // TRIAL_SHARE))
    found = {}
    for tried in PRECISIONS if precision is None else (precision,):
        found[tried] = _trial(row, side, tried, sizes, less=True)
    return found


def _trial(row: Any, side: str, precision: str, sizes: Any, *, less: bool) -> float:
    from benchmarks.rows import TRIAL_STEPS

    try:
        with worker(row.name, side, precision, sizes, trial=less) as alone:
            alone.step()
            # The least of some: other work on the machine is not to choose between a peer's settings.
            return min(alone.step() for _ in range(1 if row.whole else TRIAL_STEPS))
    except Fallen:
        return math.inf


def _by_speed(row: Any, tried: dict[str, tuple[str, float]], sizes: Any) -> list[str]:
    """A row's peers, the fastest first, from their precisions and the seconds of their trials.

    Those that less work hardly tells apart are tried at all of it: with gradient checkpointing TRL's step is the faster
    one of the two for one prompt and the slower one for four.
    """
    least = min(took for _, took in tried.values())
    close = [s for s, (_, took) in tried.items() if took <= CLOSE * least]
    if row.whole or len(close) < 2:
        return sorted(tried, key=lambda s: tried[s][1])
    again = {s: _trial(row, s, tried[s][0], sizes, less=False) for s in close}
    return sorted(tried, key=lambda s: (s not in again, again.get(s, tried[s][1])))


@lru_cache(maxsize=1)
def _rate(model: str) -> float:
    """The best matrix product of this machine on the model's own shape and a step's tokens, FLOP/s."""
    import torch

    from benchmarks.shapes import SIZES

    hidden, inner = SIZES[model]["hidden_size"], SIZES[model]["intermediate_size"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    best = math.inf
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(RATE_ROWS, hidden, dtype=dtype, device=device)
        w = torch.randn(inner, hidden, dtype=dtype, device=device)
        began = time.perf_counter()
        while time.perf_counter() - began < RATE_SECONDS:
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    return 2 * RATE_ROWS * hidden * inner / best


def _line(row: dict[str, Any]) -> str:
    memory = f", memory {row['memory']['ratio']:.2f}x less" if row["memory_target"] else ""
    return (
        f"{row['name']}: ours {row['ours']:.2f} s ({row['precision']['ours']}), {row['peer_is']} {row['peer']:.2f} s "
        f"({row['precision']['peer']}): {row['ratio']:.2f}x, target {'at most ' if row['at_most'] else ''}"
        f"{row['target']:g} {'reached' if reached(row) else 'MISSED'}{memory}; utilisation {row['utilisation']:.0%}"
    )


def _machine() -> dict[str, Any]:
    import torch

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


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("prefdistill", "torch", "transformers", "trl", "accelerate")}


if __name__ == "__main__":
    sys.exit(main())
