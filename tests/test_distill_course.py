"""How policy training goes, warns, stops and resumes, and what it holds in memory."""

from __future__ import annotations

import copy
import gc
import logging
import math
import tempfile

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import plain
from prefdistill.data.tree import Tree
from prefdistill.models.loading import add_lora
from prefdistill.scoring import Column, fill_columns, logps_forward
from prefdistill.training.degeneracy import degenerates
from prefdistill.training.distill import DistillExample, DistillTrainer
from prefdistill.training.sft import SFTTrainer
from test_distill import PAIRS, TREES, config, examples_near, policy
from tiny_models import QUIET

# -- where training goes -----------------------------------------------------------------------------------------------

# Two answers a prompt, disjoint over prompts but for a shared word; the rejected one says it four times.
STUTTER = [Tree((5 + i, 6), ((30 + i, 40, 2), (50 + i, 40, 40, 40, 40, 2))) for i in range(4)]
_start: list = []


def start():
    """A policy that gives both answers about equally, and its log-probs."""
    if not _start:
        model = policy()
        args = transformers.TrainingArguments(
            output_dir=tempfile.gettempdir(), max_steps=40, learning_rate=3e-3, per_device_train_batch_size=4, **QUIET
        )
        SFTTrainer(model, args, trees=STUTTER).train()
        model.eval()
        with torch.no_grad():
            _start.extend([model, [[float(v) for v in plain.logps(model, t)] for t in STUTTER]])
    return copy.deepcopy(_start[0]), _start[1]


def distil_stutter(folder, method, **options) -> DistillTrainer:
    model, logps = start()
    examples = [
        DistillExample(t, tuple(r), ((1.0, -1.0),), ((0, 1),), (0, 1)) for t, r in zip(STUTTER, logps, strict=True)
    ]
    options = {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant", **options}
    return DistillTrainer(model, config(folder, method, **options), examples=examples)


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "prefdistill.training.distill"]


def test_the_supervised_start_has_learnt_both_answers():
    _, logps = start()
    assert np.exp(logps).sum(1).min() > 0.5


def test_dpo_that_degenerates_is_warned_of_once(tmp_path, caplog):
    """The field's most asked question (direct-preference-optimization 8, 32, 36; trl 800, 1236): the log answers it."""
    trainer = distil_stutter(tmp_path, "dpo", max_steps=24, learning_rate=1e-2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (warning,) = warnings_of(caplog)
    assert "log-prob fell by" in warning
    assert "forward-KL" in warning
    last = [h for h in trainer.state.log_history if "loss" in h][-1]
    assert last["logps/chosen_change"] < -3
    assert last["rewards/margins"] > 5
    with torch.no_grad():
        mass = [sum(math.exp(float(v)) for v in plain.logps(trainer.model.eval(), t)) for t in STUTTER]
    assert np.mean(mass) < 0.1  # the answers that the data show, the policy no longer gives


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("p-dpo", {"kl_alpha": 0.1, "learning_rate": 3e-3}),
        ("dp-dpo", {"kl_alpha": 0.1, "beta": 0.5, "learning_rate": 3e-3}),
        ("d-dpo", {"beta": 0.5, "learning_rate": 3e-3}),
        ("dpo", {"learning_rate": 1e-3}),
    ],
)
def test_healthy_runs_are_not_warned_of(method, options, tmp_path, caplog):
    trainer = distil_stutter(tmp_path, method, max_steps=24, **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert not warnings_of(caplog)
    last = [h for h in trainer.state.log_history if "loss" in h][-1]
    assert last["rewards/margins"] > 0.1
    assert last["logps/chosen_change"] > -0.5


def test_a_resumed_run_is_judged_from_its_start(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        distil_stutter(tmp_path, "dpo", max_steps=4, learning_rate=1e-2, save_strategy="steps", save_steps=4).train()
        assert not warnings_of(caplog)
        again = distil_stutter(tmp_path, "dpo", max_steps=6, learning_rate=1e-2)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([(0, 0), (-1, 1), (-2, 2), (-3, 3)], True),
        ([(0, 0), (-1, 1), (-3, 2)], False),  # too early to tell
        ([(0, 0), (-0.1, 1), (-0.2, 2), (-0.3, 3)], False),  # hardly any fall
        ([(0, 0), (1, 1), (2, 2), (3, 3)], False),
        ([(0, 0), (-2, 1), (-2, 0.1), (-1, 0.1)], False),  # the margin does not grow
        ([(-4, 0), (-4, 1), (-2, 2), (-2, 3)], False),  # it comes back
        ([(0, 0), (-2, -3), (-4, -2), (-5, -1)], False),  # worse than the start, but not by winning
    ],
)
def test_degenerates(history, expected):
    assert degenerates(history) == expected


