"""What is compiled for this CPU against float64, and what happens where nothing can be compiled."""

from __future__ import annotations

import dataclasses
import logging
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from prefdistill.data.tree import Tree
from prefdistill.models.attention import attend, blocks_of, carrier_mask
from prefdistill.models.forward import TreeModel
from prefdistill.native import attention, library
from prefdistill.native.elementwise import Gate, Norm, Rotary
from prefdistill.native.library import Library
from test_attention import dense, places_of, visible

LIBRARY = library.library()
needs_kernel = pytest.mark.skipif(LIBRARY is None, reason="no compiler, or a CPU without AVX2")
CPU = torch.device("cpu")
# A type's rounding: relative, to the nearest.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
of_each_type = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            dtype,
            marks=pytest.mark.skipif(
                library.library_for(dtype) is None, reason=f"nothing is compiled for {dtype} here"
            ),
        )
        for dtype in ROUNDING
    ],
    ids=str,
)

# Longer than a block of 128 queries, than 128 keys and than a row of 32, and shorter than all of them.
lengths = st.tuples(st.integers(1, 300), st.lists(st.integers(1, 150), min_size=1, max_size=4).map(tuple))


def libraries(dtype: torch.dtype) -> list[Library]:
    """This machine's, and the same without AMX."""
    tiled = LIBRARY.tiles and dtype == torch.bfloat16
    return [LIBRARY, dataclasses.replace(LIBRARY, tiles=False)] if tiled else [LIBRARY]


def drawn(tokens: int, heads: int, dtype: torch.dtype, *, d: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(tokens, heads, d, generator=g)).to(dtype)


def both(compiled, shapes, dtype, *, window=None, heads=(6, 3), d=32, seed=0):
    """What comes out and its gradients: of the library, and in float64 of the same numbers."""
    places = places_of(shapes)
    tokens = places[-1].end
    values = [
        drawn(tokens, n, dtype, d=d, seed=seed + i, scale=s)
        for i, (n, s) in enumerate(zip((*heads, heads[1]), (2, 1, 1), strict=True))
    ]
    grad = drawn(tokens, heads[0], dtype, d=d, seed=seed + 7)
    inputs = [x.clone().requires_grad_() for x in values]
    ours = attention.attend(compiled, *inputs, blocks_of(places, window=window), d**-0.5)
    found = [ours, *torch.autograd.grad(ours, inputs, grad)]
    wide = [x.double().requires_grad_() for x in values]
    truth = dense(*(x.transpose(0, 1)[None] for x in wide), visible(places, window))[0]
    return found, [truth, *torch.autograd.grad(truth, wide, grad.double())]


@of_each_type
@pytest.mark.parametrize("window", [None, 5, 100])
@settings(max_examples=15, deadline=None)
@given(
    shapes=st.lists(lengths, min_size=1, max_size=3),
    heads=st.sampled_from([(6, 3), (4, 4), (5, 1)]),
    d=st.sampled_from([32, 64, 96]),
    seed=st.integers(0, 99),
)
def test_equals_dense_attention_with_its_gradients(dtype, window, shapes, heads, d, seed):
    most = {torch.bfloat16: (0.01, 1e-3, 0.03), torch.float32: (2e-6, 2e-6, 4e-6)}[dtype]
    for compiled in libraries(dtype):
        for ours, truth in zip(*both(compiled, shapes, dtype, window=window, heads=heads, d=d, seed=seed), strict=True):
            # Probabilities, their gradients and what comes out are rounded once each, in bfloat16 by 2^-8 at most; in
            # float32 sums of hundreds of products are, and scores of some tens are raised.
            assert (ours.double() - truth).norm() <= most[0] * truth.norm() + most[1]
            assert (ours.double() - truth).abs().max() <= most[2] * truth.abs().max() + most[1]


@of_each_type
def test_a_tree_hangs_on_no_other_and_a_call_on_no_earlier_one(dtype):
    """Margins are zero to the bit before training, whatever batch a reference's log-probs were computed in."""
    small, large = [(140, (30, 40))], [(140, (30, 40)), (200, (130, 5)), (1, (1,))]
    q, k, v = (drawn(547, n, dtype, d=64, seed=n) for n in (4, 2, 2))
    for compiled in libraries(dtype):
        alone = attention.attend(compiled, q[:210], k[:210], v[:210], blocks_of(places_of(small)), 0.125)
        for _ in range(3):
            assert torch.equal(attention.attend(compiled, q, k, v, blocks_of(places_of(large)), 0.125)[:210], alone)


