"""What a training step needs is told before it is taken; checkpointed, it is the same step."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from prefdistill import pipeline
from prefdistill.cli import main
from prefdistill.data.tree import Tree
from prefdistill.errors import ConfigError
from prefdistill.models import memory
from prefdistill.models.forward import TreeModel
from prefdistill.models.memory import activation_bytes, needs_checkpointing, step_bytes
from prefdistill.training.distill import DistillTrainer
from tiny_models import tiny
from tiny_runs import small

TREES = [Tree(tuple(range(3, 43)), (tuple(range(50, 60)), tuple(range(60, 70)))) for _ in range(3)]


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("inner", [64, 300])
def test_activations_are_about_what_is_kept(bfloat16, inner):
    """Against the storages that autograd really keeps of the layers, each counted once."""
    raw = tiny("llama", intermediate_size=inner).train()
    model = TreeModel(raw)
    weights = {p.untyped_storage().data_ptr() for p in raw.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t  # held, or its place would be given to another
        return t

    batch = model.collate(TREES)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16),
    ):
        model.hidden(batch, read=torch.arange(batch.input_ids.numel())).sum()
    if bfloat16:  # weights that autocast rounded are no activations
        shapes = {shape for p in raw.parameters() for shape in (tuple(p.shape), tuple(reversed(p.shape)))}
        kept = {k: t for k, t in kept.items() if tuple(t.shape) not in shapes}
    measured = sum(t.untyped_storage().nbytes() for t in kept.values())
    told = activation_bytes(raw.config, batch.tokens, bfloat16=bfloat16)
    assert 0.6 * measured < told < 1.4 * measured


def test_checkpointing_only_where_memory_asks_for_it(monkeypatch):
    model = tiny("llama").train()
    needed = step_bytes(model, TREES, 2, bfloat16=False)
    assert step_bytes(model, TREES, 3, bfloat16=False) > needed
    asked = {"batch": 2, "bfloat16": False, "device": torch.device("cpu")}
    for free, expected in ((needed - 1, True), (needed, False)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert needs_checkpointing("auto", model, TREES, **asked) is expected
        assert needs_checkpointing("never", model, TREES, **asked) is False
        assert needs_checkpointing("always", model, TREES, **asked) is True


def test_the_largest_trees_count():
    long = Tree(tuple(range(3, 103)), ((3, 4),))
    model = tiny("llama").train()
    assert step_bytes(model, [*TREES, long], 1, bfloat16=False) == step_bytes(model, [long], 1, bfloat16=False)


def test_keys_that_flash_kernels_gather_count_on_a_gpu(monkeypatch):
    model = tiny("llama")  # two key heads of 8 in four layers
    tree = Tree(tuple(range(3, 103)), ((5,), (6, 7), (8,)))
    before = step_bytes(model, [tree], 1, bfloat16=True)
    monkeypatch.setattr(memory, "device_of", lambda _: torch.device("cuda"))
    gathered = 2 * 2 * 8 * 4 * 2 * 300  # keys and values, bfloat16, the prompt for each of three responses
    assert step_bytes(model, [tree], 1, bfloat16=True) - before == pytest.approx(memory.MARGIN * gathered, abs=1)


def test_free_memory_is_within_the_containers(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1200\n")
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    assert memory.free_bytes(torch.device("cpu")) == 3800
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 800\nactive_file 50\n")
    assert memory.free_bytes(torch.device("cpu")) == 4600, "files that were read can be dropped"
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(torch.device("cpu")) > 2**20


def test_what_pytorch_keeps_of_freed_tensors_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2500)
    assert memory.free_bytes(torch.device("cuda")) == 4500


def test_a_run_that_is_short_of_memory_says_so_and_comes_out_the_same(
    data,
    model_folder,
    tmp_path,
    capsys,
    monkeypatch,
):
    weights = []
    for free in (2**40, 0):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        out = tmp_path / f"run-{free}"
        pipeline.run(small(data, model_folder, out, methods="[dpo]"), until="distill")
        said = capsys.readouterr().err
        assert said.count("gradient checkpointing: layers run again") == (free == 0)
        weights.append((out / "policy" / "dpo" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_wrong_word_is_refused(data, model_folder, tmp_path):
    with pytest.raises(ConfigError, match="gradient_checkpointing is 'often'; it must be one of auto, always, never"):
        pipeline.run(small(data, model_folder, tmp_path, gradient_checkpointing="often"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        MemoryError(),
    ],
)
def test_a_run_without_memory_says_what_to_do(error, data, model_folder, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "run", fails)
    assert main(["run", f"--data={data}", f"--model={model_folder}", f"--output-dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "there is no memory left" in said
    assert "gradient_checkpointing: always" in said
    assert "Traceback" not in said


def test_a_trained_model_is_gone_before_the_next_is_loaded(data, model_folder, tmp_path, monkeypatch):
    """A Trainer and its model are cycles, which nothing but a collection ends."""
    alive: list[weakref.ref] = []
    counts = []
    real = DistillTrainer.__init__

    def counted(self, model, *args, **kwargs):
        counts.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(model))
        real(self, model, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "__init__", counted)
    gc.disable()
    try:
        pipeline.run(small(data, model_folder, tmp_path / "run", methods="[dpo,ipo]"), until="distill")
    finally:
        gc.enable()
    assert counts == [0, 0]


def test_weights_rounded_for_bfloat16_are_counted(tmp_path):
    model = tiny("llama").requires_grad_(False)
    tree = Tree((5, 6), ((7, 2),))
    exact, rounded = (step_bytes(model, [tree], 1, bfloat16=b) for b in (False, True))
    config, n = model.config, sum(p.numel() for p in model.parameters())
    kept = [memory.activation_bytes(config, tree.tokens, bfloat16=b) for b in (False, True)]
    assert rounded - exact == pytest.approx(2 * n + memory.MARGIN * (kept[1] - kept[0]), abs=2)
