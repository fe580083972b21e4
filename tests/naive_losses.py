"""Every loss's formula written with `math` alone and naively, to compare with, and what tests of losses share.

No logsigmoid, no stable forms: they share nothing with the implementation, and serve moderate margins in float64.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from prefdistill.losses import (
    distilled_dpo,
    dpo,
    ipo,
    robust_dpo,
    rpo_bwd_kl,
    rpo_fwd_kl,
    rpo_sq,
)

PROPERTY = settings(max_examples=60, deadline=None)


def tensor(values: object, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def bernoulli_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1.0 - p) * math.log((1.0 - p) / (1.0 - q))


def naive_dpo(h: float, beta: float, e: float = 0.0) -> float:
    return -(1.0 - e) * math.log(sigmoid(beta * h)) - e * math.log(1.0 - sigmoid(beta * h))


def naive_robust(h: float, beta: float, e: float) -> float:
    right, wrong = -math.log(sigmoid(beta * h)), -math.log(1.0 - sigmoid(beta * h))
    return ((1.0 - e) * right - e * wrong) / (1.0 - 2.0 * e)


def naive_ipo(h: float, tau: float) -> float:
    return (h - 0.5 / tau) ** 2


def naive_distilled(h: float, r: float, beta: float) -> float:
    return (r - beta * h) ** 2


def naive_rpo_bwd(h: float, r: float, beta: float, eta: float) -> float:
    return bernoulli_kl(sigmoid(eta * r), sigmoid(beta * h))


def naive_rpo_fwd(h: float, r: float, beta: float, eta: float) -> float:
    return bernoulli_kl(sigmoid(beta * h), sigmoid(eta * r))


# name -> (the loss of tensors h and r, the naive loss of floats h and r); r is ignored where there is no reward
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[float, float], float]]] = {
    "dpo": (lambda h, r: dpo(h, beta=0.3), lambda h, r: naive_dpo(h, 0.3)),
    "cdpo": (lambda h, r: dpo(h, beta=0.3, label_smoothing=0.2), lambda h, r: naive_dpo(h, 0.3, 0.2)),
    "robust": (lambda h, r: robust_dpo(h, beta=0.3, label_smoothing=0.2), lambda h, r: naive_robust(h, 0.3, 0.2)),
    "robust, e = 0": (lambda h, r: robust_dpo(h, beta=0.3, label_smoothing=0.0), lambda h, r: naive_dpo(h, 0.3)),
    "ipo": (lambda h, r: ipo(h, tau=0.3), lambda h, r: naive_ipo(h, 0.3)),
    "d-dpo": (lambda h, r: distilled_dpo(h, r, beta=0.3), lambda h, r: naive_distilled(h, r, 0.3)),
    "rpo_sq": (
        lambda h, r: rpo_sq(h, r, beta=0.3, reward_scale=1.7),
        lambda h, r: naive_distilled(h, 1.7 * r, 0.3),
    ),
    "rpo_bwd_kl": (
        lambda h, r: rpo_bwd_kl(h, r, beta=0.3, reward_scale=1.7),
        lambda h, r: naive_rpo_bwd(h, r, 0.3, 1.7),
    ),
    "rpo_fwd_kl": (
        lambda h, r: rpo_fwd_kl(h, r, beta=0.3, reward_scale=1.7),
        lambda h, r: naive_rpo_fwd(h, r, 0.3, 1.7),
    ),
}
WITH_REWARD = {"d-dpo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"}
each_loss = pytest.mark.parametrize("name", LOSSES)


def some_pairs(n: int = 40, seed: int = 0) -> tuple[list[float], list[float]]:
    draw = random.Random(seed)
    return [draw.uniform(-25, 25) for _ in range(n)], [draw.uniform(-3, 3) for _ in range(n)]