@of_each_type
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_rounding_alone_and_the_same_number_nothing(dtype, threads):
    before = torch.get_num_threads()
    truth = both(LIBRARY, [(300, (40, 60))], dtype)[0]
    try:
        torch.set_num_threads(threads)
        first, again = (both(LIBRARY, [(300, (40, 60))], dtype)[0] for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(first, again, truth, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(
            a,
            c,
            atol={torch.bfloat16: 5, torch.float32: 32}[dtype] * ROUNDING[dtype] * float(c.detach().abs().max()),
            rtol=0,
        )


@needs_kernel
def test_blocks_of_another_row_are_refused():
    q, k, v = (drawn(45, n, torch.float32, d=32, seed=n) for n in (2, 1, 1))
    for blocks in (blocks_of(places_of([(40, (3, 3))])), blocks_of(places_of([(40, (3,))])), []):
        with pytest.raises(ValueError, match="do not fit queries"):
            attention.attend(LIBRARY, q, k, v, blocks, 1.0)


@of_each_type
def test_what_is_not_finite_is_not_hidden(dtype):
    places = places_of([(40, (3, 2))])
    q, k, v = (drawn(45, n, dtype, d=32, seed=n) for n in (2, 1, 1))
    q[20] = float("nan")
    for compiled in libraries(dtype):
        out = attention.attend(compiled, q, k, v, blocks_of(places), 1.0)
        assert out[20].isnan().all()
        assert out[:20].isfinite().all()
        assert out[21:].isfinite().all()


@of_each_type
def test_scores_far_apart_are_a_choice_of_one_key(dtype):
    places = places_of([(200, (2,))])
    q, k, v = torch.zeros(202, 1, 32), torch.zeros(202, 1, 32), torch.randn(202, 1, 32)
    q[:, :, 0], k[17, :, 0] = 1e4, 1e4
    q, k, v = (x.to(dtype) for x in (q, k, v))
    for compiled in libraries(dtype):
        out = attention.attend(compiled, q, k, v, blocks_of(places), 1.0)
        assert torch.equal(out[17:], v[17].expand(185, 1, 32))


@of_each_type
def test_the_model_attends_by_it(monkeypatch, dtype):
    calls = []
    monkeypatch.setattr("prefdistill.models.attention.library_for", lambda kind: calls.append(kind) or LIBRARY)
    places = places_of([(40, (3, 2))])
    mask = carrier_mask(places, window=None, device=CPU)
    for d, counted in ((32, [dtype]), (40, [])):
        q, k, v = (drawn(45, n, dtype, d=d, seed=n).transpose(0, 1)[None] for n in (4, 2, 3))
        v = v[:, :2]
        calls.clear()
        ours = attend(nn.Module(), q, k, v, mask)[0]
        assert calls == counted, d
        truth = dense(q.double(), k.double(), v.double(), visible(places, None))
        most = 16 * ROUNDING[dtype]
        torch.testing.assert_close(ours.double(), truth, atol=most, rtol=most)


@needs_kernel
def test_a_type_that_this_cpu_lacks_is_said_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(library, "library", lambda: dataclasses.replace(LIBRARY, names={torch.float32: "float"}))
    library._say_lacking.cache_clear()
    assert library.library_for(torch.float32) is not None
    assert [library.library_for(torch.bfloat16) for _ in range(2)] == [None, None]
    assert caplog.text.count("in bfloat16: it has no products of that") == 1


def test_other_types_are_pytorchs():
    assert library.library_for(torch.float64) is None
    assert library.library_for(torch.float16) is None


# -- gates and norms ------------------------------------------------------------------------------------------------


@of_each_type
@given(n=st.integers(1, 9000), seed=st.integers(0, 99), scale=st.sampled_from([0.01, 1.0, 30.0]))
@settings(max_examples=40, deadline=None)
def test_gates_equal_their_formula_with_its_gradients(dtype, n, seed, scale):
    g = torch.Generator().manual_seed(seed)
    gate, up, grad = ((s * torch.randn(n, generator=g)).to(dtype) for s in (scale, 1.0, 1.0))
    found, truth = [], []
    for values, results in (((gate, up, grad), found), ((gate.double(), up.double(), grad.double()), truth)):
        x, y = values[0].requires_grad_(), values[1].requires_grad_()
        out = Gate.apply(x, y, LIBRARY) if results is found else nn.functional.silu(x) * y
        results += [out, *torch.autograd.grad(out, (x, y), values[2])]
    for ours, exact in zip(found, truth, strict=True):
        # One rounding to the type, beside float32's own.
        torch.testing.assert_close(ours.double(), exact, rtol=ROUNDING[dtype] + 1e-6, atol=1e-6 * scale)


@of_each_type
def test_gates_of_numbers_that_are_none_or_huge(dtype):
    gate = torch.tensor([float("nan"), 1e30, -1e30, float("inf"), 0.0, 2.0]).to(dtype)
    up = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, float("nan")]).to(dtype)
    out = Gate.apply(gate, up, LIBRARY)
    assert out.isnan().tolist() == [True, False, False, False, False, True]
    assert out[1] == gate[1]
    assert out[2:5].tolist() == [0.0, float("inf"), 0.0]


