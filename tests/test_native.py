"""Compiled attention against a dense mask in float64, and what happens where it cannot be compiled."""

from __future__ import annotations

import dataclasses
import logging
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prefdistill.models import native
from prefdistill.models.attention import attend, blocks_of, carrier_mask
from test_attention import dense, places_of, visible

KERNEL = native.kernel()
needs_kernel = pytest.mark.skipif(KERNEL is None, reason="no compiler, or a CPU without bfloat16 products")
CPU = torch.device("cpu")

# Longer than a block of 128 queries, than 128 keys and than a row of 32, and shorter than all of them.
lengths = st.tuples(st.integers(1, 300), st.lists(st.integers(1, 150), min_size=1, max_size=4).map(tuple))


def kernels() -> list[native.Kernel]:
    """This machine's, and the same without AMX."""
    if KERNEL is None:
        return []
    return [KERNEL, dataclasses.replace(KERNEL, tiles=False)] if KERNEL.tiles else [KERNEL]


def drawn(tokens: int, heads: int, *, d: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(tokens, heads, d, generator=g)).bfloat16()


def both(kernel, shapes, *, window=None, heads=(6, 3), d=32, seed=0):
    """What comes out and its gradients: of the kernel, and in float64 of the same numbers."""
    places = places_of(shapes)
    tokens = places[-1].end
    values = [
        drawn(tokens, n, d=d, seed=seed + i, scale=s)
        for i, (n, s) in enumerate(zip((*heads, heads[1]), (2, 1, 1), strict=True))
    ]
    grad = drawn(tokens, heads[0], d=d, seed=seed + 7)
    inputs = [x.clone().requires_grad_() for x in values]
    ours = kernel.attend(*inputs, blocks_of(places, window=window), d**-0.5)
    found = [ours, *torch.autograd.grad(ours, inputs, grad)]
    wide = [x.double().requires_grad_() for x in values]
    truth = dense(*(x.transpose(0, 1)[None] for x in wide), visible(places, window))[0]
    return found, [truth, *torch.autograd.grad(truth, wide, grad.double())]


@needs_kernel
@pytest.mark.parametrize("window", [None, 5, 100])
@settings(max_examples=15, deadline=None)
@given(
    shapes=st.lists(lengths, min_size=1, max_size=3),
    heads=st.sampled_from([(6, 3), (4, 4), (5, 1)]),
    d=st.sampled_from([32, 64, 96]),
    seed=st.integers(0, 99),
)
def test_equals_dense_attention_with_its_gradients(window, shapes, heads, d, seed):
    for kernel in kernels():
        for ours, truth in zip(*both(kernel, shapes, window=window, heads=heads, d=d, seed=seed), strict=True):
            # bfloat16 rounds by 2^-9 at most; probabilities, their gradients and what comes out are rounded once each.
            assert (ours.double() - truth).norm() <= 0.01 * truth.norm() + 1e-3
            assert (ours.double() - truth).abs().max() <= 0.03 * truth.abs().max()


