"""Resamples of pairs: bootstrap, subsample, and D_rho, where a fraction rho prefers the longer response (section 5).

Each returns one weight a pair, how often it stands in the resample, so that a tree is computed once however often its
pairs were drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from prefdistill.data.table import PromptGroup
from prefdistill.errors import ConfigError, DataError

RESAMPLES = ("bootstrap", "subsample", "length-bias", "all")


def resample(
    kind: str,
    longer_chosen: np.ndarray,
    *,
    seed: int,
    fraction: float = 0.7,
    rho: float | None = None,
) -> np.ndarray:
    """Weights [P], int64: how often each pair stands in the resample.

    Args:
        kind: "bootstrap" (P draws with replacement), "subsample" (`fraction` of the pairs, without), "length-bias"
            (the largest D_rho that needs no replacement), "all".
        longer_chosen: [P], +1 where the chosen response has more tokens, -1 where fewer, 0 where as many.
        rho: fraction of D_rho's pairs whose longer response is preferred; pairs of equal length are left out.

    Raises:
        ConfigError: an unknown kind, or a fraction or rho out of range.
        DataError: D_rho cannot be made, since no pair prefers the longer (or the shorter) response.
    """
    pairs = len(longer_chosen)
    rng = np.random.default_rng(seed)
    weights = np.zeros(pairs, dtype=np.int64)
    if kind == "all":
        return weights + 1
    if kind == "bootstrap":
        np.add.at(weights, rng.integers(0, pairs, pairs), 1)
        return weights
    if kind == "subsample":
        if not 0 < fraction <= 1:
            raise ConfigError(f"reward.fraction is {fraction}; it must lie in (0, 1]")
        weights[rng.permutation(pairs)[: max(1, round(fraction * pairs))]] = 1
        return weights
    if kind == "length-bias":
        return length_biased(longer_chosen, rho, seed=seed)
    raise ConfigError(f"reward.resample is {kind!r}; it must be one of {', '.join(RESAMPLES)}")


def length_biased(
    longer_chosen: np.ndarray, rho: float | None, *, seed: int, size: int | None = None, replacement: bool = False
) -> np.ndarray:
    """Weights [P] of D_rho: `size` pairs, a fraction rho of which prefers the longer response.

    Args:
        longer_chosen: [P], +1 where the chosen response has more tokens, -1 where fewer, 0 where as many (left out).
        rho: in [0, 1].
        size: None: the largest that needs no replacement.
        replacement: draw a kind of pair with replacement where there are too few of it.

    Raises:
        ConfigError: rho is out of range.
        DataError: the data have no pair of a kind that rho needs, or too few for `size` without replacement.
    """
    if rho is None or not 0 <= rho <= 1:
        raise ConfigError(f"a length-biased resample needs a rho in [0, 1], got {rho}")
    rng = np.random.default_rng(seed)
    weights = np.zeros(len(longer_chosen), dtype=np.int64)
    longer, shorter = np.flatnonzero(longer_chosen > 0), np.flatnonzero(longer_chosen < 0)
    most = length_bias_size(len(longer), len(shorter), rho)
    size = most if size is None else size
    wanted = ((longer, round(rho * size), "longer"), (shorter, size - round(rho * size), "shorter"))
    for where, count, kind in wanted:
        if count <= len(where):
            weights[rng.permutation(where)[:count]] = 1
        elif replacement:
            np.add.at(weights, rng.choice(where, count), 1)
        else:
            raise DataError(
                f"D_rho with rho = {rho} and {size} pairs needs {count} pairs that prefer the {kind} response, and the "
                f"data have {len(where)}; ask for at most {most} pairs, or allow replacement"
            )
    return weights


def longer_chosen(groups: Sequence[PromptGroup]) -> np.ndarray:
    """For every pair of the groups, in order: +1 where the chosen response has more tokens, -1 where fewer, else 0."""
    signs = [np.sign(len(g.responses[c].ids) - len(g.responses[r].ids)) for g in groups for c, r in g.pairs]
    return np.array(signs, dtype=np.int64)


def biased_groups(
    groups: Sequence[PromptGroup], rho: float, *, seed: int, pairs: int | None = None
) -> list[PromptGroup]:
    """D_rho of prompt groups, without replacement: pairs that were not drawn go, and what no pair names goes with them.

    Raises:
        ConfigError, DataError: as `length_biased`.
    """
    kept = iter(length_biased(longer_chosen(groups), rho, seed=seed, size=pairs).tolist())
    out = []
    for g in groups:
        drawn = [pair for pair in g.pairs if next(kept)]
        named = sorted({i for pair in drawn for i in pair})
        place = {old: new for new, old in enumerate(named)}
        if drawn:
            out.append(
                replace(g, responses=[g.responses[i] for i in named], pairs=[(place[c], place[r]) for c, r in drawn])
            )
    return out


def common_size(longer_chosen: np.ndarray, rhos: Iterable[float]) -> int:
    """The most pairs that D_rho without replacement can have for every one of these rho."""
    longer, shorter = int((longer_chosen > 0).sum()), int((longer_chosen < 0).sum())
    return min(length_bias_size(longer, shorter, rho) for rho in rhos)


def length_bias_size(longer: int, shorter: int, rho: float) -> int:
    """The most pairs a D_rho without replacement can have.

    Raises:
        DataError: the data have no pair of a kind that rho needs.
    """
    bounds = []
    if rho > 0:
        bounds.append(longer / rho)
    if rho < 1:
        bounds.append(shorter / (1 - rho))
    size = int(min(bounds) + 1e-9)
    if size < 1:
        raise DataError(
            f"D_rho with rho = {rho} cannot be made: {longer} pairs prefer the longer response and {shorter} the "
            "shorter one; choose another rho or give more pairs"
        )
    return size
