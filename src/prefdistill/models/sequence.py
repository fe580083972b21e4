"""Reward models that read a whole sequence at once: encoders such as BERT, with a head of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefdistill.data.tree import Tree
from prefdistill.models.backbone import device_of, replace_forward, unwrap


@dataclass(frozen=True)
class SequenceBatch:
    """One row a response, [R, T] each: ids, what is no padding, and which of the two texts a token is of."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor


class SequenceModel:
    """A sequence classifier with one label behind the interface of `TreeModel`; only rewards can be asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        for module in model.modules():
            if type(module) is nn.Linear and module.out_features == 1:
                replace_forward(module, _exact)
        self.config: Any = unwrap(model).config
        self.pad_id = int(self.config.pad_token_id or 0)

    def collate(self, trees: Sequence[Tree], *, pool_pad_id: int | None = None) -> SequenceBatch:
        """`pool_pad_id` says nothing to an encoder, whose own head decides where it reads."""
        rows = [(t.prompt_ids, r) for t in trees for r in t.responses]
        width = max(len(p) + len(r) for p, r in rows)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.long)
        kinds, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, (prompt, response) in enumerate(rows):
            n, end = len(prompt), len(prompt) + len(response)
            ids[i, :end] = torch.tensor([*prompt, *response])
            kinds[i, n:end] = 1
            mask[i, :end] = 1
        device = device_of(self.model)
        return SequenceBatch(ids.to(device), mask.to(device), kinds.to(device))

    def rewards(self, batch: SequenceBatch) -> Tensor:
        """[R] float32."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if getattr(self.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = batch.token_type_ids
        logits: Tensor = self.model(**inputs).logits
        return logits.float()[:, 0]


def _exact(head: nn.Linear, x: Tensor) -> Tensor:
    """A head in its weights' precision: bfloat16 would round a reward near 5 to steps of 0.03."""
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.linear(x.to(head.weight.dtype), head.weight, head.bias)
