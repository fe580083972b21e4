"""The committed pairs and adapter are what their provenance says, and the embedded policy loads."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from prefdistill.data.formats import load_pairs
from prefdistill.data.grouping import assign_splits
from prefdistill.data.table import SPLITS, text_key
from prefdistill.embedded.oracle import score
from prefdistill.models.loading import ADAPTER, EMBEDDED_POLICY, load_policy, load_tokenizer, save_model
from prefdistill.stages.prepare import EMBEDDED_PAIRS


@pytest.fixture(scope="module")
def pairs():
    return load_pairs(str(EMBEDDED_PAIRS))


def test_small_and_with_provenance(pairs):
    assert EMBEDDED_PAIRS.stat().st_size < 2_000_000
    assert sum(f.stat().st_size for f in Path(ADAPTER).iterdir()) < 4_000_000
    provenance = json.loads(pq.read_schema(EMBEDDED_PAIRS).metadata[b"provenance"])
    assert "PSF" in provenance["text"]
    assert "Apache-2.0" in provenance["responses"]
    assert provenance["pairs"] == len(pairs)
    assert provenance["prompts"] == len({text_key(p.prompt) for p in pairs})


def test_a_prompt_stands_in_one_split(pairs):
    splits = assign_splits(pairs, {}, seed=0)
    assert {"train", "validation", "test"} <= set(splits.values()) <= set(SPLITS)


def test_labels_are_bradley_terry_on_the_oracle(pairs):
    """They agree with the oracle's order about as often as sigmoid(1.5 difference) says, and not always."""
    sample = pairs[::10]
    gaps = torch.tensor(
        [
            score(p.chosen[0]["content"], p.extra["human"]) - score(p.rejected[0]["content"], p.extra["human"])
            for p in sample
        ]
    )
    agree = (gaps > 0).double().mean()
    expected = torch.sigmoid(1.5 * gaps.abs()).double().mean()
    assert abs(float(agree - expected)) < 4 * (0.25 / len(sample)) ** 0.5


@pytest.mark.slow
def test_the_embedded_policy_loads_saves_and_summarises(tmp_path):
    model, tokenizer = load_policy(EMBEDDED_POLICY).eval(), load_tokenizer(EMBEDDED_POLICY)
    save_model(model, tokenizer, tmp_path / "start")
    again = load_policy(str(tmp_path / "start")).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Sum up in one line:\n\nReturn True if the path is a folder, else False."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(prompt).logits, again(prompt).logits)
    text = tokenizer.decode(again.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :])
    assert text.strip()
    assert text.count("\n") <= 1
