"""Theorem 1: with full support the minimiser of d-DPO is RLHF's optimum, and what is lost as support shrinks.

Fisch et al., arXiv 2405.19316, Theorem 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefdistill import losses
from prefdistill.theory.world import (
    World,
    all_pairs,
    margins_of,
    minimise,
    random_world,
    rlhf_optimum,
    total_variation,
)


def distilled(world: World, beta: float, covered: Tensor) -> Tensor:
    """log of the d-DPO minimiser over all pairs of the covered responses, searched from the reference [X, Y].

    Responses without a pair keep their logits: the minimiser that gradient descent reaches from the reference.
    """
    pairs = all_pairs(len(world.reference), covered)
    explicit = margins_of(world.reward, pairs)
    reference = margins_of(world.reference, pairs)
    zero = torch.zeros_like(reference)

    def loss(logits: Tensor) -> Tensor:
        h = losses.implicit_margin(margins_of(logits, pairs), zero, reference, zero)
        return losses.distilled_dpo(h, explicit, beta=beta).mean()

    return minimise(loss, world.reference).log_softmax(-1)


def full_support(seed: int, betas: tuple[float, ...], worlds: int = 3) -> list[dict[str, float]]:
    """For every beta and world the largest distance of a probability from RLHF's optimum."""
    out = []
    for beta in betas:
        for w in range(worlds):
            world = random_world(seed + w, prompts=3, responses=10)
            found = distilled(world, beta, torch.arange(10))
            exact = rlhf_optimum(world.reference, world.reward, beta)
            out.append({"beta": beta, "world": w, "gap": float((found.exp() - exact.exp()).abs().max())})
    return out


def shrinking_support(seed: int, beta: float, worlds: int = 20, responses: int = 20) -> list[dict[str, float]]:
    """Mean total variation between the d-DPO minimiser and RLHF's optimum, by the share of responses with a pair."""
    out = []
    for count in (20, 18, 15, 10, 6, 3, 2):
        gaps = []
        for w in range(worlds):
            world = random_world(seed + w, prompts=2, responses=responses)
            covered = torch.randperm(responses, generator=torch.Generator().manual_seed(seed + w))[:count]
            exact = rlhf_optimum(world.reference, world.reward, beta)
            gaps.append(total_variation(distilled(world, beta, covered), exact))
        at_start = [
            total_variation(world.reference, rlhf_optimum(world.reference, world.reward, beta))
            for world in (random_world(seed + w, prompts=2, responses=responses) for w in range(worlds))
        ]
        out.append(
            {
                "covered": count / responses,
                "total_variation": sum(gaps) / worlds,
                "reference_total_variation": sum(at_start) / worlds,
            }
        )
    return out
