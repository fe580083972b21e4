"""The reward model's step: Bradley-Terry on the same pairs, by our trainer and by TRL's."""

from __future__ import annotations

import warnings

import transformers
from datasets import Dataset
from trl import RewardConfig
from trl import RewardTrainer as TRLRewardTrainer

from benchmarks.policy import trainer_arguments
from benchmarks.shapes import Prompt, classifier_of, tokenizer_of
from benchmarks.steps import Step, stepper
from prefdistill.training.reward import RewardExample, RewardTrainer


def ours(prompts: list[Prompt], *, size: str, precision: str, batch_prompts: int) -> Step:
    """A step over `batch_prompts` prompts with all their pairs."""
    examples = [RewardExample(p.tree, p.pairs, (1,) * len(p.pairs)) for p in prompts]
    arguments = transformers.TrainingArguments(**trainer_arguments(precision, batch_prompts))
    trainer = RewardTrainer(classifier_of(size), arguments, examples=examples)
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
    """TRL's step over the same pairs, tokenised before; at once, or a prompt's pairs at a time."""
    batch = batch_prompts * len(prompts[0].pairs)
    rows = [
        {"chosen_ids": [*p.ids, *p.responses[c]], "rejected_ids": [*p.ids, *p.responses[r]]}
        for p in prompts
        for c, r in p.pairs
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = TRLRewardTrainer(
            model=classifier_of(size),
            args=RewardConfig(
                **trainer_arguments(precision, batch, gradient_checkpointing=checkpointing), max_length=None
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer_of(size),
        )
    return stepper(trainer, rows, batch, at_once=len(prompts[0].pairs) if accumulating else None)
