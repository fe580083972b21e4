"""From scores, log-probs and lengths of samples to the figures of a method, its tests and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefdistill.evaluation import inference, length, statistics

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
    resamples: int = 2000,
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
    # Every sample of the method meets every sample of the reference.
    met = np.repeat(np.arange(prompts), samples * reference.scores.shape[1])
    gap = (method.scores[:, :, None] - reference.scores[:, None, :]).ravel()
    gap_length = (method.lengths[:, :, None] - reference.lengths[:, None, :]).ravel().astype(np.float64)
    draws: dict[str, Any] = {"seed": seed, "resamples": resamples}
    wins = statistics.win_rate(gap, met, tie_margin, **draws)
    outcomes = statistics.outcomes(gap, tie_margin)
    equal_length = None
    if np.ptp(longer) > 0 or longer[0] == 0:
        # Else every sample is longer by the same amount: nothing tells length and advantage apart.
        equal_length = length.advantage_at_equal_length(advantage, longer, clusters, **draws).as_dict()
    return {
        "advantage": statistics.cluster_mean(advantage, clusters, **draws).as_dict(),
        "advantage_equal_length": equal_length,
        "win_rate": wins.as_dict(),
        "win_rate_equal_length": length.length_controlled_win_rate(outcomes, gap_length, met).as_dict(),
        "wins": wins.wins,
        "ties": wins.ties,
        "losses": wins.losses,
        "score_mean": float(method.scores.mean()),
        "kl_policy_ref": _kl(kl_policy_ref, draws),
        "kl_ref_policy": _kl(kl_ref_policy, draws),
        "length_mean": float(method.lengths.mean()),
        "length_reference_mean": float(reference.lengths.mean()),
        "chosen_logp_change": chosen_logp_change,
        "heldout_chosen_logp_change": heldout_chosen_logp_change,
        "truncated": method.truncated,
    }


def _kl(log_ratios: np.ndarray, draws: dict[str, Any]) -> dict[str, Any]:
    clusters = np.repeat(np.arange(log_ratios.shape[0]), log_ratios.shape[1])
    return statistics.kl_estimate(log_ratios.ravel(), clusters, **draws).as_dict()


def wald_tests(scores: Mapping[str, np.ndarray], seed: int) -> list[dict[str, Any]]:
    """Wald tests of each pair of methods on their mean score a prompt, [P, S] each, the same prompts.

    `p_holm` is corrected for the number of pairs; `detectable` is the difference that this many prompts show with a
    power of 80%, given how much prompts differ.
    """
    out = []
    names = list(scores)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            difference = scores[b].mean(1) - scores[a].mean(1)
            clusters = np.arange(len(difference))
            estimate = statistics.cluster_mean(difference, clusters, seed=seed)
            test = inference.wald_test(difference, clusters)
            spread = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
            detectable = inference.detectable_difference(len(difference), spread) if spread > 0 else None
            out.append(
                {
                    "a": b,
                    "b": a,
                    "difference": estimate.as_dict(),
                    "p_value": test.as_dict()["p_value"],
                    "detectable": detectable,
                }
            )
    known = [t for t in out if t["p_value"] is not None]
    for test_of_pair in out:
        test_of_pair["p_holm"] = None
    for test_of_pair, p in zip(known, inference.holm([t["p_value"] for t in known]) if known else [], strict=True):
        test_of_pair["p_holm"] = float(p)
    return out


def verdict(
    primary: str,
    baseline: str | None,
    methods: Mapping[str, Mapping[str, Any]],
    tests: list[dict[str, Any]],
    judge: str,
) -> str:
    """A sentence: is the policy better than the one it started from, and is it better than the baseline, DPO."""
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
        if {test["a"], test["b"]} == {primary, baseline}:
            sign = 1 if test["a"] == primary else -1
            gap, p = sign * test["difference"]["mean"], test["p_value"]
            if p is not None and p < SIGNIFICANT:
                told = inference.p_text(p)
                told = told if told.startswith("<") else f"= {told}"
                said += f"; it is {'better' if gap > 0 else 'worse'} than {baseline} by {abs(gap):.2f} (p {told})"
            else:
                said += f"; no difference shown from {baseline} ({gap:+.2f}, p = {p:.2f})" if p is not None else ""
    return said + "."
