"""Gradients of weights by AMX: float64's sums of the same numbers, in linear layers under autocast."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prefdistill.models import linears
from prefdistill.models.linears import speed_up_linears
from prefdistill.native import library, outer
from prefdistill.native.outer import ROWS
from tiny_models import tiny

COMPILED = library.library()
pytestmark = pytest.mark.skipif(COMPILED is None or not COMPILED.tiles, reason="no compiler, or a CPU without AMX")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 1100),
    m=st.integers(1, 5).map(lambda n: 32 * n),
    n=st.integers(1, 5).map(lambda n: 32 * n),
    seed=st.integers(0, 2**20),
)
def test_sums_are_float64s(tokens, m, n, seed):
    g, x = drawn(tokens, m, seed=seed).bfloat16(), drawn(tokens, n, seed=seed + 1).bfloat16()
    found = outer.outer(COMPILED, g, x)
    assert found.dtype == torch.float32
    truth, sizes = g.double().T @ x.double(), g.double().abs().T @ x.double().abs()
    assert bool(((found - truth).abs() <= tokens * 2.0**-24 * sizes + 1e-30).all())


def test_rows_that_do_not_lie_in_one_piece_and_threads():
    both = drawn(700, 192).bfloat16()
    truth = both[:, :64].double().T @ both[:, 64:128].double()
    found = outer.outer(COMPILED, both[:, :64], both[:, 64:128])
    torch.testing.assert_close(found.double(), truth, atol=1e-3, rtol=1e-4)
    across = drawn(64, 700).bfloat16().T
    truth = across.double().T @ both[:, :64].double()
    torch.testing.assert_close(outer.outer(COMPILED, across, both[:, :64]).double(), truth, atol=1e-3, rtol=1e-4)
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(outer.outer(COMPILED, both[:, :64], both[:, 64:128]), found), "whatever the threads"
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def counted(monkeypatch):
    """The sizes of every gradient that was made here."""
    calls = []
    real = outer.outer
    monkeypatch.setattr(outer, "outer", lambda c, g, x: calls.append((g.shape[1], x.shape[1])) or real(c, g, x))
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_a_layer_is_what_it_was_but_for_rounding_its_gradient(bias, states, counted):
    layer = nn.Linear(64, 96, bias=bias)
    plain = copy.deepcopy(layer)
    assert speed_up_linears(nn.ModuleList([layer])) == 1
    x, grad = drawn(2, ROWS, 64).to(states), drawn(2, ROWS, 96, seed=1).bfloat16()
    found = []
    for each in (layer, plain):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = each(inputs)
        out.backward(grad)
        found.append((out, inputs.grad, each.weight.grad, each.bias.grad if bias else None))
    (ours, d_x, d_w, d_b), (out, to_x, to_w, to_b) = found
    assert counted == [(96, 64)]
    assert torch.equal(ours, out)
    assert d_x.dtype == states
    assert torch.equal(d_x, to_x)
    truth = grad.flatten(0, 1).double().T @ x.bfloat16().flatten(0, 1).double()
    torch.testing.assert_close(d_w.double(), truth, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(d_w, to_w, atol=0.3, rtol=2.0**-7)
    if bias:
        torch.testing.assert_close(d_b.double(), grad.flatten(0, 1).double().sum(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(d_b, to_b, atol=0.3, rtol=2.0**-7)


def outcome(model, ids, *, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype=dtype):
        logits = model(input_ids=ids).logits.float()
    model.zero_grad()
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_the_same(checkpointing, counted):
    raw = tiny("llama", hidden_size=64, head_dim=16, intermediate_size=96, num_hidden_layers=2)
    ids = torch.arange(ROWS).remainder(100)[None] + 5
    if checkpointing:
        raw.train()
        raw.gradient_checkpointing_enable()
    ours = copy.deepcopy(raw)
    speed_up_linears(ours.get_decoder())
    (logits, grads), (found, our_grads) = outcome(raw, ids), outcome(ours, ids)
    assert len(counted) == 2 * 7
    assert torch.equal(found, logits)
    for name, grad in grads.items():
        assert (our_grads[name] - grad).norm() <= 2.0**-7 * grad.norm(), name


def test_what_does_not_train_and_what_is_small_is_left_to_pytorch(counted):
    layer = nn.Linear(64, 96)
    speed_up_linears(nn.ModuleList([layer]))

    def left(x, *, dtype=torch.bfloat16, autocast=True):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            out = layer(x.requires_grad_())
        out.float().sum().backward()
        assert not counted
        return out

    x = drawn(ROWS, 64)
    assert left(x[1:].clone()).dtype == torch.bfloat16
    assert left(x, autocast=False).dtype == torch.float32
    assert left(x, dtype=torch.float16).dtype == torch.float16
    layer.weight.requires_grad_(False)
    left(x)
    layer.weight.requires_grad_(True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not layer(x).requires_grad
    odd = nn.Linear(40, 96)
    assert not outer.takes(COMPILED, drawn(ROWS, 40), odd.weight)
    assert not outer.takes(replace(COMPILED, tiles=False), x, layer.weight)
    assert outer.takes(COMPILED, x, layer.weight)


def test_second_derivatives_are_refused_not_left_out():
    x, weight = drawn(ROWS, 64).requires_grad_(), nn.Parameter(drawn(96, 64))
    out = outer.linear(COMPILED, x, weight, None)
    (grad,) = torch.autograd.grad(out.float().square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


def test_a_pickle_read_where_there_is_no_amx_goes_by_pytorch(counted, monkeypatch):
    raw = nn.ModuleList([nn.Linear(64, 96)])
    speed_up_linears(raw)
    monkeypatch.setattr(linears, "library", lambda: replace(COMPILED, tiles=False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw[0](drawn(ROWS, 64)).float().sum().backward()
    assert not counted
    assert speed_up_linears(nn.ModuleList([nn.Linear(64, 96)])) == 0
