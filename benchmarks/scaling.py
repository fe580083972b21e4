"""`python -m benchmarks.scaling`: the cost model, fitted on one shape, against two others, and what it tells of larger.

Writes benchmarks/scaling.json and docs/scaling-tables.md; docs/scaling.md says what to make of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cost import KINDS, LORA_RANK, flops, parameters, step_gigabytes
from benchmarks.shapes import prompts_of

FOLDER = Path(__file__).parent
TABLES = FOLDER.parent / "docs" / "scaling-tables.md"
CALIBRATED, CHECKED, TOLD = "135m", ("30m", "135m", "360m"), ("1b", "8b", "70b")
LENGTHS = {"prompt_tokens": 360, "response_tokens": 42}
BATCH_PROMPTS, STEPS = 4, 4
BARE = "tiny"  # a model that is nothing: what its process holds is what every process holds

# What is told of larger shapes: these pairs, on GPUs of this kind. Its rate and memory are the maker's; the share of
# the rate that a step reaches is an assumption, not a measurement.
PAIRS, MEMBERS = 50_000, 5
GPU, GPU_FLOPS, GPU_GIGABYTES, GPU_SHARE = "H100 (80 GB)", 989e12, 80, 0.4
GPU_PROMPTS = 8  # a step's on a GPU


def _prompts(size: str, n: int) -> Any:
    return prompts_of("unique", n, size=size, **LENGTHS)


# -- measured points -----------------------------------------------------------------------------------------------


def point(kind: str, size: str, precision: str) -> dict[str, float]:
    """Seconds and peak memory of a step in this process, which has done nothing else."""
    from benchmarks import policy, scoring
    from benchmarks.steps import peak_gigabytes

    prompts = _prompts(size, BATCH_PROMPTS)
    if kind == "score":
        step = scoring.ours(prompts, size=size, precision=precision)
    else:
        rank = LORA_RANK if kind == "lora" else 0
        step = policy.ours(prompts, size=size, precision=precision, batch_prompts=BATCH_PROMPTS, lora_rank=rank)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "peak": peak_gigabytes()}


def _in_a_process(kind: str, size: str, precision: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scaling", "--point", kind, size, precision]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure() -> dict[str, Any]:
    """Every kind of step on every shape that is checked, each in a process of its own."""
    from benchmarks.__main__ import _machine, _rate, _versions
    from benchmarks.shapes import config_of
    from prefdistill.models.precision import choose_precision

    precision = choose_precision("auto", config_of(CALIBRATED))
    points = []
    for kind in KINDS:
        for size in (BARE, *CHECKED):
            points.append({"kind": kind, "size": size, **_in_a_process(kind, size, precision)})
            print(points[-1], flush=True)
    return {
        "precision": precision,
        "rate": _rate(CALIBRATED),
        "points": points,
        "machine": _machine(),
        "versions": _versions(),
    }


# -- the model against them ----------------------------------------------------------------------------------------


def checked(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured and told seconds and gigabytes of every point; `calibrated` are those the model was fitted on."""
    at = {(p["kind"], p["size"]): p for p in found["points"]}
    out = []
    for kind in KINDS:
        share = share_of(found, kind)
        for size in CHECKED:
            prompts = _prompts(size, BATCH_PROMPTS)
            work = flops(kind, prompts, size)
            memory = step_gigabytes(kind, prompts, size, bfloat16=found["precision"] == "bfloat16")
            out.append(
                {
                    "kind": kind,
                    "size": size,
                    "calibrated": size == CALIBRATED,
                    "seconds": at[kind, size]["seconds"],
                    "told_seconds": work / (found["rate"] * share),
                    "gigabytes": at[kind, size]["peak"],
                    "told_gigabytes": memory + at[kind, BARE]["peak"],
                }
            )
    return out


def share_of(found: dict[str, Any], kind: str) -> float:
    """The share of the machine's matrix product that a kind of step reaches, on the shape it is fitted on."""
    took = next(p["seconds"] for p in found["points"] if p["kind"] == kind and p["size"] == CALIBRATED)
    return flops(kind, _prompts(CALIBRATED, BATCH_PROMPTS), CALIBRATED) / (took * found["rate"])


# -- what it says --------------------------------------------------------------------------------------------------


