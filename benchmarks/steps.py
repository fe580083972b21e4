"""One optimiser step of a side, as its own trainer takes it."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from typing import Any

import torch

Step = Callable[[], float]


def slices_of(rows: Sequence[Any], size: int) -> list[Any]:
    """The rows in order, `size` at a time."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def stepper(trainer: Any, rows: Sequence[Any], batch: int, *, at_once: int | None = None) -> Step:
    """A function that takes the next step of a transformers.Trainer on these rows, in a ring; returns its loss.

    Gradients of `at_once` rows at a time are accumulated, or all of a batch's are computed at once.

    It is what `Trainer.train` does between two log lines: forward, backward, clipping, optimiser; the batches are
    collated anew every time.
    """
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = model
    model.train()
    batches = slices_of(rows, batch)
    place = 0

    def step() -> float:
        nonlocal place
        parts = slices_of(batches[place % len(batches)], at_once or batch)
        place += 1
        trainer.current_gradient_accumulation_steps = len(parts)  # what Trainer.train sets: a part's loss is its share
        loss = sum(trainer.training_step(model, trainer.data_collator(part)) for part in parts)
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def peak_gigabytes() -> float:
    """The most memory that this process has held: of the device where there is one, resident otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
