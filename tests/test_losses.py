"""Every loss against its formula spelt out in Python floats, its gradients, its properties and its errors.

The formulas here are written with `math` alone and naively (no logsigmoid, no stable forms), so that they share nothing
with the implementation; they are compared at moderate margins in float64. Extreme margins have tests of their own.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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

PROPERTY = settings(max_examples=60, deadline=None)


def tensor(values: object, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


# The formulas, naively


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def bernoulli_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1.0 - p) * math.log((1.0 - p) / (1.0 - q))


def naive_dpo(h: float, beta: float, e: float = 0.0) -> float:
    return -(1.0 - e) * math.log(sigmoid(beta * h)) - e * math.log(1.0 - sigmoid(beta * h))


def naive_robust(h: float, beta: float, e: float) -> float:
    right, wrong = -math.log(sigmoid(beta * h)), -math.log(1.0 - sigmoid(beta * h))
    return ((1.0 - e) * right - e * wrong) / (1.0 - 2.0 * e)


def naive_ipo(h: float, tau: float) -> float:
    return (h - 0.5 / tau) ** 2


def naive_distilled(h: float, r: float, beta: float) -> float:
    return (r - beta * h) ** 2


def naive_rpo_bwd(h: float, r: float, beta: float, eta: float) -> float:
    return bernoulli_kl(sigmoid(eta * r), sigmoid(beta * h))


def naive_rpo_fwd(h: float, r: float, beta: float, eta: float) -> float:
    return bernoulli_kl(sigmoid(beta * h), sigmoid(eta * r))


# name -> (the loss of tensors h and r, the naive loss of floats h and r); r is ignored where there is no reward
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[float, float], float]]] = {
    "dpo": (lambda h, r: dpo(h, beta=0.3), lambda h, r: naive_dpo(h, 0.3)),
    "cdpo": (lambda h, r: dpo(h, beta=0.3, label_smoothing=0.2), lambda h, r: naive_dpo(h, 0.3, 0.2)),
    "robust": (lambda h, r: robust_dpo(h, beta=0.3, label_smoothing=0.2), lambda h, r: naive_robust(h, 0.3, 0.2)),
    "robust, e = 0": (lambda h, r: robust_dpo(h, beta=0.3, label_smoothing=0.0), lambda h, r: naive_dpo(h, 0.3)),
    "ipo": (lambda h, r: ipo(h, tau=0.3), lambda h, r: naive_ipo(h, 0.3)),
    "d-dpo": (lambda h, r: distilled_dpo(h, r, beta=0.3), lambda h, r: naive_distilled(h, r, 0.3)),
    "rpo_sq": (
        lambda h, r: rpo_sq(h, r, beta=0.3, reward_scale=1.7),
        lambda h, r: naive_distilled(h, 1.7 * r, 0.3),
    ),
    "rpo_bwd_kl": (
        lambda h, r: rpo_bwd_kl(h, r, beta=0.3, reward_scale=1.7),
        lambda h, r: naive_rpo_bwd(h, r, 0.3, 1.7),
    ),
    "rpo_fwd_kl": (
        lambda h, r: rpo_fwd_kl(h, r, beta=0.3, reward_scale=1.7),
        lambda h, r: naive_rpo_fwd(h, r, 0.3, 1.7),
    ),
}
WITH_REWARD = {"d-dpo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"}
each_loss = pytest.mark.parametrize("name", LOSSES)


def some_pairs(n: int = 40, seed: int = 0) -> tuple[list[float], list[float]]:
    draw = random.Random(seed)
    return [draw.uniform(-25, 25) for _ in range(n)], [draw.uniform(-3, 3) for _ in range(n)]


# Numbers spelt out


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


# Properties

margins = st.floats(-50, 50, allow_nan=False)
huge = st.floats(-1e4, 1e4, allow_nan=False)
betas = st.floats(0.01, 2.0)
smoothings = st.floats(0.0, 0.45)
batches = st.integers(1, 6).flatmap(
    lambda p: st.tuples(
        st.lists(margins, min_size=p, max_size=p),
        st.lists(st.lists(margins, min_size=p, max_size=p), min_size=1, max_size=5),
    )
)


@PROPERTY
@given(betas, smoothings)
def test_logistic_losses_are_log_2_at_margin_zero(beta, e):
    zero = tensor([0.0])
    assert dpo(zero, beta=beta, label_smoothing=e).item() == pytest.approx(math.log(2), rel=1e-14)
    assert robust_dpo(zero, beta=beta, label_smoothing=e).item() == pytest.approx(math.log(2), rel=1e-12)


@PROPERTY
@given(margins, betas, st.floats(0.01, 0.45))
def test_label_noise_identities(h, beta, e):
    right, wrong = dpo(tensor([h]), beta=beta).item(), dpo(tensor([-h]), beta=beta).item()
    # a pair and its mirror image differ by the margin
    assert right - wrong == pytest.approx(-beta * h, rel=1e-12, abs=1e-12)
    # cDPO is the expected DPO loss under labels wrong with probability e
    smoothed = dpo(tensor([h]), beta=beta, label_smoothing=e).item()
    assert smoothed == pytest.approx((1 - e) * right + e * wrong, rel=1e-12)
    # robust DPO's expectation under flips is the DPO loss of the true label
    kept = robust_dpo(tensor([h]), beta=beta, label_smoothing=e).item()
    flipped = robust_dpo(tensor([-h]), beta=beta, label_smoothing=e).item()
    assert (1 - e) * kept + e * flipped == pytest.approx(right, rel=1e-10, abs=1e-10)


@PROPERTY
@given(betas, st.floats(0.01, 0.45))
def test_smoothed_dpo_has_its_minimum_where_the_docstring_says(beta, e):
    h = tensor([math.log((1 - e) / e) / beta], grad=True)
    dpo(h, beta=beta, label_smoothing=e).sum().backward()
    assert h.grad.item() == pytest.approx(0.0, abs=1e-14)


@PROPERTY
@given(st.lists(margins, min_size=2, max_size=8, unique=True), betas)
def test_dpo_falls_with_the_margin_and_is_positive(hs, beta):
    loss = dpo(tensor(sorted(hs)), beta=beta)
    assert (loss.diff() <= 0).all()
    assert (loss > 0).all()


@PROPERTY
@given(st.floats(0.01, 10), margins)
def test_ipo_is_symmetric_about_its_target(tau, offset):
    target = 1 / (2 * tau)
    above, below = ipo(tensor([target + offset]), tau=tau), ipo(tensor([target - offset]), tau=tau)
    assert above.item() == pytest.approx(below.item(), rel=1e-9, abs=1e-9)
    assert ipo(tensor([target]), tau=tau).item() == 0.0


@PROPERTY
@given(margins, margins, betas, st.floats(0.1, 3))
def test_distillation_ignores_the_order_of_responses(h, r, beta, eta):
    one, other = (tensor([h]), tensor([r])), (tensor([-h]), tensor([-r]))
    assert torch.equal(distilled_dpo(*one, beta=beta), distilled_dpo(*other, beta=beta))
    for rpo in (rpo_sq, rpo_bwd_kl, rpo_fwd_kl):
        a, b = (rpo(*pair, beta=beta, reward_scale=eta) for pair in (one, other))
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@PROPERTY
@given(st.lists(margins, min_size=4, max_size=4))
def test_margin_changes_sign_with_the_order_and_ignores_common_levels(logps):
    p1, p2, r1, r2 = (tensor([x]) for x in logps)
    h = implicit_margin(p1, p2, r1, r2)
    assert torch.equal(implicit_margin(p2, p1, r2, r1), -h)
    assert torch.equal(implicit_margin(p1, p2, p1, p2), torch.zeros_like(h))
    torch.testing.assert_close(implicit_margin(p1 + 7, p2 + 7, r1 - 3, r2 - 3), h, rtol=0, atol=1e-12)


@PROPERTY
@given(batches, betas)
def test_ensemble_is_below_every_member(batch, beta):
    h, r = tensor(batch[0]), tensor(batch[1])
    members = torch.stack([distilled_dpo(h, row, beta=beta) for row in r])
    pair, member = ensemble_dpo(h, r, beta=beta)
    assert (pair <= members).all()
    assert torch.equal(pair, members.gather(0, member[None])[0])
    batch_loss, batch_member = ensemble_dpo(h, r, beta=beta, over="batch")
    assert len(set(batch_member.tolist())) == 1
    assert torch.equal(batch_loss, members[batch_member[0]])
    slack = 1e-12 * (1 + members.sum().item())
    assert batch_loss.sum().item() <= members.sum(1).min().item() + slack
    assert batch_loss.sum().item() >= pair.sum().item() - slack
    assert (batch_loss >= pair).all()


@PROPERTY
@given(batches, betas, st.randoms(use_true_random=False))
def test_ensemble_value_ignores_the_order_of_members(batch, beta, shuffle):
    h, r = tensor(batch[0]), tensor(batch[1])
    order = list(range(len(r)))
    shuffle.shuffle(order)
    assert torch.equal(ensemble_dpo(h, r, beta=beta)[0], ensemble_dpo(h, r[order], beta=beta)[0])


@PROPERTY
@given(st.lists(margins, min_size=1, max_size=5), margins, betas)
def test_ensemble_of_one_is_distilled_dpo(hs, r, beta):
    h, rewards = tensor(hs), torch.full((1, len(hs)), r, dtype=torch.float64)
    for over in ("pair", "batch"):
        loss, member = ensemble_dpo(h, rewards, beta=beta, over=over)
        assert torch.equal(loss, distilled_dpo(h, rewards[0], beta=beta))
        assert (member == 0).all()


@PROPERTY
@given(huge, huge, betas, st.floats(0.1, 3))
def test_bernoulli_kls_are_not_negative(h, r, beta, eta):
    for kl in (rpo_bwd_kl, rpo_fwd_kl):
        for dtype, slack in ((torch.float64, 1e-15), (torch.float32, 5e-7)):
            assert kl(tensor([h], dtype), tensor([r], dtype), beta=beta, reward_scale=eta).item() >= -slack


@PROPERTY
@given(huge, st.floats(0.1, 3))
def test_bernoulli_kls_are_zero_at_equality(x, scale):
    for dtype in (torch.float32, torch.float64):
        h = tensor([x], dtype)
        for rpo in (rpo_sq, rpo_bwd_kl, rpo_fwd_kl):
            assert rpo(h, h, beta=scale, reward_scale=scale).item() == 0.0


@PROPERTY
@given(margins, margins, betas)
def test_backward_and_forward_kl_exchange_policy_and_reward(h, r, beta):
    backward = rpo_bwd_kl(tensor([h]), tensor([r]), beta=beta, reward_scale=0.7)
    exchanged = rpo_fwd_kl(tensor([r]), tensor([h]), beta=0.7, reward_scale=beta)
    assert torch.equal(backward, exchanged)


@PROPERTY
@given(margins, margins)
def test_kl_gradients_are_what_the_docstrings_say(a, b):
    h, r = tensor([a], grad=True), tensor([b])
    (backward,) = torch.autograd.grad(rpo_bwd_kl(h, r, beta=1.0, reward_scale=1.0).sum(), h)
    (forward,) = torch.autograd.grad(rpo_fwd_kl(h, r, beta=1.0, reward_scale=1.0).sum(), h)
    assert backward.item() == pytest.approx(sigmoid(a) - sigmoid(b), abs=1e-13)
    assert forward.item() == pytest.approx(sigmoid(a) * sigmoid(-a) * (a - b), abs=1e-13)


@PROPERTY
@given(margins, betas)
def test_backward_kl_of_a_certain_reward_is_dpo(h, beta):
    certain = rpo_bwd_kl(tensor([h]), tensor([1e4]), beta=beta, reward_scale=1.0)
    torch.testing.assert_close(certain, dpo(tensor([h]), beta=beta), rtol=1e-14, atol=1e-14)


@PROPERTY
@given(margins, margins, betas)
def test_rpo_sq_of_scale_one_is_distilled_dpo(h, r, beta):
    squared = rpo_sq(tensor([h]), tensor([r]), beta=beta, reward_scale=1.0)
    assert torch.equal(squared, distilled_dpo(tensor([h]), tensor([r]), beta=beta))


@PROPERTY
@given(st.lists(st.floats(-8, 8), min_size=4, max_size=4), st.lists(st.floats(-8, 8), min_size=4, max_size=4))
def test_forward_kl_has_the_exact_kl_as_its_expectation_under_the_reference(policy, reference):
    policy_logps = tensor(policy, grad=True).log_softmax(0)
    reference_logps = tensor(reference).log_softmax(0)
    expectation = (reference_logps.exp() * forward_kl(policy_logps, reference_logps)).sum().item()
    exact = sum(math.exp(q) * (q - p) for p, q in zip(policy_logps.tolist(), reference_logps.tolist(), strict=True))
    assert expectation == pytest.approx(exact, abs=1e-12)
    assert expectation >= -1e-12


def test_forward_kl_gradient_is_that_of_maximum_likelihood():
    policy, reference = tensor([-3.0, -5.0, -1.0], grad=True), tensor([-2.0, -9.0, -1.0])
    (got,) = torch.autograd.grad(forward_kl(policy, reference).mean(), policy)
    (expected,) = torch.autograd.grad(-policy.mean(), policy)
    assert torch.equal(got, expected)
    assert forward_kl(reference, reference).tolist() == [0.0, 0.0, 0.0]


@PROPERTY
@given(st.lists(st.floats(-0.3, 0.3), min_size=5, max_size=5), st.lists(st.floats(-3, 3), min_size=5, max_size=5))
def test_the_control_variate_changes_neither_the_kl_nor_its_gradient(step, reference):
    """Summed exactly over a world of five responses; ratios stay below the cut."""
    logits = (tensor(reference) + tensor(step)).requires_grad_()
    reference_logps = tensor(reference).log_softmax(0)
    found = {}
    for estimator in ("plain", "control-variate"):
        samples = forward_kl(logits.log_softmax(0), reference_logps, estimator=estimator)
        kl = (reference_logps.exp() * samples).sum()
        found[estimator] = kl.item(), torch.autograd.grad(kl, logits)[0]
    assert found["plain"][0] == pytest.approx(found["control-variate"][0], abs=1e-12)
    torch.testing.assert_close(found["plain"][1], found["control-variate"][1], atol=1e-12, rtol=1e-9)


@PROPERTY
@given(st.lists(st.floats(-8, 8), min_size=4, max_size=4), st.lists(st.floats(-8, 8), min_size=4, max_size=4))
def test_the_cut_control_variate_is_a_lower_bound_and_never_negative(policy, reference):
    policy_logps, reference_logps = tensor(policy).log_softmax(0), tensor(reference).log_softmax(0)
    samples = forward_kl(policy_logps, reference_logps, estimator="control-variate")
    assert (samples >= -1e-12).all()
    share = reference_logps.exp()
    assert (share * samples).sum() <= (share * forward_kl(policy_logps, reference_logps)).sum() + 1e-12


def test_the_control_variates_gradient_is_bounded_and_zero_at_the_reference():
    policy, reference = tensor([-3.0, -50.0, -1.0, -2.5, -9.0], grad=True), tensor([-3.0, -9.0, -40.0, -2.0, -9.4])
    samples = forward_kl(policy, reference, estimator="control-variate")
    (got,) = torch.autograd.grad(samples.sum(), policy)
    expected = [0.0, math.exp(-41) - 1, 1.0, math.exp(-0.5) - 1, math.exp(0.4) - 1]
    assert got.tolist() == pytest.approx(expected)
    just_below, just_above = (math.log(2) + e for e in (-1e-9, 1e-9))
    values = forward_kl(tensor([just_below, just_above]), tensor([0.0, 0.0]), estimator="control-variate")
    assert values[0] == pytest.approx(values[1].item(), abs=1e-8)
    with pytest.raises(ValueError, match="control-variate"):
        forward_kl(reference, reference, estimator="k2")


# Extreme margins


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
