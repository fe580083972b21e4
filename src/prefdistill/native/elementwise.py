"""Gates, norms and rotary embeddings by the compiled library, each in one pass over memory."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefdistill.native.library import Library


def at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def size(n: int) -> ctypes.c_int64:
    return ctypes.c_int64(n)


def threads() -> ctypes.c_int32:
    return ctypes.c_int32(torch.get_num_threads())


class Gate(torch.autograd.Function):
    """silu(gate) * up of two tensors of one shape and type; rounded once, where PyTorch rounds twice."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, library: Library) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        library.function("gate", gate.dtype)(at(gate), at(up), at(out), size(gate.numel()), threads())
        ctx.save_for_backward(gate, up)
        ctx.library = library
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad, d_gate, d_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        ctx.library.function("gate_backward", gate.dtype)(
            *map(at, (gate, up, grad, d_gate, d_up)), size(gate.numel()), threads()
        )
        return d_gate, d_up, None


class Norm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) along the last dimension: `dtype` from float32 states."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, library: Library, dtype: torch.dtype) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out, scale = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1])
        library.function("norm", dtype)(
            *map(at, (x, weight, out, scale)),
            size(scale.numel()),
            size(x.shape[-1]),
            ctypes.c_float(eps),
            threads(),
        )
        ctx.save_for_backward(x, weight, scale)
        ctx.library = library
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, d_x, d = grad.contiguous(), torch.empty_like(x), x.shape[-1]
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        parts = x.new_empty(torch.get_num_threads(), d)
        ctx.library.function("norm_backward", grad.dtype)(
            *map(at, (x, weight, scale, grad, d_x)),
            None if d_weight is None else at(d_weight),
            at(parts),
            size(scale.numel()),
            size(d),
            threads(),
        )
        return d_x, d_weight, None, None, None


class Rotary(torch.autograd.Function):
    """x cos + (-x2, x1) sin of a head's halves x1 and x2; rounded once, where PyTorch goes over memory seven times.

    x is [tokens, heads, d], cos and sin are [tokens, d] of float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, library: Library) -> Tensor:
        ctx.given = cos.contiguous(), sin.contiguous(), library
        return _rotated(x, *ctx.given, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _rotated(grad, *ctx.given, back=True), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, library: Library, *, back: bool) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    library.function("rotary", x.dtype)(
        *map(at, (x, out, cos, sin)), *map(size, x.shape), ctypes.c_int32(back), threads()
    )
    return out
