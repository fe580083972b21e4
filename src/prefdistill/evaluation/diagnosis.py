"""What ails a run: every check with its number, its threshold, the threshold's reason, and what to change.

Nothing is computed from a model here: `check_run` takes figures that evaluation made from columns, as plain values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prefdistill.training.degeneracy import FALL_NATS, degenerates

__all__ = ["Check", "check_run", "warnings_of"]

CONSERVATIVE_NATS = 0.1
SAME_WAY = 0.2
BEYOND_SHARE = 0.05
UNENDED_SHARE = 0.1
COIN = math.log(2)

State = Literal["healthy", "watch", "ill", "unknown"]


@dataclass(frozen=True)
class Check:
    """One question asked of a run.

    Attributes:
        kind: the illness.
        subject: a method, a member, the ensemble or the judge.
        state: "watch" where there is a sign of it, but the judge sees no harm; "unknown" where a number is missing.
        measure: what the number is, with its unit.
        value: None where it is not known.
        threshold: the value from which on the check is not healthy.
        reason: why the threshold lies there.
        text: what was found, in a sentence.
        what_to_do: empty where there is nothing to do.
    """

    kind: str
    subject: str
    state: State
    measure: str
    value: float | None
    threshold: float
    reason: str
    text: str
    what_to_do: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_run(
    methods: Mapping[str, Mapping[str, Any]],
    members: Sequence[Mapping[str, Any]],
    ensemble: Mapping[str, Any] | None,
    judge: Mapping[str, Any],
) -> list[Check]:
    """All checks of a run, in the order of methods, members, judge.

    Args:
        methods: a method's figures as in summary.json, and, where they are known, ``history`` (rows of chosen log-prob
            change and margin), ``agreed`` ({"kl", "asked", "prompts"}: KL of the policy, and KL that the ensemble asks
            for, on the prompts where members agree) and ``beyond`` ({"share", "reference_share", "member"}:
            samples scored outside the range of the labelled training responses by the member with most of them).
            `reference` is left out.
        members: as `prefdistill.evaluation.rewards.member_figures`, with a name.
        ensemble: the same of the members' mean.
        judge: {"heldout_accuracy", "n_heldout"}.
    """
    out: list[Check] = []
    start = methods.get("reference", {})
    for name, figures in methods.items():
        if name != "reference":
            out += [_degeneracy(name, figures), _unended(name, figures, start), _conservative(name, figures)]
            if "beyond" in figures:
                out.append(_extrapolation(name, figures["beyond"]))
    if len(members) > 1:
        out.append(_same_way(members))
    calibrated = [m.get("temperature", 1.0) is not None for m in members]
    out += [_poor_member(m, calibrated=known) for m, known in zip(members, calibrated, strict=True)]
    out += [_poor_member(ensemble, calibrated=all(calibrated))] if ensemble else []
    if judge.get("n_heldout"):
        out.append(_judge(judge))
    return out


def warnings_of(checks: Iterable[Check]) -> list[dict[str, str]]:
    """What a user must read: {"kind", "state", "text", "what_to_do"} of every check that is ill or to be watched."""
    return [
        {"kind": c.kind, "state": c.state, "text": c.text, "what_to_do": c.what_to_do}
        for c in checks
        if c.state in ("ill", "watch")
    ]


# -- policies ----------------------------------------------------------------------------------------------------------


def _degeneracy(name: str, figures: Mapping[str, Any]) -> Check:
    fall = figures.get("chosen_logp_change")
    history = figures.get("history")
    lost = _mean(figures.get("kl_ref_policy"))
    grew = degenerates(history) if history else None
    state: State = "healthy"
    what_to_do = ""
    if fall is None:
        state, text = "unknown", f"{name}: the change of its chosen log-probs is not known."
    else:
        text = f"{name}: the chosen responses' log-prob changed by {fall:+.2f} nats since the start"
        if fall <= -FALL_NATS:
            text += f" ({math.exp(fall):.0%} of their probability)"
            text += ", while the margins grew" if grew else ""
            text += f"; the reference's own responses lost {lost:.2f} nats" if lost is not None else ""
            state, what_to_do = _is_it_broken(figures.get("advantage"))
        text += "."
    return Check(
        "chosen log-prob fell",
        name,
        state,
        "change of log pi(chosen) since the start, nats a response",
        fall,
        -FALL_NATS,
        "one nat less makes a response 0.37 times as likely; with growing margins it is DPO's degeneracy "
        "(Proposition 1), and the judge knows whether the mass went somewhere better",
        text,
        what_to_do,
    )


def _is_it_broken(advantage: Mapping[str, Any] | None) -> tuple[State, str]:
    """The answer to "my chosen log-probs fall": the judge knows whether the mass went somewhere better."""
    low, high = advantage["ci95"] if advantage else (None, None)
    remedy = (
        "pin the level with the forward-KL term (p-dpo, dp-dpo, e-dpo; larger distill.kl_alpha), lower the learning "
        "rate, or stop earlier"
    )
    if advantage and low is not None and low > 0:
        return "watch", (
            f"Not broken: the probability went to responses that the judge prefers (advantage {advantage['mean']:+.2f} "
            f"[{low:+.2f}, {high:+.2f}]). If the advantage turns with longer training, {remedy}."
        )
    if high is not None and high < 0:
        return "ill", f"Broken: the probability went to responses that the judge scores lower; {remedy}."
    return "ill", f"The judge sees no gain from it: {remedy}."


def _unended(name: str, figures: Mapping[str, Any], start: Mapping[str, Any]) -> Check:
    cut, before = figures.get("truncated"), start.get("truncated")
    more = None if cut is None or before is None else cut - before
    ill = more is not None and more > UNENDED_SHARE
    text = (
        f"{name}: how many of its responses end is not known."
        if more is None
        else f"{name}: {cut:.0%} of its responses are cut at the length limit, {before:.0%} of the reference's."
    )
    return Check(
        "responses do not end",
        name,
        "unknown" if more is None else "ill" if ill else "healthy",
        "share of responses cut at evaluate.max_new_tokens, above the reference's",
        more,
        UNENDED_SHARE,
        "one response in ten that no longer ends is seen by every user; repeating a token is how a policy degenerates",
        text,
        "Lower the learning rate or train for fewer steps; if the responses are good and only long, raise "
        "evaluate.max_new_tokens."
        if ill
        else "",
    )


def _conservative(name: str, figures: Mapping[str, Any]) -> Check:
    agreed = figures.get("agreed")
    kl = agreed["kl"] if agreed else _mean(figures.get("kl_policy_ref"))
    where = f" on the {agreed['prompts']} prompts where the members agree most" if agreed else ""
    state: State = "unknown" if kl is None else "ill" if kl < CONSERVATIVE_NATS else "healthy"
    what_to_do = ""
    if kl is None:
        text = f"{name}: its KL from the starting policy is not known."
    elif state == "healthy":
        text = f"{name}: KL(policy || reference) is {kl:.2f} nats a response{where}."
    else:
        text = f"{name} stayed at the starting policy: KL(policy || reference) is {kl:.3f} nats a response{where}"
        asked = agreed["asked"] if agreed else None
        if asked is None:
            what_to_do = "Lower distill.beta or distill.kl_alpha, train longer, or raise the learning rate."
        elif asked < CONSERVATIVE_NATS:
            text += f", and their rewards ask for no more than {asked:.3f}"
            what_to_do = "Lower distill.beta: at this one the rewards are too small to move a policy."
        else:
            text += f", where their rewards ask for at least {asked:.2f}"
            what_to_do = (
                "Train longer or raise the learning rate; lower distill.kl_alpha; where members contradict one "
                "another elsewhere, use hull-dpo or fewer members (distill.members)."
            )
        text += "."
    return Check(
        "over-conservative",
        name,
        state,
        "KL(policy || reference), nats a response" + (", where the members agree" if agreed else ""),
        kl,
        CONSERVATIVE_NATS,
        "a whole response's log-ratio of 0.1 nats is a change that nobody can see",
        text,
        what_to_do,
    )


def _extrapolation(name: str, beyond: Mapping[str, Any]) -> Check:
    share = beyond["share"]
    ill = share is not None and share > BEYOND_SHARE
    text = f"{name}: how its samples are scored beside the training responses is not known."
    if share is not None:
        who = beyond["member"]
        text = f"{name}: {who} scores {share:.1%} of its samples outside the range of the pairs it was trained on"
        text += f", {beyond['reference_share']:.1%} of the reference's."
    return Check(
        "reward extrapolates",
        name,
        "unknown" if share is None else "ill" if ill else "healthy",
        "share of samples that a member scores outside the range of the labelled training responses",
        share,
        BEYOND_SHARE,
        "of responses like the training ones hardly any lies outside the range of hundreds; from one in twenty on, the "
        "policy is graded where no label ever was",
        text,
        "Let members see such responses: label samples of the reference or this policy, train them again. Until "
        "then raise distill.kl_alpha or distill.beta, or train for fewer steps."
        if ill
        else "",
    )


# -- reward models and judge -------------------------------------------------------------------------------------------


def _same_way(members: Sequence[Mapping[str, Any]]) -> Check:
    found = [m.get("error_length_correlation") for m in members]
    known = [c for c in found if c is not None]
    prompts = min((m.get("n_prompts") or 1) for m in members)
    threshold = max(SAME_WAY, 2 / math.sqrt(prompts))
    if len(known) < len(members):
        state: State = "unknown"
        value, text = None, "How the members' errors go with length is not known."
    else:
        # The one that errs least this way decides: pessimism needs one member that does not.
        value = min(known, key=abs)
        alike = all(c > 0 for c in known) or all(c < 0 for c in known)
        state = "ill" if alike and abs(value) > threshold else "healthy"
        listed = ", ".join(f"{c:+.2f}" for c in known)
        text = f"The members' errors on held-out pairs correlate with length by {listed}."
        if state == "ill":
            text = (
                f"All {len(known)} members err towards {'longer' if value > 0 else 'shorter'} responses (correlations "
                f"of their errors with length {listed}); pessimism over them cannot correct this."
            )
    return Check(
        "members biased the same way",
        "ensemble",
        state,
        "least correlation of a member's errors with length, where all have one sign",
        value,
        threshold,
        "about what heads on the embedded pairs learn where 7 in 10 labels prefer one length (unbiased: 0.08, 8 in 10: "
        "0.3); at least two standard errors for this many prompts",
        text,
        "Give members different resamples (reward.resample: length-bias with several reward.rho) or different base "
        "models (reward.models), and look at the advantage at equal length."
        if state == "ill"
        else "",
    )


def _poor_member(figures: Mapping[str, Any], *, calibrated: bool) -> Check:
    """By log-loss and accuracy; by accuracy alone where nothing made its margins log-odds (ready and given rewards)."""
    pairs, name = figures["n_heldout"], figures["name"]
    loss, accuracy = figures["log_loss"], figures["accuracy"]
    # Within a standard error of a coin's, its accuracy says nothing either.
    coin = 0.5 + math.sqrt(0.25 / max(1, pairs))
    ill = accuracy < coin or (calibrated and loss >= COIN)
    text = f"{name}: log-loss {loss:.3f} (a coin's is {COIN:.3f}), accuracy {accuracy:.1%} on {pairs} held-out pairs."
    if not calibrated:
        text = f"{name}: accuracy {accuracy:.1%} on {pairs} held-out pairs; its margins are no log-odds."
    return Check(
        "weak reward model",
        name,
        "ill" if ill else "healthy",
        "log-loss on held-out pairs, nats a pair" if calibrated else "accuracy on held-out pairs",
        loss if calibrated else accuracy,
        COIN if calibrated else coin,
        "a coin loses log 2 a pair; one that loses more, or is right within a standard error of half the time, is none"
        if calibrated
        else "a standard error above a coin's",
        f"{name} is hardly better than a coin. " + text if ill else text,
        "Train members with reward.hold: lora or full, on more prompts; or use dpo, which needs no reward."
        if ill
        else "",
    )


def _judge(judge: Mapping[str, Any]) -> Check:
    accuracy, pairs = judge["heldout_accuracy"], judge["n_heldout"]
    threshold = 0.5 + 2 * math.sqrt(0.25 / pairs)
    ill = accuracy < threshold
    text = f"The judge agrees with {accuracy:.1%} of {pairs} held-out labels"
    return Check(
        "weak judge",
        "judge",
        "ill" if ill else "healthy",
        "share of held-out labels that the judge agrees with",
        accuracy,
        threshold,
        "two standard errors above a coin",
        text + (", hardly more than a coin: its advantages and win rates say little." if ill else "."),
        "Give evaluate.judge a better reward model, or more pairs (dataset.judge_fraction)." if ill else "",
    )


def _mean(estimate: Mapping[str, Any] | None) -> float | None:
    return None if estimate is None else estimate["mean"]
