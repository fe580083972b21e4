"""Flash kernels over packed rows, told apart from kernels that are wrong; a stand-in computes what they document."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from prefdistill.data.tree import Tree
from prefdistill.models import attention, flash, forward
from prefdistill.models.attention import carrier_mask
from prefdistill.models.backbone import heads_of
from prefdistill.models.forward import TreeModel
from test_attention import dense, heads, lengths, places_of, visible
from tiny_models import tiny

CPU = torch.device("cpu")


def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, late=0):
    """torch.nn.attention.varlen.varlen_attn by its documentation: sequence by sequence, both sides end together.

    `late` keys after a query's own are seen too: a wrong kernel.
    """
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa
    assert query.is_contiguous()
    assert key.is_contiguous()
    assert value.is_contiguous()
    assert int(cu_seq_q.diff().max()) == max_q
    assert int(cu_seq_k.diff().max()) == max_k
    assert int(cu_seq_q[-1]) == len(query)
    assert int(cu_seq_k[-1]) == len(key) == len(value)
    left, right = window_size
    share = query.shape[1] // key.shape[1]
    out = []
    for n in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[n] : cu_seq_q[n + 1]]
        k, v = (x[cu_seq_k[n] : cu_seq_k[n + 1]].repeat_interleave(share, 1) for x in (key, value))
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        seen = (distance >= -right - late) & ((left < 0) | (distance <= left))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
    return torch.cat(out)


@pytest.fixture
def kernel(monkeypatch):
    """Puts a kernel in place of PyTorch's; what was asked of another is forgotten before and after."""

    def put(of):
        flash.works.cache_clear()
        monkeypatch.setattr(flash, "_kernel", lambda: of)

    yield put
    flash.works.cache_clear()


def rows(*inputs):
    return [x[0].transpose(0, 1) for x in inputs]


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@settings(max_examples=25, deadline=None)
@given(shapes=st.lists(lengths, min_size=1, max_size=4))
def test_sequences_are_the_trees_with_their_gradients(window, shapes):
    places = places_of(shapes)
    q, k, v = heads(places[-1].end, width=4, value=4)
    truth = dense(q, k, v, visible(places, window))[0]
    by_trees = flash.dense(*rows(q, k, v), places, flash.masks_of(places, window, CPU), 0.5)
    old, flash._kernel = flash._kernel, lambda: varlen
    try:
        ours = flash.attend(*rows(q, k, v), flash.sequences_of(places, CPU), window, 0.5)
    finally:
        flash._kernel = old
    torch.testing.assert_close(by_trees, truth, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours, truth, atol=1e-12, rtol=1e-12)
    weights = torch.randn(ours.shape, dtype=ours.dtype)
    grads = [torch.autograd.grad((o * weights).sum(), (q, k, v)) for o in (ours, truth)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)  # a prompt's keys are summed in float32


def test_a_prompts_gradients_are_summed_in_float32():
    """Three hundred responses of bfloat16 gradients: summed in bfloat16 they would stand still at 256."""
    k, v = (torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    keys, values = flash._Gathered.apply(k, v, torch.zeros(300, dtype=torch.long))
    (keys.sum() + 2 * values.sum()).backward()
    assert (float(k.grad), float(v.grad)) == (300, 600)


@pytest.mark.parametrize("shape", [flash.SHAPE, (9, 3, 64), (4, 4, 128)])
def test_a_right_kernel_works(kernel, shape):
    kernel(varlen)
    assert flash.works(CPU, shape)
    with torch.inference_mode():
        flash.works.cache_clear()
        assert flash.works(CPU, shape)


def _from_the_start(query, key, value, cu_seq_q, cu_seq_k, *rest, **kwargs):
    """Queries and keys begin together, as PyTorch's is_causal has it: right for prompts, wrong for responses."""
    shift = cu_seq_k.diff() - cu_seq_q.diff()
    kept = torch.cat([torch.arange(a, b - s) for a, b, s in zip(cu_seq_k, cu_seq_k[1:], shift, strict=False)])
    return varlen(query, key[kept], value[kept], cu_seq_q, cu_seq_q, rest[0], rest[0], **kwargs)


def _no_window(*args, window_size, **kwargs):
    return varlen(*args, window_size=(-1, 0), **kwargs)


def _one_gradient_lost(query, key, value, *args, **kwargs):
    return varlen(query, key, value.detach(), *args, **kwargs) + 0 * value.sum()


def _not_finite(*args, **kwargs):
    return varlen(*args, **kwargs) * float("nan")


def _refuses(*args, **kwargs):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")


def _missing(*args, **kwargs):
    raise ImportError("No module named 'torch.nn.attention.varlen'")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda *a, **k: varlen(*a, late=1, **k),
        _from_the_start,
        _no_window,
        _one_gradient_lost,
        _not_finite,
        _refuses,
        _missing,
    ],
    ids=["one key too many", "wrong end", "no window", "no gradient", "nan", "old GPU", "old PyTorch"],
)
def test_a_wrong_kernel_is_found_and_named_in_the_log(kernel, wrong, caplog):
    kernel(wrong)
    with caplog.at_level(logging.INFO, logger="prefdistill.models.flash"):
        assert not flash.works(CPU)
        assert not flash.works(CPU)
    (record,) = caplog.records
    said = record.getMessage()
    assert "without flash kernels" in said
    assert "more" not in said
    assert ("Ampere" in said) == (wrong is _refuses)
    assert ("ImportError" in said) == (wrong is _missing)


def test_pytorchs_own_kernel_refuses_a_cpu_and_that_is_no_error():
    flash.works.cache_clear()
    assert not flash.works(CPU)


