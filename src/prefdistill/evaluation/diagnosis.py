"""What a user must be warned of: each illness with its number, its threshold's reason, and what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prefdistill.evaluation import calibration

CONSERVATIVE_NATS = 0.1  # a whole response's log-ratio of 0.1 nats is a change that nobody can see
SAME_WAY = 0.3  # a correlation that explains a tenth of the rewards' variance
FALL_NATS = 1.0  # chosen responses made less than 0.37 times as likely


def member_figures(margins: np.ndarray, rewards: Sequence[np.ndarray], lengths: Sequence[np.ndarray]) -> dict[str, Any]:
    """Held-out figures of a member: margins [P] of labelled pairs, rewards and lengths a prompt [R] each."""
    probabilities, outcomes = calibration.predicted_winner(margins)
    bins = calibration.calibration_bins(probabilities, outcomes, bins=min(10, max(2, len(margins) // 20)))
    return {
        "accuracy": calibration.accuracy(margins),
        "log_loss": calibration.log_loss(margins),
        "ece": calibration.expected_calibration_error(probabilities, outcomes, bins=len(bins.count)),
        "n_heldout": len(margins),
        "length_correlation": within_prompt_correlation(rewards, lengths),
        "calibration": bins.as_dict(),
    }


def within_prompt_correlation(rewards: Sequence[np.ndarray], lengths: Sequence[np.ndarray]) -> float | None:
    """Pearson correlation of reward and length after each prompt's mean is taken away; None where it is undefined."""
    r = np.concatenate([x - x.mean() for x in rewards])
    n = np.concatenate([x - x.mean() for x in lengths]).astype(np.float64)
    if r.std() == 0 or n.std() == 0:
        return None
    return float(np.corrcoef(r, n)[0, 1])


def disagreement(margins: np.ndarray) -> dict[str, Any]:
    """How far K members differ on P held-out pairs, from margins [K, P]."""
    signs = np.sign(margins)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.atleast_2d(np.corrcoef(margins))
    return {
        "margin_std": margins.std(0).tolist(),
        "member_correlation": [[float(c) if math.isfinite(c) else None for c in row] for row in correlation],
        "agreement_rate": float((signs == signs[0]).all(0).mean()),
    }


def warnings_of(
    methods: Mapping[str, Mapping[str, Any]],
    members: Sequence[Mapping[str, Any]],
    ensemble: Mapping[str, Any] | None,
    judge: Mapping[str, Any],
) -> list[dict[str, str]]:
    """The warnings of a run, each {"kind", "text", "what_to_do"}; none for a healthy one."""
    out: list[dict[str, str]] = []

    def warn(kind: str, text: str, what_to_do: str) -> None:
        out.append({"kind": kind, "text": text, "what_to_do": what_to_do})

    for name, figures in methods.items():
        if name == "reference":
            continue
        kl = figures["kl_policy_ref"]["mean"]
        if kl is not None and kl < CONSERVATIVE_NATS:
            warn(
                "over-conservative",
                f"{name} stayed at the starting policy: KL(policy || reference) is {kl:.3f} nats a response, below "
                f"{CONSERVATIVE_NATS}.",
                "Lower distill.beta or distill.kl_alpha, train longer, or raise the learning rate.",
            )
        fall = figures["chosen_logp_change"]
        if fall is not None and fall <= -FALL_NATS:
            warn(
                "chosen log-prob fell",
                f"{name} made the chosen responses less likely: {fall:+.2f} nats since the start "
                f"({math.exp(fall):.0%} of their probability).",
                _is_it_broken(figures["advantage"]),
            )
    correlations = [m["length_correlation"] for m in members]
    known = [c for c in correlations if c is not None]
    if len(known) > 1 and len(known) == len(members):
        alike = all(c > SAME_WAY for c in known) or all(c < -SAME_WAY for c in known)
        if alike:
            warn(
                "members biased the same way",
                f"All {len(known)} members reward {'longer' if known[0] > 0 else 'shorter'} responses (correlations "
                f"{', '.join(f'{c:+.2f}' for c in known)}); pessimism over them cannot correct this.",
                "Give members different resamples (reward.resample: length-bias with several reward.rho) or different "
                "base models (reward.models), and look at the advantage at equal length.",
            )
    coin = math.log(2)
    for figures in [*members, *([ensemble] if ensemble else [])]:
        error = math.sqrt(0.25 / max(1, figures["n_heldout"]))
        if figures["log_loss"] >= coin or figures["accuracy"] < 0.5 + error:
            warn(
                "weak reward model",
                f"{figures['name']} is hardly better than a coin on {figures['n_heldout']} held-out pairs: accuracy "
                f"{figures['accuracy']:.1%}, log-loss {figures['log_loss']:.3f} (a coin's is {coin:.3f}).",
                "Train members with reward.hold: lora or full, on more prompts; or use dpo, which needs no reward.",
            )
    accuracy, pairs = judge.get("heldout_accuracy"), judge.get("n_heldout") or 0
    if accuracy is not None and pairs and accuracy < 0.5 + 2 * math.sqrt(0.25 / pairs):
        warn(
            "weak judge",
            f"The judge agrees with {accuracy:.1%} of {pairs} held-out labels, hardly more than a coin: its advantages "
            "and win rates say little.",
            "Give evaluate.judge a better reward model, or more pairs (dataset.judge_fraction).",
        )
    return out


def _is_it_broken(advantage: Mapping[str, Any]) -> str:
    """The answer to "my chosen log-probs fall": the judge knows whether the mass went somewhere better."""
    low, high = advantage["ci95"]
    remedy = (
        "pin the level with the forward-KL term (p-dpo, dp-dpo, e-dpo; larger distill.kl_alpha), lower the learning "
        "rate, or stop earlier"
    )
    if low is not None and low > 0:
        return (
            f"Not broken: the probability went to responses that the judge prefers (advantage {advantage['mean']:+.2f} "
            f"[{low:+.2f}, {high:+.2f}]). If the advantage turns with longer training, {remedy}."
        )
    if high is not None and high < 0:
        return f"Broken: the probability went to responses that the judge scores lower; {remedy}."
    return f"The judge sees no gain from it: {remedy}."
