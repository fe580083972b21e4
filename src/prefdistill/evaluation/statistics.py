"""Estimates with honest error bars: numbers in, an estimate with an interval out.

======================================  ====================================================================
question                                function
======================================  ====================================================================
what is the mean, and how sure          `cluster_mean`
how often does a method beat reference  `win_rate`
do two methods differ                   `wald_test` on paired differences
what is left at equal length            `advantage_at_equal_length`
how far is a policy from another        `kl_estimate`
is a reward model right, and how sure   `accuracy`, `log_loss`, `calibration_bins`, `expected_calibration_error`
======================================  ====================================================================

Conventions, the same in every function:

* ``N`` observations, ``G`` clusters. A cluster is a prompt: several samples of one prompt are not independent, so the
  unit that is resampled, and that the standard error counts, is the whole prompt (Miller, "Adding Error Bars to Evals",
  arXiv 2411.00640). ``clusters[N]`` holds one label an observation; any labels that sort will do.
* The mean is over observations, not over clusters: a prompt with more samples weighs more.
* The interval is the 95% percentile bootstrap over clusters (Efron and Tibshirani 1993, chapter 13). It is somewhat
  too narrow below about 30 clusters.
* The standard error is cluster-robust (Liang and Zeger 1986; Cameron and Miller 2015) with the usual small-sample
  factor ``G/(G-1) * (N-1)/(N-k)``, k coefficients: what statsmodels gives for ``cov_type="cluster"``. With one
  observation a cluster, a mean's is the ordinary ``s / sqrt(N)``.
* With ONE cluster nothing is known about the spread between prompts: the standard error and the interval are nan.
* The same input and seed give the same numbers.

Errors: `ValueError` for empty input, unequal lengths, more than one dimension, or a value that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

__all__ = [
    "CalibrationBins",
    "Estimate",
    "WaldTest",
    "WinRate",
    "accuracy",
    "advantage_at_equal_length",
    "calibration_bins",
    "cluster_mean",
    "expected_calibration_error",
    "kl_estimate",
    "log_loss",
    "predicted_winner",
    "wald_test",
    "win_rate",
]

Floats = NDArray[np.float64]
_CHUNK = 4_000_000  # weights held at once while resampling: 32 MB


@dataclass(frozen=True)
class Estimate:
    """A mean (or an intercept) with its 95% interval ``(lo, hi)`` and its cluster-robust standard error.

    With one cluster `ci95` and `standard_error` are nan.
    """

    mean: float
    ci95: tuple[float, float]
    standard_error: float
    n_clusters: int

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: the interval as a list, and what is not finite as None (JSON has no nan)."""
        return _jsonable(vars(self))


@dataclass(frozen=True)
class WinRate(Estimate):
    """`mean` is the win rate with a tie as half a win; `wins`, `ties`, `losses` are fractions and add up to 1."""

    wins: float
    ties: float
    losses: float


