"""Warnings of a run: each illness is named, a healthy run has none."""

from __future__ import annotations

import numpy as np
import pytest

from prefdistill.errors import ConfigError
from prefdistill.evaluation.diagnosis import disagreement, member_figures, warnings_of, within_prompt_correlation
from prefdistill.evaluation.judges import describe, is_oracle, load_oracle

JUDGE = {"heldout_accuracy": 0.75, "n_heldout": 400}


def policy(kl=2.0, fall=0.1, low=0.1, high=0.5):
    advantage = {"mean": 0.3, "ci95": [low, high]}
    return {"kl_policy_ref": {"mean": kl}, "chosen_logp_change": fall, "advantage": advantage}


def member(name="member 0", correlation=0.05, log_loss=0.6, accuracy=0.7):
    return {
        "name": name,
        "length_correlation": correlation,
        "log_loss": log_loss,
        "accuracy": accuracy,
        "n_heldout": 400,
    }


def kinds(methods, members=(), ensemble=None, judge=JUDGE):
    found = warnings_of(methods, members, ensemble, judge)
    assert all(w["text"] and w["what_to_do"] for w in found)
    return [w["kind"] for w in found]


def test_a_healthy_run_has_no_warning():
    assert kinds({"reference": policy(kl=0.0), "e-dpo": policy()}, [member(), member(correlation=0.4)], member()) == []


def test_each_illness_is_named():
    assert kinds({"e-dpo": policy(kl=0.01)}) == ["over-conservative"]
    assert kinds({"dpo": policy(fall=-18.7)}) == ["chosen log-prob fell"]
    assert kinds({}, [member(correlation=0.5), member(correlation=0.4)]) == ["members biased the same way"]
    assert kinds({}, [member(correlation=-0.5), member(correlation=-0.4)]) == ["members biased the same way"]
    assert kinds({}, [member(correlation=0.5), member(correlation=-0.4)]) == []
    assert kinds({}, [member(correlation=0.5)]) == []  # one member is no ensemble
    assert kinds({}, [member(accuracy=0.51)]) == ["weak reward model"]
    assert kinds({}, [member()], member(log_loss=0.7)) == ["weak reward model"]
    assert kinds({}, judge={"heldout_accuracy": 0.47, "n_heldout": 53}) == ["weak judge"]


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [(0.1, 0.5, "Not broken"), (-1.9, -1.5, "Broken"), (-0.1, 0.4, "sees no gain"), (None, None, "sees no gain")],
)
def test_is_it_broken_is_answered_by_the_judge(low, high, answer):
    (found,) = warnings_of({"dpo": policy(fall=-4.0, low=low, high=high)}, [], None, JUDGE)
    assert answer in found["what_to_do"]
    assert "-4.00 nats" in found["text"]


def test_numbers_that_do_not_exist_warn_of_nothing():
    nothing = {"kl_policy_ref": {"mean": None}, "chosen_logp_change": None}
    assert kinds({"dpo": nothing}, [member(correlation=None), member(correlation=0.9)], None, {}) == []


def test_member_figures_of_a_member_that_knows_its_odds():
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 20_000)
    margins = np.where(rng.random(20_000) < 1 / (1 + np.exp(-margins)), margins, -margins)
    found = member_figures(margins, [np.array([1.0, 2.0, 4.0])], [np.array([10, 20, 40])])
    assert found["ece"] < 0.01
    assert found["accuracy"] == pytest.approx((margins > 0).mean())
    assert found["length_correlation"] == pytest.approx(1.0)


def test_length_correlation_is_within_prompts():
    """Prompts with long responses have low rewards, within a prompt the longer response has the higher reward."""
    rewards, lengths = [np.array([9.0, 9.1]), np.array([1.0, 1.1])], [np.array([5, 6]), np.array([50, 51])]
    assert within_prompt_correlation(rewards, lengths) == pytest.approx(1.0)
    assert np.corrcoef(np.concatenate(rewards), np.concatenate(lengths))[0, 1] < -0.9
    assert within_prompt_correlation([np.ones(3)], [np.arange(3)]) is None


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
