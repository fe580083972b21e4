"""Precision is what was asked for, and for `auto` the arithmetic that was measured to be faster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers

from prefdistill.errors import ConfigError
from prefdistill.models import precision

CONFIG = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4)


@pytest.mark.parametrize(("float32", "bfloat16", "chosen"), [(1.0, 8.0, "bfloat16"), (2.7, 1.5, "float32")])
def test_auto_takes_the_faster(float32, bfloat16, chosen, monkeypatch):
    asked = []

    def rates(hidden, inner):
        asked.append((hidden, inner))
        return {"float32": float32 * 1e12, "bfloat16": bfloat16 * 1e12}

    monkeypatch.setattr(precision, "_rates", rates)
    precision._faster_on_cpu.cache_clear()
    assert precision.choose_precision("auto", CONFIG) == chosen
    assert precision.choose_precision("auto", CONFIG) == chosen
    assert asked == [(64, 96)], "the model's own shape, once"
    precision._faster_on_cpu.cache_clear()


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
