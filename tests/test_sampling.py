"""Sampling against transformers' own generate, and against the distribution it is meant to follow."""

from __future__ import annotations

import pytest
import torch

from prefdistill.evaluation.sampling import SamplingOptions, choose, sample
from tiny_models import tiny

PROMPTS = [(5, 6, 7, 8, 9, 10, 11, 12, 13), (9,), (20, 21, 22)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
def test_greedy_equals_generate(family):
    model = tiny(family)
    ours = sample(model, PROMPTS, n=2, end_ids=[2], options=SamplingOptions(max_new_tokens=12, temperature=0))
    for prompt, drawn in zip(PROMPTS, ours, strict=True):
        truth = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for s in drawn:
            assert list(s.ids) == truth
            assert s.finished == (truth[-1] == 2)


def test_samples_do_not_depend_on_the_batch_and_repeat():
    model = tiny("llama")
    options = SamplingOptions(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=3)
    together = sample(model, PROMPTS, n=3, end_ids=[2], options=options)
    alone = [sample(model, [p], n=3, end_ids=[2], options=options, keys=[i])[0] for i, p in enumerate(PROMPTS)]
    assert together == alone
    assert together == sample(model, PROMPTS, n=3, end_ids=[2], options=options, token_budget=1)
    assert len({s.ids for s in together[0]}) > 1


def test_ended_responses_stop_at_their_first_end_token():
    model = tiny("llama")
    ends = list(range(3, 60))
    for drawn in sample(model, PROMPTS, n=6, end_ids=ends, options=SamplingOptions(max_new_tokens=10)):
        for s in drawn:
            assert all(t not in ends for t in s.ids[:-1])
            assert s.finished == (s.ids[-1] in ends)
            assert s.finished or len(s.ids) == 10


def test_choose_follows_the_distribution():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]]).repeat(20000, 1)
    uniform = (torch.arange(20000) + 0.5) / 20000
    for options, expected in [
        (SamplingOptions(), torch.softmax(logits[0], 0)),
        (SamplingOptions(temperature=0.5), torch.softmax(logits[0] * 2, 0)),
    ]:
        counts = torch.bincount(choose(logits, uniform.double(), options), minlength=4) / 20000
        torch.testing.assert_close(counts, expected, atol=2e-4, rtol=0)
    p = torch.softmax(logits[0], 0)
    counts = torch.bincount(choose(logits, uniform.double(), SamplingOptions(top_p=0.8)), minlength=4) / 20000
    kept = torch.tensor([p[0], 0, p[2], 0]) / (p[0] + p[2])
    torch.testing.assert_close(counts, kept, atol=2e-4, rtol=0)


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_options_are_checked(bad):
    with pytest.raises(ValueError, match="must"):
        SamplingOptions(**bad)
