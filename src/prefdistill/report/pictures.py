"""Pictures of a run: numbers in, an SVG as a data URI out.

Every function takes plain numbers and draws them; none computes a statistic. What is not a finite number is left out;
a function with nothing left to draw returns None.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.colors
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from prefdistill.report.canvas import (
    FAINT,
    INK,
    Palette,
    Point,
    add_legend,
    drawn,
    error_bar,
    is_number,
    label_of,
    new_figure,
)


@drawn
def intervals(
    rows: Sequence[tuple[str, Point]],
    palette: Palette,
    *,
    xlabel: str,
    zero: float,
    percent: bool = False,
    second: Mapping[str, Point] | None = None,
    legend: tuple[str, str] | None = None,
) -> Figure | None:
    """Means as dots with their intervals, a row each, and a dashed line at `zero`, where nothing is gained or lost.

    `second` gives a row a hollow dot below its first; `legend` names the full and the hollow dots.
    """
    rows = [(name, point) for name, point in rows if is_number(point[0])]
    if not rows:
        return None
    second = {name: point for name, point in (second or {}).items() if is_number(point[0])}
    shift = 0.16 if second else 0.0
    figure, axes = new_figure(0.95 + (0.46 if second else 0.38) * len(rows) + (0.25 if second and legend else 0.0))
    axes.axvline(zero, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    for row, (name, point) in enumerate(rows):
        style: dict[str, Any] = {"color": palette.colour(name), "fmt": palette.marker(name), "elinewidth": 2.2}
        axes.errorbar([point[0]], [row - shift], xerr=error_bar(point), markersize=7.5, zorder=3, **style)
        if name in second:
            style = {**style, "elinewidth": 1.2, "markerfacecolor": "white", "markeredgewidth": 1.5}
            axes.errorbar(
                [second[name][0]], [row + shift], xerr=error_bar(second[name]), markersize=6.5, zorder=3, **style
            )
    axes.set_yticks(range(len(rows)), [label_of(name) for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.margins(x=0.08)
    axes.set_xlabel(xlabel)
    if percent:
        left, right = axes.get_xlim()
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if right - left > 0.06 else 1))
    if second and legend:
        for text, fill in zip(legend, (FAINT, "white"), strict=True):
            axes.plot([], [], "o", color=FAINT, markerfacecolor=fill, markeredgewidth=1.5, label=text)
        add_legend(figure, axes)
    return figure


@drawn
def reward_and_kl(points: Sequence[tuple[str, Point, Point]], palette: Palette) -> Figure | None:
    """Advantage (up) against KL(policy || reference) (right), bars both ways: up and to the left is better."""
    points = [point for point in points if is_number(point[1][0]) and is_number(point[2][0])]
    if not points:
        return None
    figure, axes = new_figure(3.9)
    axes.axhline(0.0, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    for name, kl, advantage in points:
        axes.errorbar(
            [kl[0]],
            [advantage[0]],
            xerr=error_bar(kl),
            yerr=error_bar(advantage),
            fmt=palette.marker(name),
            color=palette.colour(name),
            markersize=8,
            markeredgecolor="white",
            markeredgewidth=0.8,
            elinewidth=1.4,
            label=label_of(name),
            zorder=3,
        )
    axes.set_xlabel("KL(policy ‖ reference), nats a response")
    axes.set_ylabel("advantage over the reference")
    axes.margins(0.08)
    add_legend(figure, axes)
    return figure


@drawn
def lines(
    curves: Sequence[tuple[str, Sequence[Any], Sequence[Any]]],
    palette: Palette,
    *,
    ylabel: str,
    xlabel: str = "training step",
    logarithmic: bool = False,
    lowest: float | None = None,
) -> Figure | None:
    """One line a method, over training steps or `xlabel`, with a dashed line at 0.

    Pairs with a number missing are left out. Values below `lowest` leave the picture, with an arrow's head where they
    do: a line that falls without end would flatten the others.
    """
    kept = []
    for name, steps, values in curves:
        pairs = [(x, y) for x, y in zip(steps, values, strict=False) if is_number(x) and is_number(y)]
        if pairs:
            kept.append((name, pairs))
    if not kept:
        return None
    figure, axes = new_figure(3.5)
    axes.axhline(0.0, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    for name, pairs in kept:
        axes.plot(
            *zip(*pairs, strict=True),
            color=palette.colour(name),
            marker=palette.marker(name),
            markevery=max(1, len(pairs) // 6),
            markersize=5,
            linewidth=1.8,
            label=label_of(name),
            zorder=3,
        )
        if lowest is not None and min(y for _, y in pairs) < lowest:
            left = next(x for x, y in pairs if y < lowest)
            axes.plot([left], [lowest], "v", color=palette.colour(name), markersize=9, clip_on=False, zorder=4)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if logarithmic:
        axes.set_xscale("log")
        marks = sorted({x for _, pairs in kept for x, _ in pairs})
        if len(marks) <= 8:
            axes.set_xticks(marks, [f"{x:g}" for x in marks])
            axes.xaxis.set_minor_locator(NullLocator())
    else:
        whole = all(float(x).is_integer() for _, pairs in kept for x, _ in pairs)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole, steps=[1, 2, 5, 10]))
    if lowest is not None:
        axes.set_ylim(bottom=max(lowest, axes.get_ylim()[0]))
    axes.margins(x=0.03)
    add_legend(figure, axes)
    return figure


@drawn
def curves_with_intervals(
    curves: Sequence[tuple[str, Sequence[tuple[float, Point]]]],
    palette: Palette,
    *,
    xlabel: str,
    ylabel: str,
    mark: tuple[float, str] | None = None,
) -> Figure | None:
    """One line a method through its means with their intervals, shifted a little so that none hides another.

    `mark` is a place on the x axis with its name.
    """
    kept = [(name, [(x, p) for x, p in points if is_number(x) and is_number(p[0])]) for name, points in curves]
    kept = [(name, points) for name, points in kept if points]
    if not kept:
        return None
    places = sorted({x for _, points in kept for x, _ in points})
    gap = min((b - a for a, b in itertools.pairwise(places)), default=1.0)
    width = min(0.6 * gap, 0.2 * (places[-1] - places[0]) or 1.0)
    figure, axes = new_figure(4.2)
    axes.axhline(0.0, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    if mark is not None and is_number(mark[0]):
        axes.axvline(mark[0], color=FAINT, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
        axes.annotate(
            label_of(mark[1]), (mark[0], 1.0), xycoords=("data", "axes fraction"), xytext=(4, -10),
            textcoords="offset points", color=FAINT, fontsize=9,
        )  # fmt: skip
    for i, (name, points) in enumerate(kept):
        shift = width * ((i + 0.5) / len(kept) - 0.5)
        arms = [error_bar(p) or ([0.0], [0.0]) for _, p in points]
        axes.errorbar(
            [x + shift for x, _ in points],
            [p[0] for _, p in points],
            yerr=[[low[0] for low, _ in arms], [high[0] for _, high in arms]],
            color=palette.colour(name),
            marker=palette.marker(name),
            markersize=5.5,
            linewidth=1.6,
            elinewidth=1.1,
            label=label_of(name),
            zorder=3,
        )
    axes.set_xticks(places, [f"{x:g}" for x in places])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    add_legend(figure, axes)
    return figure


@drawn
def calibration(
    curves: Sequence[tuple[str, Sequence[Any], Sequence[Any]]], *, mean: tuple[str, Sequence[Any], Sequence[Any]] | None
) -> Figure | None:
    """Observed against predicted, a thin line a member and a thick one for their mean; the diagonal is calibrated."""
    every = [(*curve, False) for curve in curves] + ([(*mean, True)] if mean else [])
    figure, axes = new_figure(4.1)
    everything: list[float] = []
    count = len(curves)
    for position, (name, predicted, observed, thick) in enumerate(every):
        pairs = [(x, y) for x, y in zip(predicted, observed, strict=False) if is_number(x) and is_number(y)]
        if not pairs:
            continue
        everything += [number for pair in pairs for number in pair]
        colour = INK if thick else matplotlib.colormaps["viridis"](0.05 + 0.75 * position / max(1, count - 1))
        shown = thick or count <= 8
        axes.plot(
            *zip(*pairs, strict=True),
            color=colour,
            marker="o" if thick else "os^Dv<>p"[position % 8],
            markersize=6 if thick else 4.5,
            linewidth=2.4 if thick else 1.2,
            alpha=1.0 if thick else 0.85,
            clip_on=False,
            label=label_of(name) if shown else "_nolegend_",
            zorder=4 if thick else 3,
        )
    if not everything:
        return None
    low, high = max(0.0, min(everything) - 0.03), min(1.0, max(everything) + 0.03)
    axes.plot([low, high], [low, high], color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.06 else 1))
    axes.set_xlabel("how sure the model is of the response it prefers")
    axes.set_ylabel("how often it is right")
    add_legend(figure, axes)
    return figure


@drawn
def histogram(values: Sequence[Any], *, xlabel: str, ylabel: str = "pairs") -> Figure | None:
    """How many values fall where."""
    kept = [float(value) for value in values if is_number(value)]
    if not kept:
        return None
    figure, axes = new_figure(3.2)
    axes.hist(kept, bins=min(30, max(5, round(math.sqrt(len(kept))))), color=FAINT, edgecolor="white", linewidth=0.8)
    axes.grid(False, axis="x")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure


@drawn
def correlations(matrix: Sequence[Sequence[Any]], names: Sequence[str]) -> Figure | None:
    """Correlation of every member with every other: blue is alike, orange is opposed, white has nothing in common."""
    size = len(matrix)
    cells = [[float(cell) if is_number(cell) else math.nan for cell in row] for row in matrix]
    if size == 0 or any(len(row) != size for row in cells):
        return None
    figure, axes = new_figure(min(1.6 + 0.5 * size, 6.0))
    axes.grid(False)
    colours = matplotlib.colors.LinearSegmentedColormap.from_list("alike", ["#d55e00", "#ffffff", "#0072b2"])
    centres = range(size)  # a mesh and not an image, which an SVG would hold as a raster
    axes.pcolormesh(
        centres, centres, cells, cmap=colours.with_extremes(bad="#f1f2f4"), vmin=-1, vmax=1, edgecolors="white"
    )
    axes.invert_yaxis()
    if size <= 10:
        for row, line in enumerate(cells):
            for column, cell in enumerate(line):
                text = "n/a" if math.isnan(cell) else f"{cell:.2f}".replace("-", "−")
                ink = "white" if abs(cell) > 0.65 else INK
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=9 if size <= 6 else 7.5)
    labels = [label_of(name, 14) for name in names[:size]] + [str(i) for i in range(len(names), size)]
    axes.set_yticks(range(size), labels)
    axes.set_xticks(range(size), labels, rotation=30 if size > 3 else 0, ha="right" if size > 3 else "center")
    return figure
