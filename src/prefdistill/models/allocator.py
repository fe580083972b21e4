"""Freed memory: kept by glibc where it is asked for again, given back where another model is to come.

By default glibc's goes back to the kernel at every step, and comes again. A training step frees and asks for gigabytes
in large pieces; zeroing their pages anew takes a good part of its time (docs/speed.md).
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
from functools import lru_cache

import torch

logger = logging.getLogger(__name__)

# <malloc.h>; the values are part of glibc's interface.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE = 2**30
NEVER = -1  # the largest threshold that can be named, 2 GB, is less than what a step frees
SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Lets this process keep what it frees and use it again; says whether that was done.

    Only with glibc, and not where the environment already sets the allocator (MALLOC_..., GLIBC_TUNABLES, LD_PRELOAD).
    """
    if any(name in os.environ for name in SET_BY_USER):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        set_option = libc.mallopt
    except (OSError, AttributeError):
        return False  # macOS, Windows, musl: their allocators are their own
    done = bool(set_option(M_MMAP_THRESHOLD, LARGE)) and bool(set_option(M_TRIM_THRESHOLD, NEVER))
    logger.debug("freed memory is kept: %s", done)
    return done


def give_back_memory() -> None:
    """Frees what only cycles of objects hold, as a Trainer and its model do, and what a GPU's allocator keeps of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
