"""The data set as three tables: prompts, distinct responses, and pairs that index the responses.

A response that stands in several pairs stands here once. Columns that later stages compute (reference log-probs,
rewards, features) are kept a response, under a key of its token ids.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefdistill.atomic import fresh_file
from prefdistill.data.formats import Pair, Text
from prefdistill.data.given import GivenRewards
from prefdistill.data.tokenise import Encoder
from prefdistill.data.tree import Tree
from prefdistill.errors import DataError

TABLE_FORMAT = 2  # of the files of `write_groups`; a change makes those of earlier versions stale
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

    @property
    def tree(self) -> Tree:
        return Tree(self.ids, tuple(r.ids for r in self.responses))

    @property
    def name(self) -> str:
        """How a message calls the prompt: its first words, in quotes."""
        text = " ".join(prompt_text(self.prompt).split())
        return json.dumps(text if len(text) <= NAME_LENGTH else text[:NAME_LENGTH] + "...", ensure_ascii=False)

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


@dataclass(frozen=True)
class Dropped:
    """What encoding left out or cut, for the log and the report."""

    pairs_too_long: int
    prompts_cut: int
    same_tokens: int


def response_key(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """A key of what a model is given: 16 bytes of BLAKE2 over prompt and response ids, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(struct.pack(f"<q{len(prompt_ids)}q", len(prompt_ids), *prompt_ids))
    digest.update(struct.pack(f"<{len(response_ids)}q", *response_ids))
    return digest.hexdigest()


def text_key(text: Text) -> str:
    return json.dumps(text, ensure_ascii=False, sort_keys=True)


def group_pairs(
    pairs: Iterable[Pair],
    encoder: Encoder,
    *,
    splits: dict[str, str],
    on_bad: Callable[[str, DataError], None] | None = None,
    given: str | None = None,
) -> tuple[list[PromptGroup], Dropped]:
    """Pairs to prompt groups in the order of first appearance; pairs with a response too long are dropped, counted.

    Prompts that are the same to the model, cut ones that differ only where they were cut, make one group in one split.

    Args:
        splits: prompt key (`text_key`) -> split.
        on_bad: told of a pair that cannot be encoded, which is then left out; None raises.
        given: rewards are read from the columns `given`_chosen and `given`_rejected.

    Raises:
        DataError: a pair cannot be encoded, a response has an end token in its middle, where a policy would stop, or
            its given rewards are not finite, not as many as others', or not those of another row.
    """
    groups: dict[tuple[bool, tuple[int, ...]], PromptGroup] = {}
    group_of: dict[str, PromptGroup] = {}
    too_long = same = 0
    rewards = GivenRewards(given) if given is not None else None
    for pair in pairs:
        try:
            chosen = encoder.response_ids(pair.prompt, pair.chosen)
            rejected = encoder.response_ids(pair.prompt, pair.rejected)
            key = text_key(pair.prompt)
            if key not in group_of:
                encoded = encoder.prompt_ids(pair.prompt)
                new = PromptGroup(pair.prompt, encoded.ids, splits[key], dict(pair.extra), encoded.cut)
                group_of[key] = groups.setdefault((isinstance(pair.prompt, str), encoded.ids), new)
            for name, ids in (("chosen", chosen), ("rejected", rejected)):
                _check_ends(name, ids or (), encoder)
            of_pair = rewards.of(pair) if rewards is not None else ((), ())
            if rewards is not None and chosen is not None and rejected is not None:
                for ids, values in zip((chosen, rejected), of_pair, strict=True):
                    rewards.check_same(group_of[key].ids, ids, values, pair.where)
        except DataError as error:
            if on_bad is None:
                raise DataError(f"{pair.where}: {error}") from error
            on_bad(pair.where, error)
            continue
        if chosen is None or rejected is None:
            too_long += 1
            continue
        if chosen == rejected:
            same += 1
            continue
        group = group_of[key]
        both = ((pair.chosen, chosen, of_pair[0]), (pair.rejected, rejected, of_pair[1]))
        first, second = (group.place(Response(text, ids, given=values)) for text, ids, values in both)
        group.pairs.append((first, second))
    kept = [g for g in groups.values() if g.pairs]
    return kept, Dropped(too_long, sum(g.cut > 0 for g in kept), same)


def _check_ends(name: str, ids: Sequence[int], encoder: Encoder) -> None:
    inside = [i for i in ids[:-1] if i in encoder.end_ids]
    if inside:
        raise DataError(
            f"column {name!r}: the text holds the end token {encoder.tokenizer.decode(inside[:1])!r}, where a policy "
            "would stop; take it out of the text, or drop such rows with dataset.on_bad_row: drop"
        )


