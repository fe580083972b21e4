"""Figures of reward models on held-out pairs, alone and as an ensemble: numbers in, numbers out.

K members, P labelled pairs, R responses of a prompt. A margin is r(chosen) - r(rejected), in log-odds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from prefdistill.ensemble import tilted
from prefdistill.evaluation import calibration
from prefdistill.evaluation.statistics import Floats

__all__ = [
    "agreeing_prompts",
    "asked_kl",
    "beyond_training",
    "centred_rewards",
    "disagreement",
    "error_length_correlation",
    "member_figures",
    "within_prompt_correlation",
]


def member_figures(
    margins: np.ndarray,
    length_differences: np.ndarray,
    rewards: Sequence[np.ndarray],
    lengths: Sequence[np.ndarray],
) -> dict[str, Any]:
    """Held-out figures of a member.

    Args:
        margins: [P] of labelled pairs, chosen less rejected.
        length_differences: [P] of the same pairs, in tokens.
        rewards: a prompt -> [R], of all responses.
        lengths: a prompt -> [R], in tokens.
    """
    probabilities, outcomes = calibration.predicted_winner(margins)
    bins = calibration.calibration_bins(probabilities, outcomes, bins=min(10, max(2, len(margins) // 20)))
    return {
        "accuracy": calibration.accuracy(margins),
        "log_loss": calibration.log_loss(margins),
        "ece": calibration.expected_calibration_error(probabilities, outcomes, bins=len(bins.count)),
        "n_heldout": len(margins),
        "n_prompts": len(rewards),
        "length_correlation": within_prompt_correlation(rewards, lengths),
        "error_length_correlation": error_length_correlation(margins, length_differences),
        "calibration": bins.as_dict(),
    }


def within_prompt_correlation(rewards: Sequence[np.ndarray], lengths: Sequence[np.ndarray]) -> float | None:
    """Pearson correlation of reward and length after each prompt's mean is taken away; None where it is undefined."""
    r = np.concatenate([x - x.mean() for x in rewards])
    n = np.concatenate([x - x.mean() for x in lengths]).astype(np.float64)
    if r.std() == 0 or n.std() == 0:
        return None
    return float(np.corrcoef(r, n)[0, 1])


def error_length_correlation(margins: np.ndarray, length_differences: np.ndarray) -> float | None:
    """Correlation of a member's errors with length: above 0 it gives the longer response more than the labels do.

    The error of a pair is sigmoid(margin) less what happened, 1. Turned the other way round, a pair has the opposite
    error and the opposite length difference: the correlation is over both ways, so its means are 0. Unlike that of
    rewards with length it is 0 for a member that is right to like length, as far as the labels do.

    Args:
        margins, length_differences: [P], chosen less rejected.
    """
    error, longer = special.expit(margins) - 1.0, np.asarray(length_differences, dtype=np.float64)
    size = math.sqrt(float(error @ error) * float(longer @ longer))
    return float(error @ longer) / size if size > 0 else None


def disagreement(margins: np.ndarray) -> dict[str, Any]:
    """How far K members differ on P held-out pairs, from margins [K, P]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.atleast_2d(np.corrcoef(margins))
    return {
        "margin_std": margins.std(0).tolist(),
        "member_correlation": [[float(c) if math.isfinite(c) else None for c in row] for row in correlation],
        "agreement_rate": float(_agree(margins).mean()),
    }


def _agree(margins: np.ndarray) -> np.ndarray:
    """Which pairs [P] all members order alike, from margins [K, P]."""
    signs = np.sign(margins)
    return np.asarray((signs == signs[0]).all(0))


def agreeing_prompts(margins: Sequence[np.ndarray]) -> np.ndarray:
    """Prompts [N] on which the ensemble agrees: on no smaller a share of a prompt's pairs than on the median prompt's.

    Args:
        margins: a prompt -> [K, pairs]; a prompt without pairs is left out.
    """
    share = np.array([_agree(m).mean() if m.shape[1] else np.nan for m in margins])
    if np.isnan(share).all():
        return np.zeros(len(share), dtype=bool)
    return np.asarray(share >= np.nanmedian(share))


def asked_kl(rewards: np.ndarray, beta: float) -> Floats:
    """KL(pi_r || pi_ref) a prompt [N] of RLHF's optimum pi_r for a reward, over S samples of the reference a prompt.

    Args:
        rewards: [N, S] of samples of pi_ref.
        beta: in units of reward a nat.

    Returns:
        at most log S: with few samples less than the policy that the reward asks for.
    """
    samples = rewards.shape[1]
    q = tilted(np.full_like(rewards, 1.0 / samples), rewards, beta)
    out: Floats = special.xlogy(q, q * samples).sum(1)
    return out


def centred_rewards(rewards: Sequence[np.ndarray]) -> Floats:
    """Every response's reward less the mean of its prompt's other responses, over all prompts with two or more.

    A Bradley-Terry reward has no level of its own; what it says of a response is how it compares with its siblings.
    """
    parts = [(x - x.mean()) * len(x) / (len(x) - 1) for x in rewards if len(x) > 1]
    out: Floats = np.concatenate(parts) if parts else np.zeros(0)
    return out


def beyond_training(
    sampled: np.ndarray, labelled: Sequence[np.ndarray], training: Sequence[np.ndarray]
) -> float | None:
    """Share of a policy's samples that a member scores outside the range of the pairs that it was trained on.

    Scores are taken less the mean of the prompt's labelled responses (the training responses': less their siblings'
    mean, see `centred_rewards`). None where no training prompt has two responses.

    Args:
        sampled: [N, S] rewards of the policy's samples.
        labelled: the same prompts -> [L] rewards of their labelled responses.
        training: a training prompt -> [L] rewards of its labelled responses.
    """
    known = centred_rewards(training)
    if not len(known):
        return None
    scores = sampled - np.array([x.mean() for x in labelled])[:, None]
    return float(((scores > known.max()) | (scores < known.min())).mean())
