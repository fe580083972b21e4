"""Rewards of five LoRA members on one base: our columns against five separate passes; a step is all of it.

Both sides start from the five adapter folders on disk, as a run finds them: loading is part of the step.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import peft
import torch
from peft import AutoPeftModelForSequenceClassification

from benchmarks.shapes import DTYPES, Prompt, classifier_of, device, tokenizer_of
from benchmarks.steps import Step
from prefdistill.models.adapters import Classifiers
from prefdistill.models.loading import add_lora, save_adapter
from prefdistill.scoring import Column, fill_columns, rewards_forward

MEMBERS = 5
TOKEN_BUDGET = 4096


def _folders(size: str) -> list[str]:
    """Five adapters with weights of their own on one base, in a folder that goes with the process."""
    root = Path(tempfile.mkdtemp())
    tokenizer = tokenizer_of(size)
    classifier_of(size).save_pretrained(root / "base")
    folders = []
    for k in range(MEMBERS):
        torch.manual_seed(k)
        model = add_lora(classifier_of(size), rank=16, task="SEQ_CLS")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        folders.append(root / f"member-{k}")
        save_adapter(model, tokenizer, folders[-1], str(root / "base"))
    return [str(f) for f in folders]


def ours(prompts: list[Prompt], *, size: str, precision: str) -> Step:
    """The stage `score`: one base, five adapters, tree batches, columns on disk."""
    folders, trees = _folders(size), [p.tree for p in prompts]

    def step() -> float:
        classifiers, total = Classifiers(device()), 0.0
        with tempfile.TemporaryDirectory() as columns:
            for k, folder in enumerate(folders):
                column = Column(Path(columns) / str(k), "benchmark")
                fill_columns(
                    {"rewards": column},
                    trees,
                    lambda folder=folder: classifiers.load(folder),
                    rewards_forward,
                    token_budget=TOKEN_BUDGET,
                    precision=precision,
                    pool=True,
                )
                total += float(sum(column.of(t)[c] for t, p in zip(trees, prompts, strict=True) for c, _ in p.pairs))
        return total

    return step


def separate(prompts: list[Prompt], *, size: str, precision: str, batch_rows: int) -> Step:
    """Five passes of transformers and PEFT over both texts of every pair, as TRL's reward data have them.

    The merged weights are in the precision themselves: autocast would round them anew in every forward.
    """
    folders = _folders(size)
    rows = [[*p.ids, *p.responses[side]] for p in prompts for pair in p.pairs for side in pair]

    def step() -> float:
        total = 0.0
        for folder in folders:
            model: peft.PeftModel = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
            model = model.merge_and_unload().to(device(), DTYPES[precision]).eval()
            rewards: list[float] = []
            for start in range(0, len(rows), batch_rows):
                ids = torch.tensor(rows[start : start + batch_rows], device=model.device)
                with torch.inference_mode():
                    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
                rewards += out.logits[:, 0].float().tolist()
            total += sum(rewards[::2])
        return total

    return step