def assign_splits(pairs: Sequence[Pair], fractions: dict[str, float], seed: int) -> dict[str, str]:
    """Prompt key -> split: the row's own `split` column where it names one, else drawn by prompt, seeded.

    Splits that are asked for and that no row names are drawn from the prompts that are left to train on: TL;DR's rows,
    for one, all say "train".

    Args:
        fractions: split -> its share of the prompts that it is drawn from; at least one prompt if above 0.

    Raises:
        DataError: no prompt is left to train on, a prompt stands in two splits, or only some rows name their split.
    """
    own: dict[str, str] = {}
    keys: dict[str, None] = {}
    unnamed: Pair | None = None
    for pair in pairs:
        key = text_key(pair.prompt)
        keys[key] = None
        given = pair.extra.get("split")
        if given not in SPLITS:
            unnamed = unnamed or pair
        elif own.setdefault(key, given) != given:
            raise DataError(
                f"{pair.where}: its prompt stands in the split {own[key]!r} and in {given!r}; a prompt must be in "
                "one split only, or the evaluation would be on training data"
            )
    if own and unnamed is not None:
        raise DataError(
            f"{unnamed.where}: column 'split' is {unnamed.extra.get('split')!r} while other rows name one; use one of "
            f"{', '.join(SPLITS)} in every row, or leave the column out"
        )
    out = {key: split for key, split in own.items() if split != "train"}
    free = [key for key in keys if key not in out]
    order = sorted(free, key=lambda k: hashlib.blake2b(f"{seed}:{k}".encode(), digest_size=8).digest())
    start = 0
    for name in ("test", "judge", "validation"):
        share = fractions.get(name, 0.0)
        if share > 0 and name not in own.values():
            count = max(1, round(share * len(order)))
            out.update(dict.fromkeys(order[start : start + count], name))
            start += count
    if start >= len(order):
        raise DataError(
            f"{len(keys)} prompts, {len(order)} of them free for training, are too few for the splits {fractions}: "
            "none is left to train on; give more data, or leave the column 'split' out if there is one"
        )
    out.update(dict.fromkeys(order[start:], "train"))
    return out


def add_drawn(group: PromptGroup, responses: Iterable[Response]) -> None:
    """Joins responses drawn from the reference: they are scored and distilled, no label names them."""
    for response in responses:
        i = group.place(response)
        group.responses[i] = replace(group.responses[i], drawn=group.responses[i].drawn + 1)


# -- files ---------------------------------------------------------------------------------------------------------

_RESPONSE = pa.struct(
    [
        ("text", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("finished", pa.bool_()),
        ("source", pa.string()),
        ("drawn", pa.int32()),
        ("given", pa.list_(pa.float64())),
    ]
)
_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("split", pa.string()),
        ("cut", pa.int32()),
        ("extra", pa.string()),
        ("responses", pa.list_(_RESPONSE)),
        ("pairs", pa.list_(pa.list_(pa.int32()))),
    ]
)


def write_groups(path: Path, groups: Sequence[PromptGroup], metadata: dict[str, str] | None = None) -> None:
    """One row a prompt; texts and extra columns as JSON, so that chat messages and plain text go the same way."""
    rows = [
        {
            "prompt": text_key(g.prompt),
            "ids": list(g.ids),
            "split": g.split,
            "cut": g.cut,
            "extra": json.dumps(g.extra, ensure_ascii=False, default=str),
            "responses": [
                {
                    "text": text_key(r.text),
                    "ids": list(r.ids),
                    "finished": r.finished,
                    "source": r.source,
                    "drawn": r.drawn,
                    "given": list(r.given),
                }
                for r in g.responses
            ],
            "pairs": [list(p) for p in g.pairs],
        }
        for g in groups
    ]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata(metadata or {}))
    with fresh_file(path) as part:
        pq.write_table(table, part, compression="zstd")


def write_scored(
    path: Path, groups: Sequence[PromptGroup], logps: Sequence[np.ndarray], rewards: Sequence[Sequence[np.ndarray]]
) -> None:
    """The labelled pairs with their columns, one row a pair, under TRL's names where TRL has one.

    Args:
        logps: [group] -> [R] reference log-probs.
        rewards: [K][group] -> [R].
    """
    # A Parquet column has one type: where some prompts are texts and others chats, both are written as JSON.
    one_form = len({isinstance(g.prompt, str) for g in groups}) == 1
    shape: Callable[[Text], Any] = _for_trl if one_form else text_key
    rows = [
        {
            "prompt": shape(g.prompt),
            "chosen": shape(g.responses[c].text),
            "rejected": shape(g.responses[r].text),
            "split": g.split,
            "ref_chosen_logps": float(logps[i][c]),
            "ref_rejected_logps": float(logps[i][r]),
            "rewards_chosen": [float(member[i][c]) for member in rewards],
            "rewards_rejected": [float(member[i][r]) for member in rewards],
        }
        for i, g in enumerate(groups)
        for c, r in g.pairs
    ]
    with fresh_file(path) as part:
        pq.write_table(pa.Table.from_pylist(rows), part, compression="zstd")


def _for_trl(text: Text) -> Any:
    """Chat messages with role and content alone, so that all rows have one type."""
    return text if isinstance(text, str) else [{"role": m["role"], "content": m["content"]} for m in text]


def read_groups(path: Path) -> list[PromptGroup]:
    groups = []
    for row in pq.read_table(path).to_pylist():
        groups.append(
            PromptGroup(
                json.loads(row["prompt"]),
                tuple(row["ids"]),
                row["split"],
                json.loads(row["extra"]),
                row["cut"],
                [
                    Response(
                        json.loads(r["text"]),
                        tuple(r["ids"]),
                        r["finished"],
                        r["source"],
                        r["drawn"],
                        tuple(r["given"]),
                    )
                    for r in row["responses"]
                ],
                [(p[0], p[1]) for p in row["pairs"]],
            )
        )
    return groups


def in_split(groups: Iterable[PromptGroup], *splits: str) -> list[PromptGroup]:
    return [g for g in groups if g.split in splits]


def plain_text(text: Text) -> str:
    """What a person reads of a response: the text itself, or the messages' contents."""
    return text if isinstance(text, str) else "\n".join(str(m["content"]) for m in text)


def prompt_text(prompt: Text) -> str:
    """What a person reads of a prompt: the text itself, or the messages' contents, one below the other."""
    return prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt)


def response_lengths(group: PromptGroup) -> np.ndarray:
    """Tokens of each response, end token included."""
    return np.array([len(r.ids) for r in group.responses])