def test_distillation_reaches_the_rewards(tmp_path):
    """Theorem 1's fixed point on all pairs of three responses: beta h is the reward margin."""
    model = policy()
    rewards = [(0.0, 1.0, -1.5, 0.5), (2.0, 0.0), (-1.0, 1.0, 0.0)]
    with torch.no_grad():
        before = [[float(v) for v in plain.logps(model, t)] for t in TREES]
    examples = [DistillExample(t, tuple(b), (r,)) for t, b, r in zip(TREES, before, rewards, strict=True)]
    args = config(tmp_path, "d-dpo", beta=0.5, max_steps=60, learning_rate=5e-3, weight_decay=0.0)
    trainer = DistillTrainer(model, args, examples=examples)
    trainer.train()
    errors = [h["distillation/error"] for h in trainer.state.log_history if "loss" in h]
    assert errors[-1] < 0.05 * errors[0]
    with torch.no_grad():
        after = [[float(v) for v in plain.logps(model.eval(), t)] for t in TREES]
    for old, new, reward in zip(before, after, rewards, strict=True):
        implicit = 0.5 * (np.array(new) - np.array(old))
        np.testing.assert_allclose(implicit - implicit[0], np.array(reward) - reward[0], atol=0.2)


# -- what a run is made of ---------------------------------------------------------------------------------------------


def alive() -> dict[int, nn.Parameter]:
    gc.collect()
    return {o.data_ptr(): o for o in gc.get_objects() if type(o) is nn.Parameter}


def test_no_reference_model_is_in_memory(tmp_path):
    """trl 5542, 1968: after the pass over the reference its weights are gone, and training holds the policy's only."""
    others = set(alive())
    column = Column(tmp_path / "logps", "m")
    fill_columns({"logps": column}, TREES, policy, logps_forward, token_budget=100, precision="float32")
    assert set(alive()) == others
    model = policy()
    examples = [DistillExample(t, tuple(column.of(t)), (), p) for t, p in zip(TREES, PAIRS, strict=True)]
    trainer = DistillTrainer(model, config(tmp_path, "dpo", max_steps=1), examples=examples)
    trainer.train()
    assert set(alive()) - others == {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_ends_as_an_undisturbed_one(lora, tmp_path):
    """To the last bit, dropout and the order of batches included."""
    examples = examples_near(policy())

    def train(folder, resume=None):
        transformers.set_seed(5)
        model = policy(attention_dropout=0.1)
        if lora:
            model = add_lora(model, rank=2, dropout=0.1, task="CAUSAL_LM")
        args = config(
            folder,
            "e-dpo",
            num_train_epochs=2,
            per_device_train_batch_size=1,
            learning_rate=1e-3,
            save_strategy="steps",
            save_steps=4,
        )
        trainer = DistillTrainer(model, args, examples=examples)
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict(), [h for h in trainer.state.log_history if "loss" in h]

    whole, history = train(tmp_path / "whole")
    resumed, resumed_history = train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-4"))
    assert len(history) == 6
    assert resumed_history == history
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_on_cpu_is_autocast(bf16, tmp_path):
    model, seen = policy(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, i, out, name=name: seen.setdefault(name, set()).add(out.dtype))
    examples = examples_near(model)
    seen.clear()
    model.eval()
    trainer = DistillTrainer(model, config(tmp_path, "d-dpo", max_steps=1, bf16=bf16), examples=examples)
    seen.clear()  # the probe's own forward
    trainer.train()
    assert {"lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"} <= set(seen)
    assert set.union(*seen.values()) == {torch.bfloat16 if bf16 else torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
