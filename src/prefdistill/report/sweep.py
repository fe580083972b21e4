"""The page of `prefdistill sweep`, from the table of `prefdistill.experiments.sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefdistill.report.canvas import Palette
from prefdistill.report.frontier import Dot, frontier_picture
from prefdistill.report.html import render


def write_sweep(table: Mapping[str, Any], *, version: str, command: str) -> str:
    """The HTML of the sweep's page; the caller writes the file, as UTF-8."""
    palette = Palette([*(r["method"] for r in table["runs"]), *table["test"]["methods"]])
    dots = [
        Dot(
            r["method"],
            r["kl_policy_ref"]["mean"],
            (r["advantage"]["mean"], *r["advantage"]["ci95"]),
            r["frontier_of_method"],
            r["chosen"],
        )
        for r in table["runs"]
    ]
    context = {
        "run": {"title": "prefdistill: sweep", "version": version},
        "command": command,
        "table": table,
        "runs": sorted(table["runs"], key=lambda r: -r["advantage"]["mean"]),
        "colour": lambda name: palette.colour(str(name)),
        "pictures": {"frontier": frontier_picture(dots, palette)},
    }
    return render("sweep.html.jinja", context)
