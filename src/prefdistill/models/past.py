"""Keys and values of what was read: a prompt's stand once for all its samples, a sample's own behind them.

A decoded token attends in two parts, to its prompt, together with the prompt's other samples, and to its own response;
the two are put together by their sums of exponentials. So a step reads a prompt's keys once, copies none of them, and
repeats none for the query heads that share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KEPT = 0.75  # prompts leave once fewer of them than this have samples to draw: every leaving copies the others


@dataclass
class _Layer:
    """[prompts, key heads, longest prompt, d], of which `read` prompts are in, and [rows, key heads, room, d]."""

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor
    read: int = 0


class Past:
    """What the layers of a model remember of prompts and of the responses that go on from them, `samples` each.

    Rows are the samples that are still drawn, a prompt's beside each other; all have as many tokens.

    Args:
        lengths: tokens of the prompts.
        samples: responses a prompt.
        room: tokens that a response can have.
    """

    def __init__(self, lengths: Sequence[int], samples: int, room: int, device: torch.device) -> None:
        self.lengths = torch.tensor(lengths, device=device)
        self.samples = samples
        self.room = room
        self.tokens = 0  # of a response, that the layers hold
        self.reading: range | None = None  # prompts whose tokens go through the layers now
        self.prompt = torch.arange(len(lengths), device=device).repeat_interleave(samples)
        self.sample = torch.arange(samples, device=device).repeat(len(lengths))
        self._layers: dict[int, _Layer] = {}
        self._hidden: dict[int | None, Tensor | None] = {}

    @property
    def positions(self) -> Tensor:
        """[rows] position of the next token along its path."""
        return self.lengths[self.prompt] + self.tokens

    def read(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keeps a layer's keys and values of the prompts being read, [tokens, key heads, d], one after the other.

        Raises:
            ValueError: they are not those of these prompts, or not of those that come next in this layer.
        """
        now = self.reading or range(0)
        lengths = self.lengths[now.start : now.stop]
        if layer not in self._layers:
            self._layers[layer] = self._room_for(k)
        kept = self._layers[layer]
        if not now or len(k) != int(lengths.sum()) or kept.read != now.start:
            raise ValueError(f"{len(k)} keys of layer {layer} are not those of prompts of {lengths.tolist()}")
        kept.read = now.stop
        place = torch.arange(kept.prompt_keys.shape[2], device=k.device) < lengths[:, None]
        for held, x in ((kept.prompt_keys, k), (kept.prompt_values, v)):
            held[now.start : now.stop].transpose(1, 2)[place] = x

    def _room_for(self, x: Tensor) -> _Layer:
        heads, d = x.shape[1:]
        prompts = len(self.lengths), heads, int(self.lengths.max()), d
        rows = len(self.prompt), heads, self.room, d
        # Zeros: what is behind a shorter prompt is hidden, but must be numbers.
        return _Layer(x.new_zeros(prompts), x.new_zeros(prompts), x.new_empty(rows), x.new_empty(rows))

    def advance(self) -> None:
        """All layers have kept a token of every row."""
        self.tokens += 1
        self._hidden.clear()

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows alone, in order."""
        self.prompt, self.sample = self.prompt[rows], self.sample[rows]
        alive, self_of = torch.unique(self.prompt, return_inverse=True)
        fewer = len(alive) <= KEPT * len(self.lengths)
        for layer in self._layers.values():
            layer.keys, layer.values = (self._chosen(x, rows) for x in (layer.keys, layer.values))
            if fewer:
                layer.prompt_keys, layer.prompt_values = layer.prompt_keys[alive], layer.prompt_values[alive]
        if fewer:
            self.lengths, self.prompt = self.lengths[alive], self_of
        self._hidden.clear()

    def _chosen(self, x: Tensor, rows: Tensor) -> Tensor:
        out = x.new_empty(len(rows), *x.shape[1:])
        out[:, :, : self.tokens] = x[rows, :, : self.tokens]
        return out

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """Keeps a token of every row and lets it see what is before it: [rows, heads, d] from q [rows, heads, d].

        Args:
            k, v: the tokens' own keys and values, [rows, key heads, d].
            window: sliding window in tokens along a path.

        Raises:
            ValueError: the rows are others, or there is no room for more tokens.
        """
        kept, t = self._layers[layer], self.tokens
        if len(q) != len(self.prompt) or t >= self.room:
            raise ValueError(f"{len(q)} tokens do not continue {len(self.prompt)} rows of {t} tokens")
        kept.keys[:, :, t], kept.values[:, :, t] = k, v
        groups = k.shape[1]
        q = q.unflatten(1, (groups, -1))  # [rows, key heads, query heads of each, d]
        share = q.shape[2]
        slots = q.new_zeros(len(self.lengths), self.samples, *q.shape[1:])
        slots[self.prompt, self.sample] = q
        if window not in self._hidden:
            self._hidden[window] = self._hidden_from(window, kept.prompt_keys.shape[2])
        hidden = self._hidden[window]
        out, lse = _attention(slots.transpose(1, 2).flatten(2, 3), kept.prompt_keys, kept.prompt_values, scale, hidden)

        def of_rows(x: Tensor) -> Tensor:  # [prompts, key heads, samples * share, ...] -> [rows, key heads, share, ...]
            return x.unflatten(2, (self.samples, share)).transpose(1, 2)[self.prompt, self.sample]

        first = 0 if window is None else max(0, t + 1 - window)
        own, own_lse = _attention(q, kept.keys[:, :, first : t + 1], kept.values[:, :, first : t + 1], scale)
        weight = torch.sigmoid(of_rows(lse) - own_lse)[..., None]  # of the prompt's part
        return (weight * of_rows(out) + (1 - weight) * own).to(q.dtype).flatten(1, 2)

    def _hidden_from(self, window: int | None, width: int) -> Tensor | None:
        """[prompts, width], True = a key that the next tokens do not see; None where they see all."""
        place = torch.arange(width, device=self.lengths.device)
        hidden = place >= self.lengths[:, None]
        if window is not None:
            hidden |= place <= self.lengths[:, None] + self.tokens - window
        return hidden if bool(hidden.any()) else None


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(scale q k') v [B, heads, queries, d] and the logarithm of its sums [B, heads, queries], float32.

    Where a row's keys are all hidden [B, keys] the logarithm is -inf.
    """
    mask = None
    if hidden is not None:
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
        mask = mask[:, None, None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.contiguous(), k, v, 0.0, False, attn_mask=mask, scale=scale
    )
    if hidden is not None:
        lse = lse.masked_fill(hidden.all(1)[:, None, None], float("-inf"))
    return out, lse
