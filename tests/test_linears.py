"""Linear layers by compiled products: float64's numbers, the same to the bit however threads and rows are cut."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from prefdistill.data.tree import Tree
from prefdistill.models import linears
from prefdistill.models.forward import TreeModel
from prefdistill.models.gates import fuse_gates
from prefdistill.models.linears import speed_up_linears, together
from prefdistill.native import library as native
from prefdistill.native.linear import ROWS, linear, takes
from tiny_models import VOCAB, tiny

COMPILED = native.library()
pytestmark = pytest.mark.skipif(
    COMPILED is None or not hasattr(COMPILED.handle, "prefdistill_product_float"),
    reason="no compiler, or no CPU whose float32 is AVX2's",
)


@pytest.fixture
def served(monkeypatch):
    """As on a CPU where the library's products are the faster ones."""
    made = replace(COMPILED, multiplies=True)
    monkeypatch.setattr(linears, "library", lambda: made)
    return made


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def agrees(found, exact, length):
    """Within float32's rounding of a sum of so many products of standard normal numbers."""
    torch.testing.assert_close(found.double(), exact, atol=3e-6 * length**0.5, rtol=3e-5)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(ROWS, 3 * ROWS),
    inner=st.integers(1, 9).map(lambda n: 16 * n),
    outer=st.lists(st.integers(1, 9).map(lambda n: 16 * n), min_size=1, max_size=3),
    threads=st.integers(1, 3),
    trained=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_values_and_gradients_are_those_of_float64(rows, inner, outer, threads, trained):
    x = drawn(1, rows, inner).requires_grad_(trained[3])
    weights = [drawn(n, inner, seed=i + 1).requires_grad_(trained[i]) for i, n in enumerate(outer)]
    grads = [drawn(1, rows, n, seed=i + 9) for i, n in enumerate(outer)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = linear(COMPILED, x, *weights)
        asked = [t for t in (x, *weights) if t.requires_grad]
        led = [i for i, w in enumerate(weights) if x.requires_grad or w.requires_grad]
        assert [out.requires_grad for out in found] == [i in led for i in range(len(weights))]
        ours = torch.autograd.grad([found[i] for i in led], asked, [grads[i] for i in led]) if asked else ()
    finally:
        torch.set_num_threads(before)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, *weights)]
    truth = [wide[0] @ w.T for w in wide[1:]]
    for one, exact in zip(found, truth, strict=True):
        agrees(one, exact.detach(), inner)
    if asked:
        exact_grads = torch.autograd.grad(
            [truth[i] for i in led], [t for t in wide if t.requires_grad], [grads[i].double() for i in led]
        )
        for one, exact in zip(ours, exact_grads, strict=True):
            agrees(one, exact, rows + sum(outer))


def test_sums_and_right_sides_longer_than_what_is_laid_out_at_once():
    x, w = drawn(ROWS + 1, 1040).requires_grad_(), drawn(2064, 1040, seed=1).requires_grad_()
    grad = drawn(ROWS + 1, 2064, seed=2)
    (out,) = linear(COMPILED, x, w)
    agrees(out.detach(), x.detach().double() @ w.detach().double().T, 1040)
    d_x, d_w = torch.autograd.grad(out, (x, w), grad)
    agrees(d_x, grad.double() @ w.detach().double(), 2064)
    agrees(d_w, grad.double().T @ x.detach().double(), ROWS + 1)


def test_rows_of_a_gradient_beyond_one_sum():
    x, w, grad = drawn(2500, 32), drawn(48, 32, seed=1).requires_grad_(), drawn(2500, 48, seed=2)
    (out,) = linear(COMPILED, x, w)
    agrees(torch.autograd.grad(out, w, grad)[0], grad.double().T @ x.double(), 2500)


def test_strides_do_not_matter():
    x, w = drawn(64, 2 * ROWS), drawn(64, 48, seed=1)
    (out,) = linear(COMPILED, x.T, w.T)
    agrees(out, x.T.double() @ w.double(), 64)
    (out,) = linear(COMPILED, drawn(5, ROWS, 128)[:, :, ::2], w.T)
    agrees(out, drawn(5, ROWS, 128)[:, :, ::2].double() @ w.double(), 64)


def test_neither_threads_nor_other_rows_nor_other_weights_change_a_bit():
    x, w, other = drawn(3 * ROWS, 1056), drawn(80, 1056, seed=1), drawn(32, 1056, seed=2)
    (whole,) = linear(COMPILED, x, w)
    assert torch.equal(linear(COMPILED, x[: ROWS + 1], w)[0], whole[: ROWS + 1])
    assert torch.equal(linear(COMPILED, x[7 : 7 + ROWS], w)[0], whole[7 : 7 + ROWS])
    assert torch.equal(linear(COMPILED, x, other, w)[1], whole)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(linear(COMPILED, x, w)[0], whole)
    finally:
        torch.set_num_threads(before)


