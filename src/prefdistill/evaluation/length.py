"""What a method is worth when length is taken out: by a line on the reward scale, by a curve on that of wins.

Conventions and errors as in `prefdistill.evaluation.statistics`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from prefdistill.evaluation.statistics import (
    Estimate,
    Floats,
    cluster_index,
    cluster_mean,
    interval,
    resampled_totals,
    same_length,
    totals_of,
    vector,
)

__all__ = ["advantage_at_equal_length", "length_controlled_win_rate"]

_NORMAL_95 = 1.959963984540054


def advantage_at_equal_length(
    differences: ArrayLike,
    length_differences: ArrayLike,
    clusters: ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """The part of an advantage that length does not explain: the line's height where both responses are equally long.

    The intercept of the least-squares line ``difference = a + b * length_difference``, all arguments ``[N]``; the idea
    of AlpacaEval 2's length-controlled win rate (arXiv 2404.04475) on the reward scale. It is an extrapolation where
    few pairs are of about equal length. Resamples in which every length difference is the same have no line and are
    left out of the interval.

    Raises:
        ValueError: also if every length difference is the same and not 0: no line, no intercept. If all are 0, the
            lengths are equal already and the answer is `cluster_mean`.
    """
    y = vector("differences", differences)
    x = vector("length_differences", length_differences)
    index, n_clusters = cluster_index(clusters)
    same_length(differences=y, length_differences=x, clusters=index)
    spread = float(x.std())
    if spread <= 1e-12 * float(np.abs(x).max()):
        if not x.any():
            return cluster_mean(y, clusters, resamples=resamples, seed=seed)
        raise ValueError(f"every length difference is {x[0]}: the advantage at equal length cannot be told from this")
    centre = float(x.mean())
    z = (x - centre) / spread  # standardised, so that sums of squares keep their digits
    at_zero = -centre / spread  # where z says that lengths are equal
    ones = np.ones_like(y)
    totals = totals_of(index, n_clusters, ones, z, y, z * z, z * y)
    intercept = float(_height(totals.sum(axis=0, keepdims=True), at_zero)[0])
    if n_clusters < 2:
        return Estimate(intercept, (math.nan, math.nan), math.nan, n_clusters)
    error = _height_error(z, y, at_zero, index, n_clusters)
    drawn = _height(resampled_totals(totals, resamples, seed), at_zero)
    return Estimate(intercept, interval(drawn), error, n_clusters)


def _height(totals: Floats, z: float) -> Floats:
    """Height at z of the least-squares line, from the sums of 1, z, y, zz, zy ([R, 5]); nan where z does not vary."""
    n, sum_z, sum_y, sum_zz, sum_zy = totals.T
    mean_z, mean_y = sum_z / n, sum_y / n
    variance = sum_zz / n - mean_z**2
    varies = variance > 1e-12
    slope = np.where(varies, (sum_zy / n - mean_z * mean_y) / np.where(varies, variance, 1.0), np.nan)
    height: Floats = mean_y + slope * (z - mean_z)
    return height


def _height_error(z: Floats, y: Floats, at: float, index: NDArray[np.int64], n_clusters: int) -> float:
    """Cluster-robust standard error of that height: the sandwich of a regression with two coefficients."""
    n = len(y)
    if n <= 2:
        return math.nan
    design = np.stack([np.ones_like(z), z], axis=1)
    bread = np.linalg.inv(design.T @ design)
    residual = y - design @ (bread @ (design.T @ y))
    scores = totals_of(index, n_clusters, residual, residual * z)
    factor = n_clusters / (n_clusters - 1) * (n - 1) / (n - 2)
    weights = bread @ np.array([1.0, at])
    return math.sqrt(factor) * float(np.linalg.norm(scores @ weights))


def length_controlled_win_rate(outcomes: ArrayLike, length_differences: ArrayLike, clusters: ArrayLike) -> Estimate:
    """The win rate where both responses are equally long, by a logistic regression of winning on the length difference.

    ``P(win) = sigmoid(a + b tanh(d / s))``, d the difference in tokens and s the standard deviation of all d, as in
    AlpacaEval 2 (Dubois et al., arXiv 2404.04475) without its terms for models and instructions; the answer is
    ``sigmoid(a)``. The interval is Wald's on the scale of a with a cluster-robust error, so it lies within 0 and 1.

    Args:
        outcomes: ``[N]``, 1 for a win, 0 for a loss, 0.5 for a tie.
        length_differences: ``[N]``, the method's length less the reference's.
        clusters: ``[N]``.

    Returns:
        its `standard_error` is that of the rate (delta method). If lengths never differ, the plain win rate with
        `cluster_mean`'s interval; if wins can be told from losses by length alone, or all are alike, there is no finite
        curve and the mean is nan.
    """
    y, d = vector("outcomes", outcomes), vector("length_differences", length_differences)
    index, n_clusters = cluster_index(clusters)
    same_length(outcomes=y, length_differences=d, clusters=index)
    if y.min() < 0 or y.max() > 1:
        raise ValueError(f"outcomes must lie between 0 and 1, got {y.min()} to {y.max()}")
    if not d.any():
        return cluster_mean(y, clusters)
    nothing = Estimate(math.nan, (math.nan, math.nan), math.nan, n_clusters)
    spread = float(d.std())
    if spread <= 1e-12 * float(np.abs(d).max()):
        return nothing  # every response is longer by the same amount
    design = np.stack([np.ones_like(d), np.tanh(d / spread)], axis=1)
    weights = _logistic(design, y)
    if weights is None:
        return nothing
    rate = float(special.expit(weights[0]))
    n = len(y)
    if n_clusters < 2 or n <= 2:
        return Estimate(rate, (math.nan, math.nan), math.nan, n_clusters)
    fitted = special.expit(design @ weights)
    bread = np.linalg.inv((design.T * (fitted * (1 - fitted))) @ design)
    residual = y - fitted
    scores = totals_of(index, n_clusters, residual, residual * design[:, 1])
    factor = n_clusters / (n_clusters - 1) * (n - 1) / (n - 2)
    error = math.sqrt(factor) * float(np.linalg.norm(scores @ bread[0]))
    low, high = (float(special.expit(weights[0] + side * _NORMAL_95 * error)) for side in (-1, 1))
    return Estimate(rate, (low, high), rate * (1 - rate) * error, n_clusters)


def _logistic(design: Floats, y: Floats) -> Floats | None:
    """Maximum likelihood by Newton's method [2]; None where there is no finite maximum."""
    weights = np.zeros(design.shape[1])
    for _ in range(100):
        fitted = special.expit(design @ weights)
        information = (design.T * (fitted * (1 - fitted))) @ design
        if np.abs(weights).max() > 30 or np.linalg.cond(information) > 1e12:
            return None
        step = np.linalg.solve(information, design.T @ (y - fitted))
        weights = weights + step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            return weights
    return None
