"""Several responses a prompt, token by token: prompts are read once, and rows that are finished leave.

On a CPU, models whose trees are packed keep a prompt's keys once for all its samples (past.py). Whether a model
decodes so what it decodes by transformers' cache is measured with a few tokens before; where it does not, that cache
does it, with the prompt's keys repeated.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn

from prefdistill.data.checks import words_of
from prefdistill.data.tree import Place
from prefdistill.models.backbone import REFUSALS, device_of, tolerance_of, unwrap
from prefdistill.models.forward import TreeModel, small_window
from prefdistill.models.past import Past

logger = logging.getLogger(__name__)

READ_TOKENS = 4096  # of prompts at once: more was no faster, and what is held meanwhile grows with them
PROBE_STEPS = ((0, 2, 3), (1, 2), (0, 1))  # rows that go on, of four: one leaves, then a whole prompt, then none


class Decoding(Protocol):
    """Responses under way.

    Attributes:
        logits: [rows, vocabulary], of every row's next token.
    """

    logits: Tensor

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows alone, in order; `logits` are those of the token before."""

    def next(self, tokens: Tensor) -> None:
        """Every row's next token, [rows]; `logits` are then those of the one after it."""


@dataclass(frozen=True)
class Decoder:
    """How a model decodes.

    Attributes:
        start: (prompts, samples of each, tokens of a response) -> their responses under way; a prompt's samples are
            rows beside each other.
        shares: whether a prompt's keys stand once for its samples.
    """

    start: Callable[[Sequence[Sequence[int]], int, int], Decoding]
    shares: bool

    def held(self, prompt: int, samples: int, room: int) -> int:
        """Tokens whose keys are held for a prompt of so many and its responses."""
        return (prompt if self.shares else samples * prompt) + samples * room


def decoder(model: nn.Module) -> Decoder:
    """How this model decodes, which must be in evaluation mode."""
    core = unwrap(model)
    if device_of(model).type == "cpu":
        try:
            tree = TreeModel(model, path="packed")
            reason = _mismatch_once(tree)
        except REFUSALS as error:
            reason = words_of(error)
        if reason is None:
            return Decoder(lambda prompts, samples, room: _Shared(tree, prompts, samples, room), shares=True)
        logger.info("%s decodes by transformers' cache (%s)", type(core).__name__, reason)
    return Decoder(lambda prompts, samples, room: _Repeated(core, prompts, samples), shares=False)


class _Shared:
    """By `Past`; no prompt is padded while it is read."""

    def __init__(self, tree: TreeModel, prompts: Sequence[Sequence[int]], samples: int, room: int) -> None:
        self.tree, self.device = tree, device_of(tree.model)
        lengths = [len(p) for p in prompts]
        self.past = Past(lengths, samples, room - 1, self.device)  # nothing goes on from the last token
        ends = [self._read(prompts, part) for part in _parts(lengths)]
        self.logits = torch.cat(ends).repeat_interleave(samples, 0)

    def _read(self, prompts: Sequence[Sequence[int]], part: range) -> Tensor:
        """These prompts through the model; the logits behind each."""
        read = [prompts[i] for i in part]
        lengths = [len(p) for p in read]
        ends = torch.tensor(lengths, device=self.device).cumsum(0)
        places = [Place(int(end) - n, n, ()) for end, n in zip(ends, lengths, strict=True)]
        ids = torch.tensor([i for p in read for i in p], device=self.device)
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths])
        self.past.reading = part
        logits = self._run(ids, positions, places, ends - 1)
        self.past.reading = None
        return logits

    def keep(self, rows: Tensor) -> None:
        self.past.keep(rows)

    def next(self, tokens: Tensor) -> None:
        self.logits = self._run(tokens, self.past.positions, (), 0)
        self.past.advance()

    def _run(self, ids: Tensor, positions: Tensor, places: Sequence[Place], wanted: Tensor | int) -> Tensor:
        out = self.tree.core(
            input_ids=ids[None],
            attention_mask=self.tree.carriers(places, self.past),
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=wanted,
        )
        logits: Tensor = out.logits[0]
        return logits


def _parts(lengths: Sequence[int]) -> list[range]:
    """Prompts beside each other that are read at once: READ_TOKENS, or one that is longer."""
    parts, start, held = [], 0, 0
    for i, n in enumerate(lengths):
        if i > start and held + n > READ_TOKENS:
            parts.append(range(start, i))
            start, held = i, 0
        held += n
    return [*parts, range(start, len(lengths))]


class _Repeated:
    """By transformers' cache: prompts are padded at their left, and their keys repeated for their samples."""

    def __init__(self, core: Any, prompts: Sequence[Sequence[int]], samples: int) -> None:
        self.core = core
        device, width = device_of(core), max(map(len, prompts))
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for b, prompt in enumerate(prompts):
            ids[b, width - len(prompt) :] = torch.tensor(prompt)
            mask[b, width - len(prompt) :] = 1
        self.mask = mask.to(device)
        self.cache = transformers.DynamicCache(config=core.config)
        named = "cache" in inspect.signature(core.forward).parameters  # transformers' newer name for it
        self.given = {"cache" if named else "past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        self.logits = self._run(ids.to(device), (self.mask.cumsum(1) - 1).clamp_min(0))
        if samples > 1:
            self.cache.batch_repeat_interleave(samples)
            self.logits, self.mask = (x.repeat_interleave(samples, 0) for x in (self.logits, self.mask))

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def next(self, tokens: Tensor) -> None:
        positions = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(self.mask), 1))], 1)
        self.logits = self._run(tokens[:, None], positions)

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        out = self.core(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            **self.given,
        )
        logits: Tensor = out.logits[:, -1]
        return logits


_KNOWN: dict[tuple[type | str, ...], str | None] = {}


def _mismatch_once(tree: TreeModel) -> str | None:
    """`_mismatch`, asked once for all models of an architecture, configuration and kinds of numbers."""
    kinds = sorted({str(p.dtype) for p in tree.model.parameters()})
    key = type(tree.core), tree.core.config.to_json_string(), *kinds
    if key not in _KNOWN:
        _KNOWN[key] = _mismatch(tree)
    return _KNOWN[key]


def _mismatch(tree: TreeModel) -> str | None:
    """Why shared keys do not decode what transformers' cache decodes, or None if they do."""
    v = int(tree.config.vocab_size)
    ids = [(7 * i + 3) % v for i in range(24)]
    prompts = (ids[:9], ids[9:11])
    try:
        with torch.no_grad(), small_window(tree.config):
            ours = _followed(_Shared(tree, prompts, 2, len(PROBE_STEPS) + 1), ids[11:])
            truth = _followed(_Repeated(tree.core, prompts, 2), ids[11:])
    except REFUSALS as error:
        return words_of(error)
    worst = float((ours - truth).abs().max() / truth.pow(2).mean().sqrt().clamp_min(1e-6))
    return None if worst <= tolerance_of(tree.model) else f"off by {worst:.2g} of the logits' size"


def _followed(decoding: Decoding, ids: Sequence[int]) -> Tensor:
    """The logits of all steps of the probe, [rows of all steps, vocabulary]."""
    found = [decoding.logits.float()]
    for step, rows in enumerate(PROBE_STEPS):
        kept = torch.tensor(rows, device=decoding.logits.device)
        if len(rows) < len(decoding.logits):
            decoding.keep(kept)
        decoding.next(torch.tensor([ids[step + i] for i in rows], device=kept.device))
        found.append(decoding.logits.float())
    return torch.cat(found)
