"""What losses must be like at any margins: identities, bounds, symmetries, what the docstrings say of gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from naive_losses import (
    PROPERTY,
    sigmoid,
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
