"""Optuna as the searcher of a sweep: a point a method in every trial, the next one where the last ones were good."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefdistill.errors import ConfigError
from prefdistill.experiments.sweep import Point, Searcher
from prefdistill.training.methods import reads

Range = tuple[float, float]


def corners(methods: Sequence[str], ranges: Mapping[str, Range], choices: Mapping[str, Sequence[Any]]) -> list[Point]:
    """The points at the upper ends, which no proposed point asks more of the run's other stages than."""
    most = {**{name: high for name, (_, high) in ranges.items()}, **{name: max(v) for name, v in choices.items()}}
    return [Point(m, {name: value for name, value in most.items() if reads(m, name)}) for m in methods]


def optuna_search(
    methods: Sequence[str],
    ranges: Mapping[str, Range],
    choices: Mapping[str, Sequence[Any]],
    *,
    trials: int,
    seed: int,
) -> Searcher:
    """Optuna's TPE sampler over ranges (on a logarithmic scale where both ends are positive) and choices.

    Nothing is stored: the sampler is seeded, trials that are done are found done, so the same command proposes the same
    points again and goes on after the last.

    Raises:
        ConfigError: optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("--trials needs optuna, which is not installed; run: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def propose(study: Any, method: str) -> tuple[Any, Point]:
        trial = study.ask()
        options: dict[str, Any] = {}
        for name, (low, high) in ranges.items():
            if reads(method, name):
                # Three digits are enough, and give the point a name that can be read.
                options[name] = float(f"{trial.suggest_float(name, low, high, log=low > 0):.3g}")
        for name, values in choices.items():
            if reads(method, name):
                options[name] = trial.suggest_categorical(name, list(values))
        return trial, Point(method, options)

    def search(evaluate: Callable[[Sequence[Point]], list[float]]) -> list[Point]:
        studies = {
            method: optuna.create_study(
                direction="maximize",
                sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(3, trials // 3))),
            )
            for method in methods
        }
        tried: list[Point] = []
        for _ in range(trials):
            asked = [(study, *propose(study, method)) for method, study in studies.items()]
            values = evaluate([point for _, _, point in asked])
            for (study, trial, point), value in zip(asked, values, strict=True):
                study.tell(trial, value)
                tried.append(point)
        return tried

    return search