@of_each_type
@given(rows=st.integers(1, 40), d=st.integers(1, 200), seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 1e3]))
@settings(max_examples=40, deadline=None)
def test_norms_equal_their_formula_with_its_gradients(dtype, rows, d, seed, scale):
    g = torch.Generator().manual_seed(seed)
    x, weight = scale * torch.randn(rows, d, generator=g), 1 + torch.randn(d, generator=g)
    grad = torch.randn(rows, d, generator=g).to(dtype)
    found, truth = [], []
    for a, w, up, results in ((x, weight, grad, found), (x.double(), weight.double(), grad.double(), truth)):
        a, w = a.requires_grad_(), w.requires_grad_()
        out = Norm.apply(a, w, 1e-6, LIBRARY, dtype) if results is found else rms(a, w, 1e-6)
        results += [out, *torch.autograd.grad(out, (a, w), up)]
    torch.testing.assert_close(found[0].double(), truth[0], rtol=ROUNDING[dtype] + 1e-6, atol=1e-30)
    # Gradients are float32, and sums in which terms of these sizes may cancel.
    steepest = (x.detach().pow(2).mean(-1) + 1e-6).rsqrt().max()
    sizes = (weight.detach() * grad).abs().max() * steepest, grad.float().abs().sum(0).max() * d**0.5
    for ours, exact, size in zip(found[1:], truth[1:], sizes, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5 * float(size))


def rms(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@needs_kernel
def test_frozen_norms_ask_for_no_gradient():
    x, weight = torch.randn(3, 32, requires_grad=True), torch.ones(32)
    Norm.apply(x, weight, 1e-6, LIBRARY, torch.float32).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


@of_each_type
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_takes_them_all_and_gives_what_pytorch_gives(monkeypatch, dtype, checkpointing):
    """Log-probs and gradients of a Llama, in bfloat16 under autocast, to the type's rounding."""
    trees = [Tree((5, 6, 7, 8), ((20, 21, 22, 2), (23, 2))), Tree((9,), ((30, 31),))]
    places = [f"prefdistill.models.{name}.library_for" for name in ("attention", "gates", "norms", "rotary")]
    called = set()
    results = []
    for compiled in (None, LIBRARY):
        for place in places:
            monkeypatch.setattr(
                place, lambda kind, place=place, compiled=compiled: compiled and (called.add((place, kind)) or compiled)
            )
        torch.manual_seed(0)
        raw = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=128,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                attn_implementation="sdpa",
            )
        ).train()
        if checkpointing:
            raw.gradient_checkpointing_enable()
        model = TreeModel(raw)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logps = model.logps(model.collate(trees))
        logps.sum().backward()
        results.append((logps.detach(), torch.cat([p.grad.flatten() for p in raw.parameters()])))
    assert {(place, dtype) for place in places} <= called
    (logps, grads), (ours, our_grads) = results
    torch.testing.assert_close(ours, logps, atol=13 * ROUNDING[dtype], rtol=3 * ROUNDING[dtype])
    assert (our_grads - grads).norm() <= 8 * ROUNDING[dtype] * grads.norm()


