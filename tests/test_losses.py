"""Every loss against its formula spelt out in Python floats, and its gradients."""

from __future__ import annotations

import math
import random

import pytest
import torch

from naive_losses import (
    LOSSES,
    WITH_REWARD,
    each_loss,
    naive_distilled,
    some_pairs,
    tensor,
)
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


def test_implicit_margin_spelt_out():
    h = implicit_margin(tensor([-10.0, -3.0]), tensor([-12.0, -4.0]), tensor([-11.0, -3.0]), tensor([-9.0, -4.0]))
    # (-10 + 11) - (-12 + 9) = 4; a policy equal to its reference has margin 0
    assert h.tolist() == [4.0, 0.0]


def test_dpo_spelt_out():
    # sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4
    h = tensor([0.0, 10 * math.log(3), -10 * math.log(3)])
    expected = [math.log(2), math.log(4 / 3), math.log(4)]
    assert dpo(h, beta=0.1).tolist() == pytest.approx(expected, rel=1e-14)


def test_dpo_with_label_smoothing_spelt_out():
    h = tensor([0.0, 10 * math.log(3), -10 * math.log(3)])
    expected = [math.log(2), 0.9 * math.log(4 / 3) + 0.1 * math.log(4), 0.9 * math.log(4) + 0.1 * math.log(4 / 3)]
    assert dpo(h, beta=0.1, label_smoothing=0.1).tolist() == pytest.approx(expected, rel=1e-14)


def test_robust_dpo_spelt_out():
    h = tensor([0.0, 10 * math.log(3), -10 * math.log(3)])
    expected = [
        math.log(2),
        (0.75 * math.log(4 / 3) - 0.25 * math.log(4)) / 0.5,
        (0.75 * math.log(4) - 0.25 * math.log(4 / 3)) / 0.5,
    ]
    got = robust_dpo(h, beta=0.1, label_smoothing=0.25).tolist()
    assert got == pytest.approx(expected, rel=1e-14)
    assert got[1] < 0  # unbiased, not non-negative


def test_ipo_spelt_out():
    # 1/(2 * 0.1) = 5 nats
    assert ipo(tensor([0.0, 5.0, 7.0, -1.0]), tau=0.1).tolist() == [25.0, 0.0, 4.0, 36.0]


def test_distilled_dpo_spelt_out():
    h, r = tensor([0.0, 8.0, -8.0]), tensor([3.0, 3.0, 1.0])
    assert distilled_dpo(h, r, beta=0.25).tolist() == [9.0, 1.0, 9.0]


def test_ensemble_dpo_spelt_out():
    h = tensor([4.0, 0.0, -4.0])  # beta h = 2, 0, -2
    r = tensor([[2.0, 3.0, 0.0], [0.0, 1.0, -1.0]])  # losses 0, 9, 4 and 4, 1, 1
    loss, member = ensemble_dpo(h, r, beta=0.5)
    assert loss.tolist() == [0.0, 1.0, 1.0]
    assert member.tolist() == [0, 1, 1]
    loss, member = ensemble_dpo(h, r, beta=0.5, over="batch")  # sums 13 and 6
    assert loss.tolist() == [4.0, 1.0, 1.0]
    assert member.tolist() == [1, 1, 1]
    assert member.dtype == torch.int64


def test_rpo_spelt_out():
    # a = beta h = log 3 (3/4), b = 2 r = log 1 (1/2)
    h, r = tensor([10 * math.log(3)]), tensor([0.0])
    kwargs = {"beta": 0.1, "reward_scale": 2.0}
    assert rpo_sq(h, r, **kwargs).item() == pytest.approx(math.log(3) ** 2, rel=1e-14)
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert rpo_bwd_kl(h, r, **kwargs).item() == pytest.approx(backward, rel=1e-13)
    assert rpo_fwd_kl(h, r, **kwargs).item() == pytest.approx(forward, rel=1e-13)
    # reward_scale multiplies the reward: 2 * (log 3) / 2 meets the policy's margin
    for rpo in (rpo_sq, rpo_bwd_kl, rpo_fwd_kl):
        assert rpo(h, tensor([math.log(3) / 2]), **kwargs).item() == pytest.approx(0.0, abs=1e-15)


def test_forward_kl_spelt_out():
    assert forward_kl(tensor([-5.0, -2.0]), tensor([-3.0, -4.0])).tolist() == [2.0, -2.0]


# Formulas and gradients, at random


