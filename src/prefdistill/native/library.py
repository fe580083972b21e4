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
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

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
    """

    handle: Any
    names: Mapping[torch.dtype, str]
    tiles: bool

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
        file = _file(cxx)
        if not file.exists():
            _compile(cxx, file)
        try:
            handle = ctypes.CDLL(str(file))
        except OSError:  # a damaged file in the cache
            _compile(cxx, file)
            handle = ctypes.CDLL(str(file))
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
    return Library(handle, NAMES if level > 1 else {torch.float32: NAMES[torch.float32]}, tiles)


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


def _file(cxx: str) -> Path:
    """Where the library is kept; the name tells source, compiler, flags and CPU apart."""
    version = subprocess.run([cxx, "--version"], check=True, capture_output=True, text=True).stdout
    known = "\0".join([*(f.read_text(encoding="utf-8") for f in _sources("*")), cxx, version, *FLAGS, _cpu()])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefdistill"
    return home / f"native-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"


def _sources(pattern: str) -> list[Path]:
    return sorted(f for f in FOLDER.glob(pattern) if f.suffix in (".cpp", ".h"))


def _compile(cxx: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        command = [cxx, *FLAGS, "-o", str(made), *map(str, _sources("*.cpp"))]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
        made.replace(file)  # whole or not at all: others may compile at the same time


def _cpu() -> str:
    """What tells this CPU's instructions from another's that shares the cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return (
        "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name"))})) or platform.processor()
    )
