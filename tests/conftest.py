"""What runs of the main job start from, in many tests."""

from __future__ import annotations

import json

import pytest

from tiny_models import tiny
from tiny_runs import rows
from tiny_tokenizers import gpt2


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = gpt2()
    model = tiny("llama", vocab_size=len(tokenizer), pad_token_id=None, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows()), encoding="utf-8")
    return path
