"""Trainings that can be stopped at any instant: whole checkpoints are sealed, and only sealed ones are read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, TrainerCallback

from prefdistill import ranks
from prefdistill.errors import TrainingError
from prefdistill.progress import Progress
from prefdistill.seals import is_whole, seal
from prefdistill.stopping import Request, Terminated, stop_requests
from prefdistill.training.callbacks import ProgressCallback
from prefdistill.training.trackers import end_tracking


def train_to_end(trainer: transformers.Trainer, work: Path, progress: Progress) -> None:
    """Trains from the newest whole checkpoint in `work`, or from the start; returns when all processes have.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM came; the step under way was finished and a checkpoint written.
        TrainingError: a step left weights that are not finite; no checkpoint holds them.
    """
    trainer.remove_callback(PrinterCallback)
    with stop_requests() as request:
        # The seal comes last: what other callbacks write belongs to the checkpoint.
        for callback in (ProgressCallback(progress), _StopCallback(request), _SealCallback()):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=ranks.from_main(last_checkpoint, work))
        end_tracking(trainer.args.report_to)
        _check_weights(trainer.model, trainer.state.global_step, trainer.args.output_dir)
        ranks.wait()
        if request.reason is not None:
            raise request.reason


class _StopCallback(TrainerCallback):
    """Ends a training after the step in which it was asked for, with a log line and a checkpoint.

    The line is there because what is recorded between two lines is in no checkpoint.
    """

    def __init__(self, request: Request) -> None:
        self.request = request

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Whoever was told, all stop after the same step.
        own = self.request.reason
        told = ranks.largest(0 if own is None else 1 + isinstance(own, Terminated))
        if told:
            self.request.reason = Terminated() if told > 1 else KeyboardInterrupt()
            control.should_log = control.should_save = control.should_training_stop = True


class _SealCallback(TrainerCallback):
    """Writes the checksums of a checkpoint's files when all of them are there, and its weights are numbers."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # One that is not sealed is never read: a training goes on from the last good one.
        _check_weights(kwargs["model"], state.global_step, args.output_dir)
        ranks.from_main(seal, Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _check_weights(model: Any, step: int, folder: str) -> None:
    broken = not_finite(model)
    if ranks.largest(len(broken)):
        names = f", such as {broken[0]}" if broken else ""
        raise TrainingError(
            f"the weights are not finite after step {step}{names}: the step was too large: lower learning_rate; "
            + what_is_kept(folder)
        )


def not_finite(model: Any) -> list[str]:
    """Names of the parameters that hold what is no number; of sharded ones, in this process's share."""
    own = ((name, p.to_local() if isinstance(p, DTensor) else p) for name, p in model.named_parameters())
    return [name for name, p in own if not bool(p.isfinite().all())]


def what_is_kept(folder: str) -> str:
    """Says which checkpoint of a training that failed is the last good one: the newest whose weights are numbers."""
    found = sorted(Path(folder).glob("checkpoint-*"), key=lambda p: p.stat().st_mtime, reverse=True)
    kept = next((p for p in found if _is_finite(p)), None)
    return "there is no checkpoint yet" if kept is None else f"the last checkpoint is kept, {kept}"


def _is_finite(checkpoint: Path) -> bool:
    for file in checkpoint.glob("*.safetensors"):  # sharded ones have none, and are not looked into
        with safe_open(file, framework="pt") as tensors:
            if not all(bool(tensors.get_tensor(name).isfinite().all()) for name in tensors.keys()):  # noqa: SIM118
                return False
    return True


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a stopped training, or None; others are removed.

    One without a seal was being written when the training was stopped; one that is damaged is named in the log.
    """
    found = {int(p.name.split("-")[1]): p for p in folder.glob("checkpoint-*") if p.name.split("-")[1].isdigit()}
    for step in sorted(found, reverse=True):
        if is_whole(found[step]):
            return str(found[step])
        shutil.rmtree(found[step])
    return None