@needs_kernel
def test_a_tree_hangs_on_no_other_and_a_call_on_no_earlier_one():
    """Margins are zero to the bit before training, whatever batch a reference's log-probs were computed in."""
    small, large = [(140, (30, 40))], [(140, (30, 40)), (200, (130, 5)), (1, (1,))]
    q, k, v = (drawn(547, n, d=64, seed=n) for n in (4, 2, 2))
    for kernel in kernels():
        alone = kernel.attend(q[:210], k[:210], v[:210], blocks_of(places_of(small)), 0.125)
        for _ in range(3):
            assert torch.equal(kernel.attend(q, k, v, blocks_of(places_of(large)), 0.125)[:210], alone)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_rounding_alone_and_the_same_number_nothing(threads):
    kernel = kernels()[0]
    before = torch.get_num_threads()
    truth = both(kernel, [(300, (40, 60))])[0]
    try:
        torch.set_num_threads(threads)
        first, again = (both(kernel, [(300, (40, 60))])[0] for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(first, again, truth, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=0.02 * float(c.detach().abs().max()), rtol=0)


@needs_kernel
def test_blocks_of_another_row_are_refused():
    q, k, v = (drawn(45, n, d=32, seed=n) for n in (2, 1, 1))
    for blocks in (blocks_of(places_of([(40, (3, 3))])), blocks_of(places_of([(40, (3,))]))):
        with pytest.raises(ValueError, match="do not fit queries"):
            KERNEL.attend(q, k, v, blocks, 1.0)


@needs_kernel
def test_what_is_not_finite_is_not_hidden():
    places = places_of([(40, (3, 2))])
    q, k, v = (drawn(45, n, d=32, seed=n) for n in (2, 1, 1))
    q[20] = float("nan")
    for kernel in kernels():
        out = kernel.attend(q, k, v, blocks_of(places), 1.0)
        assert out[20].isnan().all()
        assert out[:20].isfinite().all()
        assert out[21:].isfinite().all()


@needs_kernel
def test_scores_far_apart_are_a_choice_of_one_key():
    places = places_of([(200, (2,))])
    q, k, v = torch.zeros(202, 1, 32), torch.zeros(202, 1, 32), torch.randn(202, 1, 32)
    q[:, :, 0], k[17, :, 0] = 1e4, 1e4
    q, k, v = (x.bfloat16() for x in (q, k, v))
    for kernel in kernels():
        out = kernel.attend(q, k, v, blocks_of(places), 1.0)
        assert torch.equal(out[17:], v[17].expand(185, 1, 32))


@needs_kernel
def test_the_model_attends_by_it_under_autocast(monkeypatch):
    calls = []
    monkeypatch.setattr(native, "kernel", lambda: calls.append(1) or KERNEL)
    places = places_of([(40, (3, 2))])
    mask = carrier_mask(places, window=None, device=CPU)
    for d, dtype, counted in ((32, torch.bfloat16, 1), (32, torch.float32, 0), (40, torch.bfloat16, 0)):
        q, k, v = (torch.randn(1, n, 45, d).to(dtype) for n in (4, 2, 2))
        calls.clear()
        ours = attend(nn.Module(), q, k, v, mask)[0]
        assert len(calls) == counted, (d, dtype)
        truth = dense(q.double(), k.double(), v.double(), visible(places, None))
        torch.testing.assert_close(ours.double(), truth, atol=0.03, rtol=0.03)


# -- where it cannot be ---------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache of its own, empty, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.kernel.cache_clear()
    yield tmp_path / "prefdistill"
    native.kernel.cache_clear()


def test_without_a_compiler_pytorch_attends(fresh, monkeypatch, caplog):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    caplog.set_level(logging.INFO)
    assert native.kernel() is None
    assert "no C++ compiler" in caplog.text
    places = places_of([(40, (3, 2))])
    q, k, v = (torch.randn(1, n, 45, 32).bfloat16() for n in (4, 2, 2))
    ours = attend(nn.Module(), q, k, v, carrier_mask(places, window=None, device=CPU))[0]
    truth = dense(q.double(), k.double(), v.double(), visible(places, None))
    torch.testing.assert_close(ours.double(), truth, atol=0.03, rtol=0.03)


def test_a_compiler_that_fails_is_said_and_pytorch_attends(fresh, monkeypatch, caplog, tmp_path):
    if native.compiler() is None:
        pytest.skip("no compiler")
    broken = tmp_path / "attention.cpp"
    broken.write_text("int prefdistill_instructions( {", encoding="utf-8")
    monkeypatch.setattr(native, "SOURCE", broken)
    assert native.kernel() is None
    assert "PyTorch's products do it" in caplog.text
    assert "error" in caplog.text
    assert not list(fresh.iterdir())


@needs_kernel
def test_it_is_compiled_once_and_a_damaged_file_again(fresh, monkeypatch, tmp_path):
    assert native.kernel() is not None
    (file,) = fresh.iterdir()
    native.kernel.cache_clear()
    with monkeypatch.context() as patched:
        run, asked = subprocess.run, []
        patched.setattr(native.subprocess, "run", lambda c, **o: asked.append(c) or run(c, **o))
        assert native.kernel() is not None
    assert [c[1:] for c in asked] == [["--version"]]
    native.kernel.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    damaged = tmp_path / "other" / "prefdistill" / file.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"no library")
    assert native.kernel() is not None
    assert damaged.stat().st_size == file.stat().st_size


@needs_kernel
def test_a_cache_that_cannot_be_written_is_said(fresh, monkeypatch, caplog, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert native.kernel() is None
    assert "PyTorch's products do it" in caplog.text
