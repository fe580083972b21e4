"""Draws docs/chosen_logps.svg, the README's picture, from a run's histories.

python scripts/draw_chosen_logps.py runs/quickstart docs/chosen_logps.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prefdistill.atomic import write_text
from prefdistill.report import pictures


def main(root: Path, target: Path) -> None:
    histories = {p.parent.name: json.loads(p.read_text()) for p in sorted(root.glob("policy/*/history.json"))}
    palette = pictures.Palette(histories)
    curves = [
        (m, [h["step"] for h in rows], [h.get("logps/chosen_change") for h in rows]) for m, rows in histories.items()
    ]
    uri = pictures.lines(curves, palette, ylabel="change of the chosen\nlog-prob, nats")
    if uri is None:
        sys.exit(f"{root}/policy holds no history with chosen log-probs")
    write_text(target, pictures.svg_of(uri))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