@needs_kernel
def test_second_derivatives_are_refused_not_left_out():
    q, k, v = (drawn(5, 1, torch.float32, d=32, seed=n).requires_grad_() for n in range(3))
    for out, of in (
        (Gate.apply(q, k, LIBRARY), q),
        (Norm.apply(q, torch.ones(32), 1e-6, LIBRARY, torch.float32), q),
        (Rotary.apply(q, torch.ones(5, 32), torch.ones(5, 32), LIBRARY), q),
        (attention.attend(LIBRARY, q, k, v, blocks_of(places_of([(3, (2,))])), 1.0), v),
    ):
        (grad,) = torch.autograd.grad(out.square().sum(), of, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.square().sum().backward()


# -- where it cannot be ---------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache of its own, empty, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.library.cache_clear()
    yield tmp_path / "prefdistill"
    library.library.cache_clear()


@needs_kernel
def test_the_environment_can_ask_for_none_or_for_no_amx(fresh, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    for most, tiles in (("AVX512_CORE_BF16", False), ("AVX512_CORE_AMX", LIBRARY.tiles), ("default", LIBRARY.tiles)):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
        library.library.cache_clear()
        assert library.library().tiles == tiles
    monkeypatch.setenv("PREFDISTILL_NATIVE", "0")
    library.library.cache_clear()
    assert library.library() is None
    assert "PREFDISTILL_NATIVE is 0" in caplog.text


def test_other_machines_are_not_asked(fresh, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(library.platform, "machine", lambda: "arm64")
    assert library.library() is None
    assert "written for x86-64" in caplog.text
    assert not fresh.exists()


def test_without_a_compiler_pytorch_attends(fresh, monkeypatch, caplog):
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    caplog.set_level(logging.INFO)
    assert library.library() is None
    assert "no C++ compiler" in caplog.text
    places = places_of([(40, (3, 2))])
    q, k, v = (torch.randn(1, n, 45, 32).bfloat16() for n in (4, 2, 2))
    ours = attend(nn.Module(), q, k, v, carrier_mask(places, window=None, device=CPU))[0]
    truth = dense(q.double(), k.double(), v.double(), visible(places, None))
    torch.testing.assert_close(ours.double(), truth, atol=0.03, rtol=0.03)


def test_a_compiler_that_fails_is_said_and_pytorch_attends(fresh, monkeypatch, caplog, tmp_path):
    if library.compiler() is None:
        pytest.skip("no compiler")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "broken.cpp").write_text("int prefdistill_instructions( {", encoding="utf-8")
    monkeypatch.setattr(library, "FOLDER", tmp_path / "source")
    assert library.library() is None
    assert "PyTorch's operations do the work" in caplog.text
    assert "error" in caplog.text
    assert not list(fresh.iterdir())


@needs_kernel
def test_it_is_compiled_once_and_a_damaged_file_again(fresh, monkeypatch, tmp_path):
    assert library.library() is not None
    (file,) = fresh.iterdir()
    library.library.cache_clear()
    with monkeypatch.context() as patched:
        run, asked = subprocess.run, []
        patched.setattr(library.subprocess, "run", lambda c, **o: asked.append(c) or run(c, **o))
        assert library.library() is not None
    assert [c[1:] for c in asked] == [["--version"]]
    library.library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    damaged = tmp_path / "other" / "prefdistill" / file.name
    damaged.parent.mkdir(parents=True)
    whole = file.read_bytes()
    for left in (b"no library", whole[: len(whole) // 2]):  # to load a part of one would end this process
        damaged.unlink(missing_ok=True)  # this process has it loaded
        damaged.write_bytes(left)
        library.library.cache_clear()
        assert library.library() is not None
        assert any(f.stat().st_size == len(whole) for f in damaged.parent.iterdir())


@needs_kernel
def test_a_cache_that_cannot_be_written_is_said(fresh, monkeypatch, caplog, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert library.library() is None
    assert "PyTorch's operations do the work" in caplog.text
