"""Preference losses: tensors in, one loss a pair out.

=================  =============================  =========================================================
objective          function                       loss of one pair
=================  =============================  =========================================================
DPO                `dpo`                          -log sigmoid(beta h)
cDPO               `dpo`, label_smoothing > 0     (1 - e) dpo(h) + e dpo(-h)
robust DPO         `robust_dpo`                   ((1 - e) dpo(h) - e dpo(-h)) / (1 - 2 e)
IPO                `ipo`                          (h - 1/(2 tau))^2
d-DPO              `distilled_dpo`                (r_1 - r_2 - beta h)^2
e-DPO              `ensemble_dpo`                 min over K members of the member's d-DPO loss
hull-DPO           `distilled_dpo`                d-DPO towards the mixture sum_k w_k r_k; the caller mixes
RPO, squared       `rpo_sq`                       (beta h - eta (r_1 - r_2))^2
RPO, backward KL   `rpo_bwd_kl`                   KL(Bern(sigmoid(eta (r_1 - r_2))) || Bern(sigmoid(beta h)))
RPO, forward KL    `rpo_fwd_kl`                   KL(Bern(sigmoid(beta h)) || Bern(sigmoid(eta (r_1 - r_2))))
p-, dp-, e-DPO+KL  the above, and `forward_kl`    loss.mean() + alpha * forward_kl(...).mean()
=================  =============================  =========================================================

Conventions, the same in every function:

* ``P`` pairs, ``K`` reward models (members), ``S`` samples. Arguments of one function have equal shapes; nothing is
  broadcast, so that a ``[P, 1]`` beside a ``[P]`` is an error and not a ``[P, P]`` loss. Where one shape is asked for
  a docstring says ``[P]``, but any shape serves; only `ensemble_dpo` insists on ``[K, P]`` and ``[P]``.
* A log-prob is ``log pi(y | x)``, in nats: the SUM over the response's tokens, its end token included, prompt tokens
  excluded.
* ``h`` is the implicit margin of `implicit_margin`, in nats and NOT multiplied by beta; ``beta * h`` is the difference
  of implicit rewards. Where labels matter (`dpo`, `robust_dpo`, `ipo`), response 1 is the preferred one.
* A reward margin is ``r(x, y_1) - r(x, y_2)`` on the Bradley-Terry scale, where sigmoid(margin) is the probability that
  response 1 is preferred. It needs no label: any two responses to one prompt are a pair.
* beta is in reward units a nat. A larger beta holds the policy closer to the reference.
* Nothing is reduced and nothing is detached. Gradients flow to whatever asks for them; compute the reference and the
  rewards without gradient.
* Floating-point tensors of any width are taken, and mixed widths promote as usual in PyTorch. Hand over float32 or
  wider sums: near -300 nats, neighbouring bfloat16 numbers are 2 nats apart, and squares leave float16's range at 256.

Errors: `TypeError` for an argument that is not a floating-point tensor or a hyper-parameter that is not a number,
`ValueError` for unequal shapes or a hyper-parameter out of its range. Values are not looked at (that would make a GPU
wait): NaN and infinity pass through to the losses they touch.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "distilled_dpo",
    "dpo",
    "ensemble_dpo",
    "forward_kl",
    "implicit_margin",
    "ipo",
    "robust_dpo",
    "rpo_bwd_kl",
    "rpo_fwd_kl",
    "rpo_sq",
]


def _check_floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")


def _check_same(**tensors: Tensor) -> None:
    """Floating-point tensors of one shape, or an error: operators would broadcast without a word."""
    _check_floating(**tensors)
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes must be equal, nothing is broadcast; got {shapes}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_positive(name: str, value: float) -> None:
    _check_number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")


def _check_label_smoothing(value: float) -> None:
    _check_number("label_smoothing", value)
    if not 0.0 <= value < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {value}")


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
    _check_same(
        policy_logps_1=policy_logps_1,
        policy_logps_2=policy_logps_2,
        reference_logps_1=reference_logps_1,
        reference_logps_2=reference_logps_2,
    )
    return (policy_logps_1 - reference_logps_1) - (policy_logps_2 - reference_logps_2)


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
    _check_floating(h=h)
    _check_positive("beta", beta)
    _check_label_smoothing(label_smoothing)
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
    _check_floating(h=h)
    _check_positive("beta", beta)
    _check_label_smoothing(label_smoothing)
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
    _check_floating(h=h)
    _check_positive("tau", tau)
    return (h - 1.0 / (2.0 * tau)) ** 2


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
    _check_same(h=h, reward_margins=reward_margins)
    _check_positive("beta", beta)
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
    _check_floating(h=h, reward_margins=reward_margins)
    if h.dim() != 1 or reward_margins.dim() != 2 or reward_margins.shape[1:] != h.shape or len(reward_margins) == 0:
        raise ValueError(
            "h must be [P] and reward_margins [K, P] with K >= 1; "
            f"got h {list(h.shape)}, reward_margins {list(reward_margins.shape)}"
        )
    _check_positive("beta", beta)
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
    _check_same(h=h, reward_margins=reward_margins)
    _check_positive("beta", beta)
    _check_positive("reward_scale", reward_scale)
    return beta * h, reward_scale * reward_margins


def _bernoulli_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(Bern(sigmoid(p_logits)) || Bern(sigmoid(q_logits))), nats, finite for every finite logit."""
    yes = torch.sigmoid(p_logits) * (F.logsigmoid(p_logits) - F.logsigmoid(q_logits))
    no = torch.sigmoid(-p_logits) * (F.logsigmoid(-p_logits) - F.logsigmoid(-q_logits))
    return yes + no


def forward_kl(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """One-sample estimates of KL(pi_ref || pi_theta), the pessimism term of p-DPO, dp-DPO and e-DPO.

    log pi_ref(y|x) - log pi_theta(y|x), y ~ pi_ref(.|x).

    The samples must be pi_ref's own: drawn from the reference at temperature 1 without truncation (no top-k, no top-p),
    once, offline, or the pair's responses where these were themselves drawn from pi_ref. On anybody else's responses
    the mean is not this KL; the two sources must not be mixed unseen.

    The mean over samples is unbiased and its expectation is >= 0; a single sample may be negative. Only
    -log pi_theta(y|x) carries gradient (the reference is a constant), so that minimising the mean is maximum likelihood
    on the reference's samples; log pi_ref makes the number a KL and nothing else.

    With a weight alpha > 0, ``loss.mean() + alpha * forward_kl(...).mean()`` turns `dpo` into p-DPO, `distilled_dpo`
    into dp-DPO and `ensemble_dpo` into pessimistic e-DPO, the full objective.

    Args:
        policy_logps: ``[S]``, log pi_theta(y|x), nats.
        reference_logps: ``[S]``, log pi_ref(y|x) of the same samples, nats.

    Returns:
        ``[S]``, nats.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ.

    References:
        Fisch et al., "Robust Preference Optimization through Reward Model Distillation", arXiv 2405.19316, Theorem 2
        and the p-DPO, dp-DPO and e-DPO objectives.
    """
    _check_same(policy_logps=policy_logps, reference_logps=reference_logps)
    return reference_logps - policy_logps
