"""A head on frozen features against brute force, and calibration against known scales."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import optimize, special

from prefdistill.training.reward import (
    L2_GRID,
    MAX_SCALE,
    calibrate,
    cross_calibrated,
    fit_head,
)

# -- a head on frozen features ---------------------------------------------------------------------------------------


def head_problem(pairs=120, width=5, seed=0, signal=1.0):
    """Differences whose sign follows a hidden head; features of unequal size and correlated."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(pairs, width)) @ rng.normal(size=(width, width)) * np.exp(rng.normal(size=width))
    head = signal * rng.normal(size=width) / z.std(0)
    z *= np.where(rng.random(pairs) < special.expit(z @ head), 1, -1)[:, None]
    return z, head, rng


def penalised_loss(w, z, rows, l2):
    """Spelt out on written-out rows: mean -log sigmoid, and half l2 times the squared head in standardised units."""
    z = z[rows]
    size = np.sqrt((z**2).mean(0))
    return np.mean(np.log1p(np.exp(-z @ w))) + 0.5 * l2 * np.sum((w * size) ** 2)


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0, 100.0])
def test_head_is_the_optimum(l2):
    z, _, rng = head_problem()
    weights = rng.integers(0, 4, len(z))
    rows = np.repeat(np.arange(len(z)), weights)
    head, used = fit_head(z, weights, np.arange(len(z)), l2=l2)
    assert used == l2
    # Another method, without our gradient, from another start.
    brute = optimize.minimize(
        penalised_loss,
        rng.normal(size=5) * 0.1,
        (z, rows, l2),
        method="Nelder-Mead",
        options={"xatol": 1e-12, "fatol": 1e-14, "maxiter": 20_000, "maxfev": 20_000, "adaptive": True},
    )
    assert penalised_loss(head, z, rows, l2) <= brute.fun + 1e-12
    np.testing.assert_allclose(head, brute.x, rtol=1e-3, atol=1e-5 * np.abs(head).max())
    # The gradient, in closed form, is zero; in float64 to near rounding.
    d = z[rows]
    gradient = -(d * special.expit(-d @ head)[:, None]).mean(0) + l2 * head * (d**2).mean(0)
    assert np.abs(gradient / np.sqrt((d**2).mean(0))).max() < 1e-8


def test_wide_heads_are_optimal_too():
    """As wide as a small model, more features than the data can hold apart: margins right to 1e-5."""
    z, _, _ = head_problem(pairs=150, width=200, signal=0.2)
    head, l2 = fit_head(z, np.ones(150), np.arange(150), l2=1e-4)
    size = np.sqrt((z**2).mean(0))
    x, w = z / size, np.zeros(200)
    for _ in range(100):  # Newton
        p = special.expit(-x @ w)
        hessian = (x.T * (p * (1 - p))) @ x / 150 + l2 * np.eye(200)
        w -= np.linalg.solve(hessian, l2 * w - x.T @ p / 150)
    np.testing.assert_allclose(z @ head, x @ w, atol=1e-5 * (x @ w).std())


@pytest.mark.parametrize("l2", [1e-3, None])
def test_weights_are_repeated_rows(l2):
    z, _, rng = head_problem(60, 4, seed=2)
    weights, clusters = rng.integers(0, 4, 60), np.arange(60) // 2
    weighted = fit_head(z, weights, clusters, l2=l2)
    repeated = fit_head(np.repeat(z, weights, 0), np.ones(weights.sum()), np.repeat(clusters, weights), l2=l2, seed=0)
    assert weighted[1] == repeated[1]
    np.testing.assert_allclose(weighted[0], repeated[0], rtol=1e-6)


def test_head_finds_the_hidden_head():
    z, hidden, _ = head_problem(pairs=40_000, width=4, signal=0.7)
    head, l2 = fit_head(z, np.ones(len(z)), np.arange(len(z)))
    assert l2 <= 1e-2
    np.testing.assert_allclose(z @ head, z @ hidden, atol=0.1 * (z @ hidden).std())


def test_cross_validation_holds_noise_down():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(60, 40))
    head, l2 = fit_head(noise, np.ones(60), np.arange(60))
    assert l2 >= 1.0
    assert np.abs(noise @ head).mean() < 0.5


