"""Distils columns into a policy whose weights are sharded over several processes.

`accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/distributed.py RUN METHOD OUT`, where RUN is a
run directory that was scored (`prefdistill score CONFIG.yaml`). The loss is that of the trees of all processes
together: their steps are those that one process takes. Checkpoints lie in OUT, and the same command goes on from the
newest whole one; SIGINT and SIGTERM have one written. A whole run whose weights fit into every process needs no script:
`torchrun --nproc-per-node 2 -m prefdistill run CONFIG.yaml`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers

from prefdistill import ranks
from prefdistill.cli import parse
from prefdistill.errors import PrefdistillError
from prefdistill.progress import on_terminal, silent
from prefdistill.stages.bases import new_policy
from prefdistill.stages.distill import arguments_of, training_examples
from prefdistill.stages.run import Run
from prefdistill.stopping import Terminated
from prefdistill.training.checkpoints import train_to_end
from prefdistill.training.distill import DistillTrainer


def main(folder: str, method: str, out: str) -> None:
    run = Run(parse("run", [f"{folder}/config.yaml", "--output_dir", folder]))
    examples = training_examples(run, method)
    transformers.set_seed(run.config.seed)  # an adapter starts at random
    policy = new_policy(run, run.config.distill.of(method), on_host=True)  # no device need hold all of it
    trainer = DistillTrainer(policy, arguments_of(run, method, Path(out), policy, examples), examples=examples)
    train_to_end(trainer, Path(out), on_terminal if ranks.is_main() else silent)
    trainer.save_model(out)
    if ranks.is_main():
        run.tokenizer.save_pretrained(out)


if __name__ == "__main__":
    with ranks.joined(sharded=True):
        try:
            main(*sys.argv[1:])
        except PrefdistillError as error:
            sys.exit(f"{error}")
        except KeyboardInterrupt as stop:
            sys.exit(143 if isinstance(stop, Terminated) else 130)  # the checkpoint is written
