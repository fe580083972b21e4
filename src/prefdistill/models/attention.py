"""Attention over trees packed into one row: every block of queries meets the keys that it may see, and no others.

transformers hands a registered attention function the heads' queries, keys and values and the mask that the caller
gave to the model. Here that mask is one empty cell that carries the trees' places; without them the function is
transformers' own `sdpa`. No [T, T] mask is made: a prompt's queries go in blocks over the keys before them (the upper
triangle is never computed), a tree's responses over their prompt and themselves. A backward pass computes a block's
probabilities again, so that memory grows with tokens, not with their square. Where the machine can have compiled
code (native/), that does the same over the same blocks. On a GPU flash kernels take the row in one piece (flash.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefdistill.data.tree import Place
from prefdistill.models import flash
from prefdistill.models.past import Past
from prefdistill.native import attention as native
from prefdistill.native.library import library_for

NAME = "prefdistill"  # of the attention function in transformers' registry
QUERIES = 128  # a block's


@dataclass(frozen=True)
class Block:
    """Queries [start, stop) of a row that see its keys [first, middle) and [own, stop), but for what is hidden.

    Attributes:
        first, middle: of the prompt that a response goes on from; empty for the prompt's own queries.
        own: where the queries' own prompt or responses begin.
        hidden: [queries, 1, n], added to scores over the last n of the keys: -inf = unseen. All before them are seen.
    """

    start: int
    stop: int
    first: int
    middle: int
    own: int
    hidden: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """The queries' part of [tokens, key heads, query heads of each, d]: [key heads, queries * query heads, d]."""
        return x[self.start : self.stop].transpose(0, 1).flatten(1, 2)

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Puts what `rows` took, or took of another x, into its place."""
        x[self.start : self.stop] = rows.unflatten(1, (self.stop - self.start, -1)).transpose(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        """The keys' part of [tokens, key heads, d]: [key heads, keys, d], in one piece as products want it."""
        own = x[self.own : self.stop]
        part = own if self.first == self.middle else torch.cat([x[self.first : self.middle], own])
        return part.transpose(0, 1).contiguous()

    def add_to(self, total: Tensor, part: Tensor) -> None:
        """Adds what `keys` took to its places in [tokens, key heads, d]."""
        before = self.middle - self.first
        part = part.transpose(0, 1)
        if before:
            total[self.first : self.middle] += part[:before]
        total[self.own : self.stop] += part[before:]


def blocks_of(places: Sequence[Place], *, window: int | None = None, device: Any = None) -> list[Block]:
    """The blocks of a packed row.

    Args:
        window: sliding window in tokens along a path, as in `prefdistill.data.tree.tree_mask`.
    """
    blocks = []
    for place in places:
        prompt = place.prompt
        blocks += _blocks(place.start, [prompt], 0, place.start, window)
        start = place.start + prompt
        for group in _groups(place.responses):
            blocks += _blocks(start, group, prompt, place.start, window)
            start += sum(group)
    return [dataclasses.replace(b, hidden=b.hidden.to(device)) for b in blocks]


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Neighbouring responses that fit into one block together; a longer one stands alone."""
    groups: list[list[int]] = []
    for n in lengths:
        if groups and sum(groups[-1]) + n <= QUERIES:
            groups[-1].append(n)
        else:
            groups.append([n])
    return groups


def _blocks(start: int, lengths: Sequence[int], before: int, root: int, window: int | None) -> list[Block]:
    """Blocks of neighbouring segments that all go on from `before` tokens at `root`."""
    position = torch.cat([torch.arange(before, before + n) for n in lengths])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    found = []
    for a in range(0, len(position), QUERIES):
        b = min(len(position), a + QUERIES)
        query, key = position[a:b, None], position[None, :b]
        hidden = (query < key) | (owner[a:b, None] != owner[None, :b])
        if window is not None:
            hidden = torch.cat([query - torch.arange(before)[None] >= window, hidden | (query - key >= window)], 1)
        elif len(lengths) == 1:
            hidden = hidden[:, a:]  # all earlier keys are seen
        # bfloat16 holds both numbers, and adding costs a third of filling (masked_fill_) on a CPU.
        bias = torch.zeros(hidden.shape, dtype=torch.bfloat16).masked_fill_(hidden, float("-inf"))
        found.append(Block(start + a, start + b, root, root + before, start, bias[:, None]))
    return found


@dataclass(frozen=True)
class Row:
    """Who sees whom in a packed row, in the form that each kernel reads; made once, for the first layer that asks.

    With a past, the row is prompts whose keys and values are kept there, or tokens that go on from them. `read` are the
    positions whose final states are read, where these are not all.
    """

    places: Sequence[Place]
    window: int | None
    device: torch.device
    past: Past | None = None
    read: Tensor | None = None

    @cached_property
    def blocks(self) -> list[Block]:
        return blocks_of(self.places, window=self.window, device=self.device)

    @cached_property
    def sequences(self) -> flash.Sequences:
        return flash.sequences_of(self.places, self.device)

    @cached_property
    def masks(self) -> list[Tensor]:
        return flash.masks_of(self.places, self.window, self.device)


def carrier_mask(
    places: Sequence[Place],
    *,
    window: int | None,
    device: torch.device,
    past: Past | None = None,
    read: Tensor | None = None,
) -> Tensor:
    """A mask to give to a model whose attention is this module's: [1, 1, 1, 1], with the row as an attribute."""
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    mask.row = Row(places, window, device, past, read)  # type: ignore[attr-defined]
    return mask