@each_loss
def test_formula(name):
    loss, naive = LOSSES[name]
    hs, rs = some_pairs()
    expected = [naive(h, r) for h, r in zip(hs, rs, strict=True)]
    assert loss(tensor(hs), tensor(rs)).tolist() == pytest.approx(expected, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("over", ["pair", "batch"])
def test_ensemble_formula(over):
    draw = random.Random(1)
    hs = [draw.uniform(-25, 25) for _ in range(30)]
    rs = [[draw.uniform(-5, 5) for _ in hs] for _ in range(4)]
    table = [[naive_distilled(h, r, 0.3) for h, r in zip(hs, row, strict=True)] for row in rs]
    if over == "pair":
        members = [min(range(4), key=lambda k: table[k][p]) for p in range(30)]
    else:
        members = [min(range(4), key=lambda k: sum(table[k]))] * 30
    loss, member = ensemble_dpo(tensor(hs), tensor(rs), beta=0.3, over=over)
    assert member.tolist() == members
    assert loss.tolist() == pytest.approx([table[k][p] for p, k in enumerate(members)], rel=1e-12)


@each_loss
def test_gradcheck(name):
    loss, _ = LOSSES[name]
    hs, rs = some_pairs(8, seed=2)
    h, r = tensor(hs, grad=True), tensor(rs, grad=name in WITH_REWARD)
    inputs = (h, r) if name in WITH_REWARD else (h,)
    assert torch.autograd.gradcheck(lambda h, r=r: loss(h, r), inputs)


@each_loss
def test_gradient_is_the_finite_difference_of_the_naive_formula(name):
    loss, naive = LOSSES[name]
    hs, rs = some_pairs(12, seed=3)
    h, r, step = tensor(hs, grad=True), tensor(rs, grad=True), 1e-5
    loss(h, r).sum().backward()
    in_h = [(naive(a + step, b) - naive(a - step, b)) / (2 * step) for a, b in zip(hs, rs, strict=True)]
    assert h.grad.tolist() == pytest.approx(in_h, rel=1e-6, abs=1e-8)
    if name in WITH_REWARD:
        in_r = [(naive(a, b + step) - naive(a, b - step)) / (2 * step) for a, b in zip(hs, rs, strict=True)]
        assert r.grad.tolist() == pytest.approx(in_r, rel=1e-6, abs=1e-8)
    else:
        assert r.grad is None


@pytest.mark.parametrize("over", ["pair", "batch"])
def test_ensemble_gradcheck(over):
    # margins far enough apart that no finite step changes the chosen member
    h = tensor([1.0, -7.0, 12.0, 3.0], grad=True)
    r = tensor([[0.5, -2.0, 1.0, 4.0], [-1.5, 2.0, 3.0, -4.0], [2.5, 0.0, -3.0, 1.0]], grad=True)
    assert torch.autograd.gradcheck(lambda h, r: ensemble_dpo(h, r, beta=0.3, over=over)[0], (h, r))


@pytest.mark.parametrize("over", ["pair", "batch"])
def test_ensemble_gradient_is_the_chosen_members(over):
    hs, _ = some_pairs(20, seed=4)
    r = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(3).requires_grad_()
    h = tensor(hs, grad=True)
    loss, member = ensemble_dpo(h, r, beta=0.3, over=over)
    got_h, got_r = torch.autograd.grad(loss.sum(), (h, r))
    chosen = r.detach().gather(0, member[None]).squeeze(0)
    (expected_h,) = torch.autograd.grad(distilled_dpo(h, chosen, beta=0.3).sum(), h)
    assert torch.equal(got_h, expected_h)
    assert torch.equal(got_r != 0, torch.nn.functional.one_hot(member, 3).T.bool())
    # and a central difference of the minimum itself, in plain Python
    if over == "pair":
        step, rows = 1e-6, r.tolist()
        for p, value in enumerate(hs):
            up, down = (min(naive_distilled(value + s, row[p], 0.3) for row in rows) for s in (step, -step))
            assert got_h[p].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-6)


def test_gradcheck_of_margin_and_forward_kl():
    logps = [tensor(some_pairs(5, seed=5 + i)[0], grad=True) for i in range(4)]
    assert torch.autograd.gradcheck(implicit_margin, tuple(logps))
    assert torch.autograd.gradcheck(forward_kl, tuple(logps[:2]))
    assert torch.autograd.gradcheck(lambda p, q: forward_kl(p, q, estimator="control-variate"), tuple(logps[:2]))


def test_margin_gradient_signs():
    logps = [tensor([-3.0, -4.0], grad=True) for _ in range(4)]
    grads = torch.autograd.grad(implicit_margin(*logps).sum(), logps)
    assert [g[0].item() for g in grads] == [1.0, -1.0, -1.0, 1.0]
