"""A small exact world: X prompts, Y responses each, softmax policies in float64, nothing sampled.

Shapes: policies and rewards [X, Y], ensembles [K, X, Y]; a policy is a log-probability of every response.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """What is known of a world, all of it exact.

    Attributes:
        reference: [X, Y] log pi_ref, full support.
        reward: [X, Y] the true reward.
        members: [K, X, Y] reward models.
        pairs: [P, 3] (prompt, chosen, rejected).
    """

    reference: Tensor
    reward: Tensor
    members: Tensor
    pairs: Tensor

    @property
    def responses(self) -> int:
        return self.reference.shape[1]


def random_world(
    seed: int, *, prompts: int = 4, responses: int = 12, members: int = 3, spread: float = 1.0, noise: float = 1.0
) -> World:
    """Normal rewards, members that see them through noise, and one pair a prompt whose better response is chosen."""
    rng = np.random.default_rng(seed)
    reference = np.log(rng.dirichlet(np.full(responses, 2.0), size=prompts) + 1e-4)
    reference -= np.log(np.exp(reference).sum(1, keepdims=True))
    reward = spread * rng.normal(size=(prompts, responses))
    seen = reward + noise * rng.normal(size=(members, prompts, responses))
    pairs = []
    for x in range(prompts):
        a, b = rng.choice(responses, size=2, replace=False)
        pairs.append((x, a, b) if reward[x, a] > reward[x, b] else (x, b, a))
    return World(torch.tensor(reference), torch.tensor(reward), torch.tensor(seen), torch.tensor(pairs))


def margins_of(values: Tensor, pairs: Tensor) -> Tensor:
    """values(chosen) - values(rejected), [P] from [X, Y], [K, P] from [K, X, Y]."""
    x, chosen, rejected = pairs.unbind(1)
    return values[..., x, chosen] - values[..., x, rejected]


def all_pairs(prompts: int, covered: Tensor) -> Tensor:
    """Every pair of the covered responses of every prompt, [P, 3]; covered [C] are indices of responses."""
    ab = torch.combinations(covered, 2)
    x = torch.arange(prompts).repeat_interleave(len(ab))
    return torch.cat([x[:, None], ab.repeat(prompts, 1)], dim=1)


def rlhf_optimum(reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log of pi_ref exp(r / beta) / Z, [X, Y]."""
    return (reference + reward / beta).log_softmax(-1)


def forward_kl(reference: Tensor, policy: Tensor) -> Tensor:
    """KL(pi_ref || pi) of every prompt [X], summed exactly."""
    return (reference.exp() * (reference - policy)).sum(-1)


def total_variation(a: Tensor, b: Tensor) -> float:
    """Half the sum of |a - b| over the responses, the mean over prompts; 0 to 1."""
    return float(0.5 * (a.exp() - b.exp()).abs().sum(-1).mean())


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where the loss of a policy's logits [X, Y] is least: L-BFGS from `start`, until no step improves."""

    def value_and_gradient(flat: Floats) -> tuple[float, Floats]:
        logits = torch.tensor(flat).reshape(start.shape).requires_grad_()
        value = loss(logits)
        (gradient,) = torch.autograd.grad(value, logits)
        return value.item(), gradient.numpy().ravel()

    found = optimize.minimize(
        value_and_gradient,
        start.numpy().ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxcor": 60, "maxiter": 20_000, "maxfun": 40_000, "ftol": 0.0, "gtol": 1e-13},
    )
    return torch.tensor(found.x).reshape(start.shape)
