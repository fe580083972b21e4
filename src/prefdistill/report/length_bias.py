"""The page of the length-bias sweep, from the table of `prefdistill.experiments.length_bias`; nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefdistill.report import pictures
from prefdistill.report.canvas import Palette
from prefdistill.report.html import estimate, number, p_value, percent, render


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
        xlabel="ρ: share of labels for the longer response",
        ylabel="advantage over the reference",
        mark=(table["natural_rate"], "as labelled"),
    )


def sweep_markdown(table: Mapping[str, Any], *, version: str, command: str, picture: str) -> str:
    """The sweep's table and picture as Markdown, for a page of documentation; `picture` is the SVG's name."""

    def row(*cells: Any) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    several = len(table["seeds"]) > 1
    head = ["ρ", "method", "advantage [95%]", "less DPO's", "p (Holm)", "win rate [95%]", "KL", "tokens", "chosen"]
    head += ["by seed"] if several else []
    seeds, members = ", ".join(map(str, table["seeds"])), ", ".join(f"{r:g}" for r in table["member_rhos"])
    natural = percent(table["natural_rate"])
    out = [
        f"Made by `{command}`, prefdistill {version}, seeds {seeds}: {table['pairs']} pairs of each D_ρ, "
        f"{table['prompts']} unbiased test prompts; as labelled, {natural} of the pairs prefer the longer response; "
        f"reward models of ρ {members}.",
        "",
        f"![advantage by ρ]({picture})",
        "",
        row(*head),
        row(*["---"] * len(head)),
    ]
    for r in table["rows"]:
        against = r["against_dpo"]
        cells = [
            f"{r['rho']:g}",
            r["method"],
            estimate(r["advantage"]),
            number(against["mean"], 2, True) if against else "",
            p_value(against.get("p_holm")) if against else "",
            estimate(r["win_rate"], as_percent=True, signed=False),
            number(r["kl_policy_ref"]),
            number(r["length_mean"], 1),
            number(r["chosen_logp_change"], 2, True),
        ]
        cells += [", ".join(number(v, 2, True) for v in r["by_seed"])] if several else []
        out.append(row(*cells))
    out += ["", row("method", "least advantage over ρ", "mean", "longest less shortest, tokens"), row(*["---"] * 4)]
    for method, o in table["over_rho"].items():
        least, mean = (number(o[key], 2, True) for key in ("least_advantage", "mean_advantage"))
        out.append(row(method, least, mean, number(o["length_range"], 1)))
    out += ["", row("reward model of ρ", "accuracy", "log-loss", "correlation with length"), row(*["---"] * 4)]
    for rho, m in table["members"].items():
        figures = percent(m.get("accuracy")), number(m.get("log_loss"), 3), number(m.get("length_correlation"), 2, True)
        out.append(row(rho, *figures))
    return "\n".join(out) + "\n"


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
    return render("length_bias.html.jinja", context)
