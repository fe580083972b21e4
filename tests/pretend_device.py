"""A device that is not the CPU, for tests on machines that have none: its tensors refuse those that lie elsewhere.

The CPU computes for it, on memory that only this module knows of. As with CUDA, an operation on tensors of two devices
raises RuntimeError; copies, indices and tensors without a dimension may come from the CPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
COPIES = ("copy_", "_copy_from", "_copy_from_and_resize", "_to_copy")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
# These would fill a tensor of no size yet, made on the device.
MADE = ("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm", "full")
# What autocast computes in its precision, as on GPUs.
ROUNDED = ("linear", "matmul", "mm", "addmm", "bmm", "scaled_dot_product_attention")
PURGE = 4096

_memory: dict[int, tuple[StorageWeakRef, Tensor]] = {}  # by a storage on the device: all of it, on the CPU
_kept: list[Any] = []


def register() -> torch.device:
    """The device, which this process has from now on."""
    if not _kept:
        module: Any = backend_registration._DummyBackendModule()
        module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
        backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=module)
        every, made = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        every.fallback(_computed, "PrivateUse1")
        every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        for name in MADE:
            base, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, base), overload or "default")
            made.impl(name, functools.partial(_made, op), "PrivateUse1")
        for name in ROUNDED:
            made.impl(name, functools.partial(_rounded, getattr(torch.ops.aten, name)), "AutocastPrivateUse1")
        _kept.extend((every, made))
        plain = torch.UntypedStorage.cpu
        torch.UntypedStorage.cpu = lambda self: (  # type: ignore[method-assign]
            _memory[self._cdata][1].clone().untyped_storage() if self.device.type == NAME else plain(self)
        )
    return torch.device(NAME)


def _is_away(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == NAME


def _near(x: Any) -> Any:
    """What a tensor of the device is on the CPU, the same memory; anything else as it is."""
    if not _is_away(x):
        return x
    _, whole = _memory[x.untyped_storage()._cdata]
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())


def _away(near: Tensor, kin: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
    """The device's tensor for this one on the CPU: a view of that of `kin`, pairs of both, which has its memory."""
    storage = near.untyped_storage()
    base = next((a for a, n in kin if n.untyped_storage()._cdata == storage._cdata and n.dtype == near.dtype), None)
    if base is None:
        whole = torch.as_strided(near.detach(), (storage.nbytes() // near.element_size(),), (1,), 0)
        with torch._C._AutoDispatchBelowAutograd():
            base = torch._C._acc.create_empty_tensor(whole.shape, whole.dtype)
        _remember(base.untyped_storage(), whole)
    with _by_meta():
        return base.as_strided(near.shape, near.stride(), near.storage_offset())


def _remember(storage: Any, whole: Tensor) -> None:
    _memory[storage._cdata] = StorageWeakRef(storage), whole
    if len(_memory) % PURGE == 0:
        for key in [k for k, (ref, _) in _memory.items() if ref.expired()]:
            del _memory[key]


@contextlib.contextmanager
def _by_meta() -> Iterator[None]:
    """PyTorch's code for tensors without memory, which makes shapes on any device."""
    with torch._C._AutoDispatchBelowAutograd(), torch._C._IncludeDispatchKeyGuard(torch._C.DispatchKey.Meta):
        yield


def _made(op: Any, *args: Any, **kwargs: Any) -> Tensor:
    return _away(op(*args, **{**kwargs, "device": torch.device("cpu")}))


def _rounded(op: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.is_autocast_enabled(NAME):
        dtype = torch.get_autocast_dtype(NAME)
        args, kwargs = tree_map(lambda x: x.to(dtype) if _is_away(x) and x.is_floating_point() else x, (args, kwargs))
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return op(*args, **kwargs)


def _computed(op: Any, *args: Any, **kwargs: Any) -> Any:
    name = op._schema.name.split("::")[1]
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    kin = [(x, _near(x)) for x in given if _is_away(x)]
    free = given[1:] if name in INDEXED and _is_away(given[0]) else []
    strangers = [x for x in given if not _is_away(x) and x.dim() > 0 and not any(x is f for f in free)]
    if strangers and kin and name not in COPIES:
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, but some are on the CPU")
    near = {id(a): n for a, n in kin}
    near_args, near_kwargs = tree_map(lambda x: near.get(id(x), x), (args, kwargs))
    to = near_kwargs.get("device")
    if to is not None:
        near_kwargs["device"] = torch.device("cpu")
    if name == "_copy_from":
        near_args[1].copy_(near_args[0])
        return args[1]
    found = op(*near_args, **near_kwargs)

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or (to is not None and torch.device(to).type != NAME):
            return x
        own = next((a for a, n in kin if n is x), None)
        if own is None:
            return _away(x, kin)
        if own.shape != x.shape:
            resized = _away(x)
            with _by_meta():
                own.set_(resized.untyped_storage(), 0, x.shape, x.stride())
        return own

    return tree_map(wrapped, found)
