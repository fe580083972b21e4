"""Decoding with a prompt's keys once for all its samples, against full forwards of every row as it stands."""

from __future__ import annotations

import logging
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prefdistill.errors import ConfigError
from prefdistill.models import decoding, past
from prefdistill.models.decoding import decoder
from prefdistill.models.loading import add_lora
from prefdistill.models.past import Past
from tiny_models import VOCAB, tiny

SHARED = ["llama", "qwen3", "gemma3", "mistral", "granite", "gpt2"]
REPEATED = ["gemma2", "bloom"]  # soft caps, ALiBi: they do not attend by sdpa
EXACT = {"atol": 5e-5, "rtol": 1e-4}  # float32 sums in another order


def _model(family):
    return tiny(family).eval().requires_grad_(False)


def _truth(model, row):
    return model(torch.tensor([row])).logits[0, -1]


def _follow(model, prompts, samples, leaving, *, exact):
    """Decodes random tokens, rows leaving at random; every step's logits against the rows' own full forwards."""
    draw = torch.Generator().manual_seed(len(leaving))
    found = decoder(model).start(prompts, samples, len(leaving) + 1)
    rows = [list(p) for p in prompts for _ in range(samples)]
    for stay in leaving:
        torch.testing.assert_close(found.logits, torch.stack([_truth(model, r) for r in rows]), **exact)
        kept = [i for i in range(len(rows)) if (stay >> (i % 8)) & 1] or [0]
        if len(kept) < len(rows):
            found.keep(torch.tensor(kept))
        rows = [rows[i] for i in kept]
        tokens = torch.randint(3, VOCAB, (len(rows),), generator=draw)
        found.next(tokens)
        for r, token in zip(rows, tokens.tolist(), strict=True):
            r.append(token)
    torch.testing.assert_close(found.logits, torch.stack([_truth(model, r) for r in rows]), **exact)
    return found


prompts_of = st.lists(st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None)
@given(
    prompts=prompts_of,
    samples=st.integers(1, 3),
    leaving=st.lists(st.integers(0, 255), min_size=0, max_size=9),
    read_tokens=st.sampled_from([1, 14, 4096]),
)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_every_step_equals_a_full_forward(family, prompts, samples, leaving, read_tokens):
    with torch.no_grad(), mock.patch.object(decoding, "READ_TOKENS", read_tokens):
        found = _follow(_model(family), prompts, samples, leaving, exact=EXACT)
    assert isinstance(found, decoding._Shared)


@pytest.mark.parametrize("family", SHARED)
def test_families_share(family):
    with torch.no_grad():
        found = _follow(_model(family), [[5, 6, 7, 8, 9, 10, 11], [9, 4]], 2, [255, 0b1110, 0b0110, 255], exact=EXACT)
    assert isinstance(found, decoding._Shared)


@pytest.mark.parametrize("family", REPEATED)
def test_others_go_by_transformers_cache(family):
    with torch.no_grad():
        found = _follow(_model(family), [[5, 6, 7, 8], [9, 4]], 2, [255, 0b1110, 255], exact=EXACT)
    assert isinstance(found, decoding._Repeated)
    assert decoder(_model(family)).held(4, 2, 3) == 8 + 6


def test_bfloat16_is_as_near_as_transformers_cache():
    model = _model("llama")
    prompts = [[5, 6, 7, 8, 9, 10, 11], [9, 4, 3]]
    steps = [torch.tensor([3, 4, 5, 6]), torch.tensor([7, 8, 9, 10])]

    def logits(start):
        found = start()
        out = [found.logits]
        for tokens in steps:
            found.next(tokens)
            out.append(found.logits)
        return torch.stack(out).float()

    with torch.no_grad():
        shared = decoder(model).start
        truth = logits(lambda: shared(prompts, 2, 4))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = logits(lambda: shared(prompts, 2, 4))
            theirs = logits(lambda: decoding._Repeated(model, prompts, 2))
    assert (ours - truth).abs().max() <= 1.5 * (theirs - truth).abs().max()


@pytest.mark.parametrize("wrong", ["another scale", "no kernel", "lost"])
def test_a_model_that_decodes_otherwise_is_found(monkeypatch, caplog, wrong):
    monkeypatch.setattr(decoding, "_KNOWN", {})
    if wrong == "another scale":
        right = Past.attend
        monkeypatch.setattr(Past, "attend", lambda self, n, q, k, v, w, s: right(self, n, q, k, v, w, s * 1.1))
    elif wrong == "no kernel":
        monkeypatch.setattr(past, "_attention", lambda *_: torch.ops.aten.no_such_kernel)
    else:
        monkeypatch.setattr(Past, "attend", lambda self, n, q, k, v, w, s: q)
    with caplog.at_level(logging.INFO, logger="prefdistill.models.decoding"):
        found = decoder(_model("llama")).start([[5, 6, 7]], 2, 4)
    assert isinstance(found, decoding._Repeated)
    assert "decodes by transformers' cache" in caplog.text


