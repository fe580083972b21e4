"""`python -m benchmarks`: every row's two sides in turn, in the precision that is faster on this machine for each."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.table import markdown, picture, reached
from prefdistill.report.canvas import svg_of

FOLDER = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rows", help="only rows whose name holds this text")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--model", default="135m", help="135m or tiny")
    parser.add_argument("--prompt-tokens", type=int, default=360)
    parser.add_argument("--response-tokens", type=int, default=42)
    parser.add_argument("--batch-prompts", type=int, default=4)
    parser.add_argument("--output", type=Path, default=FOLDER, help="where results.json and RESULTS.md go")
    parser.add_argument("--memory-of", nargs=3, metavar=("ROW", "SIDE", "PRECISION"), help=argparse.SUPPRESS)
    options = parser.parse_args()

    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.ERROR)
    import datasets

    from benchmarks.rows import ROWS, Sizes
    from benchmarks.steps import peak_gigabytes

    datasets.disable_progress_bars()
    sizes = Sizes(options.model, options.prompt_tokens, options.response_tokens, options.batch_prompts)
    if options.memory_of:
        name, side, precision = options.memory_of
        row = next(r for r in ROWS if r.name == name)
        step = row.sides[side](row.prompts(sizes, 1), sizes, precision)
        step()
        step()
        print(json.dumps({"peak": peak_gigabytes()}))
        return 0
    found = []
    for row in ROWS:
        if not options.rows or options.rows in row.name:
            found.append(_measure(row, sizes, options))
            print(_line(found[-1]), flush=True)
    results = {"rows": found, "machine": _machine(), "versions": _versions(), "sizes": vars(sizes)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.output / "RESULTS.md").write_text(markdown(results, picture="results.svg"), encoding="utf-8")
    drawn = picture(found)
    if drawn is not None:
        (options.output / "results.svg").write_text(svg_of(drawn), encoding="utf-8")
    return 0


def _measure(row: Any, sizes: Any, options: Any) -> dict[str, Any]:
    """A row's sides, each in both precisions for a step, then in the faster one in turn with the others."""
    from benchmarks.rows import flops_once
    from benchmarks.steps import take_turns

    prompts = row.prompts(sizes)
    candidates = {}
    for side, make in row.sides.items():
        # A trial step of each precision decides; only the faster is kept in memory.
        trials = {}
        for precision in ("float32", "bfloat16"):
            step = make(prompts, sizes, precision)
            step()
            start = time.perf_counter()
            step()
            trials[precision] = time.perf_counter() - start
            del step
        candidates[side] = min(trials, key=lambda p: trials[p])
    peers = [side for side in row.sides if side != "ours"]
    steps = {side: row.sides[side](prompts, sizes, precision) for side, precision in candidates.items()}
    times = take_turns(steps, steps=options.steps, warmup=options.warmup)
    del steps
    best = min(peers, key=lambda side: times[side].median)
    batch = prompts if row.whole else prompts[: sizes.batch_prompts]
    pairs = sum(len(p.pairs) for p in batch)
    ours, peer = times["ours"].median, times[best].median
    memory = (
        {side: _peak(row.name, side, candidates[side], sizes) for side in ("ours", best)} if row.memory_target else {}
    )
    return {
        "name": row.name,
        "work": row.work,
        "peer_is": f"{row.peer} ({best})" if len(peers) > 1 else row.peer,
        "ours": ours,
        "peer": peer,
        "ratio": ours / peer if row.at_most else peer / ours,
        "target": row.target,
        "at_most": row.at_most,
        "precision": {"ours": candidates["ours"], "peer": candidates[best]},
        "pairs_a_second": {"ours": pairs / ours, "peer": pairs / peer},
        "seconds": {side: list(t.seconds) for side, t in times.items()},
        "memory": memory and {"ours": memory["ours"], "peer": memory[best], "ratio": memory[best] / memory["ours"]},
        "memory_target": row.memory_target,
        "utilisation": flops_once(batch, sizes.model, training=row.training, head=row.head) / ours / _rate(sizes.model),
    }


def _peak(row: str, side: str, precision: str, sizes: Any) -> float:
    """Peak memory in a process of its own."""
    shape = ["--model", sizes.model, "--prompt-tokens", str(sizes.prompt_tokens)]
    shape += ["--response-tokens", str(sizes.response_tokens), "--batch-prompts", str(sizes.batch_prompts)]
    command = [sys.executable, "-m", "benchmarks", *shape, "--memory-of", row, side, precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=FOLDER.parent)
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


def _rate(model: str) -> float:
    """The best matrix product of this machine on the model's own shape, FLOP/s."""
    from benchmarks.shapes import SIZES
    from prefdistill.models.precision import _rates

    return max(_rates(SIZES[model]["hidden_size"], SIZES[model]["intermediate_size"]).values())


def _line(row: dict[str, Any]) -> str:
    memory = f", memory {row['memory']['ratio']:.2f}x less" if row["memory"] else ""
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
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("prefdistill", "torch", "transformers", "trl", "accelerate")}


if __name__ == "__main__":
    sys.exit(main())
