"""Attention layers that turn queries and keys by their positions in one pass over memory, where it is compiled.

transformers' rotary embedding is seven operations over states that autocast makes float32, each way. Which modules
are such layers is measured: one that hands other queries, keys or values, or more than these, to its attention
function on random numbers, or does something else with what comes back, is left as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from prefdistill.models.attention import NAME, attend
from prefdistill.models.backbone import REFUSALS, device_of, replace_forward, tolerance_of
from prefdistill.models.linears import together
from prefdistill.native.elementwise import Rotary
from prefdistill.native.library import library_for

TOLERANCE = 1e-5
SPY = f"{NAME}_spy"  # of the attention function that a layer is measured with
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
IGNORED = ("sliding_window", "position_ids", "use_cache", "is_causal")  # said by the row, or nothing to attention


def fuse_rotary(backbone: nn.Module) -> int:
    """Replaces the forward of a model's attention layers on a CPU; returns how many.

    It is the module's own for every mask but a packed row's, and to torch.compile.
    """
    found = 0
    if device_of(backbone).type != "cpu":
        return found
    layers: Any = getattr(backbone, "layers", None) or []
    for layer in layers:
        attention = getattr(layer, "self_attn", None)
        if attention is not None and "forward" not in vars(attention) and _is_formula(attention):
            replace_forward(attention, _forward)
            found += 1
    return found


def _is_formula(attention: Any) -> bool:
    parts = [getattr(attention, name, None) for name in PARTS]
    bases: list[Any] = [getattr(part, "base_layer", part) for part in parts]  # of adapters
    d, config = getattr(attention, "head_dim", None), getattr(attention, "config", None)
    whole = all(type(base) is nn.Linear and base.weight.dim() == 2 and not base.weight.is_meta for base in bases)
    if not whole or config is None:
        return False
    known = all(isinstance(getattr(attention, name, None), float | int) for name in ("scaling", "attention_dropout"))
    if not known or not isinstance(d, int) or d % 2:
        return False
    weight = bases[0].weight
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, weight.shape[1], generator=draw).to(weight.dtype)
    cos, sin = torch.randn(2, 1, 3, d, generator=draw).to(weight.dtype)
    before, training = config._attn_implementation, attention.training
    attention.eval()  # without dropout, its adapters' too
    try:
        config._attn_implementation = SPY
        with torch.no_grad():
            out, _ = attention(hidden_states=x, position_embeddings=(cos, sin), attention_mask=None)
            seen = _spied.pop()
            ours = [*_turned(attention, x, cos, sin), attention.o_proj(seen.out.flatten(2))]
    except REFUSALS:
        return False
    finally:
        config._attn_implementation = before
        attention.train(training)
        _spied.clear()
    told = {name: value for name, value in seen.kwargs.items() if name not in IGNORED and value is not None}
    if told != {"scaling": attention.scaling, "dropout": 0.0}:
        return False
    tolerance = TOLERANCE if weight.dtype in (torch.float32, torch.float64) else tolerance_of(attention)
    pairs = zip(ours, (*seen.states, out), strict=True)
    return all(a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max()) for a, b in pairs)


class _Spied(NamedTuple):
    """What a layer handed to its attention function, and what it got back."""

    states: tuple[Tensor, Tensor, Tensor]
    kwargs: dict[str, Any]
    out: Tensor


_spied: list[_Spied] = []


def _spy(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    out = torch.linspace(-2.0, 3.0, q.numel()).to(q.dtype).view_as(q.transpose(1, 2))
    _spied.append(_Spied((q, k, v), kwargs, out))
    return out, None


transformers.AttentionInterface.register(SPY, _spy)


def _turned(self: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x [1, T, H]: [1, heads, T, d] each, the first two turned by cos and sin [1, T, d]."""
    q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in together(x, self.q_proj, self.k_proj, self.v_proj))
    norms = (getattr(self, name, None) for name in ("q_norm", "k_norm"))
    q, k = (y if norm is None else norm(y) for y, norm in zip((q, k), norms, strict=True))
    q, k = (_turn(y, cos, sin) for y in (q, k))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, T, heads, d], turned."""
    compiled = library_for(x.dtype)
    if compiled is not None:
        found: Tensor = Rotary.apply(x[0], cos[0].float(), sin[0].float(), compiled)
        return found.unsqueeze(0)
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    states, turns, mask = (kwargs.get(name) for name in ("hidden_states", "position_embeddings", "attention_mask"))
    is_row = getattr(mask, "row", None) is not None and not args and not torch.compiler.is_compiling()
    if not is_row or states is None or turns is None or not states.is_cpu:
        return type(self).forward(self, *args, **kwargs)
    q, k, v = _turned(self, states, *turns)
    out, _ = attend(self, q, k, v, mask, self.attention_dropout if self.training else 0.0, self.scaling)
    return self.o_proj(out.flatten(2)), None
