"""Resamples against counting: sizes, fractions, who may be drawn, and what is refused."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prefdistill.data.bias import RESAMPLES, length_bias_size, resample
from prefdistill.errors import ConfigError, DataError


def signs(longer: int, shorter: int, equal: int = 0) -> np.ndarray:
    """+1 / -1 / 0 in a fixed, mixed order."""
    return np.random.default_rng(0).permutation([1] * longer + [-1] * shorter + [0] * equal)


counts = st.integers(1, 60)
tenths = st.integers(0, 10)


@given(counts, counts, st.integers(0, 10), tenths, st.integers(0, 5))
@example(7, 3, 0, 7, 0)  # 3 / (1 - 0.7) is 9.999999999999998 in floats
def test_length_bias_has_its_fraction_and_repeats_nothing(longer, shorter, equal, tenth, seed):
    rho, where = Fraction(tenth, 10), signs(longer, shorter, equal)
    # By search, in exact fractions: the most pairs so that neither kind runs out.
    size = max(n for n in range(longer + shorter + 1) if rho * n <= longer and (1 - rho) * n <= shorter)
    if size == 0:
        with pytest.raises(DataError):
            resample("length-bias", where, seed=seed, rho=float(rho))
        return
    weights = resample("length-bias", where, seed=seed, rho=float(rho))
    assert set(weights) <= {0, 1}
    assert weights.sum() == size == length_bias_size(longer, shorter, float(rho))
    assert weights[where == 0].sum() == 0
    assert abs(weights[where > 0].sum() - rho * size) <= Fraction(1, 2)
    if (rho * size).denominator == 1:
        assert weights[where > 0].sum() == rho * size


@pytest.mark.parametrize(
    ("rho", "longer", "shorter"), [(0.2, 25, 100), (0.5, 100, 100), (0.8, 100, 25), (0.0, 0, 100), (1.0, 100, 0)]
)
def test_length_bias_of_a_balanced_set(rho, longer, shorter):
    where = signs(100, 100, 7)
    weights = resample("length-bias", where, seed=3, rho=rho)
    assert (weights[where > 0].sum(), weights[where < 0].sum()) == (longer, shorter)


@given(counts)
def test_bootstrap_draws_as_many_as_there_are(pairs):
    weights = resample("bootstrap", np.zeros(pairs), seed=0)
    assert weights.sum() == pairs
    assert weights.dtype == np.int64


def test_bootstrap_leaves_out_what_drawing_with_replacement_leaves_out():
    weights = resample("bootstrap", np.zeros(20_000), seed=1)
    for times in range(4):  # Poisson(1), to within four standard errors
        p = math.exp(-1) / math.factorial(times)
        assert abs((weights == times).mean() - p) < 4 * math.sqrt(p * (1 - p) / 20_000)


@given(counts, st.integers(1, 100))
def test_subsample_draws_its_share_once(pairs, percent):
    weights = resample("subsample", np.zeros(pairs), seed=0, fraction=percent / 100)
    assert set(weights) <= {0, 1}
    assert weights.sum() == max(1, round(percent / 100 * pairs))


def test_all_is_everything_once():
    assert (resample("all", signs(3, 4, 5), seed=9) == 1).all()


@pytest.mark.parametrize("kind", ["bootstrap", "subsample", "length-bias"])
def test_a_seed_repeats_and_another_differs(kind):
    where = signs(100, 80, 20)
    draws = [resample(kind, where, seed=seed, rho=0.3) for seed in (0, 0, 1)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()


@pytest.mark.parametrize("kind", ["subsample", "length-bias"])
def test_every_pair_may_be_drawn(kind):
    """40 seeds at one half each: a pair that is never drawn has a chance of 1e-12."""
    where = signs(30, 30)
    drawn = sum(resample(kind, where, seed=seed, fraction=0.5, rho=0.25) for seed in range(120))
    assert (drawn > 0).all()
    assert abs(drawn[where < 0].mean() - (60 if kind == "subsample" else 120)) < 10


@pytest.mark.parametrize("rho", [None, -0.1, 1.1, math.nan])
def test_rho_out_of_range(rho):
    with pytest.raises(ConfigError, match="rho"):
        resample("length-bias", signs(5, 5), seed=0, rho=rho)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, math.nan])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ConfigError, match=r"reward\.fraction"):
        resample("subsample", signs(5, 5), seed=0, fraction=fraction)


def test_unknown_kind_names_the_known():
    with pytest.raises(ConfigError, match=", ".join(RESAMPLES)):
        resample("jackknife", signs(5, 5), seed=0)


@pytest.mark.parametrize(
    ("longer", "shorter", "rho"), [(0, 9, 0.2), (9, 0, 0.2), (0, 9, 1.0), (9, 0, 0.0), (0, 0, 0.5)]
)
def test_data_without_a_kind_that_rho_needs(longer, shorter, rho):
    with pytest.raises(DataError, match=f"rho = {rho}.*{longer} pairs.*{shorter}"):
        resample("length-bias", signs(longer, shorter, 3), seed=0, rho=rho)
