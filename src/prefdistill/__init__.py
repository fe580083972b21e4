"""prefdistill: robust offline preference optimisation by reward model distillation (arXiv 2405.19316)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefdistill.config import RunConfig
    from prefdistill.data.tree import Tree
    from prefdistill.pipeline import run
    from prefdistill.training.distill import DistillConfig, DistillExample, DistillTrainer

__all__ = ["DistillConfig", "DistillExample", "DistillTrainer", "RunConfig", "Tree", "run"]

_HOMES = {
    "RunConfig": "prefdistill.config",
    "Tree": "prefdistill.data.tree",
    "run": "prefdistill.pipeline",
    "DistillConfig": "prefdistill.training.distill",
    "DistillExample": "prefdistill.training.distill",
    "DistillTrainer": "prefdistill.training.distill",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for, so that `prefdistill --help` does not wait for torch.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'prefdistill' has no attribute {name!r}")
