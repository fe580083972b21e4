"""Reference log-probs of a data set: our column against TRL's precomputing pass; a step is the whole set."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.policy import trl_trainer
from benchmarks.shapes import Prompt, policy_of
from benchmarks.steps import Step, slices_of
from prefdistill.scoring import Column, fill_columns, logps_forward

TOKEN_BUDGET = 4096


def ours(prompts: list[Prompt], *, size: str, precision: str) -> Step:
    """All log-probs into a fresh column on disk, as the stage `reference` computes them."""
    policy = policy_of(size)
    trees = [p.tree for p in prompts]

    def step() -> float:
        with tempfile.TemporaryDirectory() as folder:
            column = Column(Path(folder), "benchmark")
            fill_columns(
                {"logps": column},
                trees,
                lambda: policy,
                logps_forward,
                token_budget=TOKEN_BUDGET,
                precision=precision,
            )
            return float(sum(column.of(t)[c] for t, p in zip(trees, prompts, strict=True) for c, _ in p.pairs))

    return step


def trl(prompts: list[Prompt], *, size: str, precision: str, batch_pairs: int) -> Step:
    """TRL's own pass, batch by batch, without its cache on disk."""
    trainer = trl_trainer(prompts, size=size, precision=precision, batch=batch_pairs, checkpointing=False)
    rows = [dict(row) for row in trainer.train_dataset]
    batches = slices_of(rows, batch_pairs)

    def step() -> float:
        total = torch.zeros(())
        for batch in batches:
            inputs: Any = trainer._prepare_inputs(trainer.data_collator(batch))
            total += trainer.compute_ref_log_probs(trainer.model, inputs)[0].sum()
        return float(total)

    return step
