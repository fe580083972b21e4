"""Precision chosen by measuring: a matmul of the model's own shape in float32 and in bfloat16."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch

from prefdistill.errors import ConfigError

logger = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16"]
MEASURED_ROWS = 256
REPEATS = 15
BUDGET_SECONDS = 0.5  # large shapes are measured fewer times


def choose_precision(asked: str, config: Any, device: torch.device | str = "cpu") -> Literal["float32", "bfloat16"]:
    """The arithmetic to use for a model: what was asked, or for "auto" the faster one on this device.

    bfloat16 means autocast over float32 weights. On a CPU the two are timed for under a second on the model's own
    hidden and intermediate sizes: with AMX bfloat16 is several times faster, without it can be slower. One thread's
    time of the processor is what counts: with all threads on a busy machine, both wait for each other most of it.

    Raises:
        ConfigError: an unknown precision.
    """
    if asked == "float32":
        return "float32"
    if asked == "bfloat16":
        return "bfloat16"
    if asked != "auto":
        raise ConfigError(f"precision is {asked!r}; it must be auto, float32 or bfloat16")
    device = torch.device(device)
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type != "cpu":
        return "float32"
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    return _faster_on_cpu(hidden, inner)


@lru_cache(maxsize=8)
def _faster_on_cpu(hidden: int, inner: int) -> Literal["float32", "bfloat16"]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = _rates(hidden, inner, time.thread_time)
    finally:
        torch.set_num_threads(threads)
    faster: Literal["float32", "bfloat16"] = "bfloat16" if rates["bfloat16"] > rates["float32"] else "float32"
    logger.info(
        "precision: %s (matmul %d x %d on one thread: float32 %.2f, bfloat16 %.2f TFLOP/s)",
        faster,
        hidden,
        inner,
        rates["float32"] / 1e12,
        rates["bfloat16"] / 1e12,
    )
    return faster


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@lru_cache(maxsize=8)
def _rates(hidden: int, inner: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """FLOP/s of a float32 activation through a weight in each arithmetic, casts included as autocast does them.

    The two take turns and the best of each counts. No turn starts after BUDGET_SECONDS of this clock.
    """
    x, w = torch.randn(MEASURED_ROWS, hidden), torch.randn(inner, hidden)
    best = dict.fromkeys(_DTYPES, float("inf"))
    began = clock()
    for _ in range(REPEATS):
        if clock() - began > BUDGET_SECONDS:
            break
        for name, dtype in _DTYPES.items():
            start = clock()
            torch.nn.functional.linear(x.to(dtype), w.to(dtype))
            best[name] = min(best[name], clock() - start)
    return {name: 2 * MEASURED_ROWS * hidden * inner / seconds for name, seconds in best.items()}


def forward_seconds(config: Any, tokens: int, device: torch.device, precision: str = "auto") -> float | None:
    """About how long one forward over so many tokens takes, from a matrix product that is timed here.

    In the precision asked for, or the faster one. None where nothing is timed (not on a CPU) or the configuration does
    not tell the model's size as numbers.
    """
    text = config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "vocab_size")
    hidden, layers, vocabulary = (getattr(text, name, None) or 0 for name in names)
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    if device.type != "cpu" or not all(isinstance(n, int) and n > 0 for n in (hidden, layers, vocabulary, inner)):
        return None
    weights = layers * (4 * hidden**2 + 3 * hidden * inner) + vocabulary * hidden
    rates = _rates(hidden, inner)
    return 2 * weights * tokens / rates.get(precision, max(rates.values()))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a forward runs with this precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
