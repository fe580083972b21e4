"""Checks of a run: each illness is named with its number, a healthy run has none."""

from __future__ import annotations

import functools
import math
import sys

import numpy as np
import pytest
from scipy import special, stats

from prefdistill.ensemble import tilted
from prefdistill.errors import ConfigError, DataError
from prefdistill.evaluation.diagnosis import check_run, warnings_of
from prefdistill.evaluation.judges import describe, is_oracle, load_oracle, oracle_fingerprint, oracle_scores
from prefdistill.evaluation.rewards import (
    agreeing_prompts,
    asked_kl,
    beyond_training,
    centred_rewards,
    disagreement,
    error_length_correlation,
    member_figures,
    within_prompt_correlation,
)

JUDGE = {"heldout_accuracy": 0.75, "n_heldout": 400}
FALLING = [(-0.5 * i, 0.3 * i) for i in range(8)]


def policy(kl=2.0, fall=0.1, low=0.1, high=0.5, **more):
    advantage = {"mean": 0.3, "ci95": [low, high]}
    figures = {"kl_policy_ref": {"mean": kl}, "kl_ref_policy": {"mean": kl}, "truncated": 0.02}
    return {**figures, "chosen_logp_change": fall, "advantage": advantage, **more}


def member(name="member 0", correlation=0.05, log_loss=0.6, accuracy=0.7, prompts=200):
    return {
        "name": name,
        "error_length_correlation": correlation,
        "log_loss": log_loss,
        "accuracy": accuracy,
        "n_heldout": 400,
        "n_prompts": prompts,
    }


def checks(methods, members=(), ensemble=None, judge=JUDGE):
    found = check_run({"reference": policy(kl=0.0), **methods}, members, ensemble, judge)
    assert all(c.text and c.reason and c.measure for c in found)
    assert all(bool(c.what_to_do) == (c.state in ("ill", "watch")) for c in found)
    return found


def ill(*args, **options):
    return [(c.kind, c.subject) for c in checks(*args, **options) if c.state == "ill"]


def test_a_healthy_run_has_no_warning():
    agreed = {"kl": 0.8, "asked": 0.9, "prompts": 60}
    healthy = policy(
        history=[(0.1, 0.1 * i) for i in range(8)],
        agreed=agreed,
        beyond={"share": 0.01, "reference_share": 0.0, "member": "m"},
    )
    found = checks({"e-dpo": healthy}, [member(), member(correlation=0.4)], member())
    assert {c.state for c in found} == {"healthy"}
    assert warnings_of(found) == []
    assert {c.kind for c in found} == {
        "chosen log-prob fell",
        "responses do not end",
        "over-conservative",
        "reward extrapolates",
        "members biased the same way",
        "weak reward model",
        "weak judge",
    }


def test_each_illness_is_named():
    assert ill({"e-dpo": policy(kl=0.01)}) == [("over-conservative", "e-dpo")]
    assert ill({"dpo": policy(fall=-18.7, low=-2, high=-1)}) == [("chosen log-prob fell", "dpo")]
    assert ill({"dpo": policy(truncated=0.3)}) == [("responses do not end", "dpo")]
    assert ill({"d-dpo": policy(beyond={"share": 0.2, "reference_share": 0.0, "member": "m"})}) == [
        ("reward extrapolates", "d-dpo")
    ]
    same_way = [("members biased the same way", "ensemble")]
    assert ill({}, [member(correlation=0.5), member(correlation=0.3)]) == same_way
    assert ill({}, [member(correlation=-0.5), member(correlation=-0.3)]) == same_way
    assert ill({}, [member(correlation=0.5), member(correlation=-0.4)]) == []
    assert ill({}, [member(correlation=0.5), member(correlation=0.1)]) == []  # one of them is good enough
    assert ill({}, [member(correlation=0.3, prompts=20), member(correlation=0.3, prompts=20)]) == []  # may be chance
    assert ill({}, [member(correlation=0.5)]) == []  # one member is no ensemble
    assert ill({}, [member(accuracy=0.51)]) == [("weak reward model", "member 0")]
    assert ill({}, [member()], member("mean", log_loss=0.7)) == [("weak reward model", "mean")]
    assert ill({}, judge={"heldout_accuracy": 0.47, "n_heldout": 53}) == [("weak judge", "judge")]


