"""Proposition 1 and point 4: DPO's degenerate optimum, and the finite optima of the regularised losses.

Fisch et al., arXiv 2405.19316, section 3: on pairs of disjoint responses DPO's loss reaches its infimum with next to
no probability on any chosen response, whatever beta is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prefdistill import losses
from prefdistill.theory.world import World, forward_kl, margins_of, minimise

CHOSEN = 1e-7  # probability that the degenerate policy leaves to a chosen response
LOGIT = 30.0  # beta h of the degenerate policy: a loss of exp(-30)


def loss_of(method: str, world: World, beta: float, alpha: float) -> Any:
    """The exact loss of a method as a function of logits [X, Y]: no sampling, the KL summed over all responses."""
    reward_margins = margins_of(world.members, world.pairs)
    reference = margins_of(world.reference, world.pairs)
    zero = torch.zeros_like(reference)

    def loss(logits: Tensor) -> Tensor:
        policy = logits.log_softmax(-1)
        # Both responses' own log-probs enter as differences; the reference's are known.
        h = losses.implicit_margin(margins_of(policy, world.pairs), zero, reference, zero)
        if method in ("dpo", "p-dpo"):
            value = losses.dpo(h, beta=beta).mean()
        elif method == "ipo":
            value = losses.ipo(h, tau=beta).mean()
        elif method in ("d-dpo", "dp-dpo"):
            value = losses.distilled_dpo(h, reward_margins.mean(0), beta=beta).mean()
        else:
            value = losses.ensemble_dpo(h, reward_margins, beta=beta)[0].mean()
        if method in ("p-dpo", "dp-dpo", "e-dpo"):
            value = value + alpha * forward_kl(world.reference, policy).mean()
        return value

    return loss


def degenerate_policy(world: World, beta: float) -> Tensor:
    """log of a policy at DPO's infimum that gives the chosen responses almost nothing: the rest goes to unseen ones."""
    policy = world.reference.clone()
    for x, chosen, rejected in world.pairs.tolist():
        seen = torch.zeros(world.responses, dtype=torch.bool)
        seen[[chosen, rejected]] = True
        unseen = policy[x].masked_fill(seen, -math.inf).log_softmax(0)
        policy[x] = unseen
        policy[x, chosen] = math.log(CHOSEN)
        gap = world.reference[x, chosen] - world.reference[x, rejected]
        policy[x, rejected] = math.log(CHOSEN) - gap - LOGIT / beta
    return policy.log_softmax(-1)


def degenerate_optima(world: World, betas: tuple[float, ...]) -> list[dict[str, float]]:
    """For every beta: DPO's loss at the degenerate policy, and the largest probability of a chosen response there."""
    out = []
    for beta in betas:
        policy = degenerate_policy(world, beta)
        x, chosen, _ = world.pairs.unbind(1)
        out.append(
            {
                "beta": beta,
                "dpo_loss": float(loss_of("dpo", world, beta, 0.0)(policy)),
                "dpo_loss_at_start": float(loss_of("dpo", world, beta, 0.0)(world.reference)),
                "max_prob_chosen": float(policy[x, chosen].exp().max()),
            }
        )
    return out


def finite_optima(world: World, beta: float, alpha: float) -> dict[str, float]:
    """Least ratio pi(y_w) / pi_ref(y_w) at the minimum of each regularised loss, from the degenerate policy on."""
    x, chosen, _ = world.pairs.unbind(1)
    start = degenerate_policy(world, beta).clamp(min=-60)
    out = {}
    for method in ("p-dpo", "dp-dpo", "e-dpo"):
        policy = minimise(loss_of(method, world, beta, alpha), start).log_softmax(-1)
        out[method] = float((policy - world.reference)[x, chosen].exp().min())
    return out
