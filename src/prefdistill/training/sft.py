"""The supervised start: pi_ref from a base model, by maximum likelihood of demonstrations (paper, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import transformers
from torch import Tensor, nn

from prefdistill.data.tree import Tree, TreeBatch, shape_of
from prefdistill.training.trees import Item, TreeTrainer


class SFTTrainer(TreeTrainer):
    """Minimises the mean negative log-likelihood of a response token; prompts carry no loss.

    Args:
        trees: a prompt with its demonstrations each.
        name_of: what errors call a tree's prompt.
    """

    dropout = True  # demonstrations are learnt, nothing is compared

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments,
        *,
        trees: Sequence[Tree],
        eval_trees: Sequence[Tree] | None = None,
        name_of: Callable[[Tree], str] = shape_of,
        **kwargs: Any,
    ) -> None:
        self._tree_name = name_of
        super().__init__(
            model,
            args,
            train_items=[{"tree": t} for t in trees],
            eval_items=None if eval_trees is None else [{"tree": t} for t in eval_trees],
            join=lambda items: {},
            **kwargs,
        )

    def name_of(self, item: Item) -> str:
        return self._tree_name(item["tree"])

    def values_of(self, batch: TreeBatch) -> Tensor:
        return self.tree_model.token_logps(batch)

    def loss_of(self, values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        self.record(token_nll=-values.mean())
        return -values.mean()
