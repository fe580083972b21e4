"""Resamples of pairs: bootstrap, subsample, and D_rho, where a fraction rho prefers the longer response (section 5).

Each returns one weight a pair, how often it stands in the resample, so that a tree is computed once however often its
pairs were drawn.
"""

from __future__ import annotations

import numpy as np

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
        if rho is None or not 0 <= rho <= 1:
            raise ConfigError(f"a length-biased resample needs a rho in [0, 1], got {rho}")
        longer, shorter = np.flatnonzero(longer_chosen > 0), np.flatnonzero(longer_chosen < 0)
        size = length_bias_size(len(longer), len(shorter), rho)
        for where, count in ((longer, round(rho * size)), (shorter, size - round(rho * size))):
            weights[rng.permutation(where)[:count]] = 1
        return weights
    raise ConfigError(f"reward.resample is {kind!r}; it must be one of {', '.join(RESAMPLES)}")


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
