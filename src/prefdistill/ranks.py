"""A run in several processes (torchrun, accelerate launch): what one of them does for all, and where they wait.

Every process goes through the same stages. Files of the run are written by the first one, inside of `from_main`; where
the work itself is divided (columns, samples) each writes files of its own names, and all wait before they are read.
With one process every function here is the plain thing.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from prefdistill.errors import ConfigError

if TYPE_CHECKING:
    import torch.distributed as dist

P = ParamSpec("P")
T = TypeVar("T")
PATIENCE = datetime.timedelta(days=7)  # of those that wait while the first process works

# Over gloo: what is told here are small objects, wherever the tensors lie.
_group: dist.ProcessGroup | None = None
_alone = False  # while the first process works and the others wait


def launched() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def joined(*, sharded: bool = False) -> Iterator[None]:
    """Joins the processes of a launch for as long as the block runs; inside another such block, or alone, nothing.

    Args:
        sharded: whether the launcher may shard weights.

    Raises:
        ConfigError: the launcher shards weights, which a run's stages do not know.
    """
    global _group
    if launched() == 1 or _group is not None:
        yield
        return
    for name in ("FSDP", "DEEPSPEED"):
        if not sharded and os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ConfigError(
                f"a run's stages keep whole weights in every process, and this launch shards them ({name}): start the "
                "run without it, and train a policy that needs it with examples/distributed.py"
            )
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    _group = dist.new_group(backend="gloo", timeout=PATIENCE)
    if not is_main():
        logging.getLogger("prefdistill").setLevel(logging.ERROR)
    try:
        yield
        # A process that ends with the group's threads still running aborts, now and then; after an error the launcher
        # ends the others, and waiting for them would be in vain.
        wait()
        dist.destroy_process_group()
    finally:
        _group = None


def count() -> int:
    """How many processes share the work at hand: 1 in `from_main`."""
    return 1 if _group is None or _alone else _group.size()


def rank() -> int:
    """This process's place among those that share the work."""
    return 0 if _group is None or _alone else _group.rank()


def share_of(option: str, prompts: int) -> int:
    """A process's share of a batch.

    Raises:
        ConfigError: it cannot be divided among the processes.
    """
    if prompts % count():
        raise ConfigError(
            f"{option} is {prompts}; a batch is shared by the {count()} processes of this launch, so it must be a "
            "multiple of that"
        )
    return prompts // count()


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier(group=_group)


def from_main(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work(*args, **kwargs)` returns in the first process, told to all; it begins when all are here.

    Inside of `work` the process counts as the only one.

    Raises:
        SystemExit: in the other processes, where `work` failed in the first.
    """
    global _alone
    if count() == 1:
        return work(*args, **kwargs)
    import torch.distributed as dist

    wait()
    told: list[Any] = [False, None]
    try:
        if is_main():
            _alone = True
            told = [True, work(*args, **kwargs)]
    finally:
        _alone = False
        dist.broadcast_object_list(told, src=0, group=_group)
    if not told[0]:
        raise SystemExit(2)
    result: T = told[1]
    return result


def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    if count() == 1:
        return number
    import torch
    import torch.distributed as dist

    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_group)
    return int(found)
