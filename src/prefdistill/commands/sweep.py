"""`prefdistill sweep`: hyper-parameters and checkpoints chosen on validation prompts, the chosen ones tested."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from prefdistill.atomic import write_json, write_text
from prefdistill.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="prefdistill sweep",
        allow_abbrev=False,
        description="Trains variants of each method, compares them on the validation prompts, and evaluates the best "
        "of each method on the test prompts. Every option of `prefdistill run` is an option here too; with "
        "--distill.checkpoints N the judge chooses among N checkpoints of every variant.",
    )
    made.add_argument(
        "--grid", action="append", default=[], metavar="OPTION=A,B", help="values of an option of the distill section"
    )
    made.add_argument("--points", type=Path, help="a YAML list of points, e.g. - {method: e-dpo, beta: 0.2}")
    made.add_argument(
        "--range", action="append", default=[], metavar="OPTION=LOW:HIGH", help="what --trials searches (optuna)"
    )
    made.add_argument("--trials", type=int, help="how many points of each method to search")
    return made


def main(argv: list[str]) -> int:
    options, rest = parser().parse_known_args(argv)

    from prefdistill.cli import parse, quiet
    from prefdistill.experiments.search import corners, optuna_search
    from prefdistill.experiments.sweep import check_space, grid, points_of, run_sweep
    from prefdistill.report.sweep import write_sweep

    axes = [_grid(text) for text in options.grid]
    spans = [_range(text) for text in options.range]
    names = [name for name, _ in [*axes, *spans]]
    check_space(names)
    if len(set(names)) < len(names):
        raise ConfigError("an option stands in --grid or --range twice; give all its values at once")
    choices, ranges = dict(axes), dict(spans)
    if options.points and (choices or ranges or options.trials):
        raise ConfigError("--points is a list of its own; give it without --grid, --range and --trials")
    if bool(ranges) != (options.trials is not None):
        raise ConfigError("--range and --trials belong together: what to search, and how many points")
    if options.trials is not None and options.trials < 1:
        raise ConfigError(f"--trials is {options.trials}; it must be at least 1")
    config = parse("run", rest)
    search = None
    if options.points:
        points = points_of(_listed(options.points), str(options.points), config)
    elif options.trials:
        points = corners(config, ranges, choices)
        search = optuna_search(config, ranges, choices, trials=options.trials)
    else:
        points = grid(config, choices)
    quiet()
    table = run_sweep(config, points, search)
    root = Path(config.output_dir)
    write_json(root / "sweep.json", table)
    command = " ".join(["prefdistill sweep", *argv])
    write_text(root / "sweep.html", write_sweep(table, version=version("prefdistill"), command=command))
    _print(table)
    print(f"page: {root / 'sweep.html'}", file=sys.stderr)
    return 0


def _split(text: str, flag: str, example: str) -> tuple[str, str]:
    name, equals, values = text.partition("=")
    if not equals or not name or not values:
        raise ConfigError(f"{flag} {text!r}: write it like {flag} {example}")
    return name.removeprefix("distill.").replace("-", "_"), values


def _grid(text: str) -> tuple[str, Sequence[Any]]:
    name, values = _split(text, "--grid", "beta=0.05,0.1")
    found: list[Any] = [_value(part) for part in values.split(",")]
    if name == "members":
        found = [_members(part) for part in values.split(",")]
    if len(set(map(str, found))) < len(found):
        raise ConfigError(f"--grid {text!r} names a value twice")
    return name, found


def _range(text: str) -> tuple[str, tuple[float, float]]:
    name, values = _split(text, "--range", "beta=0.02:0.5")
    low, colon, high = values.partition(":")
    try:
        ends = float(low), float(high)
    except ValueError as error:
        raise ConfigError(f"--range {text!r}: write it like --range beta=0.02:0.5") from error
    if not colon or not -math.inf < ends[0] < ends[1] < math.inf:
        raise ConfigError(f"--range {text!r}: the low end must lie below the high one, both finite")
    return name, ends


_NAMED = {"true": True, "false": False, "null": None}


def _value(text: str) -> Any:
    """A number where it is one (YAML takes 4e-4 for a text), true, false or null."""
    if text.strip() in _NAMED:
        return _NAMED[text.strip()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()


def _members(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split("+")]
    except ValueError as error:
        raise ConfigError(f"--grid members: {text!r} is no list such as 0+1") from error


def _listed(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--points {path} cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--points {path} is no YAML: {str(error).splitlines()[0]}") from error


def _print(table: Any) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from prefdistill.report.html import estimate, number

    out = Table(title=f"{table['prompts']} validation prompts", box=SIMPLE)
    for column in ("point", "advantage [95%]", "KL", "tokens", "step", ""):
        out.add_column(column, justify="left" if column in ("point", "") else "right", no_wrap=True)
    for r in table["runs"]:
        mark = "chosen" if r["chosen"] else "frontier" if r["frontier"] else ""
        step = "last" if r["checkpoint"] is None else str(r["checkpoint"])
        kl, tokens = number(r["kl_policy_ref"]["mean"]), number(r["length_mean"], 1)
        out.add_row(Text(r["name"]), estimate(r["advantage"]), kl, tokens, step, mark)
    console = Console()
    console.print(out)
    test = table["test"]
    out = Table(title=f"the chosen ones, {test['prompts']} test prompts", box=SIMPLE)
    for column in ("point", "advantage [95%]", "win rate [95%]", "KL"):
        out.add_column(column, justify="left" if column == "point" else "right", no_wrap=True)
    for name, m in test["methods"].items():
        wins = estimate(m["win_rate"], as_percent=True, signed=False)
        out.add_row(Text(name), estimate(m["advantage"]), wins, number(m["kl_policy_ref"]["mean"]))
    console.print(out)
    console.print(test["verdict"], markup=False)
