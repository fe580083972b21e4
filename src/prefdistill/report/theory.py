"""The theory lab's page: the numbers of `prefdistill.theory.lab`, laid out; nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefdistill.report import pictures
from prefdistill.report.canvas import Palette
from prefdistill.report.html import render

LOWEST = -12.0  # nats; DPO's path falls without end and would flatten the others


def write_theory(numbers: Mapping[str, Any], *, version: str, command: str) -> str:
    """The HTML of the lab's page; the caller writes the file, as UTF-8."""
    paths = numbers["paths"]
    palette = Palette(paths)
    support, few = numbers["shrinking_support"], numbers["few_samples"]
    context = {
        "run": {"title": "prefdistill: the theory, exactly", "version": version},
        "command": command,
        "numbers": numbers,
        "colour": lambda name: palette.colour(str(name)),
        "pictures": {
            "chosen": pictures.lines(
                [(m, p["step"][1:], p["chosen"][1:]) for m, p in paths.items()],
                palette,
                ylabel="log π(chosen) since the start, nats",
                logarithmic=True,
                lowest=LOWEST,
            ),
            "unseen": pictures.lines(
                [(m, p["step"][1:], p["kl"][1:]) for m, p in paths.items()],
                palette,
                ylabel="KL(reference ‖ policy), nats",
                logarithmic=True,
            ),
            "support": pictures.lines(
                [
                    ("d-dpo", [s["covered"] for s in support], [s["total_variation"] for s in support]),
                    ("reference", [s["covered"] for s in support], [s["reference_total_variation"] for s in support]),
                ],
                palette,
                ylabel="total variation from RLHF's optimum",
                xlabel="share of responses that are in a pair",
            ),
            "few": pictures.lines(
                [
                    ("as estimated", [f["samples"] for f in few], [f["value"] for f in few]),
                    ("of the policy found", [f["samples"] for f in few], [f["worst_case"] for f in few]),
                    ("exact", [f["samples"] for f in few], [f["exact_value"] for f in few]),
                ],
                Palette(["as estimated", "of the policy found", "exact"]),
                ylabel="worst-case advantage",
                xlabel="samples of the reference a prompt",
                logarithmic=True,
            ),
        },
    }
    return render("theory.html.jinja", context)
