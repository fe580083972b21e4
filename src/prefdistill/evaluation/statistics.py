"""Estimates with honest error bars: numbers in, an estimate with an interval out.

| question                                        | function                             |
|-------------------------------------------------|--------------------------------------|
| what is the mean, and how sure                  | `cluster_mean`                       |
| how often does a method beat the reference      | `win_rate`                           |
| how far is a policy from another                | `kl_estimate`                        |
| do two methods differ, how many prompts show it | `prefdistill.evaluation.inference`   |
| what is left at equal length                    | `prefdistill.evaluation.length`      |
| is a reward model right, and how sure           | `prefdistill.evaluation.calibration` |

Conventions, the same in every function:

* ``N`` observations, ``G`` clusters. A cluster is a prompt: several samples of one prompt are not independent, so the
  unit that is resampled, and that the standard error counts, is the whole prompt (Miller, "Adding Error Bars to Evals",
  arXiv 2411.00640). ``clusters[N]`` holds one label an observation; any labels that sort will do.
* The mean is over observations, not over clusters: a prompt with more samples weighs more.
* The interval is the 95% percentile bootstrap over clusters (Efron and Tibshirani 1993, chapter 13). It is somewhat
  too narrow below about 30 clusters. `cluster_mean` also has the bias-corrected and accelerated one (BCa, chapter 14),
  which follows a skewed distribution better.
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
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = ["Estimate", "WinRate", "cluster_mean", "kl_estimate", "outcomes", "win_rate"]

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
        return jsonable(vars(self))


@dataclass(frozen=True)
class WinRate(Estimate):
    """`mean` is the win rate with a tie as half a win; `wins`, `ties`, `losses` are fractions and add up to 1."""

    wins: float
    ties: float
    losses: float


def jsonable(fields: Mapping[str, Any]) -> dict[str, Any]:
    def value(item: Any) -> Any:
        if isinstance(item, tuple):
            return [value(part) for part in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return {name: value(item) for name, item in fields.items()}


def vector(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {list(array.shape)}")
    if array.size == 0:
        raise ValueError(f"{name} is empty")
    if not np.isfinite(array).all():
        where = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, got {array[where]} at index {where}")
    return array


def same_length(**arrays: NDArray[Any]) -> None:
    if len({array.shape for array in arrays.values()}) > 1:
        lengths = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
        raise ValueError(f"lengths must be equal, got {lengths}")


def cluster_index(clusters: ArrayLike) -> tuple[NDArray[np.int64], int]:
    """``index[N]`` in 0..G-1, and G."""
    labels = np.asarray(clusters)
    if labels.ndim != 1:
        raise ValueError(f"clusters must have one dimension, got shape {list(labels.shape)}")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError("clusters must be finite; a missing label is no label")
    names, index = np.unique(labels, return_inverse=True)
    return index.astype(np.int64), len(names)


def totals_of(index: NDArray[np.int64], n_clusters: int, *columns: Floats) -> Floats:
    """Sum of every column in every cluster, [G, columns]."""
    return np.stack([np.bincount(index, weights=column, minlength=n_clusters) for column in columns], axis=1)


def resampled_totals(totals: Floats, resamples: int, seed: int) -> Floats:
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


def interval(replicates: Floats, ends: tuple[float, float] = (0.025, 0.975)) -> tuple[float, float]:
    known = replicates[np.isfinite(replicates)]
    if known.size == 0:
        return (math.nan, math.nan)
    low, high = np.quantile(known, ends)
    return (float(low), float(high))


def mean_and_error(values: Floats, index: NDArray[np.int64], n_clusters: int) -> tuple[float, float]:
    mean = float(values.mean())
    if n_clusters < 2:
        return mean, math.nan
    residual_totals = np.bincount(index, weights=values - mean, minlength=n_clusters)
    variance = n_clusters / (n_clusters - 1) * float(residual_totals @ residual_totals) / len(values) ** 2
    return mean, math.sqrt(variance)


def cluster_mean(
    values: ArrayLike,
    clusters: ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
    method: Literal["percentile", "bca"] = "percentile",
) -> Estimate:
    """Mean of ``values[N]`` with an interval and a standard error that respect ``clusters[N]``.

    The standard error is ``sqrt(G/(G-1) * sum_g (sum_{i in g} (v_i - mean))^2) / N``.

    Args:
        method: "percentile", or "bca": percentiles moved by the bias of the resampled means and by their acceleration,
            from leaving out one cluster at a time (Efron and Tibshirani 1993, equations 14.9 to 14.15).
    """
    if method not in ("percentile", "bca"):
        raise ValueError(f"method must be 'percentile' or 'bca', got {method!r}")
    data = vector("values", values)
    index, n_clusters = cluster_index(clusters)
    same_length(values=data, clusters=index)
    mean, error = mean_and_error(data, index, n_clusters)
    if n_clusters < 2:
        return Estimate(mean, (math.nan, math.nan), math.nan, n_clusters)
    totals = totals_of(index, n_clusters, np.ones_like(data), data)
    drawn = resampled_totals(totals, resamples, seed)
    replicates = drawn[:, 1] / drawn[:, 0]
    ends = (0.025, 0.975) if method == "percentile" else _bca_ends(mean, replicates, totals)
    return Estimate(mean, interval(replicates, ends), error, n_clusters)


def _bca_ends(mean: float, replicates: Floats, totals: Floats) -> tuple[float, float]:
    """The quantiles of the replicates that BCa reads in place of 0.025 and 0.975."""
    # Ties count half, or a lattice of values would look biased.
    below = float((replicates < mean).mean() + 0.5 * (replicates == mean).mean())
    if not 0 < below < 1:
        return (0.025, 0.975)
    bias = float(stats.norm.ppf(below))
    left_out = totals.sum(0) - totals
    jackknife = left_out[:, 1] / left_out[:, 0]
    around = jackknife.mean() - jackknife
    size = float((around**2).sum()) ** 1.5
    acceleration = 0.0 if size == 0 else float((around**3).sum()) / (6 * size)
    z = bias + stats.norm.ppf([0.025, 0.975])
    low, high = stats.norm.cdf(bias + z / (1 - acceleration * z))
    return (float(low), float(high))


def outcomes(differences: Floats, tie_margin: float) -> Floats:
    """1 for a win (above `tie_margin`), 0 for a loss (below ``-tie_margin``), 0.5 for a tie; any shape."""
    won, lost = differences > tie_margin, differences < -tie_margin
    return 0.5 * (1.0 + won.astype(np.float64) - lost.astype(np.float64))


def win_rate(
    differences: ArrayLike, clusters: ArrayLike, tie_margin: float = 0.0, *, resamples: int = 2000, seed: int = 0
) -> WinRate:
    """How often ``differences[N]`` (a method's reward minus the reference's, same prompt) is a win, a tie half a win.

    Args:
        differences: ``[N]``; a win above `tie_margin`, a loss below ``-tie_margin``, a tie between, bounds included.
        clusters: ``[N]``.
        tie_margin: reward difference that does not count, at least 0.
    """
    data = vector("differences", differences)
    if not (math.isfinite(tie_margin) and tie_margin >= 0):
        raise ValueError(f"tie_margin must be finite and at least 0, got {tie_margin}")
    won, lost = data > tie_margin, data < -tie_margin
    rate = cluster_mean(outcomes(data, tie_margin), clusters, resamples=resamples, seed=seed)
    wins, losses, ties = float(won.mean()), float(lost.mean()), float((~won & ~lost).mean())
    return WinRate(**vars(rate), wins=wins, ties=ties, losses=losses)


def kl_estimate(log_ratios: ArrayLike, clusters: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """KL(p || q) in nats a response, as the mean of ``log_ratios[N] = log p(y|x) - log q(y|x)`` with y drawn from p.

    Who drew y decides which divergence it is: for KL(pi_ref || pi_theta) the responses must come from pi_ref. The
    estimate is unbiased and may be below 0 by chance; the divergence is not.
    """
    data = vector("log_ratios", log_ratios)
    return cluster_mean(data, clusters, resamples=resamples, seed=seed)
