"""Tests and power: do two methods differ, after how many comparisons, and how many prompts would show it.

Conventions and errors as in `prefdistill.evaluation.statistics`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from prefdistill.evaluation.statistics import cluster_index, jsonable, mean_and_error, same_length, vector

__all__ = [
    "McNemarTest",
    "WaldTest",
    "detectable_difference",
    "holm",
    "mcnemar_test",
    "power_of",
    "prompts_needed",
    "wald_test",
]


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
        return jsonable(vars(self))


def wald_test(differences: ArrayLike, clusters: ArrayLike) -> WaldTest:
    """Two-sided test that the mean of ``differences[N]`` is 0; for methods a and b, ``reward_a - reward_b`` a prompt.

    Pairing on the prompt takes the prompts' own difficulty out of the error (Miller 2024). The statistic
    is the mean over its cluster-robust standard error and is compared with Student's t with G - 1 degrees of freedom,
    not with the normal: the same from a few hundred prompts on, and less overconfident with few (Cameron and Miller
    2015, section VI). No difference anywhere gives statistic 0 and p 1; one cluster gives nan.
    """
    data = vector("differences", differences)
    index, n_clusters = cluster_index(clusters)
    same_length(differences=data, clusters=index)
    mean, error = mean_and_error(data, index, n_clusters)
    if math.isnan(error):
        statistic = p_value = math.nan
    elif error == 0.0:
        statistic = 0.0 if mean == 0.0 else math.copysign(math.inf, mean)
        p_value = 1.0 if mean == 0.0 else 0.0
    else:
        statistic = mean / error
        p_value = float(2.0 * stats.t.sf(abs(statistic), n_clusters - 1))
    return WaldTest(statistic, p_value, mean, error, n_clusters - 1)


@dataclass(frozen=True)
class McNemarTest:
    """`first_only` and `second_only` count the prompts that one of the two won and the other did not."""

    first_only: int
    second_only: int
    p_value: float

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return jsonable(vars(self))


def mcnemar_test(first: ArrayLike, second: ArrayLike) -> McNemarTest:
    """Do two methods win equally often against the reference on the same prompts (McNemar 1947, exact and two-sided).

    Only prompts that one won and the other did not say anything; under no difference each is a fair coin.

    Args:
        first: ``[P]``, one outcome a prompt: true for a win.
        second: ``[P]``, the other method's on the same prompts.
    """
    a, b = np.asarray(first), np.asarray(second)
    for name, outcomes in (("first", a), ("second", b)):
        if outcomes.ndim != 1 or outcomes.size == 0 or not np.isin(outcomes, (0, 1)).all():
            raise ValueError(f"{name} must be one or more outcomes, true or false, one a prompt")
    same_length(first=a, second=b)
    ours, theirs = int((a > b).sum()), int((b > a).sum())
    p = 1.0 if ours + theirs == 0 else float(stats.binomtest(ours, ours + theirs).pvalue)
    return McNemarTest(ours, theirs, p)


def p_text(p: float) -> str:
    """A p-value to three places, or that it is below the last of them."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """p-values ``[M]`` adjusted for M comparisons so that the chance of any false discovery is bounded (Holm 1979)."""
    p = vector("p_values", p_values)
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"p_values must lie between 0 and 1, got {p.min()} to {p.max()}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    out = np.empty_like(p)
    out[order] = np.minimum(stepped, 1.0)
    return out


def power_of(prompts: int, difference: float, spread: float, *, level: float = 0.05) -> float:
    """Chance that the two-sided t-test on this many prompts shows a true difference.

    Args:
        prompts: at least 2.
        difference: the true mean difference a prompt.
        spread: standard deviation between prompts of a prompt's difference, sampling noise included.
        level: of the test.
    """
    if prompts < 2:
        raise ValueError(f"prompts must be at least 2, got {prompts}")
    _check_power(difference, spread, level)
    degrees, shift = prompts - 1, abs(difference) / spread * math.sqrt(prompts)
    bound = float(stats.t.ppf(1 - level / 2, degrees))
    return float(stats.nct.sf(bound, degrees, shift) + stats.nct.cdf(-bound, degrees, shift))


def prompts_needed(difference: float, spread: float, *, power: float = 0.8, level: float = 0.05) -> int:
    """The fewest prompts on which a true `difference` is shown with this `power`; arguments as for `power_of`.

    Raises:
        ValueError: also for a difference of 0, which no number of prompts shows.
    """
    _check_power(difference, spread, level)
    if difference == 0:
        raise ValueError("difference is 0: no number of prompts shows it")
    if not level < power < 1:
        raise ValueError(f"power must lie between level and 1, got {power}")
    # The normal approximation is a little too low; from there up.
    z = float(stats.norm.ppf(1 - level / 2) + stats.norm.ppf(power))
    prompts = max(2, math.floor((z * spread / difference) ** 2))
    while power_of(prompts, difference, spread, level=level) < power:
        prompts += 1
    return prompts


def detectable_difference(prompts: int, spread: float, *, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true difference that this many prompts show with this `power`; arguments as for `power_of`."""
    low, high = 0.0, spread
    while power_of(prompts, high, spread, level=level) < power:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if power_of(prompts, middle, spread, level=level) < power else (low, middle)
    return high


def _check_power(difference: float, spread: float, level: float) -> None:
    if not (math.isfinite(difference) and math.isfinite(spread) and spread > 0):
        raise ValueError(f"difference must be finite and spread above 0, got {difference} and {spread}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
