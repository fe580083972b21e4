"""Losses of extreme margins, of other shapes and dtypes, and of inputs that are refused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from naive_losses import (
    LOSSES,
    each_loss,
    some_pairs,
    tensor,
)
from prefdistill import losses
from prefdistill.losses import (
    distilled_dpo,
    dpo,
    ensemble_dpo,
    forward_kl,
    implicit_margin,
    ipo,
    robust_dpo,
    rpo_bwd_kl,
    rpo_fwd_kl,
    rpo_sq,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.01, 1.0, 5.0])
def test_extreme_margins_are_finite(dtype, beta):
    grid = [-1e4, -1e3, -1.0, 0.0, 1.0, 1e3, 1e4]
    pairs = [(a, b) for a in grid for b in grid]

    def check(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        h = tensor([a for a, _ in pairs], dtype, grad=True)
        r = tensor([b for _, b in pairs], dtype, grad=True)
        value = loss(h, r)
        assert value.dtype == dtype
        assert value.isfinite().all()
        for grad in torch.autograd.grad(value.sum(), (h, r), allow_unused=True):
            assert grad is None or grad.isfinite().all()

    check(lambda h, r: dpo(h, beta=beta))
    check(lambda h, r: dpo(h, beta=beta, label_smoothing=0.1))
    check(lambda h, r: robust_dpo(h, beta=beta, label_smoothing=0.1))
    check(lambda h, r: ipo(h, tau=beta))
    check(lambda h, r: distilled_dpo(h, r, beta=beta))
    check(lambda h, r: rpo_sq(h, r, beta=beta, reward_scale=1.0))
    check(lambda h, r: rpo_bwd_kl(h, r, beta=beta, reward_scale=1.0))
    check(lambda h, r: rpo_fwd_kl(h, r, beta=beta, reward_scale=1.0))
    check(lambda h, r: ensemble_dpo(h, torch.stack([r, -r, r + 1]), beta=beta)[0])
    check(lambda h, r: ensemble_dpo(h, torch.stack([r, -r, r + 1]), beta=beta, over="batch")[0])
    check(forward_kl)
    check(lambda h, r: implicit_margin(h, r, r, h))


def test_extreme_margins_have_the_right_values():
    # far out, the logistic losses are linear: -log sigmoid(-1e4) = 1e4, -log sigmoid(1e4) = 0
    h = tensor([-1e4, 1e4], torch.float32)
    assert dpo(h, beta=1.0).tolist() == [1e4, 0.0]
    assert dpo(h, beta=1.0, label_smoothing=0.25).tolist() == [7500.0, 2500.0]
    assert robust_dpo(h, beta=1.0, label_smoothing=0.25).tolist() == [15000.0, -5000.0]
    assert rpo_bwd_kl(h, -h, beta=1.0, reward_scale=1.0).tolist() == [1e4, 1e4]
    assert rpo_fwd_kl(h, -h, beta=1.0, reward_scale=1.0).tolist() == [1e4, 1e4]


def test_plain_dpo_of_an_infinite_margin_is_not_nan():
    assert dpo(tensor([math.inf, -math.inf]), beta=0.1).tolist() == [0.0, math.inf]


def test_ensemble_does_not_hide_a_nan():
    h, r = tensor([0.0, 0.0]), tensor([[1.0, math.nan], [2.0, 3.0]])
    loss, _ = ensemble_dpo(h, r, beta=1.0)
    assert loss[0].item() == 1.0
    assert loss[1].isnan()
    assert ensemble_dpo(h, r, beta=1.0, over="batch")[0].isnan().any()


def test_ensemble_ties_go_to_the_first_member():
    h, r = tensor([0.0, 0.0], grad=True), tensor([[2.0, 5.0], [1.0, -1.0], [-1.0, 1.0]], grad=True)
    for over in ("pair", "batch"):
        loss, member = ensemble_dpo(h, r, beta=1.0, over=over)
        assert member.tolist() == [1, 1]
        (grad,) = torch.autograd.grad(loss.sum(), r)
        assert (grad[2] == 0).all()
        assert not member.requires_grad


# Shapes, dtypes, errors


@each_loss
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 3)])
def test_nothing_is_reduced(name, shape):
    h = torch.zeros(shape, dtype=torch.float64)
    assert LOSSES[name][0](h, h).shape == shape


def test_empty_batch_of_an_ensemble():
    for over in ("pair", "batch"):
        loss, member = ensemble_dpo(torch.zeros(0), torch.zeros(3, 0), beta=1.0, over=over)
        assert loss.shape == member.shape == (0,)
        assert member.dtype == torch.int64


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept(name, dtype):
    x = torch.ones(3, dtype=dtype)
    assert LOSSES[name][0](x, x).dtype == dtype


def test_mixed_widths_promote():
    h, r = torch.ones(3, dtype=torch.float32), torch.ones(3, dtype=torch.float64)
    assert distilled_dpo(h, r, beta=1.0).dtype == torch.float64
    assert ensemble_dpo(h, r[None], beta=1.0)[0].dtype == torch.float64


TWO_TENSORS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "distilled_dpo": lambda a, b: distilled_dpo(a, b, beta=1.0),
    "rpo_sq": lambda a, b: rpo_sq(a, b, beta=1.0, reward_scale=1.0),
    "rpo_bwd_kl": lambda a, b: rpo_bwd_kl(a, b, beta=1.0, reward_scale=1.0),
    "rpo_fwd_kl": lambda a, b: rpo_fwd_kl(a, b, beta=1.0, reward_scale=1.0),
    "forward_kl": forward_kl,
    "implicit_margin, 2nd": lambda a, b: implicit_margin(a, b, a, a),
    "implicit_margin, 3rd": lambda a, b: implicit_margin(a, a, b, a),
    "implicit_margin, 4th": lambda a, b: implicit_margin(a, a, a, b),
}


@pytest.mark.parametrize("name", TWO_TENSORS)
@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (1,), (), (3,)])
def test_shapes_that_would_broadcast_are_an_error(name, shape):
    a, b = torch.zeros(4), torch.zeros(shape)
    for one, other in ((a, b), (b, a)):
        with pytest.raises(ValueError, match="shapes must be equal"):
            TWO_TENSORS[name](one, other)


@pytest.mark.parametrize(
    ("h", "rewards"),
    [((4,), (4,)), ((4,), (2, 3)), ((4,), (2, 1)), ((4,), (4, 2)), ((4, 1), (2, 4)), ((), (2, 1)), ((4,), (0, 4))],
)
def test_ensemble_shapes(h, rewards):
    with pytest.raises(ValueError, match=r"h must be \[P\] and reward_margins \[K, P\]"):
        ensemble_dpo(torch.zeros(h), torch.zeros(rewards), beta=1.0)


ONE_TENSOR: dict[str, Callable[[Tensor], object]] = {
    "dpo": lambda h: dpo(h, beta=1.0),
    "robust_dpo": lambda h: robust_dpo(h, beta=1.0, label_smoothing=0.1),
    "ipo": lambda h: ipo(h, tau=1.0),
}


@pytest.mark.parametrize("bad", [torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool), [0.0] * 4, 0.0])
def test_anything_but_a_floating_point_tensor_is_an_error(bad):
    good = torch.zeros(4)
    for loss in ONE_TENSOR.values():
        with pytest.raises(TypeError, match=r"^h must be"):
            loss(bad)
    for pair_loss in TWO_TENSORS.values():
        for one, other in ((bad, good), (good, bad)):
            with pytest.raises(TypeError, match="must be"):
                pair_loss(one, other)
    with pytest.raises(TypeError, match=r"^h must be"):
        ensemble_dpo(bad, good[None], beta=1.0)
    with pytest.raises(TypeError, match=r"^reward_margins must be"):
        ensemble_dpo(good, bad, beta=1.0)


X = torch.zeros(2)
POSITIVE: dict[str, Callable[[float], object]] = {
    "dpo beta": lambda v: dpo(X, beta=v),
    "robust_dpo beta": lambda v: robust_dpo(X, beta=v, label_smoothing=0.1),
    "ipo tau": lambda v: ipo(X, tau=v),
    "distilled_dpo beta": lambda v: distilled_dpo(X, X, beta=v),
    "ensemble_dpo beta": lambda v: ensemble_dpo(X, X[None], beta=v),
    **{
        f"{rpo.__name__} {key}": (lambda v, rpo=rpo, key=key: rpo(X, X, **{"beta": 1.0, "reward_scale": 1.0, key: v}))
        for rpo in (rpo_sq, rpo_bwd_kl, rpo_fwd_kl)
        for key in ("beta", "reward_scale")
    },
}


@pytest.mark.parametrize("name", POSITIVE)
def test_hyper_parameters_must_be_positive_numbers(name):
    call, parameter = POSITIVE[name], name.split()[1]
    for value in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{parameter} must be finite and greater than 0"):
            call(value)
    for wrong in ("0.1", None, True, torch.tensor(0.1)):
        with pytest.raises(TypeError, match=f"{parameter} must be a number"):
            call(wrong)
    call(1)  # an int is a number


@pytest.mark.parametrize("loss", [dpo, robust_dpo])
def test_label_smoothing_must_lie_below_a_half(loss):
    for value in (-0.01, 0.5, 0.9, math.nan):
        with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0\.5\)"):
            loss(X, beta=1.0, label_smoothing=value)
    with pytest.raises(TypeError, match="label_smoothing must be a number"):
        loss(X, beta=1.0, label_smoothing="0.1")
    loss(X, beta=1.0, label_smoothing=0.0)


def test_over_must_be_pair_or_batch():
    with pytest.raises(ValueError, match='over must be "pair" or "batch", got \'epoch\''):
        ensemble_dpo(X, X[None], beta=1.0, over="epoch")


# The module as a whole


def test_inputs_are_left_alone():
    hs, rs = some_pairs(6)
    for name, (loss, _) in LOSSES.items():
        h, r = tensor(hs), tensor(rs)
        loss(h, r)
        assert h.tolist() == hs, name
        assert r.tolist() == rs, name


def test_every_public_function_is_listed_documented_and_in_the_table():
    public = {name for name, f in inspect.getmembers(losses, inspect.isfunction) if not name.startswith("_")}
    assert public == set(losses.__all__)
    for name in public:
        function = getattr(losses, name)
        doc = inspect.getdoc(function) or ""
        for heading in ("Args:", "Returns:", "Raises:", "References:"):
            assert heading in doc, (name, heading)
        for parameter in inspect.signature(function).parameters:
            assert f"{parameter}:" in doc, (name, parameter)
        assert f"`{name}`" in (losses.__doc__ or "")


def test_hyper_parameters_are_keyword_only():
    for name in losses.__all__:
        for parameter in inspect.signature(getattr(losses, name)).parameters.values():
            is_tensor = parameter.annotation in (Tensor, "Tensor")
            assert (parameter.kind is parameter.KEYWORD_ONLY) != is_tensor, (name, parameter)