def test_what_is_not_a_number_stays_in_its_row():
    x, w = drawn(ROWS + 3, 32), drawn(16, 32, seed=1)
    x[5, 7], x[-1, 0] = float("nan"), float("inf")
    (out,) = linear(COMPILED, x, w)
    assert torch.isnan(out[5]).all()
    assert not torch.isfinite(out[-1]).any()
    assert torch.isfinite(out[[i for i in range(len(out)) if i not in (5, len(out) - 1)]]).all()


def test_only_what_the_gradients_need_is_kept():
    def kept(x, w):
        found = []

        def pack(t):
            found.append(t.data_ptr())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            linear(COMPILED, x, w)
        return found

    x, w = drawn(ROWS, 16), drawn(16, 16, seed=1)
    asked_x, asked_w = x.clone().requires_grad_(), w.clone().requires_grad_()
    assert kept(asked_x, w) == [w.data_ptr()], "as PyTorch: the states of a frozen weight can go"
    assert kept(x, asked_w) == [x.data_ptr()]
    assert kept(asked_x, asked_w) == [asked_x.data_ptr(), asked_w.data_ptr()]


def test_gradients_have_their_weights_type_whatever_the_default_is():
    x, w = drawn(ROWS, 16), drawn(16, 16, seed=1).requires_grad_()
    (out,) = linear(COMPILED, x, w)
    torch.set_default_dtype(torch.bfloat16)
    try:
        (grad,) = torch.autograd.grad(out.sum(), w)
    finally:
        torch.set_default_dtype(torch.float32)
    assert grad.dtype == torch.float32
    agrees(grad, x.double().sum(0).expand(16, 16), ROWS)


def test_second_derivatives_are_refused():
    x, w = drawn(ROWS, 16).requires_grad_(), drawn(16, 16, seed=1)
    (grad,) = torch.autograd.grad(linear(COMPILED, x, w)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("x", "w"),
    [
        (drawn(ROWS - 1, 32), drawn(16, 32)),
        (drawn(ROWS, 33), drawn(16, 33)),
        (drawn(ROWS, 32), drawn(1, 32)),
        (drawn(ROWS, 32), drawn(16, 48)),
        (drawn(ROWS, 32).double(), drawn(16, 32).double()),
        (drawn(ROWS, 32), drawn(16, 32).bfloat16()),
        (drawn(ROWS, 32), torch.empty(16, 32, device="meta")),
        (drawn(0, 32), drawn(16, 32)),
        (drawn(ROWS, 0), drawn(16, 0)),
        (drawn(ROWS, 32), drawn(0, 32)),
        (drawn(ROWS, 32), drawn(0)),  # of a shard
        (drawn(ROWS, 32), TwoTensor(drawn(16, 32), drawn(16, 32))),  # holds numbers elsewhere
    ],
)
def test_what_is_not_served(x, w):
    assert not takes(x, w)
    assert takes(drawn(ROWS, 32), drawn(16, 32)), "as all of these but for one thing"


def model_of(family="llama", **overrides):
    """A tiny model, and rows of tokens long enough to be served."""
    model = tiny(family, **overrides)
    ids = torch.randint(3, VOCAB, (2, ROWS), generator=torch.Generator().manual_seed(0))
    return model, ids


def outcome(model, ids, *, autocast=False):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids).logits.float()
    model.zero_grad()
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.fixture
def counted(monkeypatch):
    """How many layers every call of the compiled products served."""
    calls = []
    real = linears.linear.linear

    def spy(compiled, x, *weights):
        calls.append(len(weights))
        return real(compiled, x, *weights)

    monkeypatch.setattr(linears.linear, "linear", spy)
    return calls


@pytest.mark.parametrize("family", ["llama", "gemma3", "biased"])
def test_a_model_computes_the_same(family, served, counted):
    raw, ids = model_of("llama", attention_bias=True, mlp_bias=True) if family == "biased" else model_of(family)
    ours = copy.deepcopy(raw)
    layers = sum(type(m) is nn.Linear for m in ours.get_decoder().modules())
    assert speed_up_linears(ours.get_decoder()) == layers > 0
    assert speed_up_linears(ours.get_decoder()) == 0, "once is enough"
    (logits, grads), (found, our_grads) = outcome(raw, ids), outcome(ours, ids)
    assert counted, "the layers' sizes are served"
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=1e-3 * float(grad.abs().max()), rtol=1e-3, msg=name)


