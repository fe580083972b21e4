"""Attention over packed trees against a dense mask in float64; no key is seen that should not be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prefdistill.data.tree import Place, Tree, collate_packed
from prefdistill.models import attention
from prefdistill.models.attention import attend, blocks_of, carrier_mask
from prefdistill.models.forward import TreeModel
from tiny_models import tiny

lengths = st.tuples(st.integers(1, 14), st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple))


def places_of(shapes) -> list[Place]:
    places, start = [], 0
    for prompt, responses in shapes:
        places.append(Place(start, prompt, responses))
        start = places[-1].end
    return places


def visible(places, window) -> torch.Tensor:
    """Who sees whom, token by token, from the definition: own tree, prompt or own response, no later, not too far."""
    nodes = []  # (tree, response or 0 for the prompt, position along the path)
    for t, place in enumerate(places):
        nodes += [(t, 0, i) for i in range(place.prompt)]
        for r, n in enumerate(place.responses, start=1):
            nodes += [(t, r, place.prompt + i) for i in range(n)]
    t, r, p = torch.tensor(nodes).T
    seen = (t[:, None] == t) & ((r == 0) | (r[:, None] == r)) & (p <= p[:, None])
    return seen if window is None else seen & (p[:, None] - p < window)


def dense(q, k, v, seen):
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def heads(tokens, *, queries=6, keys=3, width=4, value=5):
    g = torch.Generator().manual_seed(tokens)

    def draw(n, w):
        return torch.randn(1, n, tokens, w, generator=g, dtype=torch.float64, requires_grad=True)

    return draw(queries, width), draw(keys, width), draw(keys, value)


@pytest.mark.parametrize("window", [None, 3, 100])
@settings(max_examples=25, deadline=None)
@given(shapes=st.lists(lengths, min_size=1, max_size=4))
def test_equals_dense_attention_with_its_gradients(window, shapes):
    places = places_of(shapes)
    q, k, v = heads(places[-1].end)
    old, attention.QUERIES = attention.QUERIES, 4  # so that short texts make many blocks
    try:
        mask = carrier_mask(places, window=window, device=torch.device("cpu"))
        assert max(b.stop - b.start for b in mask.row.blocks) <= 4
    finally:
        attention.QUERIES = old
    ours, nothing = attend(nn.Module(), q, k, v, mask)
    truth = dense(q, k, v, visible(places, window))
    assert nothing is None
    torch.testing.assert_close(ours, truth, atol=1e-12, rtol=1e-12)
    weights = torch.randn(ours.shape, dtype=ours.dtype)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weights).sum(), (q, k, v)),
        torch.autograd.grad((truth * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)


@given(shapes=st.lists(lengths, min_size=1, max_size=4))
def test_blocks_cover_every_query_once_in_order(shapes):
    places = places_of(shapes)
    at = 0
    for block in blocks_of(places):
        assert block.start == at < block.stop <= at + attention.QUERIES
        at = block.stop
    assert at == places[-1].end


def test_dropout_falls_on_probabilities_and_is_off_at_rate_zero():
    places = places_of([(5, (3, 2))])
    q, k, v = heads(10)
    mask = carrier_mask(places, window=None, device=torch.device("cpu"))
    without = attend(nn.Module(), q, k, v, mask)[0]
    torch.manual_seed(0)
    drawn = torch.stack([attend(nn.Module(), q, k, v, mask, dropout=0.2)[0] for _ in range(4000)])
    assert not torch.equal(drawn[0], drawn[1])
    # Inverted dropout leaves the mean as it was.
    torch.testing.assert_close(drawn.mean(0), without, atol=0.1, rtol=0)


def test_a_mask_that_lost_its_places_is_refused():
    q, k, v = heads(10)
    mask = carrier_mask(places_of([(5, (3, 2))]), window=None, device=torch.device("cpu")).clone()
    with pytest.raises(ValueError, match="lost its places"):
        attend(nn.Module(), q, k, v, mask)


@pytest.mark.parametrize("asked", ["softcap", "s_aux", "position_bias", "cache"])
def test_what_a_layer_asks_beyond_is_refused(asked):
    q, k, v = heads(10)
    mask = carrier_mask(places_of([(5, (3, 2))]), window=None, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=asked):
        attend(nn.Module(), q, k, v, mask, **{asked: 1.0})


def test_gradient_checkpointing_changes_no_gradient():
    """The layers run again in the backward pass, long after the forward's own masks are gone from its frame."""
    trees = [Tree((5, 6, 7, 8), ((20, 21, 22, 2), (23, 2))), Tree((9,), ((30, 31),))]
    grads = []
    for checkpointing in (False, True):
        raw = tiny("llama").train()
        if checkpointing:
            raw.gradient_checkpointing_enable()
        model = TreeModel(raw)
        assert model.path == "packed"
        model.logps(model.collate(trees)).sum().backward()
        grads.append([p.grad for p in raw.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


def test_autocast_gives_gradients_in_the_weights_own_precision():
    raw = tiny("qwen3").train()  # whose query norms give float32 beside bfloat16 values
    model = TreeModel(raw)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.logps(model.collate([Tree((5, 6, 7, 8), ((20, 21, 2), (23, 2)))])).sum()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in raw.parameters())


def test_a_packed_batch_has_no_padding():
    trees = [Tree((5, 6, 7, 8), ((20, 21, 22, 2), (23, 2))), Tree((9,), ((30, 31),))]
    batch = collate_packed(trees, pad_id=0)
    assert batch.input_ids.shape == (1, sum(t.tokens for t in trees))
    assert batch.places == (Place(0, 4, (4, 2)), Place(10, 1, (2,)))
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 0, 1, 2]]
    assert batch.source.tolist() == [3, 4, 5, 6, 3, 8, 10, 11]
    assert batch.last.tolist() == [7, 9, 12]
