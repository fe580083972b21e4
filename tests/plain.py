"""The truth for tests: transformers itself, one unpadded sequence at a time, in float64."""

from __future__ import annotations

import copy

import torch


def doubled(model):
    """A float64 copy, for numbers and gradients that rounding does not reach."""
    return copy.deepcopy(model).double().eval()


def logps(model, tree) -> list[torch.Tensor]:
    """log pi(y|x) of each response of a tree, from full logits; scalars that carry gradient."""
    out = []
    for response in tree.responses:
        table = model(input_ids=torch.tensor([tree.prompt_ids + response])).logits[0].log_softmax(-1)
        p = len(tree.prompt_ids)
        out.append(sum(table[p - 1 + i, token] for i, token in enumerate(response)))
    return out


def last_hidden(model, tree) -> torch.Tensor:
    """Final hidden state at each response's last token, [R, H]."""
    rows = []
    for response in tree.responses:
        out = model(input_ids=torch.tensor([tree.prompt_ids + response]), output_hidden_states=True)
        rows.append(out.hidden_states[-1][0, -1])
    return torch.stack(rows)


def rewards(model, tree) -> list[torch.Tensor]:
    """A classifier's own logits; scalars that carry gradient."""
    return [model(input_ids=torch.tensor([tree.prompt_ids + r])).logits[0, 0] for r in tree.responses]
