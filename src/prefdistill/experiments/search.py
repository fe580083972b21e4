"""Optuna as the searcher of a sweep: a point a method in every trial, the next one where the last ones were good."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefdistill.config import RunConfig
from prefdistill.errors import ConfigError
from prefdistill.experiments.sweep import Point, Searcher, grid
from prefdistill.options import DistillOptions
from prefdistill.training.methods import reads

Range = tuple[float, float]


def corners(config: RunConfig, ranges: Mapping[str, Range], choices: Mapping[str, Sequence[Any]]) -> list[Point]:
    """The points at the ends of all ranges with every choice: what is right for them is right for all between."""
    ends = {name: [_whole(name, end) for end in ends] for name, ends in ranges.items()}
    return grid(config, {**ends, **choices})


def _is_whole(name: str) -> bool:
    return isinstance(getattr(DistillOptions(), name), int)


def _whole(name: str, value: float) -> float:
    return int(value) if _is_whole(name) else value


def optuna_search(
    config: RunConfig,
    ranges: Mapping[str, Range],
    choices: Mapping[str, Sequence[Any]],
    *,
    trials: int,
) -> Searcher:
    """Optuna's TPE sampler over ranges (on a logarithmic scale where both ends are positive) and choices.

    Nothing is stored: the sampler is seeded, and what is trained and sampled is found done, so the same command
    proposes the same points again and goes on after the last. A judge that is a function is asked again, and must
    answer alike.

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
            if not reads(config.distill.method_of(method), name):
                continue
            if _is_whole(name):
                options[name] = trial.suggest_int(name, int(low), int(high), log=low > 0)
            else:
                # Three digits are enough, and give the point a name that can be read.
                options[name] = float(f"{trial.suggest_float(name, low, high, log=low > 0):.3g}")
        for name, values in choices.items():
            if reads(config.distill.method_of(method), name):
                options[name] = values[trial.suggest_categorical(name, range(len(values)))]
        return trial, Point(method, options)

    def search(evaluate: Callable[[Sequence[Point]], list[float]]) -> list[Point]:
        studies = {
            method: optuna.create_study(
                direction="maximize",
                sampler=optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=min(10, max(3, trials // 3))),
            )
            for method in config.methods
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