def test_ready_and_given_rewards_need_not_be_log_odds():
    """Right four times in five, with margins of six: nothing made their scale, and accuracy says what they are."""
    large = {"log_loss": 1.2, "accuracy": 0.8}
    trained = [{**member(name=f"member {k}"), "temperature": 0.5} for k in range(2)]
    ready = {**member(name="member 1", **large), "temperature": None}
    assert ill({}, [trained[0], ready], member("mean", **large)) == []
    assert ill({}, [trained[0], {**ready, "accuracy": 0.51}]) == [("weak reward model", "member 1")]
    assert ill({}, trained, member("mean", **large)) == [("weak reward model", "mean")]
    (found,) = [c for c in checks({}, [ready]) if c.kind == "weak reward model"]
    assert (found.value, found.threshold) == (0.8, 0.525)
    assert "no log-odds" in found.text


@pytest.mark.parametrize(
    ("low", "high", "state", "answer"),
    [
        (0.1, 0.5, "watch", "Not broken"),
        (-1.9, -1.5, "ill", "Broken"),
        (-0.1, 0.4, "ill", "sees no gain"),
        (None, None, "ill", "sees no gain"),
    ],
)
def test_is_it_broken_is_answered_by_the_judge(low, high, state, answer):
    found = next(
        c for c in checks({"dpo": policy(fall=-4.0, low=low, high=high, history=FALLING)}) if c.kind[:6] == "chosen"
    )
    assert found.state == state
    assert answer in found.what_to_do
    assert "-4.00 nats" in found.text
    assert "margins grew" in found.text
    (warning,) = warnings_of([found])
    assert warning == {"kind": found.kind, "state": state, "text": found.text, "what_to_do": found.what_to_do}


def test_conservatism_is_judged_where_the_ensemble_agrees():
    """A policy that stays put where members contradict one another does what it was asked to."""
    stays = {"kl": 0.02, "asked": 0.9, "prompts": 60}
    found = next(c for c in checks({"e-dpo": policy(kl=2.0, agreed=stays)}) if c.kind == "over-conservative")
    assert (found.state, found.value) == ("ill", 0.02)
    assert "at least 0.90" in found.text
    flat = {"kl": 0.02, "asked": 0.01, "prompts": 60}
    found = next(c for c in checks({"e-dpo": policy(agreed=flat)}) if c.kind == "over-conservative")
    assert "Lower distill.beta" in found.what_to_do
    moved = {"kl": 0.5, "asked": 0.9, "prompts": 60}
    assert ill({"e-dpo": policy(kl=0.05, agreed=moved)}) == []


def test_numbers_that_do_not_exist_are_not_known():
    nothing = {
        "kl_policy_ref": {"mean": None},
        "chosen_logp_change": None,
        "beyond": {"share": None, "reference_share": None, "member": "m"},
    }
    members = [member(correlation=None), member(correlation=0.9)]
    found = check_run({"dpo": nothing}, members, None, {})
    assert [c.state for c in found] == ["unknown"] * 5 + ["healthy"] * 2
    assert warnings_of(found) == []


# -- figures of reward models ------------------------------------------------------------------------------------------


def test_member_figures_of_a_member_that_knows_its_odds():
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 20_000)
    margins = np.where(rng.random(20_000) < 1 / (1 + np.exp(-margins)), margins, -margins)
    longer = rng.normal(0, 5, 20_000)
    found = member_figures(margins, longer, [np.array([1.0, 2.0, 4.0])], [np.array([10, 20, 40])])
    assert found["ece"] < 0.01
    assert found["accuracy"] == pytest.approx((margins > 0).mean())
    assert found["length_correlation"] == pytest.approx(1.0)
    assert abs(found["error_length_correlation"]) < 0.02


def test_length_correlation_is_within_prompts():
    """Prompts with long responses have low rewards, within a prompt the longer response has the higher reward."""
    rewards, lengths = [np.array([9.0, 9.1]), np.array([1.0, 1.1])], [np.array([5, 6]), np.array([50, 51])]
    assert within_prompt_correlation(rewards, lengths) == pytest.approx(1.0)
    assert np.corrcoef(np.concatenate(rewards), np.concatenate(lengths))[0, 1] < -0.9
    assert within_prompt_correlation([np.ones(3)], [np.arange(3)]) is None


@pytest.mark.parametrize(("liked", "low", "high"), [(0.0, -0.02, 0.02), (0.2, 0.2, 1.0), (-0.2, -1.0, -0.2)])
def test_errors_go_with_length_only_beyond_what_the_labels_like(liked, low, high):
    """Labels like length; a member that likes it as much makes no error with it, one that likes it more does."""
    rng = np.random.default_rng(1)
    n = 40_000
    quality, length = rng.normal(0, 1, n), rng.normal(0, 5, n)
    truth = quality + 0.15 * length
    first = rng.random(n) < special.expit(truth)
    turn = np.where(first, 1.0, -1.0)  # so that the chosen one comes first
    member = turn * (truth + liked * length)
    found = error_length_correlation(member, turn * length)
    assert low <= found <= high
    # Both ways round, spelt out.
    error = np.concatenate([special.expit(member) - 1, 1 - special.expit(member)])
    both = np.concatenate([turn * length, -turn * length])
    assert found == pytest.approx(stats.pearsonr(error, both)[0])
    assert error_length_correlation(member, np.zeros(n)) is None


