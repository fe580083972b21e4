"""torch.compile takes one layer for all, and every step is the one that was taken without it."""

from __future__ import annotations

import os

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from prefdistill.data.tree import Tree
from prefdistill.errors import ConfigError
from prefdistill.models import compiled
from prefdistill.models.forward import TreeModel
from prefdistill.native import library
from test_distill import config, examples_near, policy
from tiny_models import tiny

from prefdistill.training.distill import DistillTrainer  # isort: skip

TREES = [[Tree(tuple(range(5, 5 + n)), (tuple(range(20, 20 + k)), (23, 2)))] for n, k in ((5, 4), (30, 7), (9, 3))]


@pytest.fixture
def counter(monkeypatch):
    """Counts what torch.compile compiles, and runs it as it is."""
    torch._dynamo.reset()
    counting, real = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: real(self, backend=counting, **kwargs))
    return counting


def logps_of(model: TreeModel) -> list[torch.Tensor]:
    return [model.logps(model.collate(trees)).detach() for trees in TREES]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "gemma2"])
def test_what_is_compiled_does_not_grow_with_layers(counter, family):
    """torch.compile gives up on a function after eight compilations: layers beyond them ran as they are."""
    counts = []
    for layers in (2, 12):
        torch._dynamo.reset()
        counter.clear()
        truth = logps_of(TreeModel(tiny(family, num_hidden_layers=layers)))
        model = TreeModel(tiny(family, num_hidden_layers=layers))
        assert compiled.compile_layers(model.backbone) == layers
        for found, expected in zip(logps_of(model), truth, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0


def test_another_reader_of_a_compiled_model_compiles_nothing(counter):
    raw = tiny("llama")
    model = TreeModel(raw)
    compiled.compile_layers(model.backbone)
    truth = logps_of(model)
    counts = []
    for _ in range(2):  # the first's probe runs without gradients, and that is compiled once
        again = TreeModel(raw)
        for found, expected in zip(logps_of(again), truth, strict=True):
            assert torch.equal(found, expected)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0
    assert not any("forward" in vars(part) for layer in again.backbone.layers for part in layer.modules())


def test_compiled_layers_take_the_same_steps(tmp_path):
    """Batches of several lengths, one compilation for all of them; nothing is left behind for the next trainer."""
    curves = []
    for torch_compile in (False, True):
        torch.manual_seed(0)
        model = policy()
        examples = examples_near(model)
        options = {"max_steps": 4, "per_device_train_batch_size": 1, "logging_steps": 1, "learning_rate": 1e-3}
        arguments = config(tmp_path, "d-dpo", torch_compile=torch_compile, **options)
        trainer = DistillTrainer(model, arguments, examples=examples)
        trainer.train()
        curves.append([h["loss"] for h in trainer.state.log_history if "loss" in h])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="g\\+\\+"):
        compiled.check_compiler(torch.device("cpu"))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ConfigError, match="\\$CC, cc, gcc nor clang"):
        compiled.check_compiler(torch.device("cuda"))
    monkeypatch.setattr(library.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "clang" else None)
    compiled.check_compiler(torch.device("cuda"))


def test_a_model_without_layers_is_refused():
    with pytest.raises(ConfigError, match="no list of layers"):
        compiled.compile_layers(torch.nn.Linear(2, 2))
