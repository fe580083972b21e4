"""Started by accelerate: runs a script with accelerate's own sharding, which it keeps to accelerators, on processors.

`sharded_on_cpu.py SCRIPT ARGUMENTS`. Changed is what accelerate takes the processes for; the plugin, how it wraps and
gathers weights, and torch's FSDP2 beneath are theirs. What became of the weights is said.
"""

from __future__ import annotations

import os
import runpy
import sys
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.tensor import DTensor


def backend(self, *arguments, **options):
    return "gloo", DistributedType.MULTI_GPU


def set_device(self):
    self.device = torch.device("cpu")


def prepare(accelerator, model):
    model = fsdp2_prepare_model(accelerator, model)
    whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    share = sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    print(f"sharded: {share:.0%} of the weights here, {len(whole)} parameters whole", flush=True)
    return model


if __name__ == "__main__":
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    sys.argv = sys.argv[1:]
    dist.init_process_group("gloo")
    with (
        mock.patch.object(PartialState, "_prepare_backend", backend),
        mock.patch.object(PartialState, "set_device", set_device),
        mock.patch("accelerate.accelerator.fsdp2_prepare_model", prepare),
    ):
        runpy.run_path(sys.argv[0], run_name="__main__")
