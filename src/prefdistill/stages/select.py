"""Which checkpoint of a training is kept: the one whose samples on the validation prompts the judge likes best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from prefdistill.errors import DataError
from prefdistill.evaluation import statistics
from prefdistill.evaluation.sampling import SamplingOptions
from prefdistill.seals import sealed_file, sealed_files
from prefdistill.stages.draw import sample_in_parts
from prefdistill.stages.judge import score_samples
from prefdistill.stages.run import Run
from prefdistill.stages.sampler import sampler

VERSION = 1


class KeepWeights(TrainerCallback):
    """Keeps what a training changes, at `n` evenly spaced steps, the last among them, in a stage's working folder."""

    def __init__(self, work: Path, n: int) -> None:
        self.work = work
        self.n = n

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step in kept_steps(state.max_steps, self.n):
            trained = {
                name: p.detach().contiguous() for name, p in kwargs["model"].named_parameters() if p.requires_grad
            }
            folder, stem = self.work / "kept", f"step-{state.global_step:06d}"
            for old in folder.glob(f"{stem}-*.safetensors"):
                old.unlink()  # of a training that was stopped and went on from an earlier step
            with sealed_file(folder / f"{stem}.safetensors") as part:
                save_file(trained, part)


def kept_file(work: Path, step: int) -> Path:
    """The weights that `KeepWeights` kept after this step.

    Raises:
        DataError: they are not there, or damaged.
    """
    found = sealed_files(work / "kept", f"step-{step:06d}", ".safetensors")
    if not found:
        raise DataError(f"{work} lacks the weights of step {step}; remove that folder to train again")
    return found[0]


def kept_steps(steps: int, n: int) -> list[int]:
    """The steps of the `n` checkpoints of a training, from 1 to `steps`."""
    return sorted({max(1, round(steps * i / n)) for i in range(1, n + 1)})


def put_weights(model: nn.Module, file: Path) -> None:
    """Puts the weights that `KeepWeights` kept into a model of the same make, in place."""
    weights = load_file(file)
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise DataError(f"{file} holds weights that the policy does not have, such as {unknown[0]}; remove the folder")


def best_checkpoint(
    run: Run, name: str, work: Path, steps: Sequence[int], policy_at: Callable[[Path], nn.Module]
) -> dict[str, Any]:
    """What the judge makes of every checkpoint, and which is the best; ties go to the earlier one.

    Args:
        name: of the method or variant.
        work: holds the weights of these steps, and keeps samples as they are drawn, so that a stopped stage goes on.
        policy_at: a policy with the weights of this file, ready to sample from.

    Returns:
        {"version", "split", "prompts", "chosen": step, "checkpoints": [{"step", "score": an estimate, "length_mean"}]}.
    """
    groups, options = list(run.groups.of("validation")), run.config.evaluate
    rows: list[dict[str, Any]] = []
    with run.progress(len(groups) * len(steps), "prompts") as tick:
        for step in steps:
            with sampler(run, policy_at(kept_file(work, step))) as policy:
                drawn = sample_in_parts(
                    run,
                    policy,
                    groups,
                    work / f"samples-{step}",
                    n=options.samples,
                    # The same random numbers for all: the same luck for both sides of a comparison.
                    options=SamplingOptions(
                        options.max_new_tokens, options.temperature, options.top_p, run.config.seed
                    ),
                    progress=tick,
                )
            del policy  # two of them need not lie in memory
            scores = score_samples(run, groups, drawn, name)
            estimate = statistics.cluster_mean(
                scores.ravel(), np.repeat(np.arange(len(groups)), scores.shape[1]), seed=run.config.seed
            )
            lengths = [len(s.ids) for d in drawn for s in d]
            rows.append({"step": step, "score": estimate.as_dict(), "length_mean": float(np.mean(lengths))})
    best = max(rows, key=lambda row: (row["score"]["mean"], -row["step"]))
    return {
        "version": VERSION,
        "split": "validation",
        "prompts": len(groups),
        "chosen": best["step"],
        "checkpoints": rows,
    }
