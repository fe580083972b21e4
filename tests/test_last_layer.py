"""The last layer's MLP runs where its output is read, and what is read is what it was."""

from __future__ import annotations

import pytest
import torch

from prefdistill.data.tree import Tree
from prefdistill.models.forward import TreeModel
from tiny_models import tiny

TREES = [Tree((5, 6, 7, 8, 9), ((20, 21, 22, 2), (23, 2))), Tree((9, 3), ((30, 31),))]


def seen_of(model: TreeModel) -> list[list[int]]:
    """The numbers of tokens that each layer's MLP sees, from now on."""
    seen: list[list[int]] = [[] for _ in model.backbone.layers]
    for layer, counts in zip(model.backbone.layers, seen, strict=True):
        layer.mlp.down_proj.register_forward_hook(lambda _, args, out, counts=counts: counts.append(args[0].shape[1]))
    return seen


def untrimmed(model: TreeModel) -> TreeModel:
    model.backbone.layers[-1]._forward_pre_hooks.clear()
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probs_and_gradients_are_those_of_all_positions(checkpointing):
    results = []
    for trim in (True, False):
        raw = tiny("llama").train()
        if checkpointing:
            raw.gradient_checkpointing_enable()
        model = TreeModel(raw)
        batch = model.collate(TREES)
        assert batch.kind == "packed"
        seen = seen_of(model if trim else untrimmed(model))
        logps = model.logps(batch)
        logps.sum().backward()
        read, tokens = len(batch.source.unique()), batch.input_ids.numel()
        assert read < tokens
        assert set(seen[0]) == {tokens}
        assert set(seen[-1]) == {read if trim else tokens}
        results.append((logps.detach(), torch.cat([p.grad.flatten() for p in raw.parameters()])))
    (ours, our_grads), (logps, grads) = results
    torch.testing.assert_close(ours, logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_grads, grads, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_each_question_reads_its_own_positions():
    model = TreeModel(tiny("llama").eval())
    batch = model.collate(TREES)
    seen = seen_of(model)
    features, logps = model.features(batch), model.logps(batch)
    both = model.hidden(batch)
    places = [batch.last, batch.source, torch.cat([batch.last, batch.source])]
    assert seen[-1] == [len(p.unique()) for p in places]
    torch.testing.assert_close(model.features(batch, both), features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.logps(batch, both), logps, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_forward_of_the_model_itself_is_whole():
    raw = tiny("llama").eval()
    ids = torch.arange(12)[None]
    before = raw(input_ids=ids).logits
    model = TreeModel(raw)
    model.logps(model.collate(TREES))
    torch.testing.assert_close(raw(input_ids=ids).logits, before, atol=1e-5, rtol=1e-5)