def test_cross_validation_leaves_out_whole_prompts():
    """Every prompt has a direction of its own, the same in its eight pairs: it helps nobody else."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 8)
    z = np.eye(40)[clusters] * np.where(rng.random(40) < 0.5, 1, -1)[clusters][:, None]
    z = np.hstack([z, rng.normal(size=(320, 1))])
    _, by_prompt = fit_head(z, np.ones(320), clusters)
    _, by_pair = fit_head(z, np.ones(320), np.arange(320))
    assert by_prompt > 100 * by_pair


def test_the_penalty_is_the_best_when_each_prompt_is_left_out():
    """With four prompts the four folds are the prompts, so brute force can say what cross-validation must find."""
    found = []
    for seed in range(6):
        z, _, rng = head_problem(pairs=32, width=3, seed=seed, signal=0.6)
        clusters = rng.permutation(np.repeat(np.arange(4), 8))
        x, losses = z / np.sqrt((z**2).mean(0)), dict.fromkeys(L2_GRID, 0.0)
        for l2, prompt in itertools.product(L2_GRID, range(4)):
            kept, out = x[clusters != prompt], x[clusters == prompt]

            def loss(w, kept=kept, l2=l2):
                return np.mean(np.log1p(np.exp(-kept @ w))) + 0.5 * l2 * w @ w

            losses[l2] += np.log1p(np.exp(-out @ optimize.minimize(loss, np.zeros(3), method="BFGS").x)).sum()
        found.append(fit_head(z, np.ones(32), clusters)[1])
        assert found[-1] == min(losses, key=losses.get)
    assert len(set(found)) > 2, "always the same penalty would prove little"


def test_one_prompt_alone_has_no_cross_validation():
    z, _, _ = head_problem(12, 3)
    head, l2 = fit_head(z, np.ones(12), np.zeros(12))
    assert l2 == 1.0
    assert np.isfinite(head).all()


def test_a_constant_feature_has_no_weight():
    z, _, _ = head_problem(60, 3)
    z[:, 1] = 0
    head, _ = fit_head(z, np.ones(60), np.arange(60), l2=1e-3)
    assert head[1] == 0


# -- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])
def test_calibrate_finds_a_known_scale(scale):
    """Raw margins m with P(label) = sigmoid(scale * m); what is handed over is chosen less rejected."""
    rng = np.random.default_rng(1)
    raw = rng.normal(size=30_000) / scale
    chosen_first = rng.random(30_000) < special.expit(scale * raw)
    assert calibrate(np.where(chosen_first, raw, -raw)) == pytest.approx(scale, rel=0.05)


def test_calibrate_where_margins_say_nothing_or_everything():
    rng = np.random.default_rng(0)
    assert calibrate(-np.abs(rng.normal(size=50))) == 0.0  # always wrong
    assert calibrate(np.zeros(9)) == 0.0
    assert calibrate(np.array([])) == 1.0
    assert calibrate(np.abs(rng.normal(size=50))) == pytest.approx(MAX_SCALE, abs=1e-3)  # separable


def test_calibrated_margins_are_log_odds():
    """Twice is once: the factor for margins that are log-odds already is 1."""
    rng = np.random.default_rng(5)
    margins = rng.normal(loc=0.4, scale=2.0, size=4000)
    assert calibrate(margins * calibrate(margins)) == pytest.approx(1.0, abs=1e-3)


def test_cross_calibration_gives_a_half_the_others_scale():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 2, 4000)
    margins = np.where(rng.random(4000) < 1 / (1 + np.exp(-truth)), truth, -truth)
    prompts = np.arange(4000) // 2
    half = np.isin(prompts, np.unique(prompts)[::2])
    stretched = np.where(half, 3 * margins, margins)  # only the one half is too sure
    found = cross_calibrated(stretched, prompts)
    assert found[half] == pytest.approx(calibrate(margins[~half]) * stretched[half])
    assert found[~half] == pytest.approx(calibrate(3 * margins[half]) * stretched[~half])
    assert cross_calibrated(margins[:2], np.zeros(2)) == pytest.approx(margins[:2])  # one prompt has no other half