def test_where_an_ensemble_agrees():
    agree, half, never = (
        np.array([[1.0, 2.0], [3.0, 1.0]]),
        np.array([[1.0, 2.0], [3.0, -1.0]]),
        np.array([[1.0], [-1.0]]),
    )
    assert agreeing_prompts([agree, half, never, never]).tolist() == [True, True, False, False]
    assert agreeing_prompts([agree, np.zeros((2, 0))]).tolist() == [True, False]
    assert agreeing_prompts([np.zeros((2, 0))]).tolist() == [False]


def test_asked_kl_is_that_of_the_tilted_samples():
    rewards = np.array([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]])
    q = tilted(np.full((1, 3), 1 / 3), rewards[:1], 0.5)[0]
    assert asked_kl(rewards, 0.5) == pytest.approx([float((q * np.log(q * 3)).sum()), 0.0])
    assert asked_kl(np.array([[0.0, 1000.0]]), 0.1) == pytest.approx([math.log(2)])


def test_beyond_training_counts_what_no_sibling_came_near():
    training = [np.array([0.0, 1.0]), np.array([5.0, 5.5, 6.0]), np.array([7.0])]
    assert sorted(centred_rewards(training)) == pytest.approx([-1.0, -0.75, 0.0, 0.75, 1.0])
    labelled = [np.array([10.0, 12.0])]
    sampled = np.array([[11.9, 12.1, 10.1, 9.0]])  # +0.9, +1.1, -0.9, -2.0 beside the labelled ones' mean
    assert beyond_training(sampled, labelled, training) == 0.5
    assert beyond_training(sampled, labelled, [np.array([7.0])]) is None


def test_disagreement():
    found = disagreement(np.array([[1.0, -1.0, 2.0], [1.0, 1.0, 2.0]]))
    assert found["agreement_rate"] == pytest.approx(2 / 3)
    assert found["margin_std"] == pytest.approx([0.0, 1.0, 0.0])
    assert disagreement(np.array([[1.0, 2.0], [0.0, 0.0]]))["member_correlation"][0][1] is None


def score_words(rows, responses):
    """Counts words. And more."""
    return [float(len(r.split())) for r in responses]


def test_oracles_by_name():
    assert is_oracle("my.module:score")
    assert not is_oracle("org/model")
    assert not is_oracle("C:\\models\\judge")
    found = load_oracle(f"{__name__}:score_words")
    assert found([{}], ["a b"]) == [2.0]
    assert describe(found) == "Counts words. And more"
    assert describe(lambda rows, responses: []) == "a function given by the user"
    for name in ("no_such_module:f", "json:no_such_function"):
        with pytest.raises(ConfigError, match=name.split(":")[0]):
            load_oracle(name)


class Words:
    def __call__(self, rows, responses):
        return score_words(rows, responses)


an_object, a_partial, no_function = Words(), functools.partial(score_words), 3.5
written_in_a_notebook: dict = {}
exec(compile("def judge(rows, responses): return [0.0]", "<ipython-input-1>", "exec"), written_in_a_notebook)
in_a_notebook = written_in_a_notebook["judge"]


def test_any_callable_judges():
    """An edit of its file is an edit of the judge, where it has one."""
    own = oracle_fingerprint(f"{__name__}:score_words")
    assert len(own) == 32
    assert oracle_fingerprint(f"{__name__}:an_object") == oracle_fingerprint(f"{__name__}:a_partial") == own
    assert oracle_fingerprint(f"{__name__}:in_a_notebook") == oracle_fingerprint("builtins:len") == ""
    assert oracle_scores(f"{__name__}:an_object", [{}], ["a b"]).tolist() == [2.0]
    with pytest.raises(ConfigError, match="is a float, which cannot be called"):
        load_oracle(f"{__name__}:no_function")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([1.0, math.nan], 'gave nan for "second one"'),
        ([1.0, math.inf], "gave inf"),
        ([1.0], r"shape \(1,\) for 2 responses"),
        ([[1.0], [2.0]], r"shape \(2, 1\)"),
        (None, r"shape \(\)|no list of numbers"),
        (["good", "bad"], "no list of numbers"),
    ],
)
def test_an_oracle_gives_a_finite_number_for_every_response(given, match, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "score_words", lambda rows, responses: given)
    with pytest.raises(DataError, match=match):
        oracle_scores(f"{__name__}:score_words", [{}, {}], ["first", "second\none"])
