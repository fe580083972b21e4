"""What the stages put together, computed once more from the files by other means: transformers alone, one at a time."""

from __future__ import annotations

import json
from math import log

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from prefdistill import pipeline
from prefdistill.data.group_files import read_groups
from prefdistill.evaluation.sampling import SamplingOptions, sample
from prefdistill.stages.distill import examples_of
from prefdistill.stages.prepare import _demonstrations
from prefdistill.stages.run import Run
from test_illness import pairs
from tiny_runs import WORDS, small

N, SAMPLED = 2, 3


def by_row(rows, responses):
    """A score that hangs on the row and its prompt as much as on the text."""
    return [
        float((7 * row["id"] + 5 * len(row["prompt"]) + 3 * len(text)) % 11)
        for row, text in zip(rows, responses, strict=True)
    ]


def ending(rng):
    """What is good of it stands at its end, where a head on the features of a random model can read it."""
    return f" {rng.choice(['old', 'new', 'soft', 'hard'])} {rng.choice(WORDS)}"


def config_of(model, folder, out, **options):
    """A run whose test, validation, judge and training sets differ in size."""
    return small(
        folder / "pairs.jsonl",
        model,
        out,
        **{
            "evaluate.judge": f"{__name__}:by_row",
            "evaluate.samples": N,
            "evaluate.temperature": 0.7,
            "sample.reference_per_prompt": SAMPLED,
            "sample.max_new_tokens": 1,
            "sft.enabled": True,
            "sft.lora_rank": 0,
            "sft.learning_rate": 3e-3,
            "sft.epochs": 4,
            "distill.lora_rank": 0,
            "distill.learning_rate": 1e-3,
            "distill.epochs": 2,
            "dataset.test_fraction": 0.2,
            "dataset.validation_fraction": 0.15,
            "reward.resample": "all",
            "reward.members": 2,
            **options,
        },
    )