@pytest.mark.parametrize("error", [ConfigError, AttributeError, TypeError, RuntimeError])
def test_a_model_that_cannot_go_by_trees_is_sampled_all_the_same(monkeypatch, caplog, error):
    def refuses(*args, **kwargs):
        raise error("no hidden states")

    monkeypatch.setattr(decoding, "TreeModel", refuses)
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="prefdistill.models.decoding"):
        found = _follow(_model("llama"), [[5, 6, 7], [9, 4]], 2, [255, 0b1110], exact=EXACT)
    assert isinstance(found, decoding._Repeated)
    assert f"{error.__name__}: no hidden states" in caplog.text


def test_adapters_are_heard():
    adapted = add_lora(tiny("llama"), rank=4, task="CAUSAL_LM").eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    with torch.no_grad():
        found = _follow(adapted, [[5, 6, 7], [9, 4]], 2, [255, 0b1110, 255], exact=EXACT)
        assert isinstance(found, decoding._Shared)
        with adapted.disable_adapter():
            plain = _follow(adapted, [[5, 6, 7], [9, 4]], 2, [255, 0b1110, 255], exact=EXACT)
    assert not torch.allclose(found.logits, plain.logits, atol=0.01)


def test_sampling_says_nothing_of_paths_that_it_does_not_go(caplog):
    with caplog.at_level(logging.WARNING):
        decoder(tiny("mamba").eval())
        decoder(tiny("bloom").eval())
    assert not caplog.records


def test_an_architecture_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(decoding, "_KNOWN", {})
    monkeypatch.setattr(decoding, "_mismatch", lambda tree: asked.append(tree.core.config.vocab_size))
    decoder(_model("llama"))
    decoder(tiny("llama", seed=1).eval())
    decoder(_model("qwen3"))
    assert asked == [VOCAB, VOCAB]


def test_a_prompts_keys_stand_once_and_leave_with_its_samples():
    model = _model("llama")
    with torch.no_grad():
        found = decoder(model).start([[5, 6, 7, 8]] + [[9, 4]] * 3, 5, 4)
        (layer, *_) = found.past._layers.values()
        assert layer.prompt_keys.shape == (4, 2, 4, 8)
        assert layer.keys.shape == (20, 2, 3, 8)
        assert decoder(model).held(4, 5, 3) == 4 + 15
        found.keep(torch.arange(5, 20))  # the first prompt's samples are done
        assert layer.prompt_keys.shape[0] == 3
        assert layer.keys.shape[0] == 15


def test_prompts_are_read_by_parts_of_bounded_size():
    assert decoding._parts([2000, 2000, 96, 1]) == [range(3), range(3, 4)]
    assert decoding._parts([5000, 1, 4096, 7]) == [range(1), range(1, 2), range(2, 3), range(3, 4)]
    assert decoding._parts([3]) == [range(1)]


def test_what_does_not_continue_the_rows_is_refused():
    kept = Past([3, 2], 2, 1, torch.device("cpu"))
    x = torch.randn(5, 2, 4)
    with pytest.raises(ValueError, match="not those of prompts"):
        kept.read(0, x, x)  # no prompt is being read
    kept.reading = range(1, 2)
    with pytest.raises(ValueError, match="not those of prompts"):
        kept.read(0, x[:2], x[:2])  # the first prompt was not
    kept.reading = range(2)
    with pytest.raises(ValueError, match="not those of prompts"):
        kept.read(0, x[:4], x[:4])
    kept.read(0, x, x)
    with pytest.raises(ValueError, match="not those of prompts"):
        kept.read(0, x, x)
    kept.reading = range(1, 2)
    with pytest.raises(ValueError, match="not those of prompts"):
        kept.read(0, x[:2], x[:2])  # the second prompt was read, too
    with pytest.raises(ValueError, match="do not continue 4 rows"):
        kept.attend(0, x, x, x, None, 1.0)
    q = torch.randn(4, 4, 4)
    kept.attend(0, q, x[:4], x[:4], None, 1.0)
    kept.advance()
    with pytest.raises(ValueError, match="of 1 tokens"):
        kept.attend(0, q, x[:4], x[:4], None, 1.0)


def test_a_model_trains_after_it_was_sampled_from():
    """Its attention was taken over; other masks go where they went."""
    model = tiny("llama")
    before = model(torch.tensor([[5, 6, 7]])).logits
    decoder(model.eval())
    after = model(torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(before, after, **EXACT)
    after.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if isinstance(p, nn.Parameter))
