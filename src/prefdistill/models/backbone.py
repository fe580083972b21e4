"""The parts of a model: what is inside wrappers, what maps tokens to hidden states, where it lies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from prefdistill.errors import ConfigError

# What a model that takes no such rows or masks, or a PyTorch without such a kernel, may raise: why, in its own words.
REFUSALS = (
    ConfigError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError,
)  # fmt: skip


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


def tolerance_of(model: nn.Module) -> float:
    """How far two ways through a model may be apart, by the size of what comes out: what its weights' precision rounds.

    Weights of 4 bits are computed with in bfloat16, whatever the embeddings are in.
    """
    return 1e-3 if all(p.dtype == torch.float32 for p in model.parameters()) else 0.1


def replace_forward(module: nn.Module, forward: Callable[..., Any], *first: Any) -> None:
    """From now on `forward(module, *first, ...)` is what a module's own forward was; `del module.forward` ends it."""
    # No method: those are pickled by their name in the class.
    module.forward = partial(forward, module, *first)  # type: ignore[method-assign]


def replacement_of(module: nn.Module) -> Any:
    """The function that `replace_forward` put there for a module's own forward; None where it has its own."""
    return getattr(vars(module).get("forward"), "func", None)


def heads_of(config: Any) -> tuple[int, int, int] | None:
    """Heads, key heads and a head's size of a model's layers; none where the text configuration does not tell them."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None)
    return (heads, key_heads if isinstance(key_heads, int) else heads, width) if isinstance(width, int) else None
