"""Losses of rewards: distillation, over an ensemble, and reward-aware preference optimisation."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefdistill.losses.checks import check_floating, check_positive, check_same


def distilled_dpo(h: Tensor, reward_margins: Tensor, *, beta: float) -> Tensor:
    """d-DPO, reward model distillation: regress the implicit reward margin onto an explicit one.

    (r(x, y_1) - r(x, y_2) - beta h)^2.

    No label is needed: exchanging the responses changes the sign of both margins and leaves the loss. Where the pairs
    cover all responses and pi_ref has full support, the minimiser is the RLHF optimum pi_ref exp(r/beta) / Z. Only
    differences are seen: the common level of a prompt's log-probs is free unless `forward_kl` is added.

    Args:
        h: ``[P]``, implicit margins, nats.
        reward_margins: ``[P]``, r(x, y_1) - r(x, y_2) of one reward model (or of a mixture), responses in h's order.
        beta: reward units a nat, > 0.

    Returns:
        ``[P]``, reward units^2; no factor 1/2.

    Raises:
        TypeError: an argument is not a floating-point tensor, or beta is not a number.
        ValueError: shapes differ, or beta <= 0.

    References:
        Fisch et al., "Robust Preference Optimization through Reward Model Distillation", arXiv 2405.19316, the reward
        model distillation objective.
    """
    check_same(h=h, reward_margins=reward_margins)
    check_positive("beta", beta)
    return (reward_margins - beta * h) ** 2


def ensemble_dpo(
    h: Tensor, reward_margins: Tensor, *, beta: float, over: Literal["pair", "batch"] = "pair"
) -> tuple[Tensor, Tensor]:
    """e-DPO, pessimistic ensemble: the d-DPO loss of the reward model that the policy already fits best.

    ``over="pair"``: min_k (r_k(x, y_1) - r_k(x, y_2) - beta h)^2, for each pair by itself.
    ``over="batch"``: k* = argmin_k sum over the batch of those losses; every pair then has the loss of member k*.

    The paper's minimum is over reward functions, of the expected loss: "batch" is its estimate from one batch, "pair"
    lets the member change from pair to pair and is never larger. Under "batch" the choice depends on what one call
    sees: a micro-batch, one process's share. The gradient is that of the chosen member's loss; of members that tie the
    first is taken. The member's index itself carries no gradient.

    Args:
        h: ``[P]``, implicit margins, nats.
        reward_margins: ``[K, P]``, one row of r_k(x, y_1) - r_k(x, y_2) a member, K >= 1, all on one scale.
        beta: reward units a nat, > 0.
        over: what the minimum is taken over, "pair" or "batch".

    Returns:
        loss: ``[P]``, reward units^2; no factor 1/2.
        member: ``[P]``, int64, the chosen member of each pair; constant under ``over="batch"``.

    Raises:
        TypeError: an argument is not a floating-point tensor, or beta is not a number.
        ValueError: h is not ``[P]`` or reward_margins not ``[K, P]`` with K >= 1, beta <= 0, or another ``over``.

    References:
        Fisch et al., "Robust Preference Optimization through Reward Model Distillation", arXiv 2405.19316, the
        pessimistic ensemble objective (e-DPO), without its KL term; for that add alpha * `forward_kl`.
    """
    check_floating(h=h, reward_margins=reward_margins)
    if h.dim() != 1 or reward_margins.dim() != 2 or reward_margins.shape[1:] != h.shape or len(reward_margins) == 0:
        raise ValueError(
            "h must be [P] and reward_margins [K, P] with K >= 1; "
            f"got h {list(h.shape)}, reward_margins {list(reward_margins.shape)}"
        )
    check_positive("beta", beta)
    losses = (reward_margins - beta * h) ** 2  # [K, P]
    if over == "pair":
        member = losses.detach().argmin(dim=0)
    elif over == "batch":
        member = losses.detach().sum(dim=1).argmin().expand(h.shape[0])
    else:
        raise ValueError(f'over must be "pair" or "batch", got {over!r}')
    return losses.gather(0, member.unsqueeze(0)).squeeze(0), member


def rpo_sq(h: Tensor, reward_margins: Tensor, *, beta: float, reward_scale: float) -> Tensor:
    """RPO with the squared distance: d-DPO with a scale on the rewards.

    (a - b)^2, a = beta h, b = reward_scale * (r(x, y_1) - r(x, y_2)).

    Args:
        h: ``[P]``, implicit margins, nats.
        reward_margins: ``[P]``, r(x, y_1) - r(x, y_2), responses in h's order.
        beta: reward units a nat, > 0.
        reward_scale: eta > 0, multiplies the reward margin; 1 gives `distilled_dpo`.

    Returns:
        ``[P]``, (scaled reward units)^2; no factor 1/2.

    Raises:
        TypeError: an argument is not a floating-point tensor, or a hyper-parameter is not a number.
        ValueError: shapes differ, or a hyper-parameter <= 0.

    References:
        Sun et al., "Reward-aware Preference Optimization", arXiv 2502.00203; name and scale of NeMo-Aligner's
        ``preference_loss: rpo_sq`` (reward_scale is its ``gt_reward_scale``, beta its ``ref_policy_kl_penalty``).
    """
    implicit, explicit = _reward_aware_margins(h, reward_margins, beta, reward_scale)
    return (implicit - explicit) ** 2


def rpo_bwd_kl(h: Tensor, reward_margins: Tensor, *, beta: float, reward_scale: float) -> Tensor:
    """RPO with the backward Bernoulli KL: cross-entropy with the reward model's soft label, less its entropy.

    KL(Bern(sigmoid(b)) || Bern(sigmoid(a))), a = beta h, b = reward_scale * (r(x, y_1) - r(x, y_2)).

    Its gradient in a is sigmoid(a) - sigmoid(b), at most 1 however far the margins lie apart. As b goes to infinity it
    becomes `dpo`.

    Args:
        h: ``[P]``, implicit margins, nats.
        reward_margins: ``[P]``, r(x, y_1) - r(x, y_2), responses in h's order.
        beta: reward units a nat, > 0.
        reward_scale: eta > 0, multiplies the reward margin.

    Returns:
        ``[P]``, nats; >= 0 up to rounding (about 1e-7 in float32), 0 where a = b.

    Raises:
        TypeError: an argument is not a floating-point tensor, or a hyper-parameter is not a number.
        ValueError: shapes differ, or a hyper-parameter <= 0.

    References:
        Sun et al., "Reward-aware Preference Optimization", arXiv 2502.00203; "backward" is NeMo-Aligner's word, as in
        ``preference_loss: rpo_bwd_kl``.
    """
    implicit, explicit = _reward_aware_margins(h, reward_margins, beta, reward_scale)
    return _bernoulli_kl(explicit, implicit)


def rpo_fwd_kl(h: Tensor, reward_margins: Tensor, *, beta: float, reward_scale: float) -> Tensor:
    """RPO with the forward Bernoulli KL: `rpo_bwd_kl` with its two distributions exchanged.

    KL(Bern(sigmoid(a)) || Bern(sigmoid(b))), a = beta h, b = reward_scale * (r(x, y_1) - r(x, y_2)).

    Its gradient in a is sigmoid(a) sigmoid(-a) (a - b): it vanishes where the policy is already certain, also when it
    is certain of the wrong response.

    Args:
        h: ``[P]``, implicit margins, nats.
        reward_margins: ``[P]``, r(x, y_1) - r(x, y_2), responses in h's order.
        beta: reward units a nat, > 0.
        reward_scale: eta > 0, multiplies the reward margin.

    Returns:
        ``[P]``, nats; >= 0 up to rounding (about 1e-7 in float32), 0 where a = b.

    Raises:
        TypeError: an argument is not a floating-point tensor, or a hyper-parameter is not a number.
        ValueError: shapes differ, or a hyper-parameter <= 0.

    References:
        Sun et al., "Reward-aware Preference Optimization", arXiv 2502.00203; "forward" is NeMo-Aligner's word, as in
        ``preference_loss: rpo_fwd_kl``.
    """
    implicit, explicit = _reward_aware_margins(h, reward_margins, beta, reward_scale)
    return _bernoulli_kl(implicit, explicit)


def _reward_aware_margins(h: Tensor, reward_margins: Tensor, beta: float, reward_scale: float) -> tuple[Tensor, Tensor]:
    check_same(h=h, reward_margins=reward_margins)
    check_positive("beta", beta)
    check_positive("reward_scale", reward_scale)
    return beta * h, reward_scale * reward_margins


def _bernoulli_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(Bern(sigmoid(p_logits)) || Bern(sigmoid(q_logits))), nats, finite for every finite logit."""
    yes = torch.sigmoid(p_logits) * (F.logsigmoid(p_logits) - F.logsigmoid(q_logits))
    no = torch.sigmoid(-p_logits) * (F.logsigmoid(-p_logits) - F.logsigmoid(-q_logits))
    return yes + no
