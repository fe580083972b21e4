"""Gated MLPs (down(silu(gate(x)) * up(x))) whose gate is one pass over memory, where it is compiled for the CPU.

The last layer's runs at the positions of a packed row whose final states are read, and at no others.

Which modules are such is measured: one whose outputs differ from the formula on random numbers is left as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prefdistill.models.backbone import device_of, replace_forward
from prefdistill.models.linears import together
from prefdistill.native.elementwise import Gate
from prefdistill.native.library import library_for

TOLERANCE = 1e-5
PARTS = ("gate_proj", "up_proj", "down_proj")


class Reads:
    """At which positions the output of the layer that runs now is read; None: at all.

    The layer's attention tells, which runs before its MLP in every forward: in a checkpoint's second one, where hooks
    of the layer do not, and beside compiled code. The MLP takes it away, so that no other call has it.
    """

    now: Tensor | None = None


def fuse_gates(backbone: nn.Module) -> int:
    """Replaces the forward of a model's gated MLPs on a CPU; returns how many.

    It is the module's own in a precision that nothing is compiled for, and to torch.compile.
    """
    found = 0
    if device_of(backbone).type != "cpu":
        return found
    layers: Any = getattr(backbone, "layers", None) or []
    for layer in layers:
        mlp = getattr(layer, "mlp", None)
        if mlp is not None and "forward" not in vars(mlp) and _is_formula(mlp):
            attention = getattr(layer, "self_attn", None)
            reads = None
            if layer is layers[-1] and attention is not None:
                reads = attention.reads = Reads()
            replace_forward(mlp, _forward, reads)
            found += 1
    return found


def _is_formula(mlp: Any) -> bool:
    parts = [getattr(mlp, name, None) for name in PARTS]
    bases = [getattr(part, "base_layer", part) for part in parts]  # of adapters
    if not all(type(base) is nn.Linear and not base.weight.is_meta for base in bases):
        return False
    weight = bases[0].weight  # type: ignore[union-attr]
    x = torch.linspace(-3.0, 2.0, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(2, -1)
    with torch.no_grad():
        truth = mlp(x).float()
        ours = mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)).float()
    return bool((ours - truth).abs().max() <= TOLERANCE * truth.abs().max())


def _forward(self: Any, reads: Reads | None, x: Tensor) -> Any:
    read = None
    if reads is not None and not torch.compiler.is_compiling():
        read, reads.now = reads.now, None
    if read is None:
        return _gated(self, x)
    found = _gated(self, x[:, read])
    return found.new_zeros((*x.shape[:-1], found.shape[-1])).index_copy(1, read, found)


def _gated(self: Any, x: Tensor) -> Any:
    gate, up = together(x, self.gate_proj, self.up_proj)
    if not torch.compiler.is_compiling() and gate.dtype == up.dtype and gate.is_cpu and up.is_cpu:
        compiled = library_for(gate.dtype)
        if compiled is not None:
            return self.down_proj(Gate.apply(gate, up, compiled))
    return self.down_proj(nn.functional.silu(gate) * up)
