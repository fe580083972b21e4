"""`prefdistill diagnose RUN`: what ails a run, each check with its number, its threshold and what to change."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from prefdistill.errors import DataError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="prefdistill diagnose",
        description="Looks for degeneracy, over-conservatism, biased and weak reward models and rewards that "
        "extrapolate, from the columns of an evaluated run: no model is loaded. Exit status 1 if something is ill.",
    )
    made.add_argument("run", type=Path, help="a run directory")
    made.add_argument("--json", action="store_true", help="print the checks as JSON")
    return made


def main(argv: list[str]) -> int:
    """Exit status: 0 nothing is ill, 1 something is."""
    options = parser().parse_args(argv)

    from prefdistill.cli import opened
    from prefdistill.stages.diagnose import diagnose

    run = opened(options.run)
    run.check_evaluated()
    summary, ensemble = (_read(run.evaluation_path, name) for name in ("summary", "ensemble"))
    checks = diagnose(run, summary["methods"], ensemble, summary["judge"])
    if options.json:
        print(json.dumps({"checks": [c.as_dict() for c in checks]}, indent=2))
    else:
        _print(checks)
    return int(any(c.state == "ill" for c in checks))


def _read(folder: Path, name: str) -> Any:
    path = folder / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; evaluate the run first: prefdistill evaluate CONFIG.yaml") from error
    except ValueError as error:
        raise DataError(f"{path} is broken ({error}); remove it and run prefdistill evaluate CONFIG.yaml") from error


def _print(checks: Any) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"healthy": "green", "watch": "yellow", "ill": "red", "unknown": "dim"}
    table = Table(box=SIMPLE)
    for column, justify in (
        ("check", "left"),
        ("of", "left"),
        ("state", "left"),
        ("number", "right"),
        ("limit", "right"),
    ):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for c in checks:
        number = "n/a" if c.value is None else f"{c.value:.3f}"
        table.add_row(c.kind, Text(c.subject), Text(c.state, colours[c.state]), number, f"{c.threshold:.3f}")
    console = Console()
    console.print(table)
    for c in checks:
        if c.state in ("ill", "watch"):
            console.print(Text.assemble((f"{c.kind}: ", f"bold {colours[c.state]}"), c.text))
            console.print(f"  measured: {c.measure}; limit {c.threshold:.3f}: {c.reason}", markup=False)
            console.print(f"  what to do: {c.what_to_do}\n", markup=False)
    ill = sum(c.state == "ill" for c in checks)
    console.print(f"{len(checks)} checks: {ill} ill" if ill else f"{len(checks)} checks: nothing is ill")
