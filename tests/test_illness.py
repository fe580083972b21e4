"""`prefdistill diagnose` on runs of a tiny model made to have each illness, and on one that has none."""

from __future__ import annotations

import json
import random
from math import exp

import pytest

from prefdistill import pipeline
from prefdistill.cli import main
from tiny_runs import WORDS, small

COLOURS = {"red", "green", "blue"}


def colours(rows, responses):
    """Colours named, less what is no word of the task, less length beyond five words."""
    out = []
    for response in responses:
        words = response.split()
        good = len(COLOURS & set(words))
        out.append(float(good - sum(w not in WORDS for w in words) - max(0, len(words) - 5)))
    return out


def free(rng):
    """Three to five words."""
    return " " + " ".join(rng.choices(WORDS, k=rng.choice((3, 4, 5))))


def formula(rng):
    """Responses that end alike: to a reward model that reads their ends they are nearly one."""
    return f" {rng.choice(WORDS)} it is, and it is small and old and new and soft and dark"


def pairs(path, *, prompts: int, odds: float, response=free):
    """All pairs of four responses a prompt, labelled by Bradley-Terry on their colours; `odds` 0: by a coin."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for i in range(prompts):
            prompt = f"Describe {' '.join(rng.choices(WORDS, k=2))}:"
            texts = sorted({response(rng) for _ in range(4)})
            scores = colours([], texts)
            for a in range(len(texts)):
                for b in range(a):
                    first = rng.random() < 1 / (1 + exp(-odds * (scores[a] - scores[b])))
                    c, r = (a, b) if first else (b, a)
                    out.write(json.dumps({"prompt": prompt, "chosen": texts[c], "rejected": texts[r], "id": i}) + "\n")
    return path


def start(data, model, out, **options):
    """A run whose starting policy has learnt the responses' words."""
    return small(
        data,
        model,
        out,
        **{
            "sft.enabled": True,
            "sft.lora_rank": 0,
            "sft.learning_rate": 3e-3,
            "sft.epochs": 15,
            "evaluate.max_new_tokens": 16,
            "sample.max_new_tokens": 16,
            "sample.reference_per_prompt": 4,
            "evaluate.samples": 4,
            "evaluate.judge": f"{__name__}:colours",
            "dataset.test_fraction": 0.25,
            "reward.hold": "full",
            "reward.learning_rate": 2e-3,
            "reward.epochs": 6,
            "distill.lora_rank": 0,
            "distill.learning_rate": 1e-3,
            "distill.logging_steps": 2,
            **options,
        },
    )


def diagnosed(root, capsys) -> tuple[int, dict]:
    """Exit status, and (kind, subject) -> check."""
    capsys.readouterr()
    status = main(["diagnose", str(root), "--json"])
    found = json.loads(capsys.readouterr().out)["checks"]
    return status, {(c["kind"], c["subject"]): c for c in found}


@pytest.fixture(scope="module")
def labelled(model_folder, tmp_path_factory):
    """One run: dpo at a rate that ruins it, e-dpo that may not move, dp-dpo as it should be."""
    folder = tmp_path_factory.mktemp("labelled")
    per_method = {
        "dpo": {"learning_rate": 4e-3, "epochs": 4.0},
        "dp-dpo": {"beta": 1.0, "kl_alpha": 0.3},
        "e-dpo": {"learning_rate": 1e-7},
    }
    options = {"methods": "[dpo,dp-dpo,e-dpo]", "distill.per_method": json.dumps(per_method)}
    options |= {"reward.resample": "all", "reward.members": 2}
    pipeline.run(start(pairs(folder / "pairs.jsonl", prompts=240, odds=4.0), model_folder, folder / "run", **options))
    return folder / "run"


def test_what_is_ill_is_named_and_what_is_healthy_is_not(labelled, capsys):
    status, found = diagnosed(labelled, capsys)
    assert status == 1
    fell, stayed = found["chosen log-prob fell", "dpo"], found["over-conservative", "e-dpo"]
    assert fell["state"] == "ill"
    assert fell["value"] < -5
    assert "margins grew" in fell["text"]
    assert stayed["state"] == "ill"
    assert "ask for at least" in stayed["text"]
    # dp-dpo, the members, the ensemble and the judge are well.
    healthy = {k: c["state"] for k, c in found.items() if k[1] not in ("dpo", "e-dpo")}
    assert len(healthy) == 9
    assert set(healthy.values()) == {"healthy"}, healthy


def test_what_the_command_and_the_report_say(labelled, capsys):
    """The command finds from columns what the run found; a person reads the number, its limit and the remedy."""
    _, found = diagnosed(labelled, capsys)
    written = json.loads((labelled / "evaluation" / "diagnosis.json").read_text())
    assert [(c["kind"], c["subject"]) for c in written["checks"]] == list(found)
    assert [c["value"] for c in written["checks"]] == pytest.approx([c["value"] for c in found.values()])
    assert main(["diagnose", str(labelled)]) == 1
    said = capsys.readouterr().out
    assert "over-conservative" in said
    assert "what to do:" in said
    warned = json.loads((labelled / "evaluation" / "summary.json").read_text())["warnings"]
    assert {w["kind"] for w in warned} >= {"chosen log-prob fell", "over-conservative"}
    report = (labelled / "report.html").read_text(encoding="utf-8")
    assert f"All {len(found)} checks" in report


def test_members_that_learnt_length_and_nothing_else(model_folder, tmp_path, capsys):
    """Labels of a coin, every member on a resample that prefers the longer response."""
    out = tmp_path / "run"
    options = {"methods": "[d-dpo]", "reward.resample": "length-bias", "reward.rho": "[0.95,0.9]", "reward.members": 2}
    pipeline.run(start(pairs(tmp_path / "pairs.jsonl", prompts=120, odds=0.0), model_folder, out, **options))
    _, found = diagnosed(out, capsys)
    same_way = found["members biased the same way", "ensemble"]
    assert same_way["state"] == "ill"
    assert "longer" in same_way["text"]
    assert {found["weak reward model", f"member {k}"]["state"] for k in range(2)} == {"ill"}


def test_rewards_of_what_no_label_was_like(model_folder, tmp_path, capsys):
    """The labelled responses end alike, the policy's do not."""
    data = pairs(tmp_path / "pairs.jsonl", prompts=100, odds=4.0, response=formula)
    options = {"methods": "[d-dpo]", "reward.hold": "head", "sft.enabled": False, "dataset.both_orders": "keep"}
    pipeline.run(start(data, model_folder, tmp_path / "run", **options))
    _, found = diagnosed(tmp_path / "run", capsys)
    beyond = found["reward extrapolates", "d-dpo"]
    assert beyond["state"] == "ill"
    assert beyond["value"] > 0.2


def test_a_folder_that_is_no_run_or_is_not_evaluated(tmp_path, labelled, capsys):
    assert main(["diagnose", str(tmp_path)]) == 2
    assert "no config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text((labelled / "config.yaml").read_text())
    assert main(["diagnose", str(tmp_path)]) == 2
    assert "evaluate the run first" in capsys.readouterr().err
