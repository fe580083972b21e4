"""Linear layers in float32 by the compiled library, on CPUs where its products are faster than PyTorch's.

Layers that read the same states go together: these are laid out once, and their gradient is added up in place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from prefdistill.native.library import Library

WIDTH = 16  # features come in multiples of it
ROWS = 256  # below, laying a weight out is not worth it


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is numbers in a CPU's memory: of other classes it need not have memory of its own."""
    return type(x) in (Tensor, Parameter) and x.layout == torch.strided and x.device.type == "cpu"


def takes(x: Tensor, *weights: Tensor) -> bool:
    """Whether the library could put states x [..., in] through weights [out, in], all of float32 on a CPU."""
    return (
        all(is_plain(t) and t.dtype == torch.float32 for t in (x, *weights))
        and x.numel() >= ROWS * x.shape[-1] > 0
        and all(w.dim() == 2 and len(w) > 0 and w.shape[1] == x.shape[-1] for w in weights)
        and all(n % WIDTH == 0 for w in weights for n in w.shape)
    )


def linear(library: Library, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x W' for every weight W [out, in]: [..., out] each, of x [..., in].

    Raises:
        MemoryError: there is no memory for what threads work in.
    """
    found: tuple[Tensor, ...] = _Linear.apply(library, x, *weights)
    return found


class _Side(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("size", "row", "step")))

    @classmethod
    def of(cls, x: Tensor) -> _Side:
        return cls(x.data_ptr(), len(x), x.stride(0), x.stride(1))


class _Product(ctypes.Structure):
    _fields_ = (
        ("lefts", ctypes.POINTER(_Side)),
        ("n_lefts", ctypes.c_int64),
        ("rights", ctypes.POINTER(_Side)),
        ("n_rights", ctypes.c_int64),
        ("outs", ctypes.POINTER(ctypes.c_void_p)),
        ("length", ctypes.c_int64),
        ("add", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def _products(
    library: Library, lefts: Sequence[Tensor], rights: Sequence[Tensor], outs: Sequence[Tensor], *, add: bool = False
) -> None:
    """outs[l * len(rights) + r] [m, n] (+)= left l [m, s] times right r [n, s], transposed; each dense in memory."""
    work = _Product(
        lefts=(_Side * len(lefts))(*map(_Side.of, lefts)),
        n_lefts=len(lefts),
        rights=(_Side * len(rights))(*map(_Side.of, rights)),
        n_rights=len(rights),
        outs=(ctypes.c_void_p * len(outs))(*(out.data_ptr() for out in outs)),
        length=lefts[0].shape[1],
        add=add,
        threads=torch.get_num_threads(),
    )
    if library.function("product", torch.float32)(ctypes.byref(work)):
        raise MemoryError(f"no memory for a product of {len(lefts[0])} rows by {work.threads} threads")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, library: Library, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        rows, dense = x.reshape(-1, x.shape[-1]).contiguous(), [w.contiguous() for w in weights]
        outs = tuple(x.new_empty(*x.shape[:-1], len(w)) for w in weights)
        _products(library, [rows], dense, outs)
        _, to_x, *to_weights = ctx.needs_input_grad
        # As PyTorch: of frozen weights the states are not needed, of states without a gradient not the weights.
        ctx.save_for_backward(x if any(to_weights) else None, *(w if to_x else None for w in weights))
        ctx.given = library, x.shape, [w.shape for w in weights]
        ctx.mark_non_differentiable(
            *(out for out, wanted in zip(outs, to_weights, strict=True) if not (to_x or wanted))
        )
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        library, shape, sizes = ctx.given
        _, to_x, *to_weights = ctx.needs_input_grad
        flat = [g.reshape(-1, g.shape[-1]).contiguous() for g in grads]
        d_x = grads[0].new_empty(shape) if to_x else None
        for i, g in enumerate(flat):
            if d_x is not None:
                _products(library, [g], [weights[i].contiguous().T], [d_x], add=i > 0)
        d_weights = [
            g.new_empty(size) if wanted else None for g, size, wanted in zip(flat, sizes, to_weights, strict=True)
        ]
        asked = [(g.T, d) for g, d in zip(flat, d_weights, strict=True) if d is not None]
        if asked:
            lefts, outs = zip(*asked, strict=True)
            _products(library, lefts, [x.reshape(-1, x.shape[-1]).contiguous().T], outs)
        return None, d_x, *d_weights
