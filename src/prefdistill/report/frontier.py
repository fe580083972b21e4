"""The picture of a sweep: advantage against KL, a dot a point, and each method's frontier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from prefdistill.report.canvas import INK, Palette, Point, add_legend, drawn, error_bar, is_number, label_of, new_figure


@dataclass(frozen=True)
class Dot:
    """A point of a sweep: of which method, at which KL and advantage, whether it is on its method's frontier."""

    method: str
    kl: float
    advantage: Point
    frontier: bool
    chosen: bool


@drawn
def frontier_picture(dots: Sequence[Dot], palette: Palette) -> Figure | None:
    """Up is better, left is cheaper: a method whose line runs above another's gives more for every nat.

    Full dots are the chosen ones; a line joins what no other dot of its method beats.
    """
    dots = [dot for dot in dots if is_number(dot.kl) and is_number(dot.advantage[0])]
    if not dots:
        return None
    figure, axes = new_figure(4.2)
    axes.axhline(0.0, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    for method in dict.fromkeys(dot.method for dot in dots):
        own = sorted((dot for dot in dots if dot.method == method), key=lambda dot: dot.kl)
        colour, best = palette.colour(method), [dot for dot in own if dot.frontier]
        axes.plot(
            [dot.kl for dot in best],
            [dot.advantage[0] for dot in best],
            color=colour,
            marker=palette.marker(method),
            markersize=0,
            linewidth=1.8,
            zorder=2,
        )
        for dot in own:
            axes.errorbar(
                [dot.kl],
                [dot.advantage[0]],
                yerr=error_bar(dot.advantage),
                fmt=palette.marker(method),
                color=colour,
                markersize=9 if dot.chosen else 6.5,
                markerfacecolor=colour if dot.chosen else "white",
                markeredgewidth=1.5,
                elinewidth=0.9,
                zorder=4 if dot.chosen else 3,
            )
        axes.plot([], [], color=colour, marker=palette.marker(method), linewidth=1.8, label=label_of(method))
    axes.set_xlabel("KL(policy ‖ reference), nats a response")
    axes.set_ylabel("advantage over the reference")
    axes.margins(0.08)
    add_legend(figure, axes)
    return figure