def take_over(core: nn.Module) -> bool:
    """Makes a model attend by this module where it attended by `sdpa`; says whether it does.

    To every other mask the model answers as before.
    """
    core_: Any = core
    if core_.config.get_text_config()._attn_implementation == "sdpa":
        core_.set_attn_implementation(NAME)
    return bool(core_.config.get_text_config()._attn_implementation == NAME)


def give_back(core: nn.Module) -> None:
    """Undoes `take_over`."""
    core_: Any = core
    core_.set_attn_implementation("sdpa")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    Args:
        query: [1, heads, tokens, d]; key and value: [1, key heads, tokens, d].
        attention_mask: from `carrier_mask`, or any that `sdpa` accepts.

    Raises:
        ValueError: the mask has lost its places on the way, or the layer asks for what is not done here (soft caps,
            sinks, biases).
    """
    row: Row | None = getattr(attention_mask, "row", None)
    reads: Any = getattr(module, "reads", None)  # of the last layer
    if reads is not None:
        reads.now = None if row is None else row.read
    if row is None:
        if attention_mask is not None and attention_mask.shape[-1] == 1 < key.shape[2]:
            raise ValueError("the packed row's mask has lost its places on the way through the model")
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention over packed trees does not know {name}")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    with torch.autocast(kind, enabled=False):  # the backward pass has none either
        q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
        if row.past is not None:
            layer: Any = module.layer_idx
            if row.past.reading is None:
                return row.past.attend(layer, q, k, v, row.window, scale).unsqueeze(0), None
            row.past.read(layer, k, v)
        return _over(row, q, k, v, scale, dropout, kind).unsqueeze(0), None


def _over(row: Row, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, kind: str) -> Tensor:
    """[tokens, heads, d] from q [tokens, heads, d] and k, v [tokens, key heads, d], by what this kind of device has."""
    if kind != "cpu":  # where every block's products would be launches of their own
        if dropout == 0 and flash.takes(q, k, v):
            return flash.attend(q, k, v, row.sequences, row.window, scale)
        return flash.dense(q, k, v, row.places, row.masks, scale, dropout)
    if dropout == 0 and native.takes(q, k, v) and (compiled := library_for(q.dtype)) is not None:
        return native.attend(compiled, q, k, v, row.blocks, scale)
    q = (q * scale).unflatten(1, (k.shape[1], -1))
    out = _with_dropout(q, k, v, row.blocks, dropout) if dropout > 0 else _Attention.apply(q, k, v, row.blocks)
    return out.flatten(1, 2)


def _probabilities(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """[key heads, queries * query heads of each, keys] from q [key heads, queries * query heads of each, d]."""
    scores = q @ k.transpose(1, 2)
    seen = scores.shape[2] - hidden.shape[2]
    scores.unflatten(1, (len(hidden), -1))[..., seen:].add_(hidden)
    return scores.softmax(-1)


class _Attention(torch.autograd.Function):
    """softmax(q k') v by blocks; only q, k and v are kept for the backward pass.

    q is [tokens, key heads, query heads of each, d], k and v are [tokens, key heads, d].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block]) -> Tensor:
        out = q.new_empty((*q.shape[:3], v.shape[2]))
        for block in blocks:
            block.put(out, _probabilities(block.rows(q), block.keys(k), block.hidden) @ block.keys(v))
        ctx.save_for_backward(q, k, v)
        ctx.blocks = blocks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        sums = torch.float64 if q.dtype == torch.float64 else torch.float32
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=sums), torch.zeros_like(v, dtype=sums)
        for block in ctx.blocks:
            part, g, keys, values = block.rows(q), block.rows(grad), block.keys(k), block.keys(v)
            p = _probabilities(part, keys, block.hidden)
            block.add_to(dv, p.transpose(1, 2) @ g)
            ds = torch._softmax_backward_data(g @ values.transpose(1, 2), p, -1, p.dtype)
            block.put(dq, ds @ keys)
            block.add_to(dk, ds.transpose(1, 2) @ part)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _with_dropout(q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], rate: float) -> Tensor:
    parts = []
    for block in blocks:
        p = nn.functional.dropout(_probabilities(block.rows(q), block.keys(k), block.hidden), rate)
        parts.append((p @ block.keys(v)).unflatten(1, (block.stop - block.start, -1)).transpose(0, 1))
    return torch.cat(parts)


# Blocks stand in the row's order, one after the other: what `_with_dropout` puts together is the row.
transformers.AttentionInterface.register(NAME, attend)
transformers.AttentionMaskInterface.register(NAME, sdpa_mask)
