"""From scores, log-probs and lengths of samples to the figures of a method, its tests and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefdistill.evaluation import statistics

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Drawn:
    """What is known of a policy's samples on P held-out prompts, S a prompt.

    Attributes:
        scores: [P, S] the judge's.
        lengths: [P, S] tokens, end token included.
        truncated: share of samples cut at max_new_tokens.
    """

    scores: np.ndarray
    lengths: np.ndarray
    truncated: float


def compare(
    method: Drawn,
    reference: Drawn,
    *,
    kl_policy_ref: np.ndarray,
    kl_ref_policy: np.ndarray,
    chosen_logp_change: float,
    heldout_chosen_logp_change: float,
    tie_margin: float,
    seed: int,
) -> dict[str, Any]:
    """The figures of a method against the reference on the same prompts.

    The advantage of a sample is its score less the mean score of all R samples of the reference of that prompt; for
    wins it meets each of them. R may differ from the method's S. Intervals resample whole prompts.

    Args:
        kl_policy_ref: [P, any] log pi(y|x) - log pi_ref(y|x) of samples of the policy at temperature 1.
        kl_ref_policy: [P, any] log pi_ref(y|x) - log pi(y|x) of samples of the reference at temperature 1.
    """
    prompts, samples = method.scores.shape
    clusters = np.repeat(np.arange(prompts), samples)
    advantage = (method.scores - reference.scores.mean(1, keepdims=True)).ravel()
    longer = (method.lengths - reference.lengths.mean(1, keepdims=True)).ravel()
    meetings = method.scores[:, :, None] - reference.scores[:, None, :]
    wins = statistics.win_rate(meetings.ravel(), np.repeat(np.arange(prompts), meetings[0].size), tie_margin, seed=seed)
    return {
        "advantage": statistics.cluster_mean(advantage, clusters, seed=seed).as_dict(),
        "advantage_equal_length": _at_equal_length(advantage, longer, clusters, seed),
        "win_rate": wins.as_dict(),
        "wins": wins.wins,
        "ties": wins.ties,
        "losses": wins.losses,
        "score_mean": float(method.scores.mean()),
        "kl_policy_ref": _kl(kl_policy_ref, seed),
        "kl_ref_policy": _kl(kl_ref_policy, seed),
        "length_mean": float(method.lengths.mean()),
        "length_reference_mean": float(reference.lengths.mean()),
        "chosen_logp_change": chosen_logp_change,
        "heldout_chosen_logp_change": heldout_chosen_logp_change,
        "truncated": method.truncated,
    }


def _at_equal_length(advantage: np.ndarray, longer: np.ndarray, clusters: np.ndarray, seed: int) -> Any:
    if np.ptp(longer) == 0 and longer[0] != 0:
        # Every sample is longer by the same amount: nothing tells length and advantage apart.
        return None
    return statistics.advantage_at_equal_length(advantage, longer, clusters, seed=seed).as_dict()


def _kl(log_ratios: np.ndarray, seed: int) -> dict[str, Any]:
    clusters = np.repeat(np.arange(log_ratios.shape[0]), log_ratios.shape[1])
    return statistics.kl_estimate(log_ratios.ravel(), clusters, seed=seed).as_dict()


def wald_tests(scores: Mapping[str, np.ndarray], seed: int) -> list[dict[str, Any]]:
    """Wald tests of each pair of methods on their mean score a prompt, [P, S] each, the same prompts."""
    out = []
    names = list(scores)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            difference = scores[b].mean(1) - scores[a].mean(1)
            clusters = np.arange(len(difference))
            estimate = statistics.cluster_mean(difference, clusters, seed=seed)
            test = statistics.wald_test(difference, clusters)
            out.append({"a": b, "b": a, "difference": estimate.as_dict(), "p_value": test.p_value})
    return out


def verdict(primary: str, methods: Mapping[str, Mapping[str, Any]], tests: list[dict[str, Any]], judge: str) -> str:
    """A sentence: is the policy better than the one it started from, and is it better than DPO."""
    figures = methods[primary]
    mean, (low, high) = figures["advantage"]["mean"], figures["advantage"]["ci95"]
    win, (fewest, most) = figures["win_rate"]["mean"], figures["win_rate"]["ci95"]
    if low is None or high is None:
        return (
            f"Too few prompts to say whether {primary} differs from the starting policy by {judge}: advantage "
            f"{mean:+.2f}, win rate {win:.0%}."
        )
    numbers = f"advantage {mean:+.2f} [{low:+.2f}, {high:+.2f}], win rate {win:.0%} [{fewest:.0%}, {most:.0%}]"
    if low > 0:
        said = f"{primary} is better than the starting policy by {judge}: {numbers}"
    elif high < 0:
        said = f"{primary} is worse than the starting policy by {judge}: {numbers}"
    else:
        said = f"No difference shown between {primary} and the starting policy by {judge}: {numbers}"
    for test in tests:
        if {test["a"], test["b"]} == {primary, "dpo"}:
            sign = 1 if test["a"] == primary else -1
            gap, p = sign * test["difference"]["mean"], test["p_value"]
            if p is not None and p < SIGNIFICANT:
                said += f"; it is {'better' if gap > 0 else 'worse'} than dpo by {abs(gap):.2f} (p = {p:.3f})"
            else:
                said += f"; no difference shown from dpo ({gap:+.2f}, p = {p:.2f})" if p is not None else ""
    return said + "."
