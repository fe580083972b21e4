"""Linear layers under autocast to bfloat16 by the compiled library: their weights' gradients, on CPUs with AMX.

PyTorch's products of two sides that both lie across run at half the rate of others, and autocast rounds what they add
up to bfloat16 before it is a float32 gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefdistill.native.elementwise import at, size, threads
from prefdistill.native.library import Library
from prefdistill.native.linear import ROWS, is_plain

WIDTH = 32  # features come in multiples of it


def takes(library: Library, x: Tensor, weight: Tensor) -> bool:
    """Whether the library could make the gradient of a float32 weight [out, in] that trains, of states x [..., in]."""
    return (
        library.tiles
        and is_plain(x)
        and is_plain(weight)
        and torch.is_grad_enabled()
        and weight.requires_grad
        and weight.dtype == torch.float32
        and x.dtype in (torch.float32, torch.bfloat16)
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and all(n > 0 and n % WIDTH == 0 for n in weight.shape)
        and x.numel() >= ROWS * x.shape[-1]
    )


def linear(library: Library, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b in bfloat16: [..., out] of x [..., in] and W [out, in]; the gradients of W and b are float32 sums.

    Raises:
        MemoryError: in the backward pass, there is no memory for what threads work in.
    """
    found: Tensor = _Linear.apply(x.bfloat16(), weight, bias, library)
    return found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, library: Library) -> Tensor:
        rounded = weight.to(x.dtype)
        ctx.save_for_backward(x, rounded if ctx.needs_input_grad[0] else None)
        ctx.library = library
        return torch.nn.functional.linear(x, rounded, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rounded = ctx.saved_tensors
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        return (
            grad @ rounded if to_x else None,
            outer(ctx.library, grad.flatten(0, -2), x.flatten(0, -2)) if to_weight else None,
            grad.flatten(0, -2).sum(0, dtype=torch.float32) if to_bias else None,
            None,
        )


def outer(library: Library, g: Tensor, x: Tensor) -> Tensor:
    """g' x in float32, [m, n], of g [tokens, m] and x [tokens, n] in bfloat16, m and n in multiples of 32.

    Raises:
        MemoryError: there is no memory for what threads work in.
    """
    g, x = (y if y.stride(1) == 1 else y.contiguous() for y in (g, x))
    out = torch.empty(g.shape[1], x.shape[1])
    sides = [of_side for y in (g, x) for of_side in (at(y), size(y.shape[1]), size(y.stride(0)))]
    if library.handle.prefdistill_outer_half(*sides, at(out), size(len(g)), threads()):
        raise MemoryError(f"no memory for a gradient of {tuple(out.shape)} by {torch.get_num_threads()} threads")
    return out
