"""Reward models by Bradley-Terry (paper, section 3): full, LoRA, or a linear head on frozen features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from scipy import linalg, optimize, special
from torch import Tensor, nn

from prefdistill.data.tree import Tree, TreeBatch
from prefdistill.errors import DataError
from prefdistill.training.trees import TreeTrainer, check_places

L2_GRID = (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)
FOLDS = 4
MAX_SCALE = 10.0
NEWTON_STEPS = 100
ROUNDING = 1e-14


@dataclass(frozen=True)
class RewardExample:
    """A tree, its pairs (chosen, rejected), how often each pair stands in the member's resample, and its name.

    Raises:
        DataError: there is no response at an index, or not one weight a pair.
    """

    tree: Tree
    pairs: tuple[tuple[int, int], ...]
    weights: tuple[int, ...]
    name: str = ""

    def __post_init__(self) -> None:
        check_places(self.tree, self.pairs, self.name)
        if len(self.weights) != len(self.pairs):
            raise DataError(f"{self.name or 'a tree'} has {len(self.pairs)} pairs and {len(self.weights)} weights")


def join_pairs(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pairs of a batch's trees as indices into its responses: `pairs` [P, 2], `weights` [P]."""
    pairs, weights, start = [], [], 0
    for item in items:
        example: RewardExample = item["example"]
        pairs += [(start + c, start + r) for c, r in example.pairs]
        weights += list(example.weights)
        start += len(example.tree.responses)
    return {"pairs": torch.tensor(pairs), "weights": torch.tensor(weights, dtype=torch.float64)}


