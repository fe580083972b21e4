"""The path of pi(y_w) under gradient descent, for every loss, where responses share features as they do in a network.

A policy with a logit of its own for every response raises the chosen one whenever it lowers the rejected one. A network
cannot: the two are alike, so what moves one moves the other, and the margin is widened along the little that tells them
apart, which other responses share. Here logits are `log pi_ref + features . theta`; the chosen and the rejected
response of a pair have almost the same features. The falling is that of Razin et al., "Unintentional Unalignment"
(arXiv 2410.08847); that nothing in DPO's loss stops it is Proposition 1 of Fisch et al. (arXiv 2405.19316).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prefdistill.theory.degeneracy import loss_of
from prefdistill.theory.world import World, random_world

METHODS = ("dpo", "ipo", "p-dpo", "d-dpo", "dp-dpo", "e-dpo")
LIKENESS = 0.9  # cosine between the features of a pair's two responses
STEPS = 1500
RATE = 0.05


def alike_features(world: World, dimensions: int, seed: int) -> torch.Tensor:
    """Features [X, Y, D] of unit length; those of a pair's two responses have cosine `LIKENESS`."""
    rng = np.random.default_rng(seed)
    features = torch.tensor(rng.normal(size=(*world.reference.shape, dimensions)))
    features = features / features.norm(dim=-1, keepdim=True)
    for x, chosen, rejected in world.pairs.tolist():
        along, other = features[x, chosen], features[x, rejected]
        across = other - (other @ along) * along
        features[x, rejected] = LIKENESS * along + (1 - LIKENESS**2) ** 0.5 * across / across.norm()
    return features


def descend(method: str, world: World, features: torch.Tensor, *, beta: float, alpha: float) -> dict[str, Any]:
    """Gradient descent with Adam from the reference; what becomes of pi(y_w), pi(y_l) and of all the other responses.

    Returns:
        lists over logarithmically spaced steps: `step`, and the means over prompts of `chosen` (log pi(y_w) less log
        pi_ref(y_w)), `rejected`, `unseen` (probability of responses in no pair) and `kl` (KL(pi_ref || pi)).
    """
    loss = loss_of(method, world, beta, alpha)
    theta = torch.zeros(features.shape[-1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([theta], lr=RATE)
    marks = {0, *(round(s) for s in np.geomspace(1, STEPS, 40))}
    x, chosen, rejected = world.pairs.unbind(1)
    path: dict[str, Any] = {name: [] for name in ("step", "chosen", "rejected", "unseen", "kl")}
    for step in range(STEPS + 1):
        logits = world.reference + features @ theta
        if step in marks:
            policy = logits.detach().log_softmax(-1)
            change = policy - world.reference
            path["step"].append(step)
            path["chosen"].append(float(change[x, chosen].mean()))
            path["rejected"].append(float(change[x, rejected].mean()))
            seen = policy[x, chosen].exp() + policy[x, rejected].exp()
            path["unseen"].append(float(1 - seen.mean()))
            path["kl"].append(float(-(world.reference.exp() * change).sum(-1).mean()))
        optimiser.zero_grad()
        loss(logits).backward()
        optimiser.step()
    return path


def paths(seed: int, *, beta: float = 0.5, alpha: float = 0.1) -> dict[str, dict[str, Any]]:
    """`descend` for every method in one world: 6 prompts, 24 responses, 40 features, members that see the truth."""
    world = random_world(seed, prompts=6, responses=24, noise=0.3)
    features = alike_features(world, 40, seed)
    return {method: descend(method, world, features, beta=beta, alpha=alpha) for method in METHODS}
