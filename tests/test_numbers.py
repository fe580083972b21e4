"""Numbers that are none any more stop a training: step, prompts and cause are said, the last checkpoint is good."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
import transformers

from prefdistill.cli import main
from prefdistill.data.table import PromptGroup, shorten
from prefdistill.data.tree import Tree
from prefdistill.errors import DataError, TrainingError
from prefdistill.models.forward import TreeModel
from prefdistill.progress import silent
from prefdistill.stages.run import words_of
from prefdistill.training.checkpoints import train_to_end
from prefdistill.training.distill import DistillExample, DistillTrainer
from prefdistill.training.sft import SFTTrainer
from prefdistill.training.trees import TreeTrainer
from test_distill import config, examples_near, policy
from tiny_tokenizers import chatml

ONE = {"per_device_train_batch_size": 1, "max_steps": 4, "warmup_steps": 0}


def test_broken_weights_are_named(tmp_path):
    model = policy()
    examples = examples_near(model)
    trainer = DistillTrainer(model, config(tmp_path, "dpo", **ONE), examples=examples)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(
        TrainingError, match=r"the loss is nan in step 1, on 1 prompts .*not finite at the start.*lm_head"
    ):
        trainer.train()


def test_a_step_that_was_too_large_is_the_cause_and_the_checkpoint_before_it_is_good(tmp_path):
    model = policy()
    examples = examples_near(model)
    arguments = config(tmp_path, "dpo", **ONE, save_strategy="steps", save_steps=1, learning_rate=1e-4)
    trainer = DistillTrainer(model, arguments, examples=examples)
    optimizer = trainer.create_optimizer()
    steps = []

    def blow_up(*args):
        steps.append(1)
        if len(steps) == 2:
            with torch.no_grad():
                next(model.parameters()).fill_(math.inf)

    optimizer.register_step_post_hook(blow_up)
    with pytest.raises(
        TrainingError, match=r"in step 3, .*since an earlier step.*learning_rate; .* is kept, .*checkpoint-1$"
    ):
        trainer.train()


@pytest.mark.parametrize("at", [2, 4])
def test_no_checkpoint_and_no_result_has_weights_that_are_no_numbers(at, tmp_path):
    """A step that ruins the weights, the last one too: training goes on from the checkpoint before it."""

    def train(folder, ruined=None):
        model = policy()
        arguments = config(folder, "dpo", **ONE, save_strategy="steps", save_steps=1, learning_rate=1e-4)
        trainer = DistillTrainer(model, arguments, examples=examples_near(model))
        steps = []

        def count(*args):
            steps.append(1)
            if len(steps) == ruined:
                with torch.no_grad():
                    model.lm_head.weight.fill_(math.inf)

        trainer.create_optimizer().register_step_post_hook(count)
        train_to_end(trainer, folder, silent)
        return len(steps), model.state_dict()

    with pytest.raises(
        TrainingError, match=rf"after step {at}, such as lm_head.*learning_rate; .* is kept, .*checkpoint-{at - 1}$"
    ):
        train(tmp_path / "broken", ruined=at)
    steps, weights = train(tmp_path / "broken")
    assert steps == 4 - (at - 1)
    _, whole = train(tmp_path / "whole")
    assert all(torch.equal(w, whole[name]) for name, w in weights.items())


def test_a_gradient_without_bounds_stops_before_the_step(tmp_path):
    class Steep(TreeTrainer):
        def values_of(self, batch):
            return self.tree_model.logps(batch)

        def loss_of(self, values, inputs):
            return (0 * values.sum()).sqrt()  # 0, whose slope is infinite

    model = policy()
    before = [p.clone() for p in model.parameters()]
    items = [{"tree": Tree((5, 6), ((7, 2),)), "name": "the steep prompt"}]
    trainer = Steep(model, config(tmp_path, "dpo", **ONE), train_items=items, join=lambda items: {})
    with pytest.raises(TrainingError, match=r"the gradient is nan in step 1, on 1 prompts \(the steep prompt\).*steep"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_float16s_scaler_may_leave_a_step_out(tmp_path, monkeypatch):
    """A gradient that overflows is how it finds its scale."""
    model = policy()
    trainer = DistillTrainer(model, config(tmp_path, "dpo", **ONE), examples=examples_near(model))
    monkeypatch.setattr(transformers.Trainer, "_get_grad_norm", lambda *_: math.inf)
    with pytest.raises(TrainingError, match="the gradient is inf"):
        trainer._get_grad_norm(model)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert trainer._get_grad_norm(model) == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", ["reward", "reference log-prob"])
def test_columns_that_are_given_must_be_finite(bad, column):
    tree = Tree((5, 6), ((7, 2), (8, 2)))
    logps, rewards = (-1.0, -2.0), ((0.0, 1.0), (0.5, 2.0))
    if column == "reward":
        rewards = (rewards[0], (0.5, bad))
    else:
        logps = (-1.0, bad)
    with pytest.raises(DataError, match=rf"the {column} of response 1 is .*my prompt"):
        DistillExample(tree, logps, rewards, ((0, 1),), name="my prompt")


def test_the_command_says_so_and_ends_with_2(data, model_folder, tmp_path, capsys):
    flags = ["--data", str(data), "--model", str(model_folder), "--output-dir", str(tmp_path / "run")]
    flags += ["--methods", "dpo", "--precision", "float32", "--distill.learning_rate", "1e30"]
    flags += ["--distill.training_arguments", "{max_grad_norm: 0}", "--distill.warmup_fraction", "0"]
    assert main(["distill", *flags, "--distill.epochs", "5"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("prefdistill: the ")
    assert "lower learning_rate" in last
    assert re.search(r'\(".*" \(pairs\.jsonl, row \d+\)', last), "prompts by their words and rows"
    assert not (tmp_path / "run" / "policy").exists()


@pytest.mark.parametrize("stage", ["start", "reference"])
def test_prompts_are_named_by_their_words_in_every_stage(stage, data, model_folder, tmp_path, capsys, monkeypatch):
    flags = ["--data", str(data), "--model", str(model_folder), "--output-dir", str(tmp_path / "run")]
    flags += ["--methods", "dpo", "--precision", "float32", "--sft.enabled", str(stage == "start").lower()]
    if stage == "start":
        monkeypatch.setattr(SFTTrainer, "loss_of", lambda self, values, inputs: values.sum() * math.nan)
    else:
        monkeypatch.setattr(
            TreeModel, "logps", lambda self, batch, hidden=None: torch.full((batch.responses,), math.nan)
        )
    assert main(["distill", *flags]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    prompts = [json.loads(line)["prompt"] for line in data.read_text().splitlines()]
    assert any(f"{shorten(p)} ({data.name}, row {i})" in said for i, p in enumerate(prompts, 1)), said


def test_a_prompt_of_many_rows_is_named_by_the_first():
    group = PromptGroup("p", (1,), "train", {}, rows=["pairs.jsonl, row 3", "pairs.jsonl, row 9", "b.csv, row 1"])
    assert group.name == '"p" (pairs.jsonl, row 3 and 2 more)'


def test_prompts_that_begin_alike_are_told_apart():
    """As all do that stand under one system message, in texts and in tokens under a chat template."""
    tokenizer = chatml()
    system, names = "You are a helpful assistant. " * 5, set()
    for question in ("Why is the sky blue?", "Why is grass green?"):
        turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        for name in (PromptGroup(turns, (1,), "train", {}).name, words_of(tokenizer, Tree(tuple(ids), ((1,),)))):
            assert len(name) < 80
            assert question in name
            names.add(name)
    assert len(names) == 4
