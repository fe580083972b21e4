"""The C++ beside this file, compiled for this CPU: float32 with AVX2, bfloat16 with AMX or AVX-512 BF16.

The machine's own compiler makes one library of it in some seconds, kept in the user's cache. Where there is no compiler
or the CPU lacks the instructions, PyTorch's operations do the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from prefdistill.seals import sealed_file, sealed_files

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-w")
NOTHING = "nothing is compiled for this CPU, PyTorch's operations do the work"
NAMES = {torch.float32: "float", torch.bfloat16: "half"}
PATIENCE = 120  # seconds for the compiler, which needs a few


@dataclass(frozen=True)
class Library:
    """The compiled code.

    Attributes:
        names: what its functions for a type are called after.
        tiles: whether it may use AMX.
        multiplies: whether its products of float32 matrices are faster than PyTorch's.
    """

    handle: Any
    names: Mapping[torch.dtype, str]
    tiles: bool
    multiplies: bool = False

    def function(self, name: str, dtype: torch.dtype) -> Any:
        """A function of the library for numbers of a type that it serves."""
        return getattr(self.handle, f"prefdistill_{name}_{self.names[dtype]}")


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use too: $CXX, g++ or clang++."""
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


@lru_cache(maxsize=1)
def library() -> Library | None:
    """The code for this machine, compiled if need be; None, said in the log, where the machine cannot have it.

    PREFDISTILL_NATIVE=0 in the environment asks for none. ONEDNN_MAX_CPU_ISA, by which a user keeps PyTorch's products
    off AMX, keeps this off it too.
    """
    cxx = compiler()
    lacking = None
    if os.environ.get("PREFDISTILL_NATIVE") == "0":
        lacking = "PREFDISTILL_NATIVE is 0"
    elif sys.platform != "linux" or platform.machine() != "x86_64":
        lacking = "it is written for x86-64 under Linux"
    elif cxx is None:
        lacking = "no C++ compiler is found"
    if lacking or cxx is None:
        logger.info("%s: %s", NOTHING, lacking)
        return None
    try:
        handle = ctypes.CDLL(str(_compiled(cxx)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: who runs this has no home
        said = getattr(error, "stderr", None) or str(error)
        logger.warning("%s, which is slower: %s", NOTHING, said.strip()[-500:])
        return None
    level = int(handle.prefdistill_instructions())
    if level == 0:
        logger.info("%s: this CPU has no AVX2", NOTHING)
        return None
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    tiles = level == 3 and (most in ("DEFAULT", "ALL") or "AMX" in most)
    multiplies = hasattr(handle, "prefdistill_multiplies") and bool(handle.prefdistill_multiplies())
    return Library(handle, NAMES if level > 1 else {torch.float32: NAMES[torch.float32]}, tiles, multiplies)


def library_for(dtype: torch.dtype) -> Library | None:
    """`library`, where it serves numbers of this type: float32, and bfloat16 on CPUs with products of it."""
    found = library() if dtype in NAMES else None
    if found is None or dtype in found.names:
        return found
    _say_lacking(dtype)
    return None


@lru_cache
def _say_lacking(dtype: torch.dtype) -> None:
    logger.info("%s in %s: it has no products of that", NOTHING, str(dtype).removeprefix("torch."))


def _compiled(cxx: str) -> Path:
    """The library's file: one that is kept whole, or a new one."""
    file = _file(cxx)

    def kept() -> list[Path]:
        # A part of a library would end the process that loads it, not raise.
        return sealed_files(file.parent, file.stem, file.suffix)

    if not kept():
        with sealed_file(file) as part:  # others may compile at the same time
            _run([cxx, *FLAGS, "-o", str(part), *map(str, _sources("*.cpp"))])
    return kept()[0]


def _run(command: list[str]) -> str:
    run = {"check": True, "capture_output": True, "text": True, "errors": "replace", "timeout": PATIENCE}
    return str(subprocess.run(command, **run).stdout)  # type: ignore[call-overload]


def _file(cxx: str) -> Path:
    """Where the library is kept, but for the checksum; the name tells source, compiler, flags and CPU apart."""
    version = _run([cxx, "--version"])
    known = "\0".join([*(f.read_text(encoding="utf-8") for f in _sources("*")), cxx, version, *FLAGS, _cpu()])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefdistill"
    return home / f"native-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"


def _sources(pattern: str) -> list[Path]:
    return sorted(f for f in FOLDER.glob(pattern) if f.suffix in (".cpp", ".h"))


def _cpu() -> str:
    """What tells this CPU's instructions from another's that shares the cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return (
        "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name"))})) or platform.processor()
    )
