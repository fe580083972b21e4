"""Statistics against statsmodels and scipy, closed forms, simulated coverage, and properties."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from prefdistill.evaluation import calibration, inference
from prefdistill.evaluation import length as at_length
from prefdistill.evaluation import statistics as s


def _data(n_clusters=40, seed=0, between=1.0, mean=0.3):
    """Unbalanced clusters with a shared part, as rewards of several samples of one prompt have."""
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(n_clusters), rng.integers(1, 6, n_clusters))
    values = mean + between * rng.normal(size=n_clusters)[clusters] + rng.normal(size=len(clusters))
    return values, clusters


def _clustered_ols(y, x, clusters):
    return sm.OLS(y, x).fit(cov_type="cluster", cov_kwds={"groups": clusters})


class TestClusterMean:
    def test_against_statsmodels(self):
        values, clusters = _data()
        fit = _clustered_ols(values, np.ones_like(values), clusters)
        found = s.cluster_mean(values, clusters)
        assert found.mean == pytest.approx(fit.params[0], rel=1e-12)
        assert found.standard_error == pytest.approx(fit.bse[0], rel=1e-12)
        assert found.n_clusters == 40

    def test_singletons_are_the_textbook_standard_error(self):
        values = np.array([1.0, 2.0, 4.0, 9.0])
        found = s.cluster_mean(values, ["a", "b", "c", "d"])
        assert found.mean == 4.0
        assert found.standard_error == pytest.approx(stats.sem(values), rel=1e-14)

    def test_interval_against_scipy_bootstrap(self):
        values = np.random.default_rng(1).normal(size=200)
        scipy_interval = stats.bootstrap(
            (values,), np.mean, method="percentile", n_resamples=20_000, batch=1000, rng=np.random.default_rng(2)
        ).confidence_interval
        found = s.cluster_mean(values, np.arange(200), resamples=20_000)
        assert found.ci95 == pytest.approx(tuple(scipy_interval), abs=0.006)

    def test_whole_clusters_are_drawn(self):
        """Two clusters have four equally likely draws, with means 0, 1, 1 and 4."""
        found = s.cluster_mean([0.0, 0.0, 0.0, 4.0], [0, 0, 0, 1])
        assert found.ci95 == (0.0, 4.0)
        assert found.mean == 1.0
        assert found.standard_error == pytest.approx(math.sqrt(2 * (3.0**2 + 3.0**2)) / 4)

    def test_coverage_is_near_95_percent_and_naive_is_not(self):
        runs, covered, covered_naive, covered_by_t = 300, 0, 0, 0
        for seed in range(runs):
            rng = np.random.default_rng(seed)
            clusters = np.repeat(np.arange(60), 4)
            values = 0.5 + rng.normal(size=60)[clusters] + 0.5 * rng.normal(size=240)
            found = s.cluster_mean(values, clusters, resamples=400, seed=seed)
            covered += found.ci95[0] <= 0.5 <= found.ci95[1]
            covered_naive += abs(values.mean() - 0.5) <= 1.96 * stats.sem(values)
            covered_by_t += inference.wald_test(values - 0.5, clusters).p_value > 0.05
        assert 0.90 <= covered / runs <= 0.985
        assert 0.91 <= covered_by_t / runs <= 0.985
        assert covered_naive / runs < 0.85

    def test_one_cluster_has_no_error_bar(self):
        found = s.cluster_mean([1.0, 2.0], [7, 7])
        assert found.mean == 1.5
        assert math.isnan(found.standard_error)
        assert all(math.isnan(end) for end in found.ci95)
        expected = {"mean": 1.5, "ci95": [None, None], "standard_error": None, "n_clusters": 1}
        assert json.loads(json.dumps(found.as_dict(), allow_nan=False)) == expected

    def test_chunked_resampling_is_the_same(self, monkeypatch):
        values, clusters = _data()
        whole = s.cluster_mean(values, clusters, resamples=501)
        monkeypatch.setattr(s, "_CHUNK", 40 * 7)
        assert s.cluster_mean(values, clusters, resamples=501).ci95 == pytest.approx(whole.ci95, rel=1e-12)

    @given(st.lists(st.tuples(st.integers(0, 4), st.floats(-1e3, 1e3)), min_size=2, max_size=30), st.floats(-50, 50))
    @settings(deadline=None, max_examples=50)
    def test_properties(self, rows, shift):
        clusters = np.array([row[0] for row in rows])
        values = np.array([row[1] for row in rows])
        found = s.cluster_mean(values, clusters, resamples=50)
        if found.n_clusters > 1:
            assert values.min() - 1e-9 <= found.ci95[0] <= found.ci95[1] <= values.max() + 1e-9
        moved = s.cluster_mean(values + shift, clusters, resamples=50)
        assert moved.mean == pytest.approx(found.mean + shift, abs=1e-9)
        assert moved.ci95 == pytest.approx(tuple(end + shift for end in found.ci95), abs=1e-8, nan_ok=True)
        assert moved.standard_error == pytest.approx(found.standard_error, abs=1e-8, nan_ok=True)
        order = np.random.default_rng(0).permutation(len(rows))
        mixed = s.cluster_mean(values[order], clusters[order], resamples=50)
        assert mixed.ci95 == pytest.approx(found.ci95, abs=1e-9, nan_ok=True)
        twice = s.cluster_mean(np.tile(values, 2), np.tile(clusters, 2), resamples=50)
        assert twice.standard_error == pytest.approx(found.standard_error, abs=1e-8, nan_ok=True)
        assert twice.ci95 == pytest.approx(found.ci95, abs=1e-9, nan_ok=True)


class TestWinRate:
    def test_ties_are_half(self):
        found = s.win_rate([1.0, 0.2, -0.2, -3.0, 0.0], range(5), tie_margin=0.2)
        assert (found.wins, found.ties, found.losses) == (0.2, 0.6, 0.2)
        assert found.mean == pytest.approx(0.5)
        strict = s.win_rate([1.0, 0.2, -0.2, -3.0, 0.0], range(5))
        assert (strict.wins, strict.ties, strict.losses) == (0.4, 0.2, 0.4)
        assert set(strict.as_dict()) == {"mean", "ci95", "standard_error", "n_clusters", "wins", "ties", "losses"}

    @pytest.mark.parametrize("margin", [-0.1, math.nan, math.inf])
    def test_bad_margin(self, margin):
        with pytest.raises(ValueError, match="tie_margin"):
            s.win_rate([1.0], [0], tie_margin=margin)

    @given(st.lists(st.floats(-5, 5), min_size=2, max_size=30), st.floats(0, 2))
    @settings(deadline=None, max_examples=50)
    def test_turned_round_it_is_one_minus(self, differences, margin):
        values = np.array(differences)
        clusters = np.arange(len(values)) // 2
        one = s.win_rate(values, clusters, margin, resamples=50)
        other = s.win_rate(-values, clusters, margin, resamples=50)
        assert one.mean + other.mean == pytest.approx(1.0)
        assert one.wins == other.losses
        assert one.wins + one.ties + one.losses == pytest.approx(1.0)
        assert one.mean == pytest.approx(one.wins + one.ties / 2)


class TestWald:
    def test_against_statsmodels(self):
        values, clusters = _data(n_clusters=12)
        fit = sm.OLS(values, np.ones_like(values)).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
        found = inference.wald_test(values, clusters)
        assert found.statistic == pytest.approx(fit.tvalues[0], rel=1e-12)
        assert found.p_value == pytest.approx(fit.pvalues[0], rel=1e-9)
        assert found.degrees_of_freedom == 11

    def test_singletons_are_the_paired_t_test(self):
        rng = np.random.default_rng(3)
        a, b = rng.normal(size=25), rng.normal(size=25) + 0.4
        expected = stats.ttest_rel(a, b)
        found = inference.wald_test(a - b, np.arange(25))
        assert (found.statistic, found.p_value) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)

    def test_edges(self):
        same = inference.wald_test(np.zeros(4), range(4))
        assert (same.statistic, same.p_value) == (0.0, 1.0)
        always = inference.wald_test(-np.ones(4), range(4))
        assert (always.statistic, always.p_value) == (-math.inf, 0.0)
        assert always.as_dict()["statistic"] is None
        alone = inference.wald_test([1.0, 2.0], [0, 0])
        assert math.isnan(alone.statistic)
        assert math.isnan(alone.p_value)


class TestEqualLength:
    def test_against_statsmodels(self):
        noise, clusters = _data(n_clusters=30)
        length = 20 + 15 * np.random.default_rng(5).normal(size=len(clusters))
        reward = 0.2 + 0.05 * length + noise
        fit = _clustered_ols(reward, sm.add_constant(length), clusters)
        found = at_length.advantage_at_equal_length(reward, length, clusters)
        assert found.mean == pytest.approx(fit.params[0], rel=1e-9)
        assert found.standard_error == pytest.approx(fit.bse[0], rel=1e-9)

    def test_bootstrap_equals_refitting(self):
        """The replicates from sums are those of fitting every resample, observation by observation."""
        rng = np.random.default_rng(0)
        clusters = np.repeat(np.arange(6), 3)
        x, y = rng.normal(5, 2, 18), rng.normal(size=18)
        found = at_length.advantage_at_equal_length(y, x, clusters, resamples=60, seed=9)
        counts = np.random.default_rng(9).multinomial(6, np.full(6, 1 / 6), size=60)
        heights = []
        for count in counts:
            repeat = count[clusters]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                heights.append(np.polynomial.polynomial.polyfit(np.repeat(x, repeat), np.repeat(y, repeat), 1)[0])
        assert found.ci95 == pytest.approx(tuple(np.quantile(heights, [0.025, 0.975])), rel=1e-8)

    def test_reward_that_is_only_length_has_no_advantage(self):
        length = np.array([3.0, 10.0, -4.0, 8.0, 30.0])
        found = at_length.advantage_at_equal_length(0.1 * length, length, range(5), resamples=200)
        assert found.mean == pytest.approx(0.0, abs=1e-12)
        assert found.ci95 == pytest.approx((0.0, 0.0), abs=1e-9)

    def test_no_line(self):
        assert at_length.advantage_at_equal_length([1.0, 3.0], [0, 0], [0, 1]) == s.cluster_mean([1.0, 3.0], [0, 1])
        with pytest.raises(ValueError, match="every length difference"):
            at_length.advantage_at_equal_length([1.0, 3.0], [4, 4], [0, 1])

    def test_resamples_without_a_line_are_left_out(self):
        found = at_length.advantage_at_equal_length([1.0, 1.0, 2.0], [0, 0, 1], [0, 0, 1], resamples=100)
        assert all(math.isfinite(end) for end in found.ci95)

    @given(st.floats(1e-3, 1e3))
    @settings(deadline=None, max_examples=20)
    def test_unit_of_length_does_not_matter(self, unit):
        y, clusters = _data(n_clusters=8)
        x = np.random.default_rng(1).normal(3, 2, len(y))
        one = at_length.advantage_at_equal_length(y, x, clusters, resamples=50)
        other = at_length.advantage_at_equal_length(y, unit * x, clusters, resamples=50)
        assert other.mean == pytest.approx(one.mean, rel=1e-9)
        assert other.ci95 == pytest.approx(one.ci95, rel=1e-8)


def test_kl_of_two_normals():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.5, 1.0, size=20_000)
    ratios = stats.norm.logpdf(draws, 0.5) - stats.norm.logpdf(draws, 0.0)
    found = s.kl_estimate(ratios, np.arange(20_000) // 4, resamples=200)
    assert found.mean == pytest.approx(0.125, abs=4 * found.standard_error)
    assert found.standard_error == pytest.approx(0.5 / math.sqrt(20_000), rel=0.05)


class TestRewardModel:
    def test_accuracy_and_loss(self):
        assert calibration.accuracy([2.0, -1.0, 0.0, 3.0]) == 0.625
        assert calibration.log_loss([0.0, 0.0]) == pytest.approx(math.log(2))
        assert calibration.log_loss([math.log(3), -math.log(3)]) == pytest.approx(
            -0.5 * (math.log(0.75) + math.log(0.25))
        )
        assert calibration.log_loss([-2000.0, 2000.0]) == pytest.approx(1000.0)

    def test_predicted_winner(self):
        probabilities, outcomes = calibration.predicted_winner([math.log(3), -math.log(3), 0.0])
        assert probabilities == pytest.approx([0.75, 0.75, 0.5])
        assert outcomes.tolist() == [1.0, 0.0, 0.5]

    def test_bins_by_hand(self):
        found = calibration.calibration_bins([0.9, 0.1, 0.2, 0.8, 0.7], [1, 0, 1, 1, 0], bins=2)
        assert found.count.tolist() == [3, 2]
        assert found.predicted == pytest.approx([1 / 3, 0.85])
        assert found.observed == pytest.approx([1 / 3, 1.0])
        assert calibration.expected_calibration_error(
            [0.9, 0.1, 0.2, 0.8, 0.7], [1, 0, 1, 1, 0], bins=2
        ) == pytest.approx(0.06)
        assert json.dumps(found.as_dict(), allow_nan=False)

    def test_equal_probabilities_do_not_depend_on_order(self):
        outcomes = np.array([1, 1, 1, 0, 0, 0, 0, 0, 1, 0])
        found = [
            calibration.expected_calibration_error(np.full(10, 0.4), np.roll(outcomes, k), bins=4) for k in range(10)
        ]
        assert found == pytest.approx([0.0] * 10, abs=1e-12)

    def test_a_true_model_is_calibrated_and_a_doubled_one_is_not(self):
        rng = np.random.default_rng(0)
        logits = rng.normal(0, 1.5, 20_000)
        margins = np.where(rng.random(20_000) < 1 / (1 + np.exp(-logits)), logits, -logits)
        assert calibration.expected_calibration_error(*calibration.predicted_winner(margins)) < 0.015
        assert calibration.expected_calibration_error(*calibration.predicted_winner(2 * margins)) > 0.06
        assert calibration.log_loss(margins) < calibration.log_loss(2 * margins)
        assert calibration.accuracy(margins) == calibration.accuracy(2 * margins)

    @given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=40))
    @settings(deadline=None, max_examples=50)
    def test_bins_keep_the_totals(self, rows):
        probabilities, outcomes = np.array(rows).T
        found = calibration.calibration_bins(probabilities, outcomes, bins=7)
        assert found.count.sum() == len(rows)
        assert found.count.max() - found.count.min() <= 1
        assert np.average(found.predicted, weights=found.count) == pytest.approx(probabilities.mean(), abs=1e-12)
        assert np.average(found.observed, weights=found.count) == pytest.approx(outcomes.mean(), abs=1e-12)
        assert (np.diff(found.predicted) >= -1e-12).all()
        assert 0 <= calibration.expected_calibration_error(probabilities, outcomes, bins=7) <= 1

    @pytest.mark.parametrize(("p", "o", "bins"), [([1.2], [1], 10), ([0.5], [-1], 10), ([0.5], [1], 0)])
    def test_bad_input(self, p, o, bins):
        with pytest.raises(ValueError, match="must"):
            calibration.calibration_bins(p, o, bins)


CLUSTERED = [s.cluster_mean, s.win_rate, inference.wald_test, s.kl_estimate]


@pytest.mark.parametrize("function", CLUSTERED)
@pytest.mark.parametrize(
    ("values", "clusters", "said"),
    [
        ([], [], "empty"),
        ([1.0, 2.0], [0], "lengths must be equal"),
        ([1.0, math.nan], [0, 1], "finite"),
        ([1.0, -math.inf], [0, 1], "index 1"),
        ([[1.0], [2.0]], [0, 1], "one dimension"),
        ([1.0, 2.0], [[0, 1]], "one dimension"),
        ([1.0, 2.0], [0.0, math.nan], "clusters"),
    ],
)
def test_errors(function, values, clusters, said):
    with pytest.raises(ValueError, match=said):
        function(values, clusters)


def test_errors_of_the_others():
    with pytest.raises(ValueError, match="lengths must be equal"):
        at_length.advantage_at_equal_length([1.0, 2.0], [1.0], [0, 1])
    with pytest.raises(ValueError, match="length_differences must be finite"):
        at_length.advantage_at_equal_length([1.0, 2.0], [1.0, math.inf], [0, 1])
    with pytest.raises(ValueError, match="resamples"):
        s.cluster_mean([1.0, 2.0], [0, 1], resamples=0)
    for function in (calibration.accuracy, calibration.log_loss, calibration.predicted_winner):
        with pytest.raises(ValueError, match="empty"):
            function([])
    with pytest.raises(ValueError, match="lengths must be equal"):
        calibration.calibration_bins([0.5, 0.5], [1])
