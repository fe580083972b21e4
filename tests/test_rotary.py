"""Rotary embeddings in one pass: float64's numbers, and attention layers that compute what their own forward does."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from prefdistill.data.tree import Tree
from prefdistill.models import rotary
from prefdistill.models.backbone import replacement_of
from prefdistill.models.forward import TreeModel
from prefdistill.models.loading import add_lora
from prefdistill.models.rotary import fuse_rotary
from prefdistill.native import library
from prefdistill.native.elementwise import Rotary
from test_native import ROUNDING, of_each_type
from tiny_models import SHAPE, tiny

TREES = [Tree((5, 6, 7, 8), ((20, 21, 22, 2), (23, 2))), Tree((9,), ((30, 31),))]


@of_each_type
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    heads=st.integers(1, 5),
    half=st.integers(1, 40),
    seed=st.integers(0, 2**20),
)
def test_states_and_gradients_are_float64s(dtype, tokens, heads, half, seed):
    draw = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(2, tokens, heads, 2 * half, generator=draw).to(dtype)
    cos, sin = torch.randn(2, tokens, 2 * half, generator=draw)  # its halves need not be alike
    ours = x.clone().requires_grad_()
    out = Rotary.apply(ours, cos, sin, library.library_for(dtype))
    out.backward(grad)
    wide = x.double().requires_grad_()
    truth = apply_rotary_pos_emb(wide, wide, cos.double(), sin.double())[0]
    truth.backward(grad.double())
    for found, true, of in ((out, truth, x), (ours.grad, wide.grad, grad)):
        assert found.dtype == dtype
        terms = (of.double().abs() * cos.abs().double()[:, None]).amax() + (
            of.double().abs().amax() * sin.abs().double().amax()
        )
        error = (found.double() - true).abs()
        assert bool((error <= ROUNDING[dtype] * true.abs() + 4 * 2.0**-24 * terms).all())


def outcome(raw, *, autocast=False):
    """Log-probs and gradients of a model; where compiled code is, its layers take it."""
    model = TreeModel(raw, path="packed")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logps = model.logps(model.collate(TREES))
    raw.zero_grad()
    logps.sum().backward()
    return logps.detach(), {n: p.grad.clone() for n, p in raw.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "biased", "qwen3", "gemma3", "mistral", "granite"])
def test_a_model_computes_the_same(family, monkeypatch):
    raw = tiny("llama", attention_bias=True) if family == "biased" else tiny(family)
    truth = copy.deepcopy(raw)
    assert fuse_rotary(raw.model) == 4
    assert fuse_rotary(raw.model) == 0, "once is enough"
    calls = []
    real = rotary._turned
    monkeypatch.setattr(rotary, "_turned", lambda *a: calls.append(1) or real(*a))
    ours, our_grads = outcome(raw)
    assert len(calls) >= 4
    monkeypatch.setattr("prefdistill.models.forward.fuse_rotary", lambda backbone: 0)
    calls.clear()
    logps, grads = outcome(truth)
    assert not calls
    torch.testing.assert_close(ours, logps, atol=1e-4, rtol=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=1e-3 * float(grad.abs().max()), rtol=1e-3, msg=name)


class Gated(LlamaAttention):
    """An attention layer that does something of its own with what comes back."""

    def forward(self, hidden_states, **kwargs):
        out, weights = super().forward(hidden_states, **kwargs)
        return out * 1.01, weights


def test_layers_that_attend_otherwise_are_left():
    assert fuse_rotary(tiny("gemma2").model) == 0, "its scores have a soft cap"
    assert fuse_rotary(tiny("gpt2").transformer) == 0, "its positions are learnt"
    assert fuse_rotary(tiny("qwen3").model) == 4
    model = tiny("llama")
    before = model.model.config._attn_implementation
    layers = model.model.layers
    layers[0].self_attn.__class__ = Gated
    layers[1].self_attn.scaling = "none"
    layers[2].self_attn.forward = layers[2].self_attn.forward
    assert fuse_rotary(model.model) == 1
    assert replacement_of(layers[3].self_attn) is rotary._forward
    assert model.model.config._attn_implementation == before
    assert not rotary._spied


@pytest.mark.parametrize("change", ["interleaved", "part of a head", "norm over all heads"])
def test_other_embeddings_are_left(change):
    config = {
        "interleaved": tf.CohereConfig,
        "part of a head": tf.StableLmConfig,
        "norm over all heads": tf.Olmo2Config,
    }[change](**SHAPE)
    assert fuse_rotary(tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").model) == 0


def test_to_other_masks_a_layer_is_what_it_was():
    raw = tiny("llama")
    ids = torch.arange(20)[None] + 5
    truth = copy.deepcopy(raw)(input_ids=ids).logits
    assert fuse_rotary(raw.model) == 4
    assert torch.equal(raw(input_ids=ids).logits, truth)
    assert torch.equal(raw(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, truth)
    assert torch.equal(pickle.loads(pickle.dumps(raw))(input_ids=ids).logits, truth)


def test_dropout_while_training_is_the_layers_own(monkeypatch):
    rates = []
    real = rotary.attend
    monkeypatch.setattr(rotary, "attend", lambda *a: rates.append(a[5]) or real(*a))
    raw = tiny("llama", attention_dropout=0.25)
    model = TreeModel(raw, path="packed")
    batch = model.collate(TREES)
    model.logps(batch)
    assert set(rates) == {0.0}
    rates.clear()
    raw.train()
    model.logps(batch)
    assert set(rates) == {0.25}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_hooks_and_checkpoints_stay_in_force(checkpointing):
    raw = add_lora(tiny("llama"), rank=2, task="CAUSAL_LM").eval()
    for name, parameter in raw.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        raw.train()
        raw.gradient_checkpointing_enable()
        raw.enable_input_require_grads()
    truth = copy.deepcopy(raw)
    ours, our_grads = outcome(raw)
    inner = raw.get_base_model().model.layers
    assert all(replacement_of(layer.self_attn) is rotary._forward for layer in inner)
    seen = []
    inner[1].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    outcome(raw)
    assert seen
    for layer in truth.get_base_model().model.layers:
        layer.self_attn.forward = layer.self_attn.forward
    logps, grads = outcome(truth)
    torch.testing.assert_close(ours, logps, atol=1e-4, rtol=1e-4)
    assert our_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=1e-3 * float(grad.abs().max()), rtol=1e-3, msg=name)
