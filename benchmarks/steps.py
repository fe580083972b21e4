"""One optimiser step of each side, as its own trainer takes it; two sides take turns and are timed."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], float]


def stepper(trainer: Any, batches: Sequence[Any]) -> Step:
    """A function that takes the next step of a transformers.Trainer on these batches, in a ring; returns its loss.

    It is what `Trainer.train` does between two log lines: forward, backward, clipping, optimiser; the batches are
    collated anew every time.
    """
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = model
    trainer.current_gradient_accumulation_steps = 1  # what Trainer.train sets before its first step
    model.train()
    place = 0

    def step() -> float:
        nonlocal place
        inputs = trainer.data_collator(batches[place % len(batches)])
        place += 1
        loss = trainer.training_step(model, inputs)
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


@dataclass(frozen=True)
class Times:
    """Seconds of every timed step of a side."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def take_turns(sides: Mapping[str, Step], *, steps: int, warmup: int) -> dict[str, Times]:
    """Times the sides step by step in turn, so that what else the machine does falls on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + steps):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Times(tuple(found)) for name, found in seconds.items()}


def peak_gigabytes() -> float:
    """The most memory that this process has held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
