"""Variants of a method in one run, and the checkpoint that the judge likes best on the validation prompts."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from prefdistill import pipeline
from prefdistill.errors import ConfigError
from prefdistill.evaluation import sampling
from prefdistill.stages import select
from prefdistill.stages.select import kept_steps
from prefdistill.training.trees import TreeTrainer
from tiny_runs import small


def vowels(rows, responses):
    """Counts vowels: a judge that knows nothing of training."""
    return [float(sum(c in "aeiou" for c in r)) for r in responses]


CONSTANT = {
    "evaluate.judge": "test_select:vowels",
    "distill.learning_rate": 0.02,
    "distill.warmup_fraction": 0,
    "distill.lora_rank": 2,
    "distill.batch_prompts": 2,
}


def weights(folder):
    return load_file(folder / "model.safetensors")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_evenly_spaced_steps_end_at_the_last():
    assert kept_steps(10, 3) == [3, 7, 10]
    assert kept_steps(2, 5) == [1, 2]
    assert kept_steps(7, 1) == [7]


def test_the_checkpoint_is_the_policy_of_that_step_and_the_judges_best(data, model_folder, tmp_path):
    out = tmp_path / "run"
    constant = {"lr_scheduler_type": "constant"}
    config = small(data, model_folder, out, methods="[dpo]", **CONSTANT, **{"distill.checkpoints": 3})
    config.distill.training_arguments = constant
    pipeline.run(config)
    found = read(out / "policy" / "dpo" / "checkpoints.json")
    scores = {row["step"]: row["score"]["mean"] for row in found["checkpoints"]}
    assert len(scores) == 3
    assert len(set(scores.values())) > 1
    assert scores[found["chosen"]] == max(scores.values())

    # Sampled again by the evaluation, in the same way: the chosen step's figure, and no other's.
    config.evaluate.split = "validation"
    pipeline.run(config)
    again = read(out / "validation" / "summary.json")["methods"]["dpo"]["score_mean"]
    assert again == pytest.approx(scores[found["chosen"]])

    # At a constant rate the policy of a step is what a training of so many steps gives.
    shorter = small(data, model_folder, tmp_path / "shorter", methods="[dpo]", **CONSTANT)
    shorter.distill.training_arguments = {**constant, "max_steps": found["chosen"]}
    pipeline.run(shorter, until="distill")
    kept, plain = (weights(folder / "policy" / "dpo") for folder in (out, tmp_path / "shorter"))
    assert all((kept[name] == plain[name]).all() for name in plain)
    assert "Checkpoint of" in (out / "report.html").read_text(encoding="utf-8")


def test_a_stopped_choice_goes_on(data, model_folder, tmp_path, monkeypatch):
    def config(out):
        return small(data, model_folder, out, methods="[dpo]", **CONSTANT, **{"distill.checkpoints": 2})

    pipeline.run(config(tmp_path / "whole"), until="distill")
    real = select.score_samples
    calls = []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(select, "score_samples", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config(tmp_path / "stopped"), until="distill")
    monkeypatch.setattr(TreeTrainer, "training_step", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(sampling, "_sample_batch", lambda *a, **k: pytest.fail("sampled again"))
    pipeline.run(config(tmp_path / "stopped"), until="distill")
    for name in ("checkpoints.json", "history.json", "model.safetensors"):
        whole, stopped = ((tmp_path / run / "policy" / "dpo" / name).read_bytes() for run in ("whole", "stopped"))
        assert whole == stopped, name


def test_variants_are_rows_of_their_own(data, model_folder, tmp_path):
    out = tmp_path / "run"
    config = small(data, model_folder, out, methods="[dpo,mild,strong]")
    config.distill.per_method = {
        "mild": {"method": "dpo", "beta": 0.9},
        "strong": {"method": "e-dpo", "beta": 0.05, "learning_rate": 0.001},
    }
    pipeline.run(config)
    summary = read(out / "evaluation" / "summary.json")
    assert list(summary["methods"]) == ["reference", "dpo", "mild", "strong"]
    assert "strong" in summary["verdict"]
    assert "from dpo" in summary["verdict"] or "than dpo" in summary["verdict"]
    assert weights(out / "policy" / "mild").keys() == weights(out / "policy" / "dpo").keys()

    # A variant with a method's own options is that method.
    same = small(data, model_folder, tmp_path / "same", methods="[dpo,twin]")
    same.distill.per_method = {"twin": {"method": "dpo"}}
    pipeline.run(same, until="distill")
    one, other = (weights(tmp_path / "same" / "policy" / name) for name in ("dpo", "twin"))
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ({"mine": {"beta": 0.2}}, "must say whose it is"),
        ({"mine": {"method": "ppo"}}, "unknown method 'ppo'"),
        ({"dpo": {"method": "ipo"}}, "no name of a method"),
        ({"../mine": {"method": "ipo"}}, "letters, digits"),
        ({"reference": {"method": "ipo"}}, "letters, digits"),
        ({"mine": {"method": "ipo", "beeta": 0.2}}, "unknown option 'beeta'"),
        ({"mine": {"method": "ipo", "beta": -1.0}}, "must be positive"),
        ({"mine": 3}, "must be a mapping"),
        ({"dpo": 3}, "must be a mapping"),
        ({"mine": {"method": "d-dpo", "members": 1}}, "list of whole numbers"),
        ({"mine": {"method": "d-dpo", "members": ["a"]}}, "list of whole numbers"),
        ({"mine": {"method": "ipo", "learning_rate": [1e-4]}}, "must be like a number"),
        ({"mine": {"method": "p-dpo", "kl_alpha": float("nan")}}, "must not be negative"),
    ],
)
def test_variants_that_cannot_be(variants, said, data, model_folder, tmp_path):
    config = small(data, model_folder, tmp_path / "run", methods="[dpo]")
    config.distill.per_method = variants
    with pytest.raises(ConfigError, match=said):
        config.check()
