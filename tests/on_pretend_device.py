"""`python on_pretend_device.py run OPTIONS`: prefdistill's command, whose models lie on the pretended device.

Libraries that ask for a GPU are told of this device where they would name one, and where they read its memory directly
they get a copy on the CPU.
"""

from __future__ import annotations

import sys
from typing import Any

import accelerate.accelerator
import peft.utils.save_and_load as peft_files
import torch
import transformers
from accelerate.state import PartialState
from transformers import PreTrainedModel, TrainingArguments

import pretend_device
from prefdistill.cli import main
from prefdistill.stages.run import Run


def lend(device: torch.device) -> None:
    """From now on this is the device that runs, transformers and accelerate work on."""
    Run.device = property(lambda self: device)  # type: ignore[method-assign, assignment]

    set_up: Any = TrainingArguments.device
    TrainingArguments.device = property(lambda self: (set_up.fget(self), device)[1])
    TrainingArguments.n_gpu = property(lambda self: (set_up.fget(self), 1)[1])
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    accelerate.accelerator.is_bf16_available = lambda *_: True

    start = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.device = device

    PartialState.__init__ = init  # type: ignore[method-assign]

    save = PreTrainedModel.save_pretrained

    def saved(self: Any, *args: Any, **kwargs: Any) -> None:
        copies: dict[int, torch.Tensor] = {}  # tied weights stay tied
        state = kwargs.pop("state_dict", None) or self.state_dict()
        near = {k: copies.setdefault(v.untyped_storage()._cdata, v.detach().cpu()) for k, v in state.items()}
        save(self, *args, state_dict=near, **kwargs)

    PreTrainedModel.save_pretrained = saved  # type: ignore[method-assign]

    read = peft_files.safe_load_file
    peft_files.safe_load_file = lambda file, device="cpu": {k: v.to(device) for k, v in read(file).items()}


if __name__ == "__main__":
    lend(pretend_device.register())
    sys.exit(main(sys.argv[1:]))
