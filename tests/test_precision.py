"""Precision is what was asked for, and for `auto` the arithmetic that was measured to be faster."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prefdistill.errors import ConfigError
from prefdistill.models import inference as inference_module
from prefdistill.models import precision
from prefdistill.models.inference import inference

CONFIG = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4)


@pytest.mark.parametrize(("float32", "bfloat16", "chosen"), [(1.0, 8.0, "bfloat16"), (2.7, 1.5, "float32")])
def test_auto_takes_the_faster(float32, bfloat16, chosen, monkeypatch):
    asked = []

    def rates(hidden, inner, clock):
        asked.append((hidden, inner))
        return {"float32": float32 * 1e12, "bfloat16": bfloat16 * 1e12}

    monkeypatch.setattr(precision, "_rates", rates)
    precision._faster_on_cpu.cache_clear()
    assert precision.choose_precision("auto", CONFIG) == chosen
    assert precision.choose_precision("auto", CONFIG) == chosen
    assert asked == [(64, 96)], "the model's own shape, once"
    precision._faster_on_cpu.cache_clear()


def test_what_else_runs_does_not_decide(monkeypatch):
    """float32 here works half as long as bfloat16 and waits in every product, as under other processes' load."""

    def product(x, w):
        work = 0.001 if x.dtype == torch.float32 else 0.002
        started = time.thread_time()
        while time.thread_time() - started < work:
            pass
        if x.dtype == torch.float32:
            time.sleep(0.01)
        return x @ w.T

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    precision._faster_on_cpu.cache_clear()
    precision._rates.cache_clear()
    threads = torch.get_num_threads()
    try:
        assert precision.choose_precision("auto", CONFIG) == "float32"
        assert torch.get_num_threads() == threads
        waits = precision._rates(64, 96)
        assert waits["float32"] < waits["bfloat16"], "by the clock on the wall it would be the other one"
    finally:
        precision._faster_on_cpu.cache_clear()
        precision._rates.cache_clear()


def test_the_measurement_measures():
    rates = precision._rates(64, 96)
    assert set(rates) == {"float32", "bfloat16"}
    assert all(1e6 < r < 1e16 for r in rates.values())


def test_what_is_asked_for_is_used():
    assert precision.choose_precision("float32", CONFIG) == "float32"
    assert precision.choose_precision("bfloat16", CONFIG) == "bfloat16"
    with pytest.raises(ConfigError, match="float16"):
        precision.choose_precision("float16", CONFIG)


def test_a_forward_is_guessed_from_the_models_size(monkeypatch):
    """Two FLOPs a weight and token, over the rate that was measured; the weights counted by transformers."""
    import torch

    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_hidden_layers=6, vocab_size=8000
    )
    with torch.device("meta"):
        weights = transformers.LlamaForCausalLM(config).num_parameters(exclude_embeddings=True)
    weights += 512 * 8000  # of the two tables of tokens only the head is multiplied by
    monkeypatch.setattr(precision, "_rates", lambda *sizes: {"float32": 1e9, "bfloat16": 2e9})
    found = precision.forward_seconds(config, 1000, torch.device("cpu"))
    assert found == pytest.approx(2 * weights * 1000 / 2e9, rel=0.2)
    assert precision.forward_seconds(config, 1000, torch.device("cuda")) is None
    unknown = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=8000))
    assert precision.forward_seconds(unknown, 1000, torch.device("cpu")) is None


class _Roundings(TorchDispatchMode):
    """Counts how often tensors of a matrix's shape are rounded to bfloat16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = isinstance(out, torch.Tensor) and isinstance(args[0], torch.Tensor)
        if tensors and args[0].shape == out.shape == self.shape:
            self.count += args[0].dtype == torch.float32 and out.dtype == torch.bfloat16
        return out


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("share", "times"), [(0.25, 1), (0.0, 7)])
def test_a_weight_is_rounded_once_where_memory_has_room(monkeypatch, frozen, share, times):
    monkeypatch.setattr(inference_module, "SHARE", share)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).requires_grad_(not frozen)
    x = torch.randn(4, 6)
    with _Roundings(model[1].weight.shape) as found, inference(model, "bfloat16"):
        outs = [model(x) for _ in range(7)]
        assert not any(o.requires_grad for o in outs)
    assert found.count == times
    assert all(p.requires_grad != frozen for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(o, model(x)) for o in outs)


def test_a_failing_forward_leaves_weights_frozen_and_what_they_became_counts_after():
    model = nn.Linear(3, 3).requires_grad_(False)
    with pytest.raises(ZeroDivisionError), inference(model, "bfloat16"):
        _ = 1 / 0
    assert not model.weight.requires_grad
    x = torch.randn(2, 3)
    with inference(model, "bfloat16"):
        before = model(x)
    model.weight.data.mul_(2)
    with inference(model, "bfloat16"):
        assert not torch.equal(model(x), before)


def test_float32_stays_float32():
    model = nn.Linear(3, 3)
    with inference(model, "float32"):
        out = model(torch.randn(2, 3))
    assert out.dtype == torch.float32
    assert not out.requires_grad
