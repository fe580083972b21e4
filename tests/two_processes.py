"""Started by test_processes.py under torchrun: trains what it is told to and writes the loss curve, or runs a run."""

from __future__ import annotations

import json
import os
import sys
import tempfile

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from prefdistill import cli, scoring
from prefdistill.data.tree import Tree
from prefdistill.stages import draw
from prefdistill.training.distill import DistillConfig, DistillExample, DistillTrainer
from prefdistill.training.reward import RewardExample, RewardTrainer
from prefdistill.training.sft import SFTTrainer
from tiny_models import QUIET, tiny


def trees(n: int) -> list[Tree]:
    """Prompts and responses of many lengths, so that no two processes have as many pairs or tokens."""
    rng = np.random.default_rng(0)
    draw = lambda m: tuple(int(i) for i in rng.integers(3, 100, m))  # noqa: E731
    return [Tree(draw(rng.integers(1, 9)), tuple(draw(rng.integers(1, 7)) for _ in range(2 + i % 3))) for i in range(n)]


def trainer_of(kind: str, folder: str, batch: int, **options):
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    made = trees({"reward": 19}.get(kind, 18))  # no multiple of four, nor of two
    common = {
        **QUIET,
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        **options,
    }
    if kind == "reward":
        model = tiny("llama", classifier=True, num_hidden_layers=2)
        pairs = [tuple((0, j) for j in range(1, len(t.responses))) for t in made]
        examples = [RewardExample(t, p, (1,) * len(p)) for t, p in zip(made, pairs, strict=True)]
        return RewardTrainer(model, TrainingArguments(**common), examples=examples)
    model = tiny("llama", num_hidden_layers=2)
    if kind == "sft":
        return SFTTrainer(model, TrainingArguments(**common), trees=made)
    examples = [
        DistillExample(
            t,
            tuple((-10 * rng.random(len(t.responses))).tolist()),
            tuple(tuple(rng.normal(size=len(t.responses)).tolist()) for _ in range(3)),
            ((0, 1),),
            (1,) if i % 3 else (),
        )
        for i, t in enumerate(made)
    ]
    arguments = DistillConfig(**common, method="e-dpo", pessimism="batch", kl_alpha=0.1)
    return DistillTrainer(model, arguments, examples=examples)


def by_hand(folder: str, batch: int, sharded: bool) -> tuple[list[dict[str, float]], float, bool]:
    """Steps of AdamW on e-DPO without Trainer, weights sharded by FSDP2 if asked for; accelerate does not on a CPU."""
    trainer = trainer_of("distill", folder, batch)
    model: torch.nn.Module = trainer.model.train()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if sharded:
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    items, curve = list(trainer.train_dataset), []
    for start in range(0, len(items) - batch * world + 1, batch * world):  # whole batches
        own = items[start + rank * batch : start + (rank + 1) * batch]
        loss = trainer.compute_loss(model, {"items": own})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append({"loss": float(loss.detach())})
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    norm = float(sum(p.double().square().sum() for p in whole) ** 0.5)
    return curve, norm, any(isinstance(p, DTensor) for p in model.parameters())


def train(out: str, batch: str) -> None:
    """Every kind of training, one after the other; writes their curves and the norms of what came out."""
    found = {}
    sharded = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with tempfile.TemporaryDirectory() as folder:
        # First: accelerate takes a data loader that a Trainer has left early for one that is still read.
        curve, norm, is_sharded = by_hand(folder, int(batch), sharded)
        found["fsdp2"] = {"curve": curve, "norm": norm, "sharded": is_sharded}
        for kind in ("distill", "reward", "sft"):
            trainer = trainer_of(kind, folder, int(batch))
            trainer.train()
            lines = [h for h in trainer.state.log_history if "loss" in h]
            curve = [{k: v for k, v in h.items() if k not in ("epoch", "step")} for h in lines]
            norm = float(sum(p.double().square().sum() for p in trainer.model.parameters()) ** 0.5)
            found[kind] = {"curve": curve, "norm": norm, "sharded": False}
    if int(os.environ.get("RANK", "0")) == 0:
        with open(out, "w") as file:
            json.dump(found, file)
    if dist.is_initialized():
        # A process that ends with the group's threads still running aborts, now and then.
        dist.barrier()
        dist.destroy_process_group()


def run(command: str, *flags: str) -> int:
    """A run whose columns have many shards and whose samples many batches, small as they are."""
    scoring.SHARD_TOKENS = 200
    draw.SAMPLE_BUDGET = 1
    return cli.main([command, *flags])


if __name__ == "__main__":
    sys.exit(train(*sys.argv[2:]) if sys.argv[1] == "train" else run(*sys.argv[1:]))
