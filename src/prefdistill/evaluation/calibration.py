"""Is a reward model right, and as often as it says: accuracy, log-loss, calibration.

Errors as in `prefdistill.evaluation.statistics`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from prefdistill.evaluation.statistics import Floats, same_length, vector

__all__ = [
    "CalibrationBins",
    "accuracy",
    "calibration_bins",
    "expected_calibration_error",
    "log_loss",
    "predicted_winner",
]


@dataclass(frozen=True)
class CalibrationBins:
    """B bins, least probability first: mean predicted [B], mean observed [B], number of observations [B]."""

    predicted: Floats
    observed: Floats
    count: NDArray[np.int64]

    def as_dict(self) -> dict[str, list[float]]:
        """Ready for JSON: three lists."""
        return {"predicted": self.predicted.tolist(), "observed": self.observed.tolist(), "count": self.count.tolist()}


def accuracy(margins: ArrayLike) -> float:
    """Fraction of ``margins[N] = r(chosen) - r(rejected)`` above 0, a margin of exactly 0 as one half."""
    data = vector("margins", margins)
    return float(np.heaviside(data, 0.5).mean())


def log_loss(margins: ArrayLike) -> float:
    """Mean Bradley-Terry loss, ``-log sigmoid(margin)`` of ``margins[N] = r(chosen) - r(rejected)``, in nats a pair.

    log 2 = 0.693 is a coin's; a model can be right more often than a coin and lose more, if its scale is too large.
    """
    data = vector("margins", margins)
    return float(-special.log_expit(data).mean())


def predicted_winner(margins: ArrayLike) -> tuple[Floats, Floats]:
    """``(probabilities[N], outcomes[N])`` for calibration, from ``margins[N] = r(chosen) - r(rejected)``.

    A pair is turned so that the model's own favourite comes first: the probability is ``sigmoid(|margin|)``, 0.5 to 1,
    the outcome whether the favourite was the chosen one (1, 0, or 0.5 for a margin of 0). Handing over
    ``sigmoid(margin)`` with outcomes all 1 instead would call every model badly calibrated.
    """
    data = vector("margins", margins)
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
    predicted, observed = vector("probabilities", probabilities), vector("outcomes", outcomes)
    same_length(probabilities=predicted, outcomes=observed)
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
