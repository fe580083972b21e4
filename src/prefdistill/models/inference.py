"""Forwards without gradients, in which a weight is rounded to bfloat16 once for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from prefdistill.models.backbone import device_of
from prefdistill.models.memory import free_bytes
from prefdistill.models.precision import autocast

SHARE = 0.25  # of free memory that rounded copies of the weights may take
SHARE_OF_GPU = 0.5  # where nothing but batches is to come beside them


@contextlib.contextmanager
def inference(model: nn.Module, precision: str) -> Iterator[None]:
    """The context in which a model that does not change scores or samples with this precision.

    Autocast keeps its copies of a weight while the context lasts, if the weight is a leaf that requires gradients and
    inference mode is off. A decoded token reads every weight once: without kept copies most of its time is rounding.
    Where they would take more than a quarter of free memory (half of a GPU's), every forward makes its own.
    """
    weights = [p for p in model.parameters() if p.dtype == torch.float32]
    device = device_of(model)
    copies = sum(p.numel() for p in weights) * torch.bfloat16.itemsize
    share = SHARE_OF_GPU if device.type == "cuda" else SHARE
    if precision != "bfloat16" or copies > share * free_bytes(device):
        with torch.inference_mode(), autocast(precision, device):
            yield
        return
    frozen = [p for p in weights if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)  # no graph is made of it here
        with torch.no_grad(), autocast(precision, device):
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
