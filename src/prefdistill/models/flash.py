"""Attention over packed trees on a GPU: PyTorch's flash kernels over one sequence a prompt and one a response.

A response's keys are its prompt's and its own, put together, and the kernels end queries and keys at the same token:
so their causal order is the tree's, without a mask. The kernels are asked once for every shape of heads whether they
give on this machine what attention under a dense mask gives, with its gradients; where they do not, they are not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prefdistill.data.checks import words_of
from prefdistill.data.tree import Place, tree_mask

logger = logging.getLogger(__name__)

SHAPE = (4, 2, 64)  # heads, key heads, size of a head: asked about where a configuration does not tell
LONGEST_HEAD, STEP = 256, 8  # sizes that the kernels know
TOLERANCE = 0.1  # of the values' root mean square: bfloat16 stays below 0.03, a key too many goes beyond 0.3


@dataclass(frozen=True)
class Sequences:
    """The sequences of a packed row, as the kernels read them.

    Attributes:
        keys: [K] the tokens whose keys and values they see, one sequence after the other.
        query_ends, key_ends: [S + 1] int32, from 0 on: where each sequence's queries and keys end.
        longest_queries, longest_keys: of one sequence.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_queries: int
    longest_keys: int


def sequences_of(places: Sequence[Place], device: torch.device) -> Sequences:
    """A packed row's sequences: every prompt, and every response behind its prompt."""
    keys: list[Tensor] = []
    queries: list[int] = []
    for place in places:
        root, start = torch.arange(place.start, place.start + place.prompt), place.start + place.prompt
        keys.append(root)
        queries.append(place.prompt)
        for n in place.responses:
            keys.append(torch.cat([root, torch.arange(start, start + n)]))
            queries.append(n)
            start += n
    seen = [len(k) for k in keys]
    return Sequences(
        torch.cat(keys).to(device), _ends(queries).to(device), _ends(seen).to(device), max(queries), max(seen)
    )


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels serve these queries, keys and values, [tokens, heads, d] each, and serve them right."""
    fits = k.shape == v.shape and q.shape[2] == k.shape[2] <= LONGEST_HEAD and q.shape[2] % STEP == 0
    return (
        fits
        and all(x.dtype == torch.bfloat16 and x.device.type == "cuda" for x in (q, k, v))
        and works(q.device, (q.shape[1], k.shape[1], q.shape[2]))
    )


def attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, window: int | None, scale: float) -> Tensor:
    """softmax(scale q k') v: [tokens, heads, d] from q [tokens, heads, d] and k, v [tokens, key heads, d].

    Args:
        window: sliding window in tokens along a path, as in `prefdistill.data.tree.tree_mask`.
    """
    keys, values = _Gathered.apply(k, v, sequences.keys)
    out: Tensor = _kernel()(
        q.contiguous(),
        keys,
        values,
        sequences.query_ends,
        sequences.key_ends,
        sequences.longest_queries,
        sequences.longest_keys,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    return out


def _kernel() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn  # older PyTorch has none, or one without windows

    kernel: Callable[..., Any] = varlen_attn
    return kernel


class _Gathered(torch.autograd.Function):
    """Keys and values by their tokens; gradients of a prompt's, which many responses see, are summed in float32."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index)
        ctx.tokens = len(k)
        return k[index], v[index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        sums = (
            g.new_zeros((ctx.tokens, *g.shape[1:]), dtype=torch.float32).index_add_(0, index, g.float()) for g in grads
        )
        return *(s.to(g.dtype) for s, g in zip(sums, grads, strict=True)), None


@lru_cache(maxsize=32)
def works(device: torch.device, shape: tuple[int, int, int] = SHAPE) -> bool:
    """Whether the kernels give the truth here for heads of this shape; the log says why where they do not."""
    try:
        gap = _gap(device, shape)
    except (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        # An old PyTorch has no such kernels, an old GPU cannot run them: both say so in their own words.
        reason = words_of(error)
    else:
        if gap <= TOLERANCE:
            return True
        reason = f"off by {gap:.2g} of the values' size"
    logger.info("attention on %s without flash kernels, heads %s (%s)", device, shape, reason)
    return False


def _gap(device: torch.device, shape: tuple[int, int, int]) -> float:
    """How far the kernels' values and gradients are from those under dense masks in float32, by their own size."""
    heads, key_heads, d = shape
    places = [Place(0, 150, (70, 3)), Place(223, 1, (2, 1))]
    tokens, scale = places[-1].end, d**-0.5
    draw = torch.Generator().manual_seed(0)
    worst = 0.0
    # Asked for in the middle of a checkpointed layer, what is saved here is not that layer's.
    aside = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), torch.enable_grad(), aside:
        q, k, v, weights = (
            torch.randn(tokens, n, d, generator=draw).to(device, torch.bfloat16).requires_grad_()
            for n in (heads, key_heads, key_heads, heads)
        )
        for window in (None, 40):
            ours = attend(q, k, v, sequences_of(places, device), window, scale)
            truth = dense(q.float(), k.float(), v.float(), places, masks_of(places, window, device), scale)
            pairs = [(ours, truth)]
            pairs += zip(*(torch.autograd.grad((o * weights).sum(), (q, k, v)) for o in pairs[0]), strict=True)
            for mine, theirs in pairs:
                gap = (mine.float() - theirs.float()).abs().max() / theirs.float().pow(2).mean().sqrt()
                worst = max(worst, float(gap.detach().nan_to_num(float("inf"))))
    return worst


def masks_of(places: Sequence[Place], window: int | None, device: torch.device) -> list[Tensor]:
    """Every tree's mask, [1, 1, T, T], True = visible."""
    masks = []
    for place in places:
        segments = torch.cat([torch.full((n,), i) for i, n in enumerate((place.prompt, *place.responses))])
        order = torch.cat(
            [torch.arange(place.prompt), *(torch.arange(place.prompt, place.prompt + n) for n in place.responses)]
        )
        masks.append(tree_mask(segments[None], order[None], window=window).to(device))
    return masks


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Sequence[Place],
    masks: Sequence[Tensor],
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """What `attend` gives, in any precision: PyTorch's attention tree by tree, under `masks_of` these places."""
    share = q.shape[1] // k.shape[1]  # keys repeated: kernels that know masks know no shared heads
    k, v = (x.repeat_interleave(share, 1) if share > 1 else x for x in (k, v))
    parts = []
    for place, mask in zip(places, masks, strict=True):
        queries, keys, values = (x[place.start : place.end].transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale, dropout_p=dropout
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)
