"""Attention over packed rows compiled for this machine's CPU: what attention.py does in PyTorch's products, in C++.

The source (attention.cpp) ships with the package, is compiled by the machine's own compiler in some seconds, and kept
in the user's cache. It serves bfloat16 on CPUs with AMX or AVX-512 BF16, and head sizes in multiples of 32; for all
else attention.py does the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from prefdistill.models.attention import Block

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("attention.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-w")
WIDTH = 32  # head sizes come in multiples of it
PATIENCE = 120  # seconds for the compiler, which needs two


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether compiled attention could serve these queries, keys and values, [tokens, heads, d] each."""
    fits = k.shape == v.shape and q.shape[2] == k.shape[2] and q.shape[2] % WIDTH == 0
    return fits and all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in (q, k, v))


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use too: $CXX, g++ or clang++."""
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


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
        ("lse", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Kernel:
    """The compiled code.

    Attributes:
        tiles: whether it uses AMX.
    """

    library: Any
    tiles: bool

    def attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
        """softmax(scale q k') v: [tokens, heads, d] from q [tokens, heads, d] and k, v [tokens, key heads, d].

        Raises:
            ValueError: the blocks are another row's, or the heads cannot share the key heads.
        """
        if max(b.stop for b in blocks) != len(q) or len(q) != len(k) or q.shape[1] % k.shape[1]:
            raise ValueError(
                f"blocks of {max(b.stop for b in blocks)} tokens do not fit queries {tuple(q.shape)} and keys "
                f"{tuple(k.shape)}"
            )
        out: Tensor = _Attention.apply(*(_rows(x) for x in (q, k, v)), self, blocks, scale)
        return out

    def _work(self, blocks: Sequence[Block], scale: float, lse: Tensor, **heads: Tensor) -> _Work:
        q, k = heads["q"], heads["k"]
        work = _Work(
            n=len(blocks),
            tokens=len(q),
            groups=k.shape[1],
            share=q.shape[1] // k.shape[1],
            d=q.shape[2],
            scale=scale,
            threads=torch.get_num_threads(),
            tiles=self.tiles,
            lse=lse.data_ptr(),
            **{name: _Heads.of(x) for name, x in heads.items()},
        )
        work.blocks = (_Block * len(blocks))(
            *(_Block(b.start, b.stop, b.first, b.middle, b.own, b.hidden.shape[2], b.hidden.data_ptr()) for b in blocks)
        )
        return work


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, what came out and a number a row for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, blocks: Sequence[Block], scale: float
    ) -> Any:
        out = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        kernel.library.prefdistill_forward(ctypes.byref(kernel._work(blocks, scale, lse, q=q, k=k, v=v, out=out)))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.given = kernel, blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        kernel, blocks, scale = ctx.given
        dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        heads = {"q": q, "k": k, "v": v, "out": out, "grad": _rows(grad), "dq": dq, "dk": dk, "dv": dv}
        kernel.library.prefdistill_backward(ctypes.byref(kernel._work(blocks, scale, lse, **heads)))
        return dq, dk, dv, None, None, None


@lru_cache(maxsize=1)
def kernel() -> Kernel | None:
    """The code for this machine, compiled if need be; None, said in the log, where the machine cannot have it."""
    cxx = compiler()
    if cxx is None:
        logger.info("attention is not compiled, PyTorch's products do it: no C++ compiler is found")
        return None
    try:
        file = _file(cxx)
        if not file.exists():
            _compile(cxx, file)
        try:
            library = ctypes.CDLL(str(file))
        except OSError:  # a damaged file in the cache
            _compile(cxx, file)
            library = ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logger.warning("attention is not compiled, PyTorch's products do it, which is slower: %s", said.strip()[-500:])
        return None
    level = int(library.prefdistill_instructions())
    if level == 0:
        logger.info("attention is not compiled, PyTorch's products do it: this CPU has no products of bfloat16")
        return None
    for name in ("prefdistill_forward", "prefdistill_backward"):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.POINTER(_Work)], None
    return Kernel(library, tiles=level == 2)


def _file(cxx: str) -> Path:
    """Where the library is kept; the name tells source, compiler, flags and CPU apart."""
    version = subprocess.run([cxx, "--version"], check=True, capture_output=True, text=True).stdout
    known = "\0".join([SOURCE.read_text(encoding="utf-8"), cxx, version, *FLAGS, _cpu()])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefdistill"
    return home / f"attention-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"


def _compile(cxx: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        command = [cxx, *FLAGS, "-o", str(made), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
        made.replace(file)  # whole or not at all: others may compile at the same time


def _cpu() -> str:
    """What tells this CPU's instructions from another's that shares the cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return (
        "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name"))})) or platform.processor()
    )
