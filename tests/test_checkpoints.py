"""Checkpoints hold every random state: a training with dropout, as of the supervised start, goes on to the bit."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers

from prefdistill.data.tree import Tree
from prefdistill.models.loading import add_lora
from prefdistill.progress import silent
from prefdistill.seals import seal
from prefdistill.training.checkpoints import train_to_end
from prefdistill.training.sft import SFTTrainer
from tiny_models import QUIET, tiny

TREES = [Tree((5, 6, i), ((20 + i, 21, 2), (30, 31 + i, 2))) for i in range(7, 15)]


def trained(kind: str, folder) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of six steps, from the newest checkpoint in a folder if there is one."""
    transformers.set_seed(4)
    model = tiny("gpt2") if kind == "gpt2" else add_lora(tiny("llama"), rank=2, dropout=0.5, task="CAUSAL_LM")
    options = {**QUIET, "save_strategy": "steps", "save_steps": 2, "max_steps": 6, "learning_rate": 1e-3}
    arguments = transformers.TrainingArguments(str(folder), per_device_train_batch_size=2, **options)
    trainer = SFTTrainer(model, arguments, trees=TREES)
    train_to_end(trainer, folder, silent)
    return model.state_dict(), [h["loss"] for h in trainer.state.log_history if "loss" in h]


@pytest.mark.parametrize("kind", ["gpt2", "lora"])
def test_dropout_goes_on_where_it_was(kind, tmp_path):
    whole, losses = trained(kind, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "rng_state.pth").exists()
    for name in ("again", "without"):
        (tmp_path / name).mkdir()
        shutil.copytree(checkpoint, tmp_path / name / "checkpoint-2")
    resumed, resumed_losses = trained(kind, tmp_path / "again")
    assert resumed_losses == losses
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    # Without its random state the same steps are others: equality above is not for want of dropout.
    (tmp_path / "without" / "checkpoint-2" / "rng_state.pth").unlink()
    seal(tmp_path / "without" / "checkpoint-2")
    other, other_losses = trained(kind, tmp_path / "without")
    assert other_losses[:2] == losses[:2]
    assert other_losses[2:] != losses[2:]
    assert not all(torch.equal(other[name], weight) for name, weight in whole.items())