@dataclass(frozen=True)
class WaldTest:
    """`statistic` is `mean / standard_error`; `p_value` is two-sided, from Student's t."""

    statistic: float
    p_value: float
    mean: float
    standard_error: float
    degrees_of_freedom: int

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: what is not finite becomes None."""
        return _jsonable(vars(self))


@dataclass(frozen=True)
class CalibrationBins:
    """B bins, least probability first: mean predicted [B], mean observed [B], number of observations [B]."""

    predicted: Floats
    observed: Floats
    count: NDArray[np.int64]

    def as_dict(self) -> dict[str, list[float]]:
        """Ready for JSON: three lists."""
        return {"predicted": self.predicted.tolist(), "observed": self.observed.tolist(), "count": self.count.tolist()}


def _jsonable(fields: Mapping[str, Any]) -> dict[str, Any]:
    def value(item: Any) -> Any:
        if isinstance(item, tuple):
            return [value(part) for part in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return {name: value(item) for name, item in fields.items()}


def _vector(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {list(array.shape)}")
    if array.size == 0:
        raise ValueError(f"{name} is empty")
    if not np.isfinite(array).all():
        where = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, got {array[where]} at index {where}")
    return array


def _same_length(**arrays: NDArray[Any]) -> None:
    if len({array.shape for array in arrays.values()}) > 1:
        lengths = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
        raise ValueError(f"lengths must be equal, got {lengths}")


def _cluster_index(clusters: ArrayLike) -> tuple[NDArray[np.int64], int]:
    """``index[N]`` in 0..G-1, and G."""
    labels = np.asarray(clusters)
    if labels.ndim != 1:
        raise ValueError(f"clusters must have one dimension, got shape {list(labels.shape)}")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError("clusters must be finite; a missing label is no label")
    names, index = np.unique(labels, return_inverse=True)
    return index.astype(np.int64), len(names)


def _totals(index: NDArray[np.int64], n_clusters: int, *columns: Floats) -> Floats:
    """Sum of every column in every cluster, [G, columns]."""
    return np.stack([np.bincount(index, weights=column, minlength=n_clusters) for column in columns], axis=1)


def _resampled_totals(totals: Floats, resamples: int, seed: int) -> Floats:
    """Column sums over G clusters drawn with replacement, [resamples, columns].

    A draw of G clusters is a multinomial count a cluster, so that every statistic of column sums is a matrix product.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    n_clusters = len(totals)
    rng = np.random.default_rng(seed)
    share = np.full(n_clusters, 1.0 / n_clusters)
    step = max(1, _CHUNK // n_clusters)
    parts = [
        rng.multinomial(n_clusters, share, size=min(step, resamples - start)).astype(np.float64) @ totals
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts)


def _interval(replicates: Floats) -> tuple[float, float]:
    known = replicates[np.isfinite(replicates)]
    if known.size == 0:
        return (math.nan, math.nan)
    low, high = np.quantile(known, [0.025, 0.975])
    return (float(low), float(high))


def _mean_and_error(values: Floats, index: NDArray[np.int64], n_clusters: int) -> tuple[float, float]:
    mean = float(values.mean())
    if n_clusters < 2:
        return mean, math.nan
    residual_totals = np.bincount(index, weights=values - mean, minlength=n_clusters)
    variance = n_clusters / (n_clusters - 1) * float(residual_totals @ residual_totals) / len(values) ** 2
    return mean, math.sqrt(variance)


def cluster_mean(values: ArrayLike, clusters: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean of ``values[N]`` with an interval and a standard error that respect ``clusters[N]``.

    The standard error is ``sqrt(G/(G-1) * sum_g (sum_{i in g} (v_i - mean))^2) / N``.
    """
    data = _vector("values", values)
    index, n_clusters = _cluster_index(clusters)
    _same_length(values=data, clusters=index)
    mean, error = _mean_and_error(data, index, n_clusters)
    if n_clusters < 2:
        return Estimate(mean, (math.nan, math.nan), math.nan, n_clusters)
    drawn = _resampled_totals(_totals(index, n_clusters, np.ones_like(data), data), resamples, seed)
    return Estimate(mean, _interval(drawn[:, 1] / drawn[:, 0]), error, n_clusters)


def win_rate(
    differences: ArrayLike, clusters: ArrayLike, tie_margin: float = 0.0, *, resamples: int = 2000, seed: int = 0
) -> WinRate:
    """How often ``differences[N]`` (a method's reward minus the reference's, same prompt) is a win, a tie half a win.

    Args:
        differences: ``[N]``; a win above `tie_margin`, a loss below ``-tie_margin``, a tie between, bounds included.
        clusters: ``[N]``.
        tie_margin: reward difference that does not count, at least 0.
    """
    data = _vector("differences", differences)
    if not (math.isfinite(tie_margin) and tie_margin >= 0):
        raise ValueError(f"tie_margin must be finite and at least 0, got {tie_margin}")
    won, lost = data > tie_margin, data < -tie_margin
    score = 0.5 * (1.0 + won.astype(np.float64) - lost.astype(np.float64))
    rate = cluster_mean(score, clusters, resamples=resamples, seed=seed)
    wins, losses, ties = float(won.mean()), float(lost.mean()), float((~won & ~lost).mean())
    return WinRate(**vars(rate), wins=wins, ties=ties, losses=losses)


def wald_test(differences: ArrayLike, clusters: ArrayLike) -> WaldTest:
    """Two-sided test that the mean of ``differences[N]`` is 0; for methods a and b, ``reward_a - reward_b`` a prompt.

    Pairing on the prompt takes the prompts' own difficulty out of the error (Miller 2024). The statistic
    is the mean over its cluster-robust standard error and is compared with Student's t with G - 1 degrees of freedom,
    not with the normal: the same from a few hundred prompts on, and less overconfident with few (Cameron and Miller
    2015, section VI). No difference anywhere gives statistic 0 and p 1; one cluster gives nan.
    """
    data = _vector("differences", differences)
    index, n_clusters = _cluster_index(clusters)
    _same_length(differences=data, clusters=index)
    mean, error = _mean_and_error(data, index, n_clusters)
    if math.isnan(error):
        statistic = p_value = math.nan
    elif error == 0.0:
        statistic = 0.0 if mean == 0.0 else math.copysign(math.inf, mean)
        p_value = 1.0 if mean == 0.0 else 0.0
    else:
        statistic = mean / error
        p_value = float(2.0 * stats.t.sf(abs(statistic), n_clusters - 1))
    return WaldTest(statistic, p_value, mean, error, n_clusters - 1)


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
    y = _vector("differences", differences)
    x = _vector("length_differences", length_differences)
    index, n_clusters = _cluster_index(clusters)
    _same_length(differences=y, length_differences=x, clusters=index)
    spread = float(x.std())
    if spread <= 1e-12 * float(np.abs(x).max()):
        if not x.any():
            return cluster_mean(y, clusters, resamples=resamples, seed=seed)
        raise ValueError(f"every length difference is {x[0]}: the advantage at equal length cannot be told from this")
    centre = float(x.mean())
    z = (x - centre) / spread  # standardised, so that sums of squares keep their digits
    at_zero = -centre / spread  # where z says that lengths are equal
    ones = np.ones_like(y)
    totals = _totals(index, n_clusters, ones, z, y, z * z, z * y)
    intercept = float(_height(totals.sum(axis=0, keepdims=True), at_zero)[0])
    if n_clusters < 2:
        return Estimate(intercept, (math.nan, math.nan), math.nan, n_clusters)
    error = _height_error(z, y, at_zero, index, n_clusters)
    drawn = _height(_resampled_totals(totals, resamples, seed), at_zero)
    return Estimate(intercept, _interval(drawn), error, n_clusters)


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
    scores = _totals(index, n_clusters, residual, residual * z)
    factor = n_clusters / (n_clusters - 1) * (n - 1) / (n - 2)
    weights = bread @ np.array([1.0, at])
    return math.sqrt(factor) * float(np.linalg.norm(scores @ weights))


def kl_estimate(log_ratios: ArrayLike, clusters: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """KL(p || q) in nats a response, as the mean of ``log_ratios[N] = log p(y|x) - log q(y|x)`` with y drawn from p.

    Who drew y decides which divergence it is: for KL(pi_ref || pi_theta) the responses must come from pi_ref. The
    estimate is unbiased and may be below 0 by chance; the divergence is not.
    """
    data = _vector("log_ratios", log_ratios)
    return cluster_mean(data, clusters, resamples=resamples, seed=seed)


def accuracy(margins: ArrayLike) -> float:
    """Fraction of ``margins[N] = r(chosen) - r(rejected)`` above 0, a margin of exactly 0 as one half."""
    data = _vector("margins", margins)
    return float(np.heaviside(data, 0.5).mean())


def log_loss(margins: ArrayLike) -> float:
    """Mean Bradley-Terry loss, ``-log sigmoid(margin)`` of ``margins[N] = r(chosen) - r(rejected)``, in nats a pair.

    log 2 = 0.693 is a coin's; a model can be right more often than a coin and lose more, if its scale is too large.
    """
    data = _vector("margins", margins)
    return float(-special.log_expit(data).mean())


def predicted_winner(margins: ArrayLike) -> tuple[Floats, Floats]:
    """``(probabilities[N], outcomes[N])`` for calibration, from ``margins[N] = r(chosen) - r(rejected)``.

    A pair is turned so that the model's own favourite comes first: the probability is ``sigmoid(|margin|)``, 0.5 to 1,
    the outcome whether the favourite was the chosen one (1, 0, or 0.5 for a margin of 0). Handing over
    ``sigmoid(margin)`` with outcomes all 1 instead would call every model badly calibrated.
    """
    data = _vector("margins", margins)
    probabilities: Floats = special.expit(np.abs(data))
    return probabilities, np.heaviside(data, 0.5)


def calibration_bins(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> CalibrationBins:
    """Predicted against observed in `bins` bins of equal count (one more in the first ones where N does not divide).

    Args:
        probabilities: ``[N]``, 0 to 1, such as those of `predicted_winner`.
        outcomes: ``[N]``, 0 to 1: what happened. Observations with one probability share their mean outcome before
            they are binned, so that the order of the input does not matter.
        bins: at least 1; with fewer observations than bins, one bin an observation.
    """
    predicted, observed = _vector("probabilities", probabilities), _vector("outcomes", outcomes)
    _same_length(probabilities=predicted, outcomes=observed)
    for name, array in (("probabilities", predicted), ("outcomes", observed)):
        if array.min() < 0 or array.max() > 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {array.min()} to {array.max()}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    levels, index, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    level_outcome = np.bincount(index, weights=observed) / counts
    pairs = np.stack([np.repeat(levels, counts), np.repeat(level_outcome, counts)])
    parts = np.array_split(pairs, min(bins, len(predicted)), axis=1)
    means = np.array([part.mean(axis=1) for part in parts])
    return CalibrationBins(means[:, 0], means[:, 1], np.array([part.shape[1] for part in parts], dtype=np.int64))


def expected_calibration_error(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> float:
    """Mean distance between predicted and observed over equal-count bins, weighted by count (after Naeini et al. 2015).

    Chance alone keeps it above 0: with n observations a bin, by about ``0.8 * sqrt(p (1 - p) / n)``.
    """
    found = calibration_bins(probabilities, outcomes, bins)
    return float(np.average(np.abs(found.predicted - found.observed), weights=found.count))
