"""What every picture of a report shares: colours and markers, how text is made safe, and an SVG as a data URI out.

A method has one colour and one marker in every picture (`Palette`). Pictures are drawn 4.4 inches wide, so that their
letters can still be read at the width of a telephone.

Figures are made without pyplot, so no global list of figures grows and no display is asked for. Text is drawn as
outlines: a picture needs no font, and what a user wrote is never markup in it.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Callable, Iterable
from functools import wraps
from numbers import Real
from typing import Any, ParamSpec, TypeGuard

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, FAINT, GRID = "#1f2328", "#6e7681", "#e3e6ea"

# Okabe and Ito's colours and, for what has no place there, Paul Tol's muted ones: told apart with any colour vision.
_KNOWN = {
    "reference": ("#6e7681", "s"),
    "dpo": ("#d55e00", "o"),
    "ipo": ("#e69f00", "^"),
    "p-dpo": ("#cc79a7", "v"),
    "d-dpo": ("#56b4e9", "D"),
    "dp-dpo": ("#0072b2", "P"),
    "e-dpo": ("#009e73", "o"),
    "hull-dpo": ("#882255", "X"),
}
_SPARE = (("#332288", "<"), ("#999933", ">"), ("#44aa99", "p"), ("#aa4499", "h"), ("#661100", "d"), ("#117733", "*"))

_MARKERS = "osD^v<>pPXhd*"

_STYLE: dict[str, Any] = {
    "text.usetex": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.unicode_minus": True,
    "axes.formatter.use_mathtext": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "prefdistill",
    "path.simplify": True,
}

_Args = ParamSpec("_Args")
Point = tuple[float, float | None, float | None]  # mean, low, high


def is_number(value: object) -> TypeGuard[float]:
    """A finite real number, numpy's included; True and False are not numbers."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


class Palette:
    """One colour and one marker a method: fixed for known names, spare ones in order of name for the others.

    What a sweep calls `e-dpo,beta=0.2` has the colour of e-dpo and a marker of its own.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._all = dict(_KNOWN)
        others = sorted(set(names) - _KNOWN.keys())
        families = [name.split(",")[0] for name in others]
        spare = iter(itertools.cycle(_SPARE))
        for i, (name, family) in enumerate(zip(others, families, strict=True)):
            if family in _KNOWN:
                self._all[name] = (_KNOWN[family][0], _MARKERS[families[:i].count(family) % len(_MARKERS)])
            else:
                self._all[name] = next(spare)

    def colour(self, name: str) -> str:
        return self._all[name][0] if name in self._all else FAINT

    def marker(self, name: str) -> str:
        return self._all[name][1] if name in self._all else "o"


def svg_of(uri: str) -> str:
    """The SVG inside a picture's data URI, for a file of its own."""
    return base64.b64decode(uri.split(",", 1)[1]).decode("utf-8")


def label_of(text: Any, longest: int = 26) -> str:
    """Text that matplotlib takes literally: no mathematics between dollar signs, no line breaks, not too long."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))
    line = line if len(line) <= longest else line[: longest - 1] + "…"
    line = line.replace("$", r"\$")
    return " " + line if line.startswith("_") else line  # legends leave out what begins with an underscore


def drawn(function: Callable[_Args, Figure | None]) -> Callable[_Args, str | None]:
    """Run a drawing function under our own settings, whatever the user's matplotlibrc says; its figure as a URI."""

    @wraps(function)
    def wrapper(*args: _Args.args, **kwargs: _Args.kwargs) -> str | None:
        with matplotlib.rc_context(_STYLE):
            figure = function(*args, **kwargs)
            if figure is None:
                return None
            buffer = io.BytesIO()
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
        return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

    return wrapper


def new_figure(height: float, *, width: float = 4.4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.tick_params(labelcolor=INK, length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
        axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure, axes


def add_legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = max(1, min(4, len(handles), 60 // (6 + max(map(len, labels)))))
    style = {"frameon": False, "fontsize": 9, "handlelength": 1.7, "columnspacing": 1.3, "handletextpad": 0.6}
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **style)


def error_bar(point: Point) -> tuple[list[float], list[float]] | None:
    """Lengths of the arms of an error bar, [below], [above]; never negative, whatever the interval says."""
    mean, low, high = point
    if low is None or high is None:
        return None
    return [max(mean - low, 0.0)], [max(high - mean, 0.0)]
