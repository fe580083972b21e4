"""Distils columns into a policy whose weights are sharded over several processes.

`accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/distributed.py RUN METHOD OUT`, where RUN is a
run directory that was scored (`prefdistill score CONFIG.yaml`). The loss is that of the trees of all processes
together: their steps are those that one process takes. A whole run whose weights fit into every process needs no
script: `torchrun --nproc-per-node 2 -m prefdistill run CONFIG.yaml`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
import transformers

from prefdistill.cli import parse
from prefdistill.stages.bases import new_policy
from prefdistill.stages.distill import arguments_of, training_examples
from prefdistill.stages.run import Run
from prefdistill.training.distill import DistillTrainer


def main(folder: str, method: str, out: str) -> None:
    run = Run(parse("run", [f"{folder}/config.yaml", "--output_dir", folder]))
    examples = training_examples(run, method)
    transformers.set_seed(run.config.seed)  # an adapter starts at random
    policy = new_policy(run, run.config.distill.of(method), on_host=True)  # no device need hold all of it
    arguments = arguments_of(run, method, Path(out), policy, examples)
    arguments.per_device_train_batch_size //= arguments.world_size  # the option is a whole step's batch
    trainer = DistillTrainer(policy, arguments, examples=examples)
    trainer.train()
    trainer.save_model(out)
    if trainer.is_world_process_zero():
        run.tokenizer.save_pretrained(out)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
