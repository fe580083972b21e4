"""Attention over packed rows by the compiled library: what models/attention.py does, in a part of its time.

It serves head sizes in multiples of 32; for all else PyTorch's products do the work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefdistill.native.library import Library

if TYPE_CHECKING:
    from prefdistill.models.attention import Block

WIDTH = 32  # head sizes come in multiples of it


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether compiled attention could serve these queries, keys and values, [tokens, heads, d] each of one type."""
    fits = k.shape == v.shape and q.shape[2] == k.shape[2] and q.shape[2] % WIDTH == 0
    return fits and all(x.dtype == q.dtype and x.device.type == "cpu" for x in (q, k, v))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("start", "stop", "first", "middle", "own", "width")),
        ("hidden", ctypes.c_void_p),
    )


class _Heads(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64))

    @classmethod
    def of(cls, x: Tensor) -> _Heads:
        return cls(x.data_ptr(), x.stride(0), x.stride(1))


class _Work(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.POINTER(_Block)),
        *((name, ctypes.c_int64) for name in ("n", "tokens", "groups", "share", "d")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        *((name, _Heads) for name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
        ("kept", ctypes.c_void_p),
    )


def attend(library: Library, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
    """softmax(scale q k') v: [tokens, heads, d] from q [tokens, heads, d] and k, v [tokens, key heads, d].

    Raises:
        ValueError: the blocks are another row's, or there are none, or the heads cannot share the key heads.
        MemoryError: there is no memory for what threads work in.
    """
    tokens = max((b.stop for b in blocks), default=0)
    if tokens == 0 or tokens != len(q) or len(q) != len(k) or q.shape[1] % k.shape[1]:
        raise ValueError(f"blocks of {tokens} tokens do not fit queries {tuple(q.shape)} and keys {tuple(k.shape)}")
    out: Tensor = _Attention.apply(*(_rows(x) for x in (q, k, v)), library, blocks, scale)
    return out


def _work(library: Library, blocks: Sequence[Block], scale: float, kept: Tensor, **heads: Tensor) -> _Work:
    q, k = heads["q"], heads["k"]
    work = _Work(
        n=len(blocks),
        tokens=len(q),
        groups=k.shape[1],
        share=q.shape[1] // k.shape[1],
        d=q.shape[2],
        scale=scale,
        threads=torch.get_num_threads(),
        tiles=library.tiles,
        kept=kept.data_ptr(),
        **{name: _Heads.of(x) for name, x in heads.items()},
    )
    work.blocks = (_Block * len(blocks))(
        *(_Block(b.start, b.stop, b.first, b.middle, b.own, b.hidden.shape[2], b.hidden.data_ptr()) for b in blocks)
    )
    return work


def _run(library: Library, name: str, work: _Work, dtype: torch.dtype) -> None:
    if library.function(name, dtype)(ctypes.byref(work)):
        raise MemoryError(
            f"no memory for attention over {work.tokens} tokens by {work.threads} threads: take fewer of either"
        )


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, what came out and two numbers a row for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, library: Library, blocks: Sequence[Block], scale: float
    ) -> Any:
        out = q.new_empty(q.shape)
        kept = q.new_empty((*q.shape[:2], 2), dtype=torch.float32)
        _run(library, "forward", _work(library, blocks, scale, kept, q=q, k=k, v=v, out=out), q.dtype)
        ctx.save_for_backward(q, k, v, out, kept)
        ctx.given = library, blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, kept = ctx.saved_tensors
        library, blocks, scale = ctx.given
        dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        heads = {"q": q, "k": k, "v": v, "out": out, "grad": _rows(grad), "dq": dq, "dk": dk, "dv": dv}
        _run(library, "backward", _work(library, blocks, scale, kept, **heads), q.dtype)
        return dq, dk, dv, None, None, None
