"""Log-probs of response tokens from hidden states, the logits never in memory as a whole.

The head runs at response positions only, some hundred of them at a time; a backward pass computes a piece's logits
again. A plain linear head has its gradient written out here, over two buffers that are reused; any other head (an
adapter on it, a quantised one) is asked piece by piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Logits in memory at a time: 128 MiB of them in float32.
LOGITS_AT_ONCE = 2**25


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
    if _is_plain(head) and hidden.dtype != torch.float64:
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        found: Tensor = _LinearLogps.apply(hidden, head.weight, head.bias, targets, scaling, dtype)
        return found
    parts = []
    vocabulary = int(getattr(head, "out_features", None) or head.weight.shape[0])
    for rows in _pieces(len(targets), vocabulary):
        h, t = hidden[rows], targets[rows]
        if torch.is_grad_enabled():
            parts.append(checkpoint(_asked, head, scaling, h, t, use_reentrant=False))
        else:
            parts.append(_asked(head, scaling, h, t))
    return torch.cat(parts)


def _is_plain(head: nn.Module) -> bool:
    """Whether a head is its weights and nothing else; wrappers (FSDP, adapters) and hooks want to be called."""
    return type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)


def _asked(head: nn.Module, scaling: Scaling, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = scaling(head(hidden).float())
    return logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, dim=1)


def _pieces(n: int, vocabulary: int) -> list[slice]:
    """Rows in pieces of about one size, none with more logits than LOGITS_AT_ONCE."""
    count = -(-n // max(1, LOGITS_AT_ONCE // vocabulary))
    size = -(-n // count)
    return [slice(i, min(n, i + size)) for i in range(0, n, size)]


class _LinearLogps(torch.autograd.Function):
    """A linear head's log-probs; products in `dtype`, softmax and sums of gradients in float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scaling: Scaling, dtype: Any
    ) -> Tensor:
        w = weight.to(dtype)
        h = hidden.to(dtype)
        out = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for rows in _pieces(len(targets), len(weight)):
            logits = scaling(_logits(h[rows], w, bias))
            picked = logits.gather(1, targets[rows, None])[:, 0]
            out[rows] = picked - torch.logsumexp(logits, dim=1)
        ctx.save_for_backward(hidden, weight, bias, targets)
        # Cast once a step: the backward pass reads the same copy.
        ctx.cast, ctx.scaling = (h, w), scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        (h, w), scaling = ctx.cast, ctx.scaling
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if to_hidden else None
        d_weight: Tensor | None = None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if to_bias else None
        for rows in _pieces(len(targets), len(weight)):
            logits = scaling(_logits(h[rows], w, bias))
            slope = None if scaling.cap is None else 1 - (logits / scaling.cap).square()
            g = grad[rows, None]
            # d log p_t / d logit_j = 1[j = t] - p_j
            d = torch.softmax(logits, dim=1).mul_(-g)
            d.scatter_add_(1, targets[rows, None], g)
            if slope is not None:
                d.mul_(slope)
            if scaling.factor != 1.0:
                d.mul_(scaling.factor)
            cast = d.to(h.dtype)
            if d_hidden is not None:
                d_hidden[rows] = (cast @ w).to(hidden.dtype)
            if to_weight:
                piece = (cast.T @ h[rows]).to(weight.dtype)
                d_weight = piece if d_weight is None else d_weight.add_(piece)
            if d_bias is not None:
                d_bias += d.sum(0)
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype), None, None, None


def _logits(h: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Unscaled logits in float32, whatever the products were in."""
    with torch.autocast(h.device.type, enabled=False):
        return nn.functional.linear(h, w, None if bias is None else bias.to(w.dtype)).float()
