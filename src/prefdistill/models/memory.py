"""Whether a training step fits into memory, from the model's shape; gradient checkpointing only where it does not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from prefdistill.data.tree import Tree
from prefdistill.models.backbone import device_of, heads_of, unwrap
from prefdistill.models.head import LOGITS_AT_ONCE

logger = logging.getLogger(__name__)

MARGIN = 1.3  # what allocators waste, and what is not counted
CONTAINER = Path("/sys/fs/cgroup")
LOGIT_COPIES = 4  # logits, their softmax and its rounding, in float32


def activation_bytes(config: Any, tokens: int, *, bfloat16: bool) -> int:
    """About what a backward pass keeps of a forward over so many tokens.

    Counted over a decoder layer: the inputs of two norms in float32, what the matrices and attention read, and the four
    inner states of a gated MLP (three where its gate is compiled). Layers of other designs come out too high or too low
    by some tenths.
    """
    text = config.get_text_config()
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    heads, key_heads, width = _heads(text)
    size = 2 if bfloat16 else 4
    read = 2 * hidden + 2 * heads * width + 2 * key_heads * width + 4 * inner
    return tokens * layers * (8 * hidden + size * read)


def _heads(text: Any) -> tuple[int, int, int]:
    """As `heads_of`; where a configuration does not tell, one head as wide as the hidden states."""
    return heads_of(text) or (1, 1, int(text.hidden_size))


def free_bytes(device: torch.device) -> int:
    """Memory that a process can still get: the device's, or the machine's within the limit of a container.

    What PyTorch keeps of freed tensors on a device counts, and so do a container's files in memory that can be dropped.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    free = int(psutil.virtual_memory().available)
    limit, used = CONTAINER / "memory.max", CONTAINER / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        stat = CONTAINER / "memory.stat"
        files = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
        free = min(free, int(limit.read_text()) - int(used.read_text()) + int(files.get("inactive_file", 0)))
    return free


def step_bytes(model: nn.Module, trees: Sequence[Tree], batch: int, *, bfloat16: bool) -> int:
    """About what training needs beside the weights, at its largest step of `batch` trees.

    Gradients and AdamW's two moments of what is trained, activations, and the logits that the head has at a time.
    """
    core: Any = unwrap(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # What autocast rounds of frozen weights is kept for the backward pass; of trained ones for the whole step.
    rounded = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32) if bfloat16 else 0
    largest = sorted(trees, key=lambda t: t.tokens, reverse=True)[:batch]
    kept = activation_bytes(core.config, sum(t.tokens for t in largest), bfloat16=bfloat16)
    if device_of(model).type == "cuda":
        # Flash kernels keep a prompt's keys and values once more for each of its responses.
        text = core.config.get_text_config()
        _, key_heads, width = _heads(text)
        again = sum(len(t.prompt_ids) * len(t.responses) for t in largest)
        kept += 2 * key_heads * width * (2 if bfloat16 else 4) * again * int(text.num_hidden_layers)
    return int(12 * trained + torch.bfloat16.itemsize * rounded + MARGIN * (kept + 4 * LOGIT_COPIES * LOGITS_AT_ONCE))


def needs_checkpointing(
    asked: str, model: nn.Module, trees: Sequence[Tree], batch: int, *, bfloat16: bool, device: torch.device
) -> bool:
    """Whether layers are to run again in the backward pass, which costs a third of the time and gives equal gradients.

    Args:
        asked: "always", "never", or "auto": where the largest step would not fit into free memory.
    """
    if asked != "auto":
        return asked == "always"
    needed, free = step_bytes(model, trees, batch, bfloat16=bfloat16), free_bytes(device)
    logger.debug("the largest step needs about %.1f GB, %.1f GB are free", needed / 1e9, free / 1e9)
    return needed > free