class RewardTrainer(TreeTrainer):
    """Trains a sequence classifier with one label on -log sigmoid(r(x, y_w) - r(x, y_l)).

    The loss is the mean over the resample's pairs: a pair drawn twice counts twice, its tree is computed once.
    """

    pool = True

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments,
        *,
        examples: Sequence[RewardExample],
        eval_examples: Sequence[RewardExample] | None = None,
        **kwargs: Any,
    ) -> None:
        kept = [e for e in examples if any(e.weights)]
        super().__init__(
            model,
            args,
            train_items=[{"tree": e.tree, "example": e, "name": e.name} for e in kept],
            eval_items=None if eval_examples is None else [{"tree": e.tree, "example": e} for e in eval_examples],
            join=join_pairs,
            **kwargs,
        )

    def values_of(self, batch: TreeBatch) -> Tensor:
        return self.tree_model.rewards(batch).double()

    def loss_of(self, values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        pairs, weights = inputs["pairs"], inputs["weights"]
        margins = values[pairs[:, 0]] - values[pairs[:, 1]]
        total = weights.sum()
        self.record(
            accuracy=(weights * (margins > 0)).sum() / total,
            margin=(weights * margins).sum() / total,
        )
        return -(weights * F.logsigmoid(margins)).sum() / total


# -- a linear head on frozen features ------------------------------------------------------------------------------


def fit_head(
    differences: np.ndarray, weights: np.ndarray, clusters: np.ndarray, *, l2: float | None = None, seed: int = 0
) -> tuple[np.ndarray, float]:
    """The Bradley-Terry head w of least penalised loss, exactly (the problem is convex), and the penalty used.

    Args:
        differences: [P, H] features of the chosen less those of the rejected response.
        weights: [P] how often each pair counts.
        clusters: [P] the pair's prompt; cross-validation leaves out whole prompts.
        l2: penalty on w in units of standardised features; None: the best of `L2_GRID` by cross-validation.

    Returns:
        w [H] for raw features, and l2.
    """
    used = weights > 0
    differences, weights, clusters = differences[used], weights[used].astype(np.float64), clusters[used]
    scale = np.sqrt(np.average(differences**2, axis=0, weights=weights)) + 1e-8
    x = differences / scale
    if l2 is None:
        l2 = _best_l2(x, weights, clusters, seed)
    return _solve(x, weights, l2) / scale, l2


def _solve(
    x: np.ndarray, weights: np.ndarray, l2: float, *, start: np.ndarray | None = None, tolerance: float = 1e-26
) -> np.ndarray:
    """Newton's method with a halving line search: the loss is strictly convex, so few steps reach its optimum."""
    share = weights / weights.sum()

    def loss(w: np.ndarray) -> float:
        return float(share @ np.logaddexp(0.0, -(x @ w))) + 0.5 * l2 * float(w @ w)

    w = np.zeros(x.shape[1]) if start is None else start
    value = loss(w)
    for _ in range(NEWTON_STEPS):
        wrong = special.expit(-(x @ w))
        gradient = l2 * w - x.T @ (share * wrong)
        curvature = (x.T * (share * wrong * (1 - wrong))) @ x
        curvature[np.diag_indices_from(curvature)] += l2
        step = linalg.solve(curvature, gradient, assume_a="pos")
        decrease = float(gradient @ step)
        size = 1.0
        while loss(w - size * step) > value - 0.1 * size * decrease + ROUNDING and size > 1e-8:
            size /= 2
        w = w - size * step
        value = loss(w)
        if decrease < tolerance:
            break
    return w


def _best_l2(x: np.ndarray, weights: np.ndarray, clusters: np.ndarray, seed: int) -> float:
    prompts = np.unique(clusters)
    folds = min(FOLDS, len(prompts))
    if folds < 2:
        return 1.0
    place = dict(zip(prompts, np.random.default_rng(seed).permutation(len(prompts)) % folds, strict=True))
    fold = np.array([place[c] for c in clusters])

    losses = dict.fromkeys(L2_GRID, 0.0)
    for f in range(folds):
        out = fold == f
        w = None
        # From the largest penalty down, each optimum starts the next: two or three Newton steps each.
        for l2 in L2_GRID:
            w = _solve(x[~out], weights[~out], l2, start=w, tolerance=1e-7)
            losses[l2] += float(weights[out] @ np.logaddexp(0.0, -(x[out] @ w)))
    return min(losses, key=lambda l2: losses[l2])


def calibrate(margins: np.ndarray) -> float:
    """The factor s >= 0 on held-out margins (chosen less rejected) that makes them log-odds: least log-loss of s * m.

    0 where the margins say nothing about the labels; at most MAX_SCALE, since separable data have no finite one.
    """
    if not len(margins):
        return 1.0
    found = optimize.minimize_scalar(
        lambda s: float(np.logaddexp(0.0, -s * margins).mean()), bounds=(0.0, MAX_SCALE), method="bounded"
    )
    at_zero = float(np.log(2.0))
    return 0.0 if found.fun >= at_zero else float(found.x)


def cross_calibrated(margins: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Margins [P] of which every half, by prompt [P], is calibrated on the other one: honest about their scale."""
    half = np.isin(prompts, np.unique(prompts)[::2])
    out = np.array(margins, dtype=np.float64)
    for part in (half, ~half):
        if part.any() and not part.all():
            out[part] *= calibrate(margins[~part])
    return out


def scale_head(model: nn.Module, factor: float) -> None:
    """Multiplies a classifier's rewards by `factor`, in its head's weights, so that whoever loads it gets log-odds."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-1] in ("weight", "bias") and ".original_module." not in name and _is_score(name):
                parameter.mul_(factor)


def _is_score(name: str) -> bool:
    return "score" in name.split(".")


def distinct_pad_id(tokenizer: Any, end_ids: Sequence[int], vocabulary: int) -> int | None:
    """A pad token that ends no response, for a classifier: transformers pools at the last token that is not it.

    A token that was added to the tokenizer alone is none of the model's `vocabulary`. None where the tokenizer has no
    such token; transformers then pools before the end token, and so do we.
    """
    candidates = [
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        *sorted(i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special),
    ]
    for candidate in candidates:
        known = candidate is not None and candidate < vocabulary
        if known and candidate not in end_ids and candidate != tokenizer.bos_token_id:
            return int(candidate)
    return None
