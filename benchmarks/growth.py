"""How cost grows: with the number of pairs, with the length of prompts, and memory with the tokens of a step."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.worker import worker

PAIRS = (100, 1_000, 10_000)
PROMPTS = (128, 512, 2_048)
BATCHES = (1, 2, 4, 8)
ROW = "policy step, unique prompts"


def by_pairs(counts: Sequence[int] = PAIRS) -> list[dict[str, float]]:
    """Reference log-probs of so many pairs, each with a prompt of its own, on a tiny model: what is not arithmetic."""
    from benchmarks.shapes import policy_of, prompts_of
    from prefdistill.scoring import Column, fill_columns, logps_forward

    found = []
    for n in counts:
        trees = [p.tree for p in prompts_of("unique", n, size="tiny", prompt_tokens=60, response_tokens=20)]
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            fill_columns(
                {"logps": Column(Path(folder), "growth")},
                trees,
                lambda: policy_of("tiny"),
                logps_forward,
                token_budget=8192,
                precision="float32",
            )
            took = time.perf_counter() - start
        found.append({"pairs": n, "seconds": took, "pairs_a_second": n / took})
    return found


def by_step(sizes: Any, precision: str, *, prompts: Sequence[int] = (), batches: Sequence[int] = ()) -> list[Any]:
    """Our policy step at prompts of these lengths, or with so many prompts: seconds and peak memory."""
    found = []
    for size in [replace(sizes, prompt_tokens=n) for n in prompts] + [replace(sizes, batch_prompts=n) for n in batches]:
        with worker(ROW, "ours", precision, size) as alone:
            seconds = [alone.step() for _ in range(4)][1:]
        took = statistics.median(seconds)
        found.append(
            {
                "prompt_tokens": size.prompt_tokens,
                "batch_prompts": size.batch_prompts,
                "tokens": size.batch_prompts * (size.prompt_tokens + 2 * size.response_tokens),
                "seconds": took,
                "pairs_a_second": size.batch_prompts / took,
                "peak": alone.peak,
            }
        )
    return found


def growth(sizes: Any, precision: str) -> dict[str, Any]:
    """Everything that `growth_lines` says."""
    return {
        "by_pairs": by_pairs(),
        "by_prompt": by_step(sizes, precision, prompts=PROMPTS),
        "by_batch": by_step(sizes, precision, batches=BATCHES),
        "precision": precision,
    }


def growth_lines(found: dict[str, Any]) -> list[str]:
    """The tables of RESULTS.md."""
    first, last = found["by_batch"][0], found["by_batch"][-1]
    a_token = (last["peak"] - first["peak"]) * 1e6 / (last["tokens"] - first["tokens"])
    out = [
        "## How cost grows",
        "",
        "Reference log-probs with a tiny model, prompts of 60 tokens, responses of 20: what is not arithmetic "
        "(collating, columns on disk) grows no faster than the pairs.",
        "",
        "| pairs | seconds | pairs a second |",
        "| --- | --- | --- |",
    ]
    out += [f"| {r['pairs']:,} | {r['seconds']:.1f} | {r['pairs_a_second']:.0f} |" for r in found["by_pairs"]]
    out += [
        "",
        f"Policy step, unique prompts, {found['precision']}: by the prompts' length, then by the prompts in a step. "
        f"Memory grows with tokens, {a_token:.0f} KB a token, not with their square; what does not grow is "
        "the weights, their gradients and AdamW's two moments.",
        "",
        "| prompt tokens | prompts a step | tokens | seconds | pairs a second | peak, GB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    out += [
        f"| {r['prompt_tokens']:,} | {r['batch_prompts']} | {r['tokens']:,} | {r['seconds']:.2f} | "
        f"{r['pairs_a_second']:.2f} | {r['peak']:.1f} |"
        for r in [*found["by_prompt"], *found["by_batch"]]
    ]
    return out
