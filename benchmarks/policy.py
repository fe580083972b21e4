"""The policy step: DPO on the same pairs, from the same weights, by our trainer and by TRL's."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from benchmarks.shapes import Prompt, policy_of, rows_of, tokenizer_of
from benchmarks.steps import Step, stepper
from prefdistill.models.forward import TreeModel
from prefdistill.models.loading import add_lora
from prefdistill.native.library import library
from prefdistill.training.distill import DistillConfig, DistillExample, DistillTrainer

BETA = 0.1
LEARNING_RATE = 1e-5


def trainer_arguments(precision: str, batch: int, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(Path(tempfile.gettempdir()) / "prefdistill-benchmark"),  # nothing is saved there
        "bf16": precision == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "per_device_train_batch_size": batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
        **options,
    }


def ours(
    prompts: list[Prompt],
    *,
    size: str,
    precision: str,
    batch_prompts: int,
    method: str = "dpo",
    members: int = 0,
    compiled: bool = False,
    lora_rank: int = 0,
    native: Literal["kept", "anew", "none"] = "kept",
) -> Step:
    """A step over `batch_prompts` prompts with all their pairs; reference log-probs are a column.

    Args:
        native: whether code for the CPU is there, compiled in the first step, or PyTorch's operations are all there is.
    """
    if native == "none":
        os.environ["PREFDISTILL_NATIVE"] = "0"
    policy = policy_of(size)
    model = TreeModel(policy.eval())
    logps: list[list[float]] = []
    with torch.inference_mode():
        for p in prompts:
            logps.append(model.logps(model.collate([p.tree])).tolist())
    draw = torch.Generator().manual_seed(0)
    examples = [
        DistillExample(
            p.tree,
            tuple(reference),
            tuple(tuple(torch.randn(len(p.responses), generator=draw).tolist()) for _ in range(members)),
            p.pairs,
        )
        for p, reference in zip(prompts, logps, strict=True)
    ]
    arguments = DistillConfig(
        **trainer_arguments(precision, batch_prompts, torch_compile=compiled),
        method=method,
        beta=BETA,
        kl_alpha=0.0,
        pairs="labelled",
    )
    trained: Any = add_lora(policy, rank=lora_rank, task="CAUSAL_LM") if lora_rank else policy
    trainer = DistillTrainer(trained, arguments, examples=examples)
    if native == "anew":
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # in the side's own scratch folder, which goes with it
        library.cache_clear()
    items = list(trainer.train_dataset)  # type: ignore[arg-type]
    return stepper(trainer, items, batch_prompts)


def trl(
    prompts: list[Prompt],
    *,
    size: str,
    precision: str,
    batch_prompts: int,
    checkpointing: bool = False,
    accumulating: bool = False,
) -> Step:
    """TRL's step over the same pairs, at once or a prompt's at a time; reference log-probs computed before."""
    batch = batch_prompts * len(prompts[0].pairs)
    trainer = trl_trainer(prompts, size=size, precision=precision, batch=batch, checkpointing=checkpointing)
    rows = [dict(row) for row in trainer.train_dataset]
    return stepper(trainer, rows, batch, at_once=len(prompts[0].pairs) if accumulating else None)


def trl_trainer(prompts: list[Prompt], *, size: str, precision: str, batch: int, checkpointing: bool) -> Any:
    """TRL's DPOTrainer over these pairs as text; the reference's log-probs are columns of its data set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DPOTrainer(
            model=policy_of(size),
            args=DPOConfig(
                **trainer_arguments(precision, batch, gradient_checkpointing=checkpointing),
                beta=BETA,
                precompute_ref_log_probs=True,
                max_length=None,
            ),
            train_dataset=Dataset.from_list(rows_of(prompts)),
            processing_class=tokenizer_of(size),
        )
