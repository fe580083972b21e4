"""Exact pessimism over an ensemble: the mixture of members that is the worst case over their convex hull.

The policy that is best in the worst case over members r_1 ... r_K,

    max over pi of min over k of  E_x [ E_pi r_k - E_ref r_k - beta KL(pi || pi_ref) ],

is RLHF's optimum for a mixture r_w = sum_k w_k r_k; w lies in the simplex and minimises the convex

    F(w) = E_x [ beta log E_ref exp(r_w / beta) - E_ref r_w ]  =  beta E_x KL(pi_ref || pi_w),

and F at its minimum is the worst-case advantage (minimax; the inner maximum over pi has this closed form for one
reward; Fisch et al., arXiv 2405.19316, Theorem 2, for a convex set of rewards, here the hull of the members). All that
it needs are the members' scores of samples of the reference: K numbers are found once, offline, then d-DPO distils r_w.

Shapes: N prompts, S samples a prompt, K members; scores [K, N, S]; `reference` [N, S], the probability of each sample
(1/S for samples drawn from the reference, the exact probabilities in a tabular world, 0 for padding).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Mixture", "advantages", "hull_mixture", "tilted"]

Floats = NDArray[np.float64]

_LAST_BARRIER = 1e-13  # times the scale of the scores; the objective is exact to K times that
_NEWTON_STEPS = 50
_ROUNDING = 1e-14


@dataclass(frozen=True)
class Mixture:
    """Weights of the members and what they promise.

    Attributes:
        weights: [K], or [N, K] for weights of every prompt's own.
        value: F at the weights, in units of reward: the worst-case advantage of the mixture's optimal policy.
    """

    weights: Floats
    value: float


def hull_mixture(scores: ArrayLike, reference: ArrayLike, *, beta: float, per_prompt: bool = False) -> Mixture:
    """The exact pessimistic mixture, see the module.

    A Newton barrier method on the simplex, all prompts at once. Members that score every sample alike leave their
    weights open; the barrier then shares evenly. With few samples a prompt log E exp is biased downwards (Jensen), by
    about Var(r_w) / (2 S beta): the same for all w if members have equal spread, else in favour of members with more.

    Args:
        scores: [K, N, S].
        reference: [N, S] probabilities of the samples, each row adding up to 1.
        beta: above 0, in units of reward a nat.
        per_prompt: one mixture for every prompt, as if each had a worst case of its own: more pessimistic.

    Raises:
        ValueError: shapes do not match, a number is not finite, rows of `reference` do not add up to 1, or beta <= 0.
    """
    r, p = _checked(scores, reference, beta)
    k, n, _ = r.shape
    if k == 1:
        weights = np.ones((n, 1) if per_prompt else 1)
        return Mixture(weights, float(_terms(np.ones((n, 1)), r, p, beta)[0].mean()))
    # In units of the scores' own spread, so that the barrier means the same for all data.
    spread = float(np.sqrt((p * np.square(r - (r * p).sum(2, keepdims=True))).sum(2).mean())) or 1.0
    r, b = r / spread, beta / spread
    w = np.full((n if per_prompt else 1, k), 1.0 / k)
    barrier = 1.0
    while barrier > _LAST_BARRIER:
        w = _centre(w, r, p, b, barrier)
        barrier /= 10
    w = w / w.sum(1, keepdims=True)
    value = spread * float(_terms(np.broadcast_to(w, (n, k)), r, p, b)[0].mean())
    return Mixture(w if per_prompt else w[0], value)


def tilted(reference: ArrayLike, rewards: ArrayLike, beta: float) -> Floats:
    """RLHF's optimum pi_ref exp(r / beta) / Z over the samples, [N, S] from [N, S] and [N, S]."""
    p, r = np.asarray(reference, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
    with np.errstate(divide="ignore"):
        logits = np.log(p) + r / beta
    logits = logits - logits.max(-1, keepdims=True)
    out: Floats = np.exp(logits)
    return out / out.sum(-1, keepdims=True)


def advantages(policy: ArrayLike, scores: ArrayLike, reference: ArrayLike, *, beta: float) -> Floats:
    """What each member [K] thinks of a policy [N, S]: E_x [ E_pi r_k - E_ref r_k - beta KL(pi || pi_ref) ]."""
    q, r, p = (np.asarray(a, dtype=np.float64) for a in (policy, scores, reference))
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(q > 0, q * (np.log(q) - np.log(p)), 0.0).sum(1)
    out: Floats = ((q - p) * r).sum(2).mean(1) - beta * kl.mean()
    return out


def _checked(scores: ArrayLike, reference: ArrayLike, beta: float) -> tuple[Floats, Floats]:
    r, p = np.asarray(scores, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if r.ndim != 3 or p.shape != r.shape[1:] or r.size == 0:
        raise ValueError(f"scores [K, N, S] and reference [N, S] do not match: {list(r.shape)} and {list(p.shape)}")
    if not (np.isfinite(r).all() and np.isfinite(p).all()):
        raise ValueError("scores and reference must be finite")
    if (p < 0).any() or np.abs(p.sum(1) - 1).max() > 1e-9:
        raise ValueError("every row of reference must be probabilities that add up to 1")
    if not (np.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be finite and greater than 0, got {beta}")
    return r, p


def _terms(w: Floats, r: Floats, p: Floats, beta: float) -> tuple[Floats, Floats, Floats]:
    """F of every prompt at w [N, K], its gradient [N, K] and Hessian [N, K, K]."""
    mixed = np.einsum("nk,kns->ns", w, r) / beta
    top = np.where(p > 0, mixed, -np.inf).max(1, keepdims=True)
    tilt = p * np.exp(np.minimum(mixed - top, 0.0))
    total = tilt.sum(1, keepdims=True)
    q = tilt / total
    mean_p = np.einsum("kns,ns->nk", r, p)
    value = beta * (np.log(total) + top)[:, 0] - np.einsum("nk,nk->n", w, mean_p)
    mean_q = np.einsum("kns,ns->nk", r, q)
    centred = r - mean_q.T[:, :, None]
    hessian = np.einsum("kns,lns,ns->nkl", centred, centred, q, optimize=True) / beta
    return value, mean_q - mean_p, hessian


def _centre(w: Floats, r: Floats, p: Floats, beta: float, barrier: float) -> Floats:
    """Minimises F(w) - barrier * sum log w_k over the simplex by Newton's method, [B, K] for B = 1 or N problems."""
    n, k = r.shape[1], r.shape[0]

    def terms(at: Floats) -> tuple[Floats, Floats, Floats]:
        parts = _terms(np.broadcast_to(at, (n, k)), r, p, beta)
        return parts if len(at) == n > 1 else tuple(x.mean(0, keepdims=True) for x in parts)  # type: ignore[return-value]

    def penalised(at: Floats) -> Floats:
        out: Floats = terms(at)[0] - barrier * np.log(at).sum(1)
        return out

    for _ in range(_NEWTON_STEPS):
        value, gradient, hessian = terms(w)
        value = value - barrier * np.log(w).sum(1)
        # In the variable v = step / w the barrier's curvature is the identity: well conditioned at any corner.
        g = w * gradient - barrier
        h = w[:, :, None] * hessian * w[:, None, :] + barrier * np.eye(k)
        system = np.zeros((len(w), k + 1, k + 1))
        system[:, :k, :k], system[:, :k, k], system[:, k, :k] = h, w, w
        right = np.concatenate([-g, np.zeros((len(w), 1))], axis=1)
        v = np.linalg.solve(system, right[:, :, None])[:, :k, 0]
        decrease = -np.einsum("bk,bk->b", g, v)
        if (decrease <= 1e-3 * barrier).all():
            break
        size = np.minimum(1.0, 0.99 / np.maximum(-v.min(1), 1e-300))
        for _ in range(40):
            moved = w * (1 + size[:, None] * v)
            worse = penalised(moved) > value - 0.1 * size * decrease + _ROUNDING * (1 + np.abs(value))
            if not worse.any():
                break
            size = np.where(worse, size / 2, size)
        w = moved / moved.sum(1, keepdims=True)
    return w
