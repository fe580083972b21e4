"""Tests, corrections, power and length control against statsmodels and scipy, and what they promise by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from prefdistill.evaluation.compare import Drawn, compare, verdict
from prefdistill.evaluation.inference import (
    detectable_difference,
    holm,
    mcnemar_test,
    power_of,
    prompts_needed,
)
from prefdistill.evaluation.length import length_controlled_win_rate
from prefdistill.evaluation.statistics import cluster_mean

# -- BCa ---------------------------------------------------------------------------------------------------------------


def test_bca_is_scipys():
    """Two bootstraps differ by chance; with many resamples the ends agree to a small part of the interval."""
    values = np.random.default_rng(0).lognormal(0, 1, 60)
    ours = cluster_mean(values, range(60), resamples=40_000, method="bca")
    theirs = stats.bootstrap((values,), np.mean, n_resamples=40_000, method="BCa", rng=1).confidence_interval
    width = theirs.high - theirs.low
    assert ours.ci95[0] == pytest.approx(theirs.low, abs=0.02 * width)
    assert ours.ci95[1] == pytest.approx(theirs.high, abs=0.02 * width)
    plain = cluster_mean(values, range(60), resamples=40_000)
    assert ours.ci95[1] > plain.ci95[1] + 0.02 * width  # the long tail lies above


def test_bca_of_symmetric_values_is_the_percentile_interval():
    values = np.concatenate([np.arange(1, 40), -np.arange(1, 40)]).astype(float)
    ours, plain = (cluster_mean(values, range(78), resamples=20_000, method=m).ci95 for m in ("bca", "percentile"))
    np.testing.assert_allclose(ours, plain, atol=0.3)
    assert cluster_mean([2.0, 2.0, 2.0], range(3), method="bca").ci95 == (2.0, 2.0)
    with pytest.raises(ValueError, match="bca"):
        cluster_mean([1.0], [0], method="basic")


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_the_interval_covers_what_it_says(method):
    """2,000 data sets of 120 prompts with 3 samples each, prompts far apart and somewhat heavy to one side."""
    rng, runs, covered = np.random.default_rng(7), 2000, 0
    clusters = np.repeat(np.arange(120), 3)
    for run in range(runs):
        values = np.repeat(rng.gamma(16.0, 0.25, 120) - 4.0, 3) + rng.normal(0, 0.7, 360)
        low, high = cluster_mean(values, clusters, resamples=800, seed=run, method=method).ci95
        covered += low <= 0 <= high
    assert 0.93 <= covered / runs <= 0.97


def test_the_verdict_is_wrong_about_nothing_in_at_most_one_in_twenty():
    """1,000 experiments in which the policy is the reference: `better` is said by chance alone."""
    rng, runs, better = np.random.default_rng(3), 1000, 0
    for run in range(runs):
        prompt = rng.normal(0, 1.5, (60, 1))
        own, base = (Drawn(prompt + rng.normal(0, 1, (60, n)), rng.integers(5, 20, (60, n)), 0.0) for n in (2, 4))
        figures = compare(
            own, base, kl_policy_ref=np.zeros((60, 1)), kl_ref_policy=np.zeros((60, 1)), chosen_logp_change=0.0,
            heldout_chosen_logp_change=0.0, tie_margin=0.0, seed=run, resamples=300,
        )  # fmt: skip
        better += "is better" in verdict("e-dpo", "dpo", {"e-dpo": figures}, [], "the oracle")
    assert better / runs <= 0.05
    assert better > 0, "a verdict that never says better proves nothing"


# -- McNemar and Holm --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_statsmodels(pairs):
    a, b = np.array(pairs).T
    found = mcnemar_test(a, b)
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    assert found.p_value == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert (found.first_only, found.second_only) == (table[0][1], table[1][0])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels(p_values):
    np.testing.assert_allclose(holm(p_values), multipletests(p_values, method="holm")[1], atol=1e-12)


def test_holm_keeps_false_discoveries_rare():
    rng, runs = np.random.default_rng(0), 2000
    p = rng.random((runs, 8))
    assert (p.min(1) < 0.05).mean() > 0.25
    assert np.mean([holm(row).min() < 0.05 for row in p]) < 0.065


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mcnemar_test([0.5], [1]), "true or false"),
        (lambda: mcnemar_test([True], [True, False]), "equal"),
        (lambda: holm([0.5, 1.5]), "between 0 and 1"),
        (lambda: power_of(1, 0.5, 1.0), "at least 2"),
        (lambda: prompts_needed(0.0, 1.0), "difference is 0"),
        (lambda: prompts_needed(0.1, 0.0), "spread above 0"),
        (lambda: prompts_needed(0.1, 1.0, power=0.01), "power"),
        (lambda: power_of(10, 0.1, 1.0, level=1.0), "level"),
        (lambda: length_controlled_win_rate([1.5], [1], [0]), "between 0 and 1"),
    ],
)
def test_errors(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# -- power -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "difference", "spread"), [(20, 0.4, 1.0), (120, 0.25, 1.3), (500, -0.1, 0.8)])
def test_power_is_statsmodels_and_what_happens(prompts, difference, spread):
    found = power_of(prompts, difference, spread)
    assert found == pytest.approx(TTestPower().power(difference / spread, prompts, 0.05), abs=1e-6)
    rng = np.random.default_rng(0)
    data = rng.normal(difference, spread, (4000, prompts))
    shown = stats.ttest_1samp(data, 0, axis=1).pvalue < 0.05
    assert found == pytest.approx(shown.mean(), abs=0.03)


@pytest.mark.parametrize(("difference", "spread", "power"), [(0.3, 1.2, 0.8), (2.0, 1.0, 0.9), (-0.05, 0.9, 0.5)])
def test_prompts_needed_are_enough_and_one_less_is_not(difference, spread, power):
    n = prompts_needed(difference, spread, power=power)
    assert power_of(n, difference, spread) >= power
    if n > 2:
        assert power_of(n - 1, difference, spread) < power
    # And the other way round: what this many prompts show.
    assert detectable_difference(n, spread, power=power) <= abs(difference) + 1e-9
    assert power_of(n, detectable_difference(n, spread, power=power), spread) == pytest.approx(power, abs=1e-6)


# -- win rate at equal length ------------------------------------------------------------------------------------------


def games(rng, prompts=400, samples=2, preference=0.0, per_token=0.1, longer=6.0):
    """A judge that likes length, on top of a preference for the method, and a method that writes longer."""
    d = np.round(rng.normal(longer, 8.0, prompts * samples))
    clusters = np.repeat(np.arange(prompts), samples)
    taste = np.repeat(rng.normal(0, 0.5, prompts), samples)
    wins = rng.random(len(d)) < 1 / (1 + np.exp(-(preference + taste + per_token * d)))
    return wins.astype(float), d, clusters


def test_length_control_is_statsmodels_logit():
    wins, d, clusters = games(np.random.default_rng(0), preference=0.4)
    wins[::17] = 0.5  # ties
    x = sm.add_constant(np.tanh(d / d.std()))
    fit = sm.GLM(wins, x, family=sm.families.Binomial()).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    found = length_controlled_win_rate(wins, d, clusters)
    assert found.mean == pytest.approx(1 / (1 + math.exp(-fit.params[0])), abs=1e-8)
    low, high = (1 / (1 + math.exp(-end)) for end in fit.conf_int()[0])
    assert found.ci95 == pytest.approx((low, high), abs=2e-4)


def test_a_win_rate_that_is_length_alone_is_taken_away():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        wins, d, clusters = games(rng)
        found = length_controlled_win_rate(wins, d, clusters)
        covered += found.ci95[0] <= 0.5 <= found.ci95[1]
    assert wins.mean() > 0.58
    assert covered / 200 > 0.9


def test_length_control_where_there_is_no_curve():
    same = length_controlled_win_rate([1, 0, 1, 1], [0, 0, 0, 0], range(4))
    assert same.mean == 0.75
    assert math.isnan(length_controlled_win_rate([1, 0, 1], [3, 3, 3], range(3)).mean)  # longer by the same amount
    assert math.isnan(length_controlled_win_rate([1, 1, 0, 0], [5, 4, -4, -5], range(4)).mean)  # length decides alone
    assert math.isnan(length_controlled_win_rate([1, 1, 1], [5, 4, -4], range(3)).mean)  # always wins
    assert math.isnan(length_controlled_win_rate([1, 0, 1, 0], [5, 4, -4, 1], [0] * 4).ci95[0])  # one prompt
