"""Losses of labelled pairs: DPO, cDPO, robust DPO, IPO."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from prefdistill.losses.checks import check_floating, check_label_smoothing, check_positive


def dpo(h: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: the logistic loss of the labelled pair; with label_smoothing = e > 0, conservative DPO (cDPO).

    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).

    Without smoothing the loss has no finite minimiser: it falls to 0 as h grows without bound, whatever beta is. With
    smoothing the minimum lies at beta h = log((1 - e) / e).

    Args:
        h: ``[P]``, implicit margins, nats; response 1 is the preferred one.
        beta: reward units a nat, > 0.
        label_smoothing: e in [0, 0.5), the probability that a label is wrong.

    Returns:
        ``[P]``, nats; log 2 where h = 0.

    Raises:
        TypeError: h is not a floating-point tensor, or a hyper-parameter is not a number.
        ValueError: beta <= 0, or label_smoothing outside [0, 0.5).

    References:
        Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, Eq. 7. With smoothing: Mitchell, "A note on
        DPO with noisy preferences & relationship to IPO", https://ericmitchell.ai/cdpo.pdf, Eq. 3.

    Note:
        TRL's ``loss_type="sigmoid"`` smoothed in the same way until its DPO trainer was rewritten for 0.29; since then
        (1.16 too) it ignores ``label_smoothing`` there, without a warning.
    """
    check_floating(h=h)
    check_positive("beta", beta)
    check_label_smoothing(label_smoothing)
    loss = -F.logsigmoid(beta * h)
    if label_smoothing == 0.0:
        return loss
    return (1.0 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-beta * h)


def robust_dpo(h: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (rDPO): an unbiased estimate of the DPO loss under labels flipped at a known rate.

    ( -(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h) ) / (1 - 2 e).

    Over flips of probability e its expectation is the DPO loss of the true label. The price: it may be negative and,
    for e > 0, falls without bound as h grows.

    Args:
        h: ``[P]``, implicit margins, nats; response 1 is the one labelled as preferred.
        beta: reward units a nat, > 0.
        label_smoothing: e in [0, 0.5), the probability that a label is flipped; 0 gives `dpo`.

    Returns:
        ``[P]``, nats; log 2 where h = 0.

    Raises:
        TypeError: h is not a floating-point tensor, or a hyper-parameter is not a number.
        ValueError: beta <= 0, or label_smoothing outside [0, 0.5).

    References:
        Chowdhury et al., "Provably Robust DPO: Aligning Language Models with Noisy Feedback", arXiv 2403.00409; TRL's
        ``loss_type="robust"``.
    """
    check_floating(h=h)
    check_positive("beta", beta)
    check_label_smoothing(label_smoothing)
    loss = -F.logsigmoid(beta * h)
    if label_smoothing == 0.0:
        return loss
    return ((1.0 - label_smoothing) * loss + label_smoothing * F.logsigmoid(-beta * h)) / (1.0 - 2.0 * label_smoothing)


def ipo(h: Tensor, *, tau: float) -> Tensor:
    """IPO: regress the implicit margin onto a fixed target.

    (h - 1/(2 tau))^2.

    Args:
        h: ``[P]``, implicit margins, nats; response 1 is the preferred one. The paper's h comes from probabilities of
            whole responses, hence from SUMMED log-probs, as everywhere in this module.
        tau: 1/nats, > 0; the regularisation strength. The target margin is 1/(2 tau) nats.

    Returns:
        ``[P]``, nats^2.

    Raises:
        TypeError: h is not a floating-point tensor, or tau is not a number.
        ValueError: tau <= 0.

    References:
        Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv 2310.12036v2,
        Eq. 17.

    Note:
        TRL since 0.7.11 (1.16 too, ``loss_type="ipo"``, tau called ``beta``) divides each response's log-ratio by its
        number of tokens first, end token included; its source says that the paper's authors confirmed this, the paper
        does not state it. For that loss pass log-probs AVERAGED over tokens to `implicit_margin`: h is then in nats a
        token, and tau must be chosen for that scale.
    """
    check_floating(h=h)
    check_positive("tau", tau)
    return (h - 1.0 / (2.0 * tau)) ** 2
