"""A run of the main job as tests make it: a tiny model's folder, pairs in a file, options that keep it short."""

from __future__ import annotations

import random

from prefdistill import RunConfig
from prefdistill.cli import parse

WORDS = ["red", "green", "blue", "round", "square", "small", "large", "old", "new", "bright", "dark", "soft", "hard"]


def rows(n: int = 30, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    text = lambda k: " " + " ".join(draw.choices(WORDS, k=k))  # noqa: E731
    return [{"prompt": f"Describe{text(4)}:", "chosen": text(4), "rejected": text(6)} for _ in range(n)]


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
