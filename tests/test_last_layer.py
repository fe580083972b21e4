"""The last layer's MLP runs where its output is read, and what is read is what it was."""

from __future__ import annotations

import io

import pytest
import torch
import torch._dynamo

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
    del model.backbone.layers[-1].self_attn.reads
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


def test_two_forwards_may_stand_before_a_backward_pass():
    """A checkpoint's second forward reads its own positions, not those of the forward before it."""
    grads = []
    for checkpointing in (False, True):
        raw = tiny("llama").train()
        if checkpointing:
            raw.gradient_checkpointing_enable()
        model = TreeModel(raw)
        first, second = model.collate(TREES), model.collate([Tree((4, 5, 6), ((7, 8, 2),))])
        (model.logps(first).sum() + 2 * model.logps(second).sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in raw.parameters()]))
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)


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


@torch.no_grad()
def test_nothing_is_left_behind_by_a_forward_that_ran_or_failed():
    model = TreeModel(tiny("llama").eval())
    layer = model.backbone.layers[-1]
    x = torch.randn(1, 9, model.config.hidden_size)
    whole = layer.mlp(x)
    batch = model.collate(TREES)
    model.logps(batch)
    assert torch.equal(layer.mlp(x), whole)
    failing = layer.mlp.down_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.logps(batch)
    failing.remove()
    assert torch.equal(layer.mlp(x), whole)


@torch._dynamo.config.patch(recompile_limit=1)
def test_layers_that_are_compiled_in_part_read_no_other_batchs_positions():
    """Where torch.compile gives up on a layer it compiles what the layer calls, and runs the rest as it is."""
    trees = [[Tree(tuple(range(5, 5 + n)), (tuple(range(20, 20 + k)), (23, 2)))] for n, k in ((5, 4), (30, 7), (9, 3))]
    other = TreeModel(tiny("llama"))
    with torch.no_grad():
        expected = [other.logps(other.collate(t)) for t in trees]
    raw = tiny("llama")
    model = TreeModel(raw)
    torch._dynamo.reset()
    for layer in raw.model.layers:
        layer.compile(dynamic=True, backend="eager")
    for training in (True, False, True):
        raw.train(training)
        for grad in (True, False):
            for t, logps in zip(trees, expected, strict=True):
                with torch.set_grad_enabled(grad):
                    found = model.logps(model.collate(t)).detach()
                torch.testing.assert_close(found, logps, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_a_model_can_still_be_saved_whole():
    raw = tiny("llama").eval()
    model = TreeModel(raw)
    batch = model.collate(TREES)
    file = io.BytesIO()
    torch.save(raw, file)
    file.seek(0)
    again = TreeModel(torch.load(file, weights_only=False))
    assert again.backbone.layers[0].mlp.forward.args[0] is again.backbone.layers[0].mlp
    assert torch.equal(again.logps(batch), model.logps(batch))
