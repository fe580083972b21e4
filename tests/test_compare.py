"""The figures of a method and the verdict, against counting by hand and against worlds whose answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prefdistill.evaluation.compare import Drawn, compare, verdict, wald_tests

ZERO = np.zeros((1, 1))


def figures(method: Drawn, reference: Drawn, **given):
    defaults = {
        "kl_policy_ref": np.zeros((len(method.scores), 1)),
        "kl_ref_policy": np.zeros((len(method.scores), 1)),
        "chosen_logp_change": 0.0,
        "heldout_chosen_logp_change": 0.0,
        "tie_margin": 0.0,
        "seed": 0,
    }
    return compare(method, reference, **{**defaults, **given})


def drawn(scores, lengths=None, truncated=0.0) -> Drawn:
    scores = np.asarray(scores, dtype=float)
    return Drawn(scores, np.ones_like(scores) if lengths is None else np.asarray(lengths, dtype=float), truncated)


def test_figures_are_those_counted_by_hand():
    rng = np.random.default_rng(0)
    own, base = rng.integers(0, 6, (7, 2)).astype(float), rng.integers(0, 6, (7, 3)).astype(float)
    found = figures(drawn(own, truncated=0.25), drawn(base), tie_margin=1.0)
    meetings = [a - b for x, y in zip(own, base, strict=True) for a, b in itertools.product(x, y)]
    wins, losses = (sum(m > 1 for m in meetings), sum(m < -1 for m in meetings))
    assert found["wins"] == pytest.approx(wins / 42)
    assert found["losses"] == pytest.approx(losses / 42)
    assert found["ties"] == pytest.approx(1 - (wins + losses) / 42)
    assert found["win_rate"]["mean"] == pytest.approx(0.5 + 0.5 * (wins - losses) / 42)
    assert found["advantage"]["mean"] == pytest.approx(np.mean(meetings))
    assert found["advantage"]["n_clusters"] == found["win_rate"]["n_clusters"] == 7
    assert found["score_mean"] == pytest.approx(own.mean())
    assert found["truncated"] == 0.25


def test_kl_is_the_mean_over_samples_whatever_their_number():
    log_ratios = np.random.default_rng(1).normal(1.0, 0.2, (5, 4))
    found = figures(drawn(np.ones((5, 1))), drawn(np.ones((5, 2))), kl_policy_ref=log_ratios)
    assert found["kl_policy_ref"]["mean"] == pytest.approx(log_ratios.mean())
    assert found["kl_ref_policy"]["mean"] == 0


def test_an_advantage_that_is_length_alone_vanishes_at_equal_length():
    rng = np.random.default_rng(2)
    lengths, base_lengths = rng.integers(5, 40, (300, 2)), rng.integers(5, 30, (300, 2))
    noise = lambda n: rng.normal(0, 0.1, n.shape)  # noqa: E731
    own = drawn(0.1 * lengths + noise(lengths), lengths)
    base = drawn(0.1 * base_lengths + noise(base_lengths), base_lengths)
    found = figures(own, base)
    assert found["advantage"]["ci95"][0] > 0.3
    low, high = found["advantage_equal_length"]["ci95"]
    assert low < 0.02
    assert high > -0.02
    assert high - low < 0.1


def test_one_length_for_all_leaves_nothing_to_control():
    assert (
        figures(drawn([[1.0], [2.0]], [[4], [4]]), drawn([[0.0], [0.0]], [[3], [3]]))["advantage_equal_length"] is None
    )
    same = figures(drawn([[1.0], [2.0]]), drawn([[0.0], [0.0]]))
    assert same["advantage_equal_length"]["mean"] == same["advantage"]["mean"] == 1.5


def test_the_interval_covers_the_advantage():
    """Prompts differ much, samples within a prompt little: over many experiments 95% of intervals hold the truth."""
    rng, covered, runs = np.random.default_rng(3), 0, 400
    for _ in range(runs):
        prompt, gain = rng.normal(0, 2, (60, 1)), rng.normal(0.3, 0.5, (60, 1))
        own = prompt + gain + rng.normal(0, 1, (60, 2))
        base = prompt + rng.normal(0, 1, (60, 4))
        low, high = figures(drawn(own), drawn(base), resamples=400)["advantage"]["ci95"]
        covered += low <= 0.3 <= high
    assert 0.91 <= covered / runs <= 0.98


def test_methods_are_compared_on_the_same_prompts():
    rng = np.random.default_rng(4)
    prompt = rng.normal(0, 5, (50, 1))  # would drown the difference if the prompts were not paired
    scores = {"dpo": prompt + rng.normal(0, 0.3, (50, 2)), "e-dpo": prompt + 0.4 + rng.normal(0, 0.3, (50, 2))}
    (test,) = wald_tests(scores, seed=0)
    assert (test["a"], test["b"]) == ("e-dpo", "dpo")
    assert test["difference"]["mean"] == pytest.approx(scores["e-dpo"].mean() - scores["dpo"].mean())
    assert test["p_value"] < 1e-6


def method_figures(mean, low, high):
    return {"advantage": {"mean": mean, "ci95": [low, high]}, "win_rate": {"mean": 0.6, "ci95": [0.5, 0.7]}}


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.5, "e-dpo is better than the starting policy by the oracle"),
        (-0.5, -0.1, "e-dpo is worse than the starting policy"),
        (-0.1, 0.5, "No difference shown between e-dpo and the starting policy"),
        (None, None, "Too few prompts"),
    ],
)
def test_the_verdict_says_no_more_than_the_interval(low, high, said):
    if low is None:
        found = compare(
            drawn([[1.0]]),
            drawn([[0.0]]),
            kl_policy_ref=ZERO,
            kl_ref_policy=ZERO,
            chosen_logp_change=0,
            heldout_chosen_logp_change=0,
            tie_margin=0,
            seed=0,
        )
        assert verdict("e-dpo", "dpo", {"e-dpo": found}, [], "the oracle").startswith(said)
        return
    assert verdict("e-dpo", "dpo", {"e-dpo": method_figures(0.3, low, high)}, [], "the oracle").startswith(said)


@pytest.mark.parametrize(("order", "sign"), [(("e-dpo", "dpo"), 1), (("dpo", "e-dpo"), -1)])
@pytest.mark.parametrize(
    ("gap", "p", "said"),
    [
        (0.2, 0.01, "it is better than dpo by 0.20 (p = 0.010)"),
        (-0.2, 0.01, "it is worse than dpo by 0.20 (p = 0.010)"),
        (0.2, 1e-5, "it is better than dpo by 0.20 (p < 0.001)"),
        (0.2, 0.3, "no difference shown from dpo (+0.20, p = 0.30)"),
    ],
)
def test_the_verdict_compares_with_dpo_whichever_way_the_test_stands(order, sign, gap, p, said):
    tests = [{"a": order[0], "b": order[1], "difference": {"mean": sign * gap}, "p_value": p}]
    assert said in verdict("e-dpo", "dpo", {"e-dpo": method_figures(0.3, 0.1, 0.5)}, tests, "the judge")
