"""Adapters put into the weights that they stand on.

An adapter that was trained on 4-bit weights goes into these weights, written out in float32: on the weights from before
the rounding it would be another model than the one that was trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prefdistill.models.backbone import unwrap


def is_4bit(model: nn.Module) -> bool:
    """Whether a model, or what an adapter stands on, has 4-bit weights."""
    return bool(getattr(unwrap(model), "is_loaded_in_4bit", False))


def written_out(model: Any) -> Any:
    """A transformers model with its 4-bit weights as float32, the same numbers; its own layers are replaced."""
    model = model.dequantize(dtype=torch.float32)
    model.is_loaded_in_4bit = False
    return model


def on_written_out(model: Any) -> Any:
    """A PEFT model's adapter on its base's 4-bit weights as float32; any other model as it is.

    What it computes stays the same but for rounding. The model that is given cannot be used any more.
    """
    if not is_4bit(model):
        return model
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config, state = model.peft_config["default"], get_peft_model_state_dict(model)
    found = get_peft_model(written_out(model.unload()), config)
    set_peft_model_state_dict(found, state)
    return found


def merged(model: Any) -> Any:
    """A model with its adapter added to its weights, 4-bit ones written out in float32; without one, as it is."""
    return on_written_out(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model
