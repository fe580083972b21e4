"""The data set as three tables: prompts, distinct responses, and pairs that index the responses.

A response that stands in several pairs stands here once. Columns that later stages compute (reference log-probs,
rewards, features) are kept a response, under a key of its token ids.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np

from prefdistill.data.checks import short
from prefdistill.data.formats import Text
from prefdistill.data.on_disk import View
from prefdistill.data.tree import Tree

NAME_LENGTH = 60
SPLITS = ("train", "validation", "judge", "test")


@dataclass(frozen=True)
class Response:
    """A distinct response.

    Attributes:
        text, ids: as a person and as a model reads it; unfinished ones have no end token.
        source: where it came from first, "data" or "reference".
        drawn: how often it was drawn from the reference: a likely response counts as often in forward KL.
        given: its rewards, one for each member, where the data gives them.
    """

    text: Text
    ids: tuple[int, ...]
    finished: bool = True
    source: str = "data"
    drawn: int = 0
    given: tuple[float, ...] = ()


@dataclass
class PromptGroup:
    """A prompt with its distinct responses and the pairs (chosen, rejected) over them."""

    prompt: Text
    ids: tuple[int, ...]
    split: str
    extra: dict[str, Any]
    cut: int = 0
    responses: list[Response] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)  # where each pair stands in the data, without the folder

    @property
    def tree(self) -> Tree:
        return Tree(self.ids, tuple(r.ids for r in self.responses))

    @property
    def name(self) -> str:
        """How a message calls the prompt: its first and last words, in quotes, and its first row in the data."""
        more = f" and {len(self.rows) - 1} more" if len(self.rows) > 1 else ""
        return shorten(prompt_text(self.prompt)) + (f" ({self.rows[0]}{more})" if self.rows else "")

    @property
    def keys(self) -> list[str]:
        return [response_key(self.ids, r.ids) for r in self.responses]

    def place(self, response: Response) -> int:
        """Index of this response, added if it is new. Responses are one if their ids are."""
        for i, known in enumerate(self.responses):
            if known.ids == response.ids:
                return i
        self.responses.append(response)
        return len(self.responses) - 1


def shorten(text: str) -> str:
    """A text's first and last words, in quotes, as messages show them: many prompts begin, or end, alike."""
    return json.dumps(short(" ".join(text.split()), NAME_LENGTH), ensure_ascii=False)


class Groups(Sequence[PromptGroup]):
    """Prompts, which may lie on disk, and their splits, which are known without reading them.

    An item is made anew at every access: to change one changes nothing here.
    """

    def __init__(self, items: Sequence[PromptGroup], splits: Sequence[str]) -> None:
        self._items, self.splits = items, splits

    def __len__(self) -> int:
        return len(self.splits)

    @overload
    def __getitem__(self, i: int) -> PromptGroup: ...
    @overload
    def __getitem__(self, i: slice) -> Groups: ...
    def __getitem__(self, i: int | slice) -> PromptGroup | Groups:
        return self.at(range(len(self))[i]) if isinstance(i, slice) else self._items[i]

    def __iter__(self) -> Iterator[PromptGroup]:
        return iter(self._items)

    def at(self, indices: Sequence[int]) -> Groups:
        """Those at these places, in their order."""
        return Groups(View(self._items, lambda group: group, indices), [self.splits[i] for i in indices])

    def places(self, *splits: str) -> list[int]:
        """Where the prompts of these splits stand."""
        return [i for i, split in enumerate(self.splits) if split in splits]

    def of(self, *splits: str) -> Groups:
        return self.at(self.places(*splits))

    @property
    def trees(self) -> Sequence[Tree]:
        """Every prompt's tree, in order."""
        return View(self, lambda group: group.tree)


def in_memory(groups: Sequence[PromptGroup]) -> Groups:
    return Groups(groups, [g.split for g in groups])


def response_key(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """A key of what a model is given: 16 bytes of BLAKE2 over prompt and response ids, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(struct.pack(f"<q{len(prompt_ids)}q", len(prompt_ids), *prompt_ids))
    digest.update(struct.pack(f"<{len(response_ids)}q", *response_ids))
    return digest.hexdigest()


def text_key(text: Text) -> str:
    return json.dumps(text, ensure_ascii=False, sort_keys=True)


def prompt_key(prompt: Text) -> bytes:
    """What a prompt is found by: 16 bytes of BLAKE2 over its text."""
    return hashlib.blake2b(text_key(prompt).encode(), digest_size=16).digest()


def add_drawn(group: PromptGroup, responses: Iterable[Response]) -> None:
    """Joins responses drawn from the reference: they are scored and distilled, no label names them."""
    for response in responses:
        i = group.place(response)
        group.responses[i] = replace(group.responses[i], drawn=group.responses[i].drawn + 1)


def plain_text(text: Text) -> str:
    """What a person reads of a response: the text itself, or the messages' contents."""
    return text if isinstance(text, str) else "\n".join(str(m["content"]) for m in text)


def prompt_text(prompt: Text) -> str:
    """What an encoder reads of a prompt: the text itself, or the messages' contents, one below the other."""
    return prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt)


def conversation_text(prompt: Text) -> str:
    """What a person or a language model reads of a prompt: as `prompt_text`, each of several turns with its role.

    A user's only message, and a text, stand as they are.
    """
    if isinstance(prompt, str) or [m["role"] for m in prompt] == ["user"]:
        return prompt_text(prompt)
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in prompt)


def response_lengths(group: PromptGroup) -> np.ndarray:
    """Tokens of each response, end token included."""
    return np.array([len(r.ids) for r in group.responses])
