"""From pairs, one after the other, to prompts with their distinct responses: in which split, and which pairs go.

Neither the pairs nor the prompts are held in memory: what is kept of each is a digest and where it lies.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from prefdistill.data.checks import short
from prefdistill.data.formats import Pair
from prefdistill.data.given import GivenRewards
from prefdistill.data.left_out import LeftOut
from prefdistill.data.on_disk import Spool, View
from prefdistill.data.table import SPLITS, Groups, PromptGroup, Response, prompt_key, response_key, text_key
from prefdistill.data.tokenise import Encoder
from prefdistill.errors import DataError

_PROMPT = pa.schema(
    [
        ("prompt", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("split", pa.string()),
        ("extra", pa.string()),
        ("cut", pa.int32()),
    ]
)
_SIDE = pa.struct([("text", pa.string()), ("ids", pa.list_(pa.int32())), ("given", pa.list_(pa.float64()))])
_PAIR = pa.schema([("chosen", _SIDE), ("rejected", _SIDE), ("row", pa.string())])

_SAME_TOKENS = DataError("chosen and rejected are the same tokens to the policy, so it cannot learn to tell them apart")


@dataclass(frozen=True)
class Dropped:
    """What encoding left out or cut, for the log and the report."""

    pairs_too_long: int
    prompts_cut: int
    same_tokens: int


def group_pairs(
    pairs: Iterable[Pair],
    encoder: Encoder,
    *,
    splits: dict[bytes, str],
    left_out: LeftOut | None = None,
    drop_bad: bool = False,
    given: str | None = None,
) -> tuple[Groups, Dropped]:
    """Pairs to prompt groups in the order of first appearance; pairs with a response too long are dropped, counted.

    Prompts that are the same to the model, cut ones that differ only where they were cut, make one group in one split.

    Args:
        splits: `prompt_key` -> split.
        left_out: told of every pair that is left out.
        drop_bad: a pair that cannot be encoded is left out too; otherwise it raises.
        given: rewards are read from the columns `given`_chosen and `given`_rejected.

    Raises:
        DataError: a pair cannot be encoded, a response has an end token in its middle, where a policy would stop, its
            given rewards are not finite, not as many as others', or not those of another row, or its prompt was cut to
            that of a row which names another split.
    """
    prompts, spooled = Spool(_PROMPT), Spool(_PAIR)
    number_of: dict[bytes, int] = {}  # by the text, and by the ids: texts may be the same to the model
    pairs_of: list[array[int]] = []
    own_split: list[str | None] = []  # that the row named which came first
    left_out = LeftOut() if left_out is None else left_out
    before = left_out.counts.copy()
    rewards = GivenRewards(given) if given is not None else None
    for pair in pairs:
        try:
            chosen = encoder.response_ids(pair.prompt, pair.chosen, whole=True)
            rejected = encoder.response_ids(pair.prompt, pair.rejected, whole=True)
            key = prompt_key(pair.prompt)
            if key not in number_of:
                encoded = encoder.prompt_ids(pair.prompt)
                same_ids = b"%d" % isinstance(pair.prompt, str) + response_key(encoded.ids, ()).encode()
                if same_ids not in number_of:
                    number_of[same_ids] = prompts.add(
                        {
                            "prompt": text_key(pair.prompt),
                            "ids": encoded.ids,
                            "split": splits[key],
                            "extra": json.dumps(pair.extra, default=str),
                            "cut": encoded.cut,
                        }
                    )
                    pairs_of.append(array("q"))
                    own_split.append(_named(pair))
                elif _named(pair) != (other := own_split[number_of[same_ids]]):
                    raise DataError(
                        f"column 'split' is {_named(pair)!r}, and in {other!r} stands a prompt that is the same tokens "
                        "to the policy, which reads the last dataset.max_prompt_tokens of each; a prompt must be in "
                        "one split only: raise that, or put both into one"
                    )
                number_of[key] = number_of[same_ids]
            for name, ids in (("chosen", chosen), ("rejected", rejected)):
                check_ends(name, ids or (), encoder)
            of_pair = rewards.of(pair) if rewards is not None else ((), ())
            if rewards is not None and chosen is not None and rejected is not None and chosen != rejected:
                prompt_ids = encoder.prompt_ids(pair.prompt).ids
                for ids, values in zip((chosen, rejected), of_pair, strict=True):
                    rewards.check_same(response_key(prompt_ids, ids), values, pair.where)
        except DataError as error:
            if not drop_bad:
                raise DataError(f"{pair.where}: {error}") from error
            left_out.bad(pair.where, error, pair.row())
            continue
        if chosen is None or rejected is None:
            left_out.add("too long", pair.where, _too_long(chosen, rejected, encoder), pair.row())
            continue
        if chosen == rejected:
            left_out.add("same tokens", pair.where, _SAME_TOKENS, pair.row())
            continue
        sides = ((pair.chosen, chosen, of_pair[0]), (pair.rejected, rejected, of_pair[1]))
        made = [{"text": text_key(text), "ids": ids, "given": values} for text, ids, values in sides]
        of_row = {"chosen": made[0], "rejected": made[1], "row": re.split(r"[\\/]", pair.where)[-1]}
        pairs_of[number_of[key]].append(spooled.add(of_row))
    kept = [number for number, own in enumerate(pairs_of) if own]
    heads, rows = prompts.rows(), spooled.rows()
    named, cuts = heads.column("split"), heads.column("cut")
    groups = View(kept, lambda number: _group(heads[number], [rows[i] for i in pairs_of[number]]))
    counts = left_out.counts - before
    dropped = Dropped(counts["too long"], sum(cuts[number] > 0 for number in kept), counts["same tokens"])
    return Groups(groups, [named[number] for number in kept]), dropped


def _group(head: dict[str, Any], rows: list[dict[str, Any]]) -> PromptGroup:
    group = PromptGroup(
        json.loads(head["prompt"]), tuple(head["ids"]), head["split"], json.loads(head["extra"]), head["cut"]
    )
    for row in rows:
        first, second = (
            group.place(Response(json.loads(side["text"]), tuple(side["ids"]), given=tuple(side["given"])))
            for side in (row["chosen"], row["rejected"])
        )
        group.pairs.append((first, second))
        group.rows.append(row["row"])
    return group


def _named(pair: Pair) -> str | None:
    """The split that a row names."""
    named = pair.extra.get("split")
    return named if named in SPLITS else None


def _too_long(chosen: Any, rejected: Any, encoder: Encoder) -> DataError:
    named = " and ".join(repr(n) for n, ids in (("chosen", chosen), ("rejected", rejected)) if ids is None)
    return DataError(
        f"column {named}: more than {encoder.max_response_tokens} tokens with the end token; raise "
        "dataset.max_response_tokens to use the row"
    )


def check_ends(name: str, ids: Sequence[int], encoder: Encoder) -> None:
    """Raises DataError where a response of the column `name` has an end token in its middle."""
    inside = [i for i in ids[:-1] if i in encoder.end_ids]
    if inside:
        raise DataError(
            f"column {name!r}: the text holds the end token {encoder.tokenizer.decode(inside[:1])!r}, where a policy "
            "would stop; take it out of the text, or drop such rows with dataset.on_bad_row: drop"
        )


def assign_splits(pairs: Iterable[Pair], fractions: dict[str, float], seed: int) -> dict[bytes, str]:
    """`prompt_key` -> split: the row's own `split` column where it names one, else drawn by prompt, seeded.

    Splits that are asked for and that no row names are drawn from the prompts that are left to train on: TL;DR's rows,
    for one, all say "train".

    Args:
        fractions: split -> its share of the prompts that it is drawn from; at least one prompt if above 0.

    Raises:
        DataError: no prompt is left to train on, a prompt stands in two splits, or only some rows name their split.
    """
    own: dict[bytes, str] = {}
    places: dict[bytes, bytes] = {}  # in the drawn order
    unnamed: Pair | None = None
    for pair in pairs:
        key = prompt_key(pair.prompt)
        if key not in places:
            places[key] = hashlib.blake2b(f"{seed}:{text_key(pair.prompt)}".encode(), digest_size=8).digest()
        given = _named(pair)
        if given is None:
            unnamed = unnamed or pair
        elif own.setdefault(key, given) != given:
            raise DataError(
                f"{pair.where}: its prompt stands in the split {own[key]!r} and in {given!r}; a prompt must be in "
                "one split only, or the evaluation would be on training data"
            )
    if own and unnamed is not None:
        found = short(repr(unnamed.extra.get("split")))
        raise DataError(
            f"{unnamed.where}: column 'split' is {found} while other rows name one; use one of {', '.join(SPLITS)} in "
            "every row, or leave the column out"
        )
    out = {key: split for key, split in own.items() if split != "train"}
    order = sorted((key for key in places if key not in out), key=lambda key: places[key])
    start = 0
    for name in ("test", "judge", "validation"):
        share = fractions.get(name, 0.0)
        if share > 0 and name not in own.values():
            count = max(1, round(share * len(order)))
            out.update(dict.fromkeys(order[start : start + count], name))
            start += count
    if start >= len(order):
        raise DataError(
            f"{len(places)} prompts, {len(order)} of them free for training, are too few for the splits {fractions}: "
            "none is left to train on; give more data, or leave the column 'split' out if there is one"
        )
    out.update(dict.fromkeys(order[start:], "train"))
    return out
