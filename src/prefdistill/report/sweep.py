"""The page of the length-bias sweep, from the table of `prefdistill.experiments.length_bias`; nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefdistill.report import pictures
from prefdistill.report.html import render
from prefdistill.report.pictures import Palette


def advantage_picture(table: Mapping[str, Any]) -> str | None:
    """Advantage with its interval against rho, a line a method, as a data URI."""
    palette = Palette(table["methods"])
    curves = [
        (
            method,
            [
                (r["rho"], (r["advantage"]["mean"], *r["advantage"]["ci95"]))
                for r in table["rows"]
                if r["method"] == method
            ],
        )
        for method in table["methods"]
    ]
    return pictures.curves_with_intervals(
        curves,
        palette,
        xlabel="ρ: share of training labels that prefer the longer response",
        ylabel="advantage over the reference",
        mark=(table["natural_rate"], "as labelled"),
    )


def write_sweep(table: Mapping[str, Any], *, version: str, command: str) -> str:
    """The HTML of the sweep's page; the caller writes the file, as UTF-8."""
    palette = Palette(table["methods"])
    by_method = {m: [r for r in table["rows"] if r["method"] == m] for m in table["methods"]}
    context = {
        "run": {"title": "prefdistill: length bias", "version": version},
        "command": command,
        "table": table,
        "colour": lambda name: palette.colour(str(name)),
        "pictures": {
            "advantage": advantage_picture(table),
            "length": pictures.lines(
                [(m, [r["rho"] for r in rows], [r["length_mean"] for r in rows]) for m, rows in by_method.items()],
                palette,
                ylabel="tokens a response",
                xlabel="ρ",
            ),
            "chosen": pictures.lines(
                [
                    (m, [r["rho"] for r in rows], [r["chosen_logp_change"] for r in rows])
                    for m, rows in by_method.items()
                ],
                palette,
                ylabel="log π(chosen) since the start, nats",
                xlabel="ρ",
            ),
        },
    }
    return render("sweep.html.jinja", context)
