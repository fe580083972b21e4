"""The parts of a model: what is inside wrappers, what maps tokens to hidden states, where it lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def unwrap(model: Any) -> Any:
    """The transformers model inside PEFT's and distributed wrappers (adapters stay in its layers)."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def backbone_of(model: nn.Module) -> nn.Module:
    """The part that maps tokens to final hidden states, [B, T] -> [B, T, H]."""
    core: Any = unwrap(model)
    decoder = core.get_decoder() if hasattr(core, "get_decoder") else None
    if decoder is not None and decoder is not core:
        return decoder
    inner = getattr(core, core.base_model_prefix, None)
    return inner if isinstance(inner, nn.Module) else core


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