def told(size: str) -> dict[str, Any]:
    """Hours of one GPU for a run with five members, and the memory of its largest steps."""
    one = flops("score", _prompts(size, 1), size)
    hours = {kind: PAIRS * flops(kind, _prompts(size, 1), size) / one for kind in KINDS}
    scale = one / (GPU_FLOPS * GPU_SHARE) / 3600
    prompts = _prompts(size, GPU_PROMPTS)

    def gigabytes(kind: str, **options: bool) -> float:
        return step_gigabytes(kind, prompts, size, bfloat16=True, **options)

    return {
        "size": size,
        "parameters": parameters(size),
        "hours": {
            "reference": hours["score"] * scale,
            "members": MEMBERS * hours["lora"] * scale,
            "rewards": MEMBERS * hours["score"] * scale,
            "full": hours["full"] * scale,
            "lora": hours["lora"] * scale,
        },
        "gigabytes": {
            "score": gigabytes("score"),
            "full": gigabytes("full"),
            "full, twice": gigabytes("full", checkpointing=True),
            "lora": gigabytes("lora"),
            "lora, twice": gigabytes("lora", checkpointing=True),
            "nf4, twice": gigabytes("lora", nf4=True, checkpointing=True),
        },
    }


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def tables(found: dict[str, Any]) -> str:
    """docs/scaling-tables.md."""
    machine, versions = found["machine"], found["versions"]
    shares = ", ".join(f"{share_of(found, kind):.0%} ({name})" for kind, name in KINDS.items())
    out = [
        "# The cost model's tables",
        "",
        f"Made by `python -m benchmarks.scaling`: {machine['cpu']}, {machine['threads']} threads, "
        f"{found['precision']}, best matrix product {found['rate'] / 1e12:.2f} TFLOP/s; prefdistill "
        f"{versions['prefdistill']}, torch {versions['torch']}. A step is {BATCH_PROMPTS} prompts of "
        f"{LENGTHS['prompt_tokens']} tokens with two responses of {LENGTHS['response_tokens']}. Fitted on the shape "
        f"{CALIBRATED}: steps reach {shares} of that rate.",
        "",
        "## Against measured points",
        "",
        f"Seconds are checked at {' and '.join(size for size in CHECKED if size != CALIBRATED)}: those of {CALIBRATED} "
        "are the fit, and agree with themselves. Gigabytes are counted, beside what a process holds without a model.",
        "",
        _line("step", "shape", "measured, s", "told, s", "off by", "measured, GB", "told, GB", "off by"),
        _line(*["---"] * 8),
    ]
    for row in checked(found):
        off = ["fitted" if row["calibrated"] else _off(row["told_seconds"], row["seconds"])]
        out.append(
            _line(
                KINDS[row["kind"]],
                row["size"],
                f"{row['seconds']:.2f}",
                f"{row['told_seconds']:.2f}",
                *off,
                f"{row['gigabytes']:.1f}",
                f"{row['told_gigabytes']:.1f}",
                _off(row["told_gigabytes"], row["gigabytes"]),
            )
        )
    models = [told(size) for size in TOLD]
    out += [
        "",
        f"## Told: {PAIRS:,} pairs, K = {MEMBERS}, on one {GPU}",
        "",
        f"At {GPU_SHARE:.0%} of {GPU_FLOPS / 1e12:.0f} TFLOP/s, which is assumed, not measured. Hours of one GPU, an "
        "epoch of each training; sampling is not in them.",
        "",
        _line("", *(m["size"].upper() for m in models)),
        _line(*["---"] * (1 + len(models))),
    ]
    names = {
        "reference": "reference log-probs, and features for heads",
        "members": f"{MEMBERS} LoRA members trained (heads: none)",
        "rewards": f"{MEMBERS} reward columns (heads: none)",
        "full": "policy, all weights",
        "lora": "policy, LoRA",
    }
    out += [_line(f"{text}, h", *(f"{m['hours'][name]:.1f}" for m in models)) for name, text in names.items()]
    memory = {
        "score": "scoring: reference, members",
        "full": f"policy, all weights, {GPU_PROMPTS} prompts a step",
        "full, twice": "the same with gradient checkpointing",
        "lora": f"policy or member, LoRA, {GPU_PROMPTS} prompts a step",
        "lora, twice": "the same with gradient checkpointing",
        "nf4, twice": "the same with a base in four bits as well",
    }
    out += [
        _line(
            f"{text}, GB",
            *(
                f"{m['gigabytes'][name]:.0f}" + (" (does not fit)" if m["gigabytes"][name] > GPU_GIGABYTES else "")
                for m in models
            ),
        )
        for name, text in memory.items()
    ]
    return "\n".join(out) + "\n"


def _off(told_value: float, measured: float) -> str:
    return f"{told_value / measured - 1:+.0%}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--point", nargs=3, metavar=("KIND", "SIZE", "PRECISION"), help=argparse.SUPPRESS)
    parser.add_argument("--tables", action="store_true", help="only write the tables again, from scaling.json")
    options = parser.parse_args()
    if options.point:
        print(json.dumps(point(*options.point)))
        return 0
    file = FOLDER / "scaling.json"
    if not options.tables:
        file.write_text(json.dumps(measure(), indent=2) + "\n", encoding="utf-8")
    TABLES.write_text(tables(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
