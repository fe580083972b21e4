"""A decoder's linear layers by the compiled library, on CPUs where its products beat PyTorch's.

In float32 these are all of a layer's (AMD's CPUs without AVX-512), under autocast to bfloat16 its weight's gradient
(with AMX).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from prefdistill.models.backbone import device_of, replace_forward, replacement_of
from prefdistill.native import linear, outer
from prefdistill.native.library import Library, library


def speed_up_linears(backbone: nn.Module) -> int:
    """Replaces the forward of a model's plain linear layers on such a CPU; returns how many.

    Layers with hooks or with a forward of their own are left. To torch.compile, for few rows and in other types a layer
    is what it was.
    """
    found = 0
    if device_of(backbone).type != "cpu":
        return found
    compiled = library()
    if compiled is None or not (compiled.multiplies or compiled.tiles):
        return found
    for module in backbone.modules():
        if _is_plain(module) and "forward" not in vars(module):
            replace_forward(module, _forward)
            found += 1
    return found


def together(x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """What several layers make of the same states: in one go where all are plain, served and without hooks."""
    if not _has_any_global_hook() and all(_is_plain(layer) and _is_ours(layer) for layer in layers):
        compiled = _library_for(x, *(layer.weight for layer in layers))
        if compiled is not None:
            return _multiplied(compiled, x, *layers)
    return tuple(layer(x) for layer in layers)


def _is_plain(module: Any) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is nn.Linear and not hooks


def _is_ours(module: nn.Module) -> bool:
    return replacement_of(module) is _forward


def _library_for(x: Tensor, *weights: Tensor) -> Library | None:
    """The library, where it is to put these states through these weights."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not linear.takes(x, *weights):
        return None
    compiled = library()  # another's, perhaps, than that of the machine which pickled the model
    return compiled if compiled is not None and compiled.multiplies else None


def _library_of_gradients(x: Tensor, weight: Tensor) -> Library | None:
    """The library, where it is to make this weight's gradient under autocast."""
    rounds = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if torch.compiler.is_compiling() or not rounds:
        return None
    compiled = library()
    return compiled if compiled is not None and outer.takes(compiled, x, weight) else None


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    compiled = _library_for(x, self.weight)
    if compiled is not None:
        return _multiplied(compiled, x, self)[0]
    compiled = _library_of_gradients(x, self.weight)
    if compiled is not None:
        return outer.linear(compiled, x, self.weight, self.bias)
    return nn.functional.linear(x, self.weight, self.bias)


def _multiplied(compiled: Library, x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    outs = linear.linear(compiled, x, *(layer.weight for layer in layers))
    return tuple(out if layer.bias is None else out + layer.bias for out, layer in zip(outs, layers, strict=True))
