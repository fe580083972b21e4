"""What losses see of the policy: its implicit margin, and its forward KL from the reference."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from prefdistill.losses.checks import check_same

_MOST_WEIGHT = 2.0


def implicit_margin(
    policy_logps_1: Tensor,
    policy_logps_2: Tensor,
    reference_logps_1: Tensor,
    reference_logps_2: Tensor,
) -> Tensor:
    """The implicit margin h: how much more the policy has raised response 1 than response 2.

    h = (log pi_theta(y_1|x) - log pi_ref(y_1|x)) - (log pi_theta(y_2|x) - log pi_ref(y_2|x)).

    beta * h is the difference of implicit rewards beta * log(pi_theta / pi_ref); over one prompt the partition function
    log Z(x) cancels. h is 0 where the policy is the reference, and changes sign when the responses change places.

    Args:
        policy_logps_1: ``[P]``, log pi_theta(y_1|x), nats. In labelled pairs y_1 is the preferred response.
        policy_logps_2: ``[P]``, log pi_theta(y_2|x), nats.
        reference_logps_1: ``[P]``, log pi_ref(y_1|x), nats.
        reference_logps_2: ``[P]``, log pi_ref(y_2|x), nats.

    Returns:
        h, ``[P]``, nats, not multiplied by beta.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ.

    References:
        Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, Eq. 7 (the bracket, without beta).
    """
    check_same(
        policy_logps_1=policy_logps_1,
        policy_logps_2=policy_logps_2,
        reference_logps_1=reference_logps_1,
        reference_logps_2=reference_logps_2,
    )
    return (policy_logps_1 - reference_logps_1) - (policy_logps_2 - reference_logps_2)


def forward_kl(
    policy_logps: Tensor, reference_logps: Tensor, *, estimator: Literal["plain", "control-variate"] = "plain"
) -> Tensor:
    """One-sample estimates of KL(pi_ref || pi_theta), the pessimism term of p-DPO, dp-DPO and e-DPO.

    With d = log pi_theta(y|x) - log pi_ref(y|x), y ~ pi_ref(.|x): "plain" is -d, as in the paper; "control-variate"
    adds exp(d) - 1, whose expectation is 0.

    The samples must be pi_ref's own: drawn from the reference at temperature 1 without truncation (no top-k, no top-p),
    once, offline, or the pair's responses where these were themselves drawn from pi_ref. On anybody else's responses
    the mean is not this KL; the two sources must not be mixed unseen.

    Plain: the mean over samples is unbiased and its expectation is >= 0; a single sample may be negative. Only
    -log pi_theta(y|x) carries gradient (the reference is a constant), so that minimising the mean is maximum likelihood
    on the reference's samples; log pi_ref makes the number a KL and nothing else. Its gradient is zero in expectation
    where the policy is the reference, but not for any one batch: there it is noise.

    Control variate: the expected gradient is the same, since E_ref[exp(d) grad d] = grad E_theta[1] = 0, and every
    sample's gradient, exp(d) - 1 times that of log pi_theta, vanishes where the policy is the reference. Importance
    weights are cut at 2 (above, the function goes on as its tangent), which bounds that factor by 1 either way; so cut,
    a sample is never negative, and the mean is a lower bound of the KL, 0 only where the policy is the reference.

    With a weight alpha > 0, ``loss.mean() + alpha * forward_kl(...).mean()`` turns `dpo` into p-DPO, `distilled_dpo`
    into dp-DPO and `ensemble_dpo` into pessimistic e-DPO, the full objective.

    Args:
        policy_logps: ``[S]``, log pi_theta(y|x), nats.
        reference_logps: ``[S]``, log pi_ref(y|x) of the same samples, nats.
        estimator: see above.

    Returns:
        ``[S]``, nats.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ, or an unknown estimator.

    References:
        Fisch et al., "Robust Preference Optimization through Reward Model Distillation", arXiv 2405.19316, Theorem 2
        and the p-DPO, dp-DPO and e-DPO objectives. The control variate is the "k3" estimator of J. Schulman,
        "Approximating KL Divergence" (2020), the cut that of truncated importance sampling (Ionides 2008).
    """
    check_same(policy_logps=policy_logps, reference_logps=reference_logps)
    if estimator == "plain":
        return reference_logps - policy_logps
    if estimator != "control-variate":
        raise ValueError(f"estimator must be 'plain' or 'control-variate', got {estimator!r}")
    d = policy_logps - reference_logps
    cut = math.log(_MOST_WEIGHT)
    weight = torch.exp(d.clamp(max=cut)) + _MOST_WEIGHT * (d - cut).clamp(min=0)
    return weight - 1 - d
