"""Runs whose policies and members are adapters on 4-bit weights."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch
import transformers

import plain
from prefdistill import pipeline
from prefdistill.data.tree import Tree
from prefdistill.models.quantise import load_policy_4bit
from prefdistill.seals import checksum
from prefdistill.stages.bases import rounded_reference_column
from prefdistill.stages.reference import reference_columns
from prefdistill.stages.run import Run
from test_quantise import CPU, bnb, model_folder  # noqa: F401
from tiny_runs import small


def test_a_run_on_the_rounded_reference(bnb, data, model_folder, tmp_path, capsys):  # noqa: F811
    """Margins start at zero, being measured against what the adapter starts from; other methods are as ever."""
    out = tmp_path / "run"
    config = small(
        data, model_folder, out, methods="[dpo, plain]",
        **{"distill.logging_steps": 1, "distill.checkpoints": 2, "distill.learning_rate": 0.01,
           "distill.load_in_4bit": "true", "gradient_checkpointing": "always",
           "distill.per_method": "{plain: {method: dpo, load_in_4bit: false}}"},
    )  # fmt: skip
    pipeline.run(config)
    said = capsys.readouterr().err
    assert "rounded to NF4 the reference gives responses" in said
    run = Run(config)
    trees = [g.tree for g in run.groups if g.split == "train"]
    rounded, true = rounded_reference_column(run), reference_columns(run)["logps"]
    model = load_policy_4bit(str(model_folder), precision="float32", device=CPU).eval()
    with torch.no_grad():
        expected = [[float(v) for v in plain.logps(model, t)] for t in trees[:3]]
    for tree, values in zip(trees[:3], expected, strict=True):
        assert rounded.of(tree) == pytest.approx(values, abs=1e-3)
    assert max(abs(rounded.of(t) - true.of(t)).max() for t in trees) > 0.01
    for method in ("dpo", "plain"):
        history = json.loads((out / "policy" / method / "history.json").read_text())
        assert abs(history[0]["rewards/margins"]) < 1e-5
        assert abs(history[0]["logps/level_change"]) < 1e-4
    # The report is about the model that the run began with, rounding included.
    figures = json.loads((out / "evaluation" / "summary.json").read_text())["methods"]["dpo"]
    policy = transformers.AutoModelForCausalLM.from_pretrained(out / "policy" / "dpo")
    start = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    train = [g for g in run.groups if g.split == "train" and g.pairs][: config.evaluate.chosen_prompts]
    with torch.no_grad():
        changes = [
            float(plain.logps(policy, g.tree)[c] - plain.logps(start, g.tree)[c]) for g in train for c, _ in g.pairs
        ]
    assert figures["chosen_logp_change"] == pytest.approx(sum(changes) / len(changes), abs=1e-3)
    capsys.readouterr()
    pipeline.run(config)
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("use_dora", [False, True])
def test_margins_start_at_zero_in_bfloat16_too(use_dora, bnb, data, model_folder, tmp_path):  # noqa: F811
    options = {"precision": "bfloat16", "distill.load_in_4bit": "true", "distill.use_dora": use_dora}
    options |= {"distill.logging_steps": 1, "evaluate.judge": "test_select:vowels"}
    pipeline.run(small(data, model_folder, tmp_path / "run", methods="[dpo]", **options), until="distill")
    history = json.loads((tmp_path / "run" / "policy" / "dpo" / "history.json").read_text())
    assert abs(history[0]["rewards/margins"]) < 1e-3
    assert abs(history[0]["logps/level_change"]) < 1e-2
    assert history[-1]["logps/level_change"] != 0


@pytest.mark.parametrize("use_dora", [False, True])
def test_members_of_a_run(use_dora, bnb, data, model_folder, tmp_path):  # noqa: F811
    """Whole or as adapters on one written-out base, the same rewards, by plain PEFT too; nothing needs 4 bits again."""
    import peft

    scored = {}
    for adapters in ("false", "true"):
        out = tmp_path / f"run-{adapters}"
        options = {"reward.hold": "lora", "reward.lora_rank": 2, "reward.members": 2, "reward.learning_rate": 0.01}
        options |= {"reward.load_in_4bit": "true", "reward.use_dora": use_dora, "reward.adapters": adapters}
        config = small(data, model_folder, out, methods="[d-dpo]", **options)
        pipeline.run(config, until="score")
        scored[adapters] = pq.read_table(out / "data" / "scored.parquet").to_pydict()
    rewards = [c for c in scored["true"] if "reward" in c]
    assert rewards
    for column in rewards:
        found, expected = (torch.tensor(scored[a][column]) for a in ("true", "false"))
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    bases = list((out / "reward").glob("base-nf4-*"))
    assert len(bases) == 1
    member = out / "reward" / "member-1"
    assert json.loads((member / "adapter_config.json").read_text())["base_model_name_or_path"] == str(bases[0])
    assert not list(member.glob("model*.safetensors"))
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run-false" / "reward" / "member-1"
    ).eval()
    adapted = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(member), num_labels=1).eval()
    adapted.get_base_model().config.pad_token_id = whole.config.pad_token_id
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-3)

    # The base is the run's own: where it is damaged the members that stand on it are made again.
    file = bases[0] / "model.safetensors"
    before = checksum(file)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    pipeline.run(config, until="score")
    assert checksum(file) == before


def test_a_supervised_start(bnb, data, model_folder, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    options = {"sft.enabled": "true", "sft.load_in_4bit": "true", "sft.use_dora": "true", "sft.learning_rate": 0.01}
    config = small(data, model_folder, out, methods="[dpo]", **options, **{"sft.epochs": 3})
    pipeline.run(config, until="start")
    start = transformers.AutoModelForCausalLM.from_pretrained(out / "start").eval()
    true = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    rounded = load_policy_4bit(str(model_folder), precision="float32", device=CPU).eval()
    run = Run(config)
    chosen = [Tree(g.ids, (g.responses[g.pairs[0][0]].ids,)) for g in run.groups if g.split == "train"][:8]
    with torch.no_grad():
        levels = [sum(float(plain.logps(m, t)[0]) for t in chosen) for m in (rounded, true, start)]
    assert levels[2] > max(levels[:2]) + 5, "the start knows its demonstrations"