@pytest.fixture(scope="module")
def ran(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wiring")
    pairs(folder / "pairs.jsonl", prompts=80, odds=2.0, response=ending)
    config = config_of(model_folder, folder, folder / "run", methods="[dpo,dp-dpo]")
    pipeline.run(config)
    return Run(config)


def read(run, name):
    return json.loads((run.root / "evaluation" / f"{name}.json").read_text(encoding="utf-8"))


def held_out(run):
    return list(read_groups(run.groups_path).of("test"))


def logp(model, prompt, response) -> float:
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logps = model(ids).logits[0].double().log_softmax(-1)
    return sum(float(logps[len(prompt) - 1 + i, t]) for i, t in enumerate(response))


def policies(run, method):
    return (transformers.AutoModelForCausalLM.from_pretrained(p) for p in (run.policy_path(method), run.reference))


def drawn(run, method, stream):
    path = run.root / "evaluation" / "samples" / f"{method}.json"
    return [[s["ids"] for s in d] for d in json.loads(path.read_text())[stream]]


@pytest.mark.parametrize("method", ["dpo", "dp-dpo"])
def test_samples_are_judged_against_their_own_rows(ran, method):
    end, scores = ran.tokenizer.eos_token_id, {}
    for name in ("reference", method):
        scores[name] = np.array(
            [
                by_row(
                    [{**g.extra, "prompt": g.prompt}] * len(d),
                    [ran.tokenizer.decode([i for i in s if i != end]) for s in d],
                )
                for g, d in zip(held_out(ran), drawn(ran, name, "samples"), strict=True)
            ]
        )
        assert read(ran, "scores")[name] == scores[name].tolist()
    assert scores["reference"].shape[1] == 2 * N
    figures = read(ran, "summary")["methods"][method]
    gap = scores[method] - scores["reference"].mean(1, keepdims=True)
    assert figures["advantage"]["mean"] == pytest.approx(gap.mean())
    met = scores[method][:, :, None] - scores["reference"][:, None, :]
    assert figures["win_rate"]["mean"] == pytest.approx(((met > 0) + 0.5 * (met == 0)).mean())
    assert figures["length_mean"] == pytest.approx(np.mean([len(s) for d in drawn(ran, method, "samples") for s in d]))


@pytest.mark.parametrize("method", ["dpo", "dp-dpo"])
def test_divergences_and_levels(ran, method):
    """Of samples at temperature 1, whatever the evaluation's; each in its own direction."""
    policy, reference = policies(ran, method)
    figures = read(ran, "summary")["methods"][method]
    groups = held_out(ran)

    def change(g, ids):
        return logp(policy, g.ids, ids) - logp(reference, g.ids, ids)

    for key, who, sign in (("kl_policy_ref", method, 1), ("kl_ref_policy", "reference", -1)):
        own = drawn(ran, who, "kl_samples")
        expected = np.mean([sign * change(g, s) for g, d in zip(groups, own, strict=True) for s in d])
        assert figures[key]["mean"] == pytest.approx(expected, abs=1e-4)
    assert figures["kl_policy_ref"]["mean"] > 0.05
    trained = [g for g in ran.groups.of("train") if g.pairs][: ran.config.evaluate.chosen_prompts]
    for key, where in (("chosen_logp_change", trained), ("heldout_chosen_logp_change", groups)):
        expected = np.mean([change(g, g.responses[c].ids) for g in where for c, _ in g.pairs])
        assert figures[key] == pytest.approx(expected, abs=1e-4)
        assert abs(expected) > 0.01


def test_kl_samples_are_the_policys_own(ran):
    policy, _ = policies(ran, "dpo")
    options = SamplingOptions(ran.config.evaluate.max_new_tokens, 1.0, 1.0, ran.config.seed + 1)
    again = sample(policy, [g.ids for g in held_out(ran)], n=1, end_ids=ran.encoder.end_ids, options=options)
    assert [[list(s.ids) for s in d] for d in again] == drawn(ran, "dpo", "kl_samples")
    assert drawn(ran, "dpo", "kl_samples") != [d[:1] for d in drawn(ran, "dpo", "samples")]


def rewards_of(folder, groups):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return [np.array([float(model(torch.tensor([[*g.ids, *r.ids]])).logits) for r in g.responses]) for g in groups]


def margins(rewards, groups):
    return np.array([r[c] - r[w] for r, g in zip(rewards, groups, strict=True) for c, w in g.pairs])


def best_factor(m):
    grid = np.linspace(0.05, 4, 4000)
    return grid[np.argmin([np.logaddexp(0, -s * m).mean() for s in grid])]


def test_members_are_calibrated_on_validation_pairs_and_judged_on_test_pairs(ran):
    groups = read_groups(ran.groups_path)
    for k in range(2):
        parts = {s: list(groups.of(s)) for s in ("train", "validation", "test")}
        found = {s: margins(rewards_of(ran.member_path(k), p), p) for s, p in parts.items()}
        assert best_factor(found["validation"]) == pytest.approx(1.0, abs=0.02)
        assert abs(best_factor(found["train"]) - 1) > 0.05
        figures = read(ran, "ensemble")["members"][k]
        assert figures["n_heldout"] == len(found["test"]) != len(found["validation"])
        assert figures["accuracy"] == pytest.approx((found["test"] > 0).mean())
        assert figures["log_loss"] == pytest.approx(np.logaddexp(0, -found["test"]).mean(), abs=1e-4)


def test_scored_pairs_hold_centred_rewards(ran):
    groups = ran.groups
    scored = pq.read_table(ran.root / "data" / "scored.parquet").to_pylist()
    for k in range(2):
        rewards = rewards_of(ran.member_path(k), groups)
        centre = np.concatenate([r for r, g in zip(rewards, groups, strict=True) if g.split == "train"]).mean()
        expected = [r[c] - centre for r, g in zip(rewards, groups, strict=True) for c, _ in g.pairs]
        assert [row["rewards_chosen"][k] for row in scored] == pytest.approx(expected, abs=1e-4)


def test_rewards_of_samples_stand_beside_those_of_labelled_responses(ran):
    """The share outside the range, and what the ensemble asks for where it agrees, from the members' folders."""
    groups, end = ran.groups, ran.config.distill.of("dp-dpo").beta
    train, test = list(groups.of("train")), list(groups.of("test"))
    shares, drawn_rewards, agreed = [], [], []
    for k in range(2):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(ran.member_path(k))

        def reward(g, ids, model=model):
            with torch.no_grad():
                return float(model(torch.tensor([[*g.ids, *ids]])).logits)

        def labelled(g, reward=reward):
            return np.array([reward(g, g.responses[i].ids) for i in sorted({i for p in g.pairs for i in p})])

        siblings = np.concatenate([[x - np.delete(r, i).mean() for i, x in enumerate(r)] for r in map(labelled, train)])
        own = drawn(ran, "dp-dpo", "kl_samples")
        scores = np.array([[reward(g, s) - labelled(g).mean() for s in d] for g, d in zip(test, own, strict=True)])
        shares.append(((scores > siblings.max()) | (scores < siblings.min())).mean())
        reference = drawn(ran, "reference", "kl_samples")
        drawn_rewards.append([[reward(g, s) for s in d] for g, d in zip(test, reference, strict=True)])
        agreed.append(
            [[np.sign(reward(g, g.responses[c].ids) - reward(g, g.responses[w].ids)) for c, w in g.pairs] for g in test]
        )
    alike = np.array([np.mean([a == b for a, b in zip(x, y, strict=True)]) for x, y in zip(*agreed, strict=True)])
    where = alike >= np.median(alike)
    tilt = np.exp(np.mean(drawn_rewards, axis=0)[where] / end)
    q = tilt / tilt.sum(1, keepdims=True)
    asked = (q * np.log(q * q.shape[1])).sum(1).mean()
    checks = {(c["kind"], c["subject"]): c for c in read(ran, "diagnosis")["checks"]}
    assert checks["reward extrapolates", "dp-dpo"]["value"] == pytest.approx(max(shares))
    stayed = checks["over-conservative", "dp-dpo"]
    assert f"the {where.sum()} prompts where the members agree most" in stayed["text"]
    assert asked > 0
    if stayed["state"] == "ill":
        assert f"{asked:.2f}" in stayed["text"] or f"{asked:.3f}" in stayed["text"]


def test_forward_kl_counts_a_response_as_often_as_it_was_drawn(ran):
    groups = [g for g in ran.groups if g.split == "train"]
    examples = examples_of(ran, "train", rewards=False)
    assert len(examples) == len(groups)
    repeated = 0
    for g, e in zip(groups, examples, strict=True):
        assert len(e.from_reference) == SAMPLED
        counts = {i: e.from_reference.count(i) for i in e.from_reference}
        assert counts == {i: r.drawn for i, r in enumerate(g.responses) if r.drawn}
        repeated += SAMPLED - len(counts)
    assert repeated, "no response was drawn twice: the test shows nothing"


def test_the_supervised_start_reads_chosen_responses(ran):
    trees, too_long = _demonstrations(ran)
    groups = list(read_groups(ran.groups_path).of("train"))
    assert too_long == 0
    for tree, g in zip(trees, groups, strict=True):
        assert set(tree.responses) == {g.responses[c].ids for c, _ in g.pairs}
    rejected = {g.responses[r].ids for g in groups for _, r in g.pairs} - {r for t in trees for r in t.responses}
    assert rejected, "every response was chosen once: the test shows nothing"


def test_the_judge_learns_from_pairs_of_its_own(ran, model_folder):
    folder = ran.root.parent
    config = config_of(model_folder, folder, folder / "judged", methods="[d-dpo]", **{"evaluate.judge": "heldout"})
    pipeline.run(config, until="judge")
    run = Run(config)
    groups = read_groups(run.groups_path)
    counts = {s: sum(len(g.pairs) for g in groups.of(s)) for s in ("train", "judge", "validation", "test")}
    assert len(set(counts.values())) == 4
    facts = json.loads((run.judge_path / "training.json").read_text())
    member = json.loads((run.member_path(0) / "training.json").read_text())
    assert (facts["pairs"], member["pairs"]) == (counts["judge"], counts["train"])
    own = list(groups.of("judge"))
    assert np.logaddexp(0, -margins(rewards_of(run.judge_path, own), own)).mean() < log(2)


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [("{}", 12), ("{gradient_accumulation_steps: 3}", 4), ("{max_steps: 6}", 6), ("{warmup_steps: 12}", 12)],
)
def test_the_learning_rate_rises_over_its_share_of_the_steps(arguments, steps, model_folder, tmp_path):
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for i in range(24):
            file.write(json.dumps({"prompt": f"{i} is", "chosen": " one", "rejected": " two", "split": "train"}) + "\n")
        file.write(json.dumps({"prompt": "It is", "chosen": " one", "rejected": " two", "split": "test"}) + "\n")
    options = {"batch_prompts": 4, "epochs": 2, "learning_rate": 1e-3, "logging_steps": 1, "warmup_fraction": 0.5}
    config = small(
        tmp_path / "pairs.jsonl",
        model_folder,
        tmp_path / "run",
        methods="[dpo]",
        **{f"distill.{name}": value for name, value in options.items()},
        **{"distill.training_arguments": arguments, "evaluate.judge": "test_select:vowels"},
    )
    pipeline.run(config, until="distill")
    history = json.loads((tmp_path / "run" / "policy" / "dpo" / "history.json").read_text())
    rates = [line["learning_rate"] for line in history]
    assert len(rates) == steps
    rise = steps if "warmup_steps" in arguments else steps // 2
    np.testing.assert_allclose(rates[: rise + 1], [1e-3 * k / rise for k in range(min(steps, rise + 1))], rtol=1e-6)
