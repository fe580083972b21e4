"""Several processes as one: the forward goes through whatever wraps the model, the loss is that of all their trees."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Item = Mapping[str, Any]


def route_tree_calls(core: Any) -> None:
    """Lets a model be called with `tree_call`, a function to run in its forward.

    A tree's forward goes through the model's parts, and a wrapper that adds up gradients or gathers shards
    (DistributedDataParallel, FSDP) has to see it: `wrapper(tree_call=f)` runs f inside of the wrapper's own forward. To
    every other call the model answers as before.
    """
    plain = core.forward

    @functools.wraps(plain)
    def forward(*args: Any, tree_call: Callable[[], Tensor] | None = None, **kwargs: Any) -> Any:
        return plain(*args, **kwargs) if tree_call is None else tree_call()

    core.forward = forward


def together(values: Tensor, items: Sequence[Item]) -> tuple[Tensor, list[Item]]:
    """The values [N] and items of all processes, in order of rank; gradients flow to this process's own values.

    Values without items count for nothing, but their process takes part in the backward pass.
    """
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (values[: len(values) if items else 0].detach().cpu(), list(items)))
    own = dist.get_rank()
    parts = [values if rank == own and items else share[0].to(values.device) for rank, share in enumerate(shares)]
    joined = torch.cat(parts)
    if not items:
        joined = joined + 0 * values.sum()
    return joined, [item for _, share in shares for item in share]
