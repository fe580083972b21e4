"""The page of one of the paper's experiments, from the table of `prefdistill.experiments.comparison`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefdistill.report import pictures
from prefdistill.report.canvas import Palette
from prefdistill.report.html import estimate, number, p_value, percent, render


def rho_name(rho: float | None) -> str:
    return "as labelled" if rho is None else f"{rho:g}"


def main_picture(table: Mapping[str, Any]) -> str | None:
    """Advantage with its interval against rho, a line a method; of one rho, win rates. As a data URI."""
    palette = Palette(table["methods"])
    if len(table["rhos"]) == 1:
        return pictures.intervals(
            [(r["method"], (r["win_rate"]["mean"], *r["win_rate"]["ci95"])) for r in table["rows"]],
            palette,
            xlabel="win rate over the starting policy, ties half",
            zero=0.5,
            percent=True,
        )
    curves = [
        (
            method,
            [(_place(table, r), (r["advantage"]["mean"], *r["advantage"]["ci95"])) for r in _by_place(table, method)],
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


def _place(table: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """Where a row stands on the axis of rho: the pairs as labelled have a rate too."""
    return float(table["natural_rate"] if row["rho"] is None else row["rho"])


def _by_place(table: Mapping[str, Any], method: str) -> list[Mapping[str, Any]]:
    return sorted((r for r in table["rows"] if r["method"] == method), key=lambda r: _place(table, r))


def setting(table: Mapping[str, Any]) -> str:
    """What was trained and judged, in a sentence."""
    pairs = ""
    if table["pairs"] is not None:
        pairs = f" Every D_ρ has {table['pairs']} pairs, a fraction ρ of which prefers the longer response."
    judge = table["judge"][0].lower() + table["judge"][1:]
    return (
        f"Judged on {table['prompts']} unbiased test prompts by {judge}. As labelled, "
        f"{percent(table['natural_rate'])} of the training pairs prefer the longer response.{pairs} Reward models of ρ "
        f"{', '.join(rho_name(rho) for rho in table['member_rhos'])}."
    )


def table_markdown(table: Mapping[str, Any], *, version: str, command: str, picture: str) -> str:
    """The table and picture as Markdown, for a page of documentation; `picture` is the SVG's name."""

    def row(*cells: Any) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    several = len(table["seeds"]) > 1
    head = ["ρ", "method", "advantage [95%]", "less DPO's", "p (Holm)", "win rate [95%]", "KL", "tokens", "chosen"]
    head += ["by seed"] if several else []
    out = [
        f"Made by `{command}`, prefdistill {version}, seeds {', '.join(map(str, table['seeds']))}. {setting(table)}",
        "",
        f"![the methods beside each other]({picture})",
        "",
        row(*head),
        row(*["---"] * len(head)),
    ]
    for r in table["rows"]:
        against = r["against_dpo"]
        cells = [
            rho_name(r["rho"]),
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
    if len(table["rhos"]) > 1:
        out += ["", row("method", "least advantage over ρ", "mean", "longest less shortest, tokens"), row(*["---"] * 4)]
        for method, o in table["over_rho"].items():
            least, mean = (number(o[key], 2, True) for key in ("least_advantage", "mean_advantage"))
            out.append(row(method, least, mean, number(o["length_range"], 1)))
    out += ["", row("reward model of ρ", "accuracy", "log-loss", "correlation with length"), row(*["---"] * 4)]
    for m in table["members"]:
        figures = percent(m.get("accuracy")), number(m.get("log_loss"), 3), number(m.get("length_correlation"), 2, True)
        out.append(row(rho_name(m["rho"]), *figures))
    return "\n".join(out) + "\n"


def write_comparison(table: Mapping[str, Any], *, name: str, version: str, command: str) -> str:
    """The HTML of the experiment's page; the caller writes the file, as UTF-8."""
    palette = Palette(table["methods"])

    def over_rho(figure: str, label: str) -> str | None:
        curves = []
        for method in table["methods"]:
            rows = _by_place(table, method)
            curves.append((method, [_place(table, r) for r in rows], [r[figure] for r in rows]))
        return pictures.lines(curves, palette, ylabel=label, xlabel="ρ")

    context = {
        "run": {"title": f"prefdistill: {name}", "version": version},
        "command": command,
        "table": table,
        "setting": setting(table),
        "rho_name": rho_name,
        "several": len(table["rhos"]) > 1,
        "colour": lambda method: palette.colour(str(method)),
        "pictures": {
            "main": main_picture(table),
            "length": over_rho("length_mean", "tokens a response"),
            "chosen": over_rho("chosen_logp_change", "log π(chosen) since the start, nats"),
        },
    }
    return render("comparison.html.jinja", context)
