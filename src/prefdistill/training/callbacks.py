"""What a training tells whoever watches: steps done, with a rate and the time left."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from prefdistill.progress import Progress, Tick


class ProgressCallback(TrainerCallback):
    """Shows optimiser steps on a progress bar; the history goes to files, not to the terminal."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._stack = ExitStack()
        self._tick: Tick = lambda amount: None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tick = self._stack.enter_context(self.progress(state.max_steps, "steps"))
        if state.global_step:
            self._tick(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tick(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stack.close()
