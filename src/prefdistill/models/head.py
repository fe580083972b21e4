"""Log-probs of response tokens from hidden states, the logits never in memory as a whole.

The head runs at response positions only; a backward pass computes logits again, but for few in float32 on a CPU.
A plain linear head goes over some positions and some of the vocabulary at a time, a piece that stays in a CPU's cache,
and its gradient is written out here; any other head (an adapter on it, a quantised one) is asked for all logits of some
positions at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Logits in memory at a time: 128 MiB of them in float32.
LOGITS_AT_ONCE = 2**25
# Positions and words of a piece of a plain head: 8 MiB of logits on a CPU; elsewhere as large as they may be.
ON_CPU = (2**9, 2**12)
ELSEWHERE = (2**11, 2**14)


@dataclass(frozen=True)
class Scaling:
    """What a family does to its logits: times `factor`, then softly capped at `cap`.

    Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, Gemma caps at `final_logit_softcapping`.
    """

    factor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Scaling:
        """The scaling that a configuration of transformers asks for."""
        factor = 1.0
        if getattr(config, "logits_scaling", None) is not None:
            factor /= config.logits_scaling
        if getattr(config, "logit_scale", None) is not None:
            factor *= config.logit_scale
        return cls(factor, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        """Scaled logits; writes over its argument where it can."""
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


def head_logps(head: Any, scaling: Scaling, hidden: Tensor, targets: Tensor) -> Tensor:
    """log softmax(scaling(head(hidden)))[target], [N] float32.

    Args:
        head: maps [N, H] to logits [N, V].
        hidden: [N, H].
        targets: [N].
    """
    if len(targets) == 0:
        return hidden.sum(1).float()  # [0], with a gradient if they have one
    if _is_plain(head) and hidden.dtype != torch.float64:
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        # In float32 a CPU reads logits sooner than it computes them again.
        few = len(targets) * len(head.weight) <= LOGITS_AT_ONCE
        keep = torch.is_grad_enabled() and few and dtype == torch.float32 and hidden.device.type == "cpu"
        found: Tensor = _LinearLogps.apply(hidden, head.weight, head.bias, targets, scaling, dtype, keep)
        return found
    parts = []
    vocabulary = int(getattr(head, "out_features", None) or head.weight.shape[0])
    for rows in _pieces(len(targets), LOGITS_AT_ONCE // vocabulary):
        h, t = hidden[rows], targets[rows]
        if torch.is_grad_enabled():
            parts.append(checkpoint(_asked, head, scaling, h, t, use_reentrant=False))
        else:
            parts.append(_asked(head, scaling, h, t))
    return torch.cat(parts)


def _is_plain(head: nn.Module) -> bool:
    """Whether a head is its weights and nothing else; wrappers, adapters, offloading and hooks want a call."""
    hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
    return type(head) is nn.Linear and not hooks and "forward" not in vars(head)


def _asked(head: nn.Module, scaling: Scaling, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = scaling(head(hidden).float())
    return logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, dim=1)


def _pieces(n: int, most: int) -> list[slice]:
    """Rows in pieces of about one size, none with more than `most`."""
    count = -(-n // max(1, most))
    size = -(-n // count)
    return [slice(i, min(n, i + size)) for i in range(0, n, size)]


class _LinearLogps(torch.autograd.Function):
    """A linear head's log-probs; products in `dtype`, softmax and sums of gradients in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scaling: Scaling,
        dtype: torch.dtype,
        keep: bool,
    ) -> Tensor:
        w, h = weight.to(dtype), hidden.to(dtype)
        picked = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        sums = picked.new_empty(len(targets))
        kept: dict[tuple[int, int], Tensor] = {}
        rows_most, words_most = _piece(hidden)
        for rows in _pieces(len(targets), rows_most):
            parts = []
            # Of a size that does not hang on the batch: a row's sum is added up in the same order in every batch.
            for words in _slices(len(weight), words_most):
                logits = scaling(_logits(h[rows], w, bias, words))
                here, place = _places(targets[rows], words)
                picked[rows] = torch.where(here, logits.gather(1, place)[:, 0], picked[rows])
                parts.append(torch.logsumexp(logits, dim=1))
                if keep:
                    kept[rows.start, words.start] = logits
            sums[rows] = torch.logsumexp(torch.stack(parts), dim=0)
        ctx.save_for_backward(hidden, weight, bias, targets, sums)
        # Cast once a step: the backward pass reads the same copy.
        ctx.cast, ctx.scaling, ctx.kept = (h, w), scaling, kept
        return picked - sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, sums = ctx.saved_tensors
        (h, w), scaling = ctx.cast, ctx.scaling
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        # Sums over pieces are float32's whatever the weights are.
        d_hidden = torch.empty_like(hidden, dtype=torch.float32) if to_hidden else None
        d_weight = torch.empty_like(weight) if to_weight else None
        d_bias = torch.empty_like(bias, dtype=torch.float32) if to_bias else None
        rows_most, words_most = _piece(hidden)
        pieces = _pieces(len(targets), rows_most)
        for words in _slices(len(weight), words_most):
            d_words = None
            if d_weight is not None:
                d_words = d_weight[words]
                if d_weight.dtype != torch.float32:
                    d_words = torch.empty_like(d_words, dtype=torch.float32)
            for rows in pieces:
                logits = ctx.kept.get((rows.start, words.start))
                if logits is None:
                    logits = scaling(_logits(h[rows], w, bias, words))
                slope = None if scaling.cap is None else 1 - (logits / scaling.cap).square()
                g = grad[rows, None]
                # d log p_t / d logit_j = 1[j = t] - p_j
                d = (logits - sums[rows, None]).exp_().mul_(-g)
                here, place = _places(targets[rows], words)
                d.scatter_add_(1, place, torch.where(here[:, None], g, 0.0))
                if slope is not None:
                    d.mul_(slope)
                if scaling.factor != 1.0:
                    d.mul_(scaling.factor)
                cast = d.to(h.dtype)
                if d_hidden is not None:
                    _sum_up(d_hidden, rows, cast @ w[words], first=words.start == 0)
                if d_words is not None:
                    _sum_up(d_words, slice(None), cast.T @ h[rows], first=rows.start == 0)
                if d_bias is not None:
                    _sum_up(d_bias, words, d.sum(0), first=rows.start == 0)
            if d_words is not None and d_weight is not None and d_weight.dtype != torch.float32:
                d_weight[words] = d_words
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            d_weight,
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _sum_up(total: Tensor, at: slice, part: Tensor, *, first: bool) -> None:
    if first:
        total[at] = part
    else:
        total[at] += part


def _piece(hidden: Tensor) -> tuple[int, int]:
    """Positions and words of a piece, at most."""
    return ON_CPU if hidden.device.type == "cpu" else ELSEWHERE


def _slices(n: int, size: int) -> list[slice]:
    return [slice(i, min(n, i + size)) for i in range(0, n, size)]


def _places(targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Which targets are among these words [N], and their places there [N, 1] (of others any)."""
    place = targets - words.start
    size = words.stop - words.start
    return (place >= 0) & (place < size), place.clamp(0, size - 1)[:, None]


def _logits(h: Tensor, w: Tensor, bias: Tensor | None, words: slice) -> Tensor:
    """Unscaled logits of some words in float32, whatever the products were in."""
    with torch.autocast(h.device.type, enabled=False):
        return nn.functional.linear(h, w[words], None if bias is None else bias[words].to(w.dtype)).float()