def test_a_copy_and_a_pickle_have_weights_of_their_own(served, counted):
    model, ids = model_of()
    speed_up_linears(model.get_decoder())
    truth = model(input_ids=ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(input_ids=ids).logits, truth)
        other.model.layers[0].mlp.down_proj.weight.data.zero_()
        assert not torch.allclose(other(input_ids=ids).logits, truth)
    torch.testing.assert_close(model(input_ids=ids).logits, truth)


def test_autocast_few_rows_and_other_types_are_left_to_pytorch(served, counted):
    model, ids = model_of()
    raw = copy.deepcopy(model)
    speed_up_linears(model.get_decoder())
    assert torch.equal(outcome(model, ids, autocast=True)[0], outcome(raw, ids, autocast=True)[0])
    assert torch.equal(model(input_ids=ids[:, :9]).logits, raw(input_ids=ids[:, :9]).logits)
    assert torch.equal(model.double()(input_ids=ids).logits, raw.double()(input_ids=ids).logits)
    assert counted == []


def test_a_layer_with_a_hook_or_a_forward_of_its_own_is_left(served):
    model, _ = model_of()
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    first.down_proj.register_forward_hook(lambda *_: None)
    second.down_proj.forward = second.down_proj.forward
    layers = sum(type(m) is nn.Linear for m in model.get_decoder().modules())
    assert speed_up_linears(model.get_decoder()) == layers - 2


def test_layers_of_one_input_go_together_unless_a_hook_wants_a_call(served, counted):
    parts = nn.ModuleDict({"gate": nn.Linear(32, 48, bias=False), "up": nn.Linear(32, 48)})
    raw = copy.deepcopy(parts)
    assert speed_up_linears(parts) == 2
    x = drawn(ROWS, 32)
    for found, name in zip(together(x, parts["gate"], parts["up"]), ("gate", "up"), strict=True):
        torch.testing.assert_close(found, raw[name](x), atol=1e-5, rtol=1e-5)
    assert counted == [2]
    seen = []
    parts["up"].register_forward_hook(lambda *_: seen.append(1))
    together(x, parts["gate"], parts["up"])
    assert counted == [2, 1, 1]
    assert seen == [1]


def test_a_cpu_whose_own_products_are_as_fast_keeps_them(monkeypatch):
    model, _ = model_of()
    monkeypatch.setattr(linears, "library", lambda: replace(COMPILED, multiplies=False))
    assert speed_up_linears(model.get_decoder()) == 0
    monkeypatch.setattr(linears, "library", lambda: None)
    assert speed_up_linears(model.get_decoder()) == 0


def test_a_pickle_read_where_nothing_is_compiled_goes_by_pytorch(served, counted, monkeypatch):
    model, ids = model_of()
    truth = model(input_ids=ids).logits
    speed_up_linears(model.get_decoder())
    for found in (None, replace(COMPILED, multiplies=False)):
        monkeypatch.setattr(linears, "library", lambda found=found: found)
        assert torch.equal(pickle.loads(pickle.dumps(model))(input_ids=ids).logits, truth)
    assert counted == []


def test_a_hook_of_all_modules_sees_every_layer(served, counted):
    model, ids = model_of()
    raw = copy.deepcopy(model)
    fuse_gates(model.get_decoder())
    speed_up_linears(model.get_decoder())
    seen = {id(m): 0 for m in model.get_decoder().modules() if type(m) is nn.Linear}

    def hook(module, args, out):
        if id(module) in seen:
            seen[id(module)] += 1

    with nn.modules.module.register_module_forward_hook(hook):
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, raw(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    assert set(seen.values()) == {1}
    assert 2 not in counted
    model(input_ids=ids)
    assert 2 in counted, "without it gate and up go together"


def test_a_tree_model_goes_by_them(served, counted):
    model, _ = model_of()
    raw = TreeModel(copy.deepcopy(model), path="plain")
    for module in raw.backbone.modules():
        if type(module) is nn.Linear:
            vars(module).pop("forward", None)
    counted.clear()
    trees = [Tree(tuple(3 + i % 100 for i in range(ROWS)), ((5, 6, 7), (8, 9)))]
    truth = raw.logps(raw.collate(trees))
    assert counted == []
    tree = TreeModel(model)
    torch.testing.assert_close(tree.logps(tree.collate(trees)), truth, atol=1e-3, rtol=1e-5)
    assert 2 in counted, "gate and up read the same states"