def test_pytorchs_own_kernel_takes_what_it_is_given_and_returns_what_is_expected():
    """Shapes alone, forward and backward: no kernel runs, but its arguments are checked."""
    places = places_of([(7, (3, 2)), (4, (5,))])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, k, v = (torch.empty(places[-1].end, n, 64, dtype=torch.bfloat16, requires_grad=True) for n in (6, 3, 3))
        made = flash.sequences_of(places, CPU)
        tensors = (mode.from_tensor(x) for x in (made.keys, made.query_ends, made.key_ends))
        sequences = flash.Sequences(*tensors, made.longest_queries, made.longest_keys)
        out = flash.attend(q, k, v, sequences, 5, 0.125)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert all(x.dtype == torch.bfloat16 for x in (out, *grads))


class _OnGPU:
    """Stands for a model's device where no GPU is."""

    type = "cuda"

    def __repr__(self):
        return "cuda"


@pytest.mark.parametrize("right", [True, False])
def test_a_gpu_packs_where_its_kernels_are_right(monkeypatch, right):
    model = TreeModel(tiny("llama"))
    monkeypatch.setattr(forward, "device_of", lambda _: _OnGPU())
    monkeypatch.setattr(flash, "works", lambda device, *shape: right)
    assert forward._paths(model) == (["packed", "tree"] if right else ["tree"])


def test_what_the_kernels_do_not_know_is_not_given_to_them(monkeypatch):
    monkeypatch.setattr(flash, "works", lambda *_: True)
    with FakeTensorMode():

        def fits(n=64, m=64, dtype=torch.bfloat16, device="cuda"):
            q, k, v = (torch.empty(5, 2, size, dtype=dtype, device=device) for size in (n, n, m))
            return flash.takes(q, k, v)

        assert fits()
        assert fits(256, 256)
        assert not any([fits(60, 60), fits(264, 264), fits(64, 32), fits(dtype=torch.float32), fits(device="cpu")])


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}, (9, 3, 64)),
        ({"num_attention_heads": 8, "hidden_size": 64}, (8, 8, 8)),
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "hidden_size": 64}, (8, 2, 256)),
        ({"num_attention_heads": [4, 8], "hidden_size": 64}, None),
        ({"num_attention_heads": 0, "hidden_size": 64}, None),
        ({"hidden_size": 64}, None),
    ],
)
def test_the_shape_of_a_models_heads(config, shape):
    assert heads_of(SimpleNamespace(**config)) == shape


def _as_on_a_gpu(monkeypatch):
    """Lets a model on a CPU attend as one on a GPU would, the kernel's arithmetic in float32."""

    def kernel(q, k, v, *args, **kwargs):
        return varlen(q.float(), k.float(), v.float(), *args, **kwargs).to(q.dtype)

    over = attention._over
    monkeypatch.setattr(flash, "_kernel", lambda: kernel)
    monkeypatch.setattr(flash, "takes", lambda q, k, v: flash.works(q.device, (q.shape[1], k.shape[1], q.shape[2])))
    monkeypatch.setattr(attention, "_over", lambda *a: over(*a[:-1], "cuda"))


def test_a_kernel_is_asked_inside_a_checkpointed_layer(monkeypatch):
    """What the question saves for its own backward pass is not the layer's."""
    _as_on_a_gpu(monkeypatch)
    grads = []
    for checkpointing in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        flash.works.cache_clear()
        raw = tiny("llama").train()
        model = TreeModel(raw)
        if checkpointing:
            raw.gradient_checkpointing_enable(checkpointing)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.logps(model.collate([Tree((5, 6, 7, 8, 9), ((10, 11, 12), (13, 14)))])).sum()
        loss.backward()
        assert flash.works.cache_info().misses == 1
        grads.append([p.grad for p in raw.parameters()])
    flash.works.cache_clear()
    for plain, *again in zip(*grads, strict=True):
        assert all(torch.equal(plain, g) for g in again)


def test_dropout_falls_on_probabilities_on_a_gpu_too(monkeypatch):
    monkeypatch.setattr(flash, "takes", lambda *_: pytest.fail("flash kernels know no dropout"))
    places = places_of([(5, (3, 2)), (2, (1,))])
    q, k, v = rows(*heads(places[-1].end, width=4, value=4))
    row = carrier_mask(places, window=None, device=CPU).row
    torch.manual_seed(0)
    drawn = torch.stack([attention._over(row, q, k, v, 0.5, 0.2, "cuda") for _ in range(2000)]).detach()
    assert not torch.equal(drawn[0], drawn[1])
    truth = flash.dense(q, k, v, places, row.masks, 0.5).detach()
    torch.testing.assert_close(drawn.mean(0), truth, atol=0.15, rtol=0)


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_a_gpu_takes_the_row_by_its_kernels_or_by_trees(monkeypatch, taken, window):
    """The arithmetic of a GPU runs here on a CPU."""
    asked = []
    monkeypatch.setattr(flash, "takes", lambda *_: taken)
    monkeypatch.setattr(flash, "_kernel", lambda: lambda *a, **k: asked.append(1) or varlen(*a, **k))
    places = places_of([(5, (3, 2)), (4, (1, 6))])
    q, k, v = heads(places[-1].end, width=4, value=4)
    row = carrier_mask(places, window=window, device=CPU).row
    ours = attention._over(row, *rows(q, k, v), 0.5, 0.0, "cuda")
    assert bool(asked) == taken
    torch.testing.assert_close(ours, dense(q, k, v, visible(places, window))[0], atol=1e-12, rtol=1e-12)
