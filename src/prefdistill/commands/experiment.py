"""`prefdistill experiment length-bias`: the paper's sweep over how often labels prefer the longer response."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from prefdistill.atomic import write_json, write_text
from prefdistill.errors import ConfigError

DEFAULTS = "length-bias.yaml"
QUICK_RHOS, QUICK_METHODS = (0.2, 0.8), ("dpo", "d-dpo", "e-dpo", "hull-dpo")
QUICK_PROMPTS = {"max_train_prompts": 80, "max_test_prompts": 60}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prefdistill experiment",
        description="Trains every method on pairs resampled so that a fraction rho prefers the longer response, and "
        "evaluates on unbiased prompts. Every option of `prefdistill run` is an option here too.",
    )
    parser.add_argument("name", choices=["length-bias"])
    parser.add_argument("--rhos", type=_numbers, help="fractions, e.g. 0.2,0.5,0.8")
    parser.add_argument("--member-rhos", type=_numbers, help="further rho whose reward models join the ensemble")
    parser.add_argument("--methods", type=_names, help="e.g. dpo,d-dpo,e-dpo; dpo must be among them")
    parser.add_argument("--seeds", type=_whole, default=(0,), help="e.g. 0,1,2")
    parser.add_argument("--quick", action="store_true", help="two rho, four methods, fewer prompts")
    options, rest = parser.parse_known_args(argv)

    from prefdistill.cli import parse, quiet
    from prefdistill.experiments.length_bias import METHODS, RHOS, Sweep, run_sweep
    from prefdistill.report.canvas import svg_of
    from prefdistill.report.length_bias import advantage_picture, sweep_markdown, write_sweep

    if not rest or rest[0].startswith("-"):
        rest = [str(files("prefdistill.embedded").joinpath(DEFAULTS)), *rest]
    config = parse("run", rest)
    if options.quick:
        for name, bound in QUICK_PROMPTS.items():
            setattr(config.dataset, name, min(bound, getattr(config.dataset, name) or bound))
    sweep = Sweep(
        config,
        options.rhos or (QUICK_RHOS if options.quick else RHOS),
        options.methods or (QUICK_METHODS if options.quick else METHODS),
        options.seeds,
        options.member_rhos,
    )
    quiet()
    table = run_sweep(sweep)
    root = Path(config.output_dir)
    write_json(root / "length-bias.json", table)
    made = {"version": version("prefdistill"), "command": " ".join(["prefdistill experiment", *argv])}
    write_text(root / "length-bias.html", write_sweep(table, **made))
    write_text(root / "length-bias.md", sweep_markdown(table, picture="length-bias.svg", **made))
    drawn = advantage_picture(table)
    if drawn is not None:
        write_text(root / "length-bias.svg", svg_of(drawn))
    print(f"page: {root / 'length-bias.html'}", file=sys.stderr)
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{text!r} is no list of numbers such as 0.2,0.8") from error


def _whole(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ConfigError(f"--seeds is {text!r}; give whole numbers such as 0,1,2")
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.strip("[]").split(",") if part.strip())
