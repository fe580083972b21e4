"""Distils columns into a policy in several processes.

`torchrun --nproc-per-node 2 examples/distributed.py RUN METHOD OUT`, where RUN is a run directory that was scored
(`prefdistill score CONFIG.yaml`). The loss is that of the trees of all processes together, so N processes with a batch
of B prompts each take the steps that one takes with N B. With
`accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/distributed.py ...` weights are sharded.
"""

from __future__ import annotations

import sys

import torch.distributed as dist

from prefdistill.cli import parse
from prefdistill.models.loading import load_policy
from prefdistill.stages.distill import examples_of
from prefdistill.stages.run import Run
from prefdistill.training.distill import DistillConfig, DistillTrainer


def main(folder: str, method: str, out: str) -> None:
    run = Run(parse("run", [f"{folder}/config.yaml", "--output_dir", folder]))
    options = run.config.distill.of(method)
    row = run.config.row(method)
    arguments = DistillConfig(
        output_dir=out,
        method=run.config.distill.method_of(method),
        beta=options.beta,
        kl_alpha=options.kl_alpha,
        pessimism=options.pessimism,
        pairs=options.pairs,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_prompts,
        learning_rate=options.learning_rate or 1e-5,
        bf16=run.precision == "bfloat16",
        logging_steps=options.logging_steps,
        report_to=[],
    )
    examples = examples_of(run, "train", rewards=row.needs_rewards)
    trainer = DistillTrainer(load_policy(run.reference), arguments, examples=examples)
    trainer.train()
    trainer.save_model(out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
