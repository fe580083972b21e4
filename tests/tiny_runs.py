"""A run of the main job as tests make it: a tiny model's folder, pairs in a file, options that keep it short."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefdistill import RunConfig
from prefdistill.cli import parse
from tiny_models import tiny
from tiny_tokenizers import gpt2

WORDS = ["red", "green", "blue", "round", "square", "small", "large", "old", "new", "bright", "dark", "soft", "hard"]


def rows(n: int = 30, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    text = lambda k: " " + " ".join(draw.choices(WORDS, k=k))  # noqa: E731
    return [{"prompt": f"Describe{text(4)}:", "chosen": text(4), "rejected": text(6)} for _ in range(n)]


def write_rows(path: Path, made: Iterable[dict[str, Any]]) -> str:
    """JSON lines; returns the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return str(path)


def save_model(folder: Path) -> None:
    """A tiny Llama over GPT-2's words with its tokenizer."""
    tokenizer = gpt2()
    model = tiny("llama", vocab_size=len(tokenizer), pad_token_id=None, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def small(data, model_folder, out, **sections) -> RunConfig:
    flags = {
        "data": data,
        "model": model_folder,
        "output_dir": out,
        "precision": "float32",
        "evaluate.max_new_tokens": 6,
        "sample.max_new_tokens": 6,
        "evaluate.chosen_prompts": 4,
        **sections,
    }
    return parse("run", [f"--{k}={v}" for k, v in flags.items()])
