"""`prefdistill experiment NAME`: the paper's experiments, every method beside the others."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from prefdistill.atomic import write_json, write_text
from prefdistill.errors import ConfigError

if TYPE_CHECKING:
    from prefdistill.experiments.comparison import Rho

AS_LABELLED = "as-labelled"


@dataclass(frozen=True)
class Experiment:
    """What an experiment trains unless told otherwise; its options are the YAML of its name in `embedded/`."""

    does: str
    rhos: tuple[Rho, ...]
    quick_rhos: tuple[Rho, ...]
    member_rhos: tuple[Rho, ...] | None = None


EXPERIMENTS = {
    "length-bias": Experiment(
        "labels that prefer one length too often", rhos=(0.2, 0.4, 0.5, 0.6, 0.8), quick_rhos=(0.2, 0.8)
    ),
    "helpfulness": Experiment(
        "Anthropic HH, win rates over the starting policy by a judge",
        rhos=(None,),
        quick_rhos=(None,),
        # As the paper's S: models of differently biased resamples beside that of all pairs.
        member_rhos=(0.2, 0.4, 0.6, 0.8),
    ),
}
QUICK_METHODS = ("dpo", "d-dpo", "e-dpo", "hull-dpo")
QUICK_PROMPTS = {"max_train_prompts": 80, "max_test_prompts": 60}


def parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:<12} {e.does}" for name, e in EXPERIMENTS.items())
    made = argparse.ArgumentParser(
        prog="prefdistill experiment",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains every method, on pairs resampled so that a fraction rho prefers the longer response or as\n"
        "they are labelled, and evaluates on unbiased prompts:\n\n"
        f"{names}\n\nEvery option of `prefdistill run` is an option here too.",
    )
    made.add_argument("name", choices=list(EXPERIMENTS))
    made.add_argument("--rhos", type=_rhos, help=f"fractions, e.g. 0.2,0.5,0.8; {AS_LABELLED} for all pairs")
    made.add_argument("--member-rhos", type=_rhos, help="further rho whose reward models join the ensemble")
    made.add_argument("--methods", type=_names, help="e.g. dpo,d-dpo,e-dpo; dpo must be among them")
    made.add_argument("--seeds", type=_whole, help="e.g. 0,1,2; the option seed alone where not given")
    made.add_argument("--quick", action="store_true", help="the ends of rho, four methods, fewer prompts")
    return made


def main(argv: list[str]) -> int:
    options, rest = parser().parse_known_args(argv)

    from prefdistill.cli import parse, quiet
    from prefdistill.experiments.comparison import METHODS, Comparison, run_comparison
    from prefdistill.report.canvas import svg_of
    from prefdistill.report.comparison import main_picture, table_markdown, write_comparison

    name = options.name
    experiment = EXPERIMENTS[name]
    if not rest or rest[0].startswith("-"):
        rest = [str(files("prefdistill.embedded").joinpath(f"{name}.yaml")), *rest]
    config = parse("run", rest)
    if options.quick:
        for bounded, bound in QUICK_PROMPTS.items():
            setattr(config.dataset, bounded, min(bound, getattr(config.dataset, bounded) or bound))
    job = Comparison(
        config,
        options.rhos or (experiment.quick_rhos if options.quick else experiment.rhos),
        options.methods or (QUICK_METHODS if options.quick else METHODS),
        options.seeds or (config.seed,),
        options.member_rhos or experiment.member_rhos,
    )
    quiet()
    table = run_comparison(job)
    root = Path(config.output_dir)
    write_json(root / f"{name}.json", table)
    made = {"version": version("prefdistill"), "command": " ".join(["prefdistill experiment", *argv])}
    write_text(root / f"{name}.html", write_comparison(table, name=name, **made))
    write_text(root / f"{name}.md", table_markdown(table, picture=f"{name}.svg", **made))
    drawn = main_picture(table)
    if drawn is not None:
        write_text(root / f"{name}.svg", svg_of(drawn))
    print(f"page: {root / f'{name}.html'}", file=sys.stderr)
    return 0


def _rhos(text: str) -> tuple[Rho, ...]:
    try:
        return tuple(None if part.strip() == AS_LABELLED else float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{text!r} is no list of numbers such as 0.2,0.8, or {AS_LABELLED}") from error


def _whole(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ConfigError(f"--seeds is {text!r}; give whole numbers such as 0,1,2")
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.strip("[]").split(",") if part.strip())
