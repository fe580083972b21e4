"""Hyper-parameters as the paper chooses them: on a validation split, with the test prompts out of sight until the end.

All points are variants in one run directory, so that data, reference log-probs, reward models and scores are made
once. Each is evaluated on the validation prompts; the best of each method, and no other, is then evaluated on the test
prompts.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from prefdistill import pipeline
from prefdistill.atomic import read_json
from prefdistill.config import RunConfig
from prefdistill.errors import ConfigError
from prefdistill.options import DistillOptions
from prefdistill.training.methods import method_named, reads

VERSION = 1
LONGEST_NAME = 100


@dataclass(frozen=True)
class Point:
    """A method with options of the `distill` section put in."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its variant, e.g. `e-dpo,beta=0.2`; a method without options of its own is itself."""
        return ",".join([self.method, *(f"{key}={_short(value)}" for key, value in self.options.items())])


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}"
    return "+".join(map(_short, value)) if isinstance(value, list) else str(value)


def grid(config: RunConfig, space: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination for every method, without the options that a method does not read: each training once."""
    out: dict[str, Point] = {}
    for method in config.methods:
        of = config.distill.method_of(method)
        axes = {name: values for name, values in space.items() if reads(of, name)}
        if method_named(of).hull and "pessimism" in axes:
            # hull-dpo takes any other word for hull.
            axes["pessimism"] = [v for v in axes["pessimism"] if str(v).startswith("hull")] or ["hull"]
        for combination in itertools.product(*axes.values()):
            point = Point(method, dict(zip(axes, combination, strict=True)))
            out.setdefault(point.name, point)
    return list(out.values())


def check_space(names: Iterable[str]) -> None:
    """Raises ConfigError for a name that is no option of the `distill` section, or none that can vary by point."""
    known = {f.name for f in fields(DistillOptions)} - {"per_method", "training_arguments"}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"a sweep cannot vary {name!r}; it varies options of the distill section: {', '.join(sorted(known))}"
            )


def with_points(config: RunConfig, points: Sequence[Point], *, reference_samples: int | None, split: str) -> RunConfig:
    """The run of these points on a split; a method's own options in per_method stay below the point's."""
    out = copy.deepcopy(config)
    own = config.distill.per_method
    for point in points:
        if point.options:
            out.distill.per_method[point.name] = {
                **own.get(point.method, {}),
                **point.options,
                "method": config.distill.method_of(point.method),
            }
    out.methods = [point.name for point in points]
    out.evaluate.split = split
    # As many for all points: what a reference stage is made of must not hang on which points are run together.
    out.sample.reference_per_prompt = out.reference_samples if reference_samples is None else reference_samples
    return out


Searcher = Callable[[Callable[[Sequence[Point]], list[float]]], list[Point]]


def run_sweep(config: RunConfig, points: Sequence[Point], search: Searcher | None = None) -> dict[str, Any]:
    """Trains and evaluates what is missing of the points, and returns the table of `collect`.

    Args:
        points: of a grid or a list; with `search`, its corners, which say how many samples of the reference are needed.
        search: proposes points one after the other, given a function from points (one a method, trained in one run) to
            their validation advantages; returns all that it tried.
    """
    for point in points:
        if len(point.name) > LONGEST_NAME:
            raise ConfigError(f"the point {point.name} has too long a name for a folder; vary fewer options at once")
    if not points:
        raise ConfigError("a sweep without points; give --grid, --points or --range with --trials")
    root = Path(config.output_dir)
    samples = with_points(config, points, reference_samples=None, split="validation").reference_samples
    with_points(config, points, reference_samples=samples, split="test").check()

    def evaluate(tried: Sequence[Point]) -> list[float]:
        run = with_points(config, tried, reference_samples=samples, split="validation")
        methods = read_json(pipeline.run(run) / "validation" / "summary.json")["methods"]
        return [methods[point.name]["advantage"]["mean"] for point in tried]

    if search is not None:
        points = list({point.name: point for point in search(evaluate)}.values())
    evaluate(points)
    best = chosen_of(points, read_json(root / "validation" / "summary.json")["methods"])
    pipeline.run(with_points(config, best, reference_samples=samples, split="test"))
    return collect(root, points, best)


def chosen_of(points: Sequence[Point], methods: Mapping[str, Mapping[str, Any]]) -> list[Point]:
    """The point of each method with the largest validation advantage; ties go to the one nearer to the reference."""
    best: dict[str, Point] = {}
    for point in points:
        if point.method not in best or _rank(methods[point.name]) > _rank(methods[best[point.method].name]):
            best[point.method] = point
    return list(best.values())


def _rank(figures: Mapping[str, Any]) -> tuple[float, float]:
    return figures["advantage"]["mean"], -figures["kl_policy_ref"]["mean"]


def frontier(places: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (KL, advantage) no other place beats: none has more advantage at no more KL."""
    return [
        not any(k <= kl and a >= advantage and (k, a) != (kl, advantage) for k, a in places) for kl, advantage in places
    ]


# -- the table ---------------------------------------------------------------------------------------------------------

_FIGURES = ("advantage", "win_rate", "kl_policy_ref", "length_mean", "chosen_logp_change", "truncated")


def collect(root: Path, points: Sequence[Point], best: Sequence[Point]) -> dict[str, Any]:
    """The sweep's figures, as plain JSON values: a row a point on validation prompts, and the chosen ones' test."""
    validation, test = (read_json(root / name / "summary.json") for name in ("validation", "evaluation"))
    figures = [validation["methods"][point.name] for point in points]
    undominated = _frontier_of(figures)
    of_method: dict[str, bool] = {}
    for method in dict.fromkeys(point.method for point in points):
        own = [point.name for point in points if point.method == method]
        of_method |= zip(own, _frontier_of([validation["methods"][name] for name in own]), strict=True)
    chosen = {point.name for point in best}
    runs = []
    for point, of_point, on_frontier in zip(points, figures, undominated, strict=True):
        path = root / "policy" / point.name / "checkpoints.json"
        runs.append(
            {
                "name": point.name,
                "method": point.method,
                "options": dict(point.options),
                **{name: of_point[name] for name in _FIGURES},
                "checkpoint": read_json(path)["chosen"] if path.exists() else None,
                "frontier": on_frontier,
                "frontier_of_method": of_method[point.name],
                "chosen": point.name in chosen,
            }
        )
    return {
        "version": VERSION,
        "prompts": validation["prompts"],
        "samples_per_prompt": validation["samples_per_prompt"],
        "judge": validation["judge"],
        "varied": list(dict.fromkeys(name for point in points for name in point.options)),
        "runs": runs,
        "chance": validation["methods"]["reference"]["advantage"],
        "test": {name: test[name] for name in ("verdict", "prompts", "methods", "tests")},
    }


def _frontier_of(figures: Sequence[Mapping[str, Any]]) -> list[bool]:
    return frontier([(f["kl_policy_ref"]["mean"], f["advantage"]["mean"]) for f in figures])


def points_of(rows: Any, where: str, config: RunConfig) -> list[Point]:
    """The points of a list of mappings, each with `method` and options.

    Raises:
        ConfigError: a row is none, or two rows are one training.
    """
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{where} must hold a list of points, e.g. - {{method: e-dpo, beta: 0.2}}")
    out: dict[str, Point] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("method"), str):
            raise ConfigError(f"{where}, point {number}: {row!r} is no mapping with a method")
        options = {key: value for key, value in row.items() if key != "method"}
        check_space(options)
        of = config.distill.method_of(row["method"])
        method_named(of)
        unread = [name for name in options if not reads(of, name)]
        if unread:
            raise ConfigError(
                f"{where}, point {number}: {row['method']} does not read {', '.join(unread)}; take it away"
            )
        point = Point(row["method"], options)
        if point.name in out:
            raise ConfigError(f"{where}, point {number}: {point.name} stands there twice")
        out[point.name] = point
    return list(out.values())
