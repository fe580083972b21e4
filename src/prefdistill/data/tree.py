"""The tree batch: a prompt's tokens stand once, then every distinct response to it.

A response sees the prompt and itself only (a mask over segments) and its position ids go on where the prompt ended,
so that every token is computed once and what is read at a response equals the plain, one-sequence-at-a-time forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

PAD_SEGMENT = -1
PROMPT_SEGMENT = 0


@dataclass(frozen=True)
class Tree:
    """One prompt's ids and the ids of its distinct responses; neither may be empty."""

    prompt_ids: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("a tree needs a prompt of at least one token")
        if not self.responses or any(not r for r in self.responses):
            raise ValueError("a tree needs at least one response, each of at least one token")

    @property
    def tokens(self) -> int:
        """Tokens that must be computed: the prompt once, each response once."""
        return len(self.prompt_ids) + sum(len(r) for r in self.responses)


def shape_of(tree: Tree) -> str:
    """How a message calls a prompt that nobody named."""
    return f"{len(tree.prompt_ids)} tokens from {', '.join(map(str, tree.prompt_ids[:4]))} on"


@dataclass(frozen=True)
class Place:
    """Where a tree stands in a row: its first token, and the lengths of its prompt and of its responses."""

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + self.prompt + sum(self.responses)


@dataclass(frozen=True)
class TreeBatch:
    """Tensors of B rows; R responses in order of the trees; N response tokens in order of the responses.

    Attributes:
        input_ids: [B, T], right-padded.
        position_ids: [B, T]; a response's go on from the prompt's length.
        segments: [B, T]; 0 prompt, 1.. the row's responses, -1 padding.
        source: [N] flat index (into B * T) of the position that predicts each response token.
        target: [N] the response tokens.
        response_of: [N] the response that each token belongs to.
        last: [R] flat index of the position whose hidden state stands for the response in a reward head.
        kind: "packed" where one row holds all trees, one after the other, without padding; "tree" where every row is a
            tree; "plain" where every row is one prompt and one response (the fallback and the proof).
        places: where the trees of a packed row stand; () otherwise.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    source: Tensor
    target: Tensor
    response_of: Tensor
    last: Tensor
    kind: Literal["packed", "tree", "plain"] = "tree"
    places: tuple[Place, ...] = ()

    @property
    def responses(self) -> int:
        return int(self.last.shape[0])

    @property
    def tokens(self) -> int:
        """Tokens computed, padding left out."""
        return int((self.segments != PAD_SEGMENT).sum())

    def to(self, device: torch.device | str) -> TreeBatch:
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name not in ("kind", "places")}
        return replace(self, **moved)


def collate_trees(trees: Sequence[Tree], *, pad_id: int, pool_pad_id: int | None = None) -> TreeBatch:
    """One row a tree.

    Args:
        trees: the prompts with their responses.
        pad_id: id to pad rows with; never read.
        pool_pad_id: a reward model's `config.pad_token_id`: transformers pools at the last token that is not it, so
            `last` does too (None: the response's last token).
    """
    return _collate([[(t.prompt_ids, t.responses)] for t in trees], pad_id, pool_pad_id, "tree")


def collate_packed(trees: Sequence[Tree], *, pad_id: int, pool_pad_id: int | None = None) -> TreeBatch:
    """All trees in one row, no padding; who sees whom is told by `places`, as `tree_mask` knows one tree a row only."""
    return _collate([[(t.prompt_ids, t.responses) for t in trees]], pad_id, pool_pad_id, "packed")


def collate_plain(trees: Sequence[Tree], *, pad_id: int, pool_pad_id: int | None = None) -> TreeBatch:
    """One row a response, the prompt repeated; the same R and N as `collate_trees`."""
    rows = [[(t.prompt_ids, (r,))] for t in trees for r in t.responses]
    return _collate(rows, pad_id, pool_pad_id, "plain")


def _collate(
    rows: Sequence[Sequence[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]]],
    pad_id: int,
    pool_pad_id: int | None,
    kind: Literal["packed", "tree", "plain"],
) -> TreeBatch:
    if not rows or not rows[0]:
        raise ValueError("a batch needs at least one tree")
    width = max(sum(len(p) + sum(map(len, rs)) for p, rs in row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    position_ids = torch.zeros((len(rows), width), dtype=torch.long)
    segments = torch.full((len(rows), width), PAD_SEGMENT, dtype=torch.long)
    source: list[int] = []
    target: list[int] = []
    response_of: list[int] = []
    last: list[int] = []
    places: list[Place] = []
    for b, row in enumerate(rows):
        base, start = b * width, 0
        for prompt, responses in row:
            p = len(prompt)
            places.append(Place(start, p, tuple(map(len, responses))))
            root = slice(start, start + p)
            input_ids[b, root] = torch.tensor(prompt)
            position_ids[b, root] = torch.arange(p)
            segments[b, root] = PROMPT_SEGMENT
            end = base + start + p - 1  # of the prompt: it predicts every response's first token
            start += p
            for number, response in enumerate(responses, start=1):
                n = len(response)
                span = slice(start, start + n)
                input_ids[b, span] = torch.tensor(response)
                position_ids[b, span] = torch.arange(p, p + n)
                segments[b, span] = number
                source.extend([end, *range(base + start, base + start + n - 1)])
                target.extend(response)
                response_of.extend([len(last)] * n)
                last.append(_pool_position(prompt, response, end - p + 1, base + start, pool_pad_id))
                start += n
    return TreeBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        segments=segments,
        source=torch.tensor(source),
        target=torch.tensor(target),
        response_of=torch.tensor(response_of),
        last=torch.tensor(last),
        kind=kind,
        places=tuple(places) if kind == "packed" else (),
    )


def _pool_position(
    prompt: tuple[int, ...], response: tuple[int, ...], root: int, start: int, pool_pad_id: int | None
) -> int:
    """Flat index of the last token that is not the pad token; `root` and `start` are those of prompt and response."""
    for i in range(len(response) - 1, -1, -1):
        if response[i] != pool_pad_id:
            return start + i
    for i in range(len(prompt) - 1, -1, -1):
        if prompt[i] != pool_pad_id:
            return root + i
    return root


def tree_mask(segments: Tensor, position_ids: Tensor, *, window: int | None = None) -> Tensor:
    """Which key each query may see: [B, 1, T, T], True = visible.

    Args:
        segments: [B, T], as in `TreeBatch`.
        position_ids: [B, T], as in `TreeBatch`.
        window: sliding window in tokens along a path (a key at distance < window is visible); None for full attention.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    order = torch.arange(segments.shape[1], device=segments.device)
    visible = (order[:, None] >= order[None, :]) & ((key == PROMPT_SEGMENT) | (key == query)) & (key != PAD_SEGMENT)
    if window is not None:
        visible &= position_ids[:, :, None] - position_ids[:, None, :] < window
    # Padding sees itself, or its softmax would be over nothing and give NaN.
    visible |= torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device)
    return visible[:, None]


class HasTokens(Protocol):
    """A tree, or what stands for one."""

    @property
    def tokens(self) -> int: ...


def batches_by_tokens(trees: Sequence[HasTokens], token_budget: int) -> list[list[int]]:
    """Indices of trees, longest first, in batches whose padded size is at most `token_budget` tokens.

    A tree longer than the budget stands alone. Longest first, so that a budget too large for memory fails at once.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}; it must be at least 1")
    batches: list[list[int]] = []
    width = 0
    for i in sorted(range(len(trees)), key=lambda i: (-trees[i].tokens, i)):
        if batches and (len(batches[-1]) + 1) * width <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            width = trees[i].tokens
    return batches
