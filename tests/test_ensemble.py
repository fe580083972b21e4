"""Exact pessimism against general-purpose solvers of both sides, and by its invariances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from prefdistill.ensemble import advantages, hull_mixture, tilted


def world(seed, k=3, n=1, s=12, spread=1.0):
    rng = np.random.default_rng(seed)
    return spread * rng.normal(size=(k, n, s)), rng.dirichlet(np.ones(s), size=n)


def objective(w, r, p, beta):
    """F spelt out."""
    mixed = np.tensordot(w, r, 1)
    return np.mean([beta * special.logsumexp(m / beta, b=q) - q @ m for m, q in zip(mixed, p, strict=True)])


def worst_case_by_slsqp(r, p, beta):
    """max over pi of min over k, as it is defined: t below every member's advantage, pi in the simplex."""
    k, n, s = r.shape

    def each(z):
        pi = z[:-1].reshape(n, s)
        kl = special.rel_entr(np.maximum(pi, 1e-300), p).sum(1).mean()
        return np.array([((pi - p) * m).sum(1).mean() - beta * kl for m in r]) - z[-1]

    def slope(z):
        pi = np.maximum(z[:-1].reshape(n, s), 1e-300)
        rows = [(m - beta * (np.log(pi / p) + 1)).ravel() / n for m in r]
        return np.hstack([np.array(rows), -np.ones((k, 1))])

    found = optimize.minimize(
        lambda z: -z[-1],
        np.append(p.ravel(), 0.0),
        jac=lambda z: np.append(np.zeros(n * s), -1.0),
        bounds=[(1e-12, 1)] * (n * s) + [(None, None)],
        constraints=[
            {"type": "ineq", "fun": each, "jac": slope},
            {
                "type": "eq",
                "fun": lambda z: z[:-1].reshape(n, s).sum(1) - 1,
                "jac": lambda z: np.hstack([np.kron(np.eye(n), np.ones(s)), np.zeros((n, 1))]),
            },
        ],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 1000},
    )
    assert found.status in (0, 8), found.message  # 8: no step improves any more, at this tolerance
    return found.x[-1], found.x[:-1].reshape(n, s)


@pytest.mark.parametrize(("seed", "k", "n", "beta"), [(0, 3, 1, 0.5), (1, 3, 1, 0.5), (2, 2, 3, 1.0), (3, 4, 2, 0.3)])
def test_the_mixture_is_the_worst_case_optimum(seed, k, n, beta):
    """The primal, solved without any of the theory, has the same value and the same policy."""
    r, p = world(seed, k, n, s=8)
    found = hull_mixture(r, p, beta=beta)
    value, policy = worst_case_by_slsqp(r, p, beta)
    ours = tilted(p, np.tensordot(found.weights, r, 1), beta)
    assert found.value == pytest.approx(value, abs=1e-7)
    assert advantages(ours, r, p, beta=beta).min() == pytest.approx(found.value, abs=1e-9)
    np.testing.assert_allclose(ours, policy, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 6),
    n=st.integers(1, 5),
    s=st.integers(1, 9),
    beta=st.floats(0.05, 5.0),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_optimality_in_any_world(seed, k, n, s, beta, spread):
    """KKT: no member's advantage lies below the value, and no weight can be moved for the better."""
    r, p = world(seed, k, n, s, spread)
    found = hull_mixture(r, p, beta=beta)
    assert found.weights.min() >= 0
    assert found.weights.sum() == pytest.approx(1)
    assert found.value == pytest.approx(objective(found.weights, r, p, beta), abs=1e-9 * spread)
    ours = tilted(p, np.tensordot(found.weights, r, 1), beta)
    assert advantages(ours, r, p, beta=beta).min() >= found.value - 1e-8 * max(spread, spread**2 / beta)
    rng = np.random.default_rng(seed)
    for w in rng.dirichlet(np.ones(k), size=5):
        assert objective(w, r, p, beta) >= found.value - 1e-10 * spread


def test_every_prompt_on_its_own():
    r, p = world(5, k=3, n=4, s=6)
    found = hull_mixture(r, p, beta=0.4, per_prompt=True)
    alone = [hull_mixture(r[:, i : i + 1], p[i : i + 1], beta=0.4) for i in range(4)]
    np.testing.assert_allclose(found.weights, [a.weights for a in alone], atol=1e-6)
    assert found.value == pytest.approx(np.mean([a.value for a in alone]), abs=1e-12)
    assert found.value <= hull_mixture(r, p, beta=0.4).value + 1e-12


def test_what_says_nothing_changes_nothing():
    """A member's level at a prompt, samples of no probability, and the members' order."""
    r, p = world(6, k=3, n=2, s=5)
    found = hull_mixture(r, p, beta=0.5)
    shifted = r + np.random.default_rng(0).normal(size=(3, 2, 1)) * 10
    np.testing.assert_allclose(hull_mixture(shifted, p, beta=0.5).weights, found.weights, atol=1e-8)
    padded = np.concatenate([r, np.full((3, 2, 2), 1e6)], axis=2)
    zeros = np.concatenate([p, np.zeros((2, 2))], axis=1)
    np.testing.assert_allclose(hull_mixture(padded, zeros, beta=0.5).weights, found.weights, atol=1e-8)
    np.testing.assert_allclose(hull_mixture(r[[2, 0, 1]], p, beta=0.5).weights, found.weights[[2, 0, 1]], atol=1e-8)


def test_members_that_agree_or_contradict():
    r, p = world(7, k=1, s=6)
    assert hull_mixture(np.concatenate([r, r]), p, beta=0.5).weights == pytest.approx([0.5, 0.5], abs=1e-6)
    opposite = hull_mixture(np.concatenate([r, -r]), p, beta=0.5)
    assert opposite.value == pytest.approx(0, abs=1e-9)  # the worst case of r and -r allows no gain at all
    assert opposite.weights == pytest.approx([0.5, 0.5], abs=1e-5)
    louder = hull_mixture(np.concatenate([r, 3 * r]), p, beta=0.5)
    assert louder.weights == pytest.approx([1, 0], abs=1e-6)  # the least demanding member
    assert hull_mixture(np.zeros((2, 1, 4)), np.full((1, 4), 0.25), beta=1.0).value == 0


@pytest.mark.parametrize(
    ("scores", "reference", "beta", "said"),
    [
        (np.zeros((2, 1, 3)), np.full((1, 2), 0.5), 1.0, "do not match"),
        (np.full((2, 1, 2), np.nan), np.full((1, 2), 0.5), 1.0, "finite"),
        (np.zeros((2, 1, 2)), np.full((1, 2), 0.6), 1.0, "add up to 1"),
        (np.zeros((2, 1, 2)), np.full((1, 2), 0.5), 0.0, "beta"),
    ],
)
def test_errors(scores, reference, beta, said):
    with pytest.raises(ValueError, match=said):
        hull_mixture(scores, reference, beta=beta)
