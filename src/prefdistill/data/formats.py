"""Rows of any accepted shape become one canonical example: `Pair`, with a prompt and two responses.

| shape | columns |
|---|---|
| explicit | prompt, chosen, rejected: texts, or lists of messages; responses to messages may be texts |
| implicit, conversational | chosen, rejected: lists of messages; the turns they share are the prompt |
| implicit, HH | chosen, rejected: "\\n\\nHuman: ...\\n\\nAssistant: ..." transcripts |
| implicit, plain | chosen, rejected: texts; the words they share at their beginning are the prompt |
| TL;DR comparisons | info, summaries, choice, as published by Stiennon et al. (2020) |

These are also the preference formats of TRL 1.16 (`tests/test_trl_data.py` holds the two together).

Texts pass through exactly; a row that cannot be used stops the reading with a `DataError` that says where, which
column, what was found and what to do. Nothing is repaired or dropped in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from prefdistill.data.checks import bad, check_different, check_encodable, check_parts, is_blank, kind, names
from prefdistill.data.neighbours import RENDER, holds_messages, left_out, no_pairs, only_text, question_beside
from prefdistill.data.sources import OnBad, read_rows
from prefdistill.data.transcripts import ASSISTANT, hh_seam, is_hh_transcript, turn_seam, word_seam
from prefdistill.errors import ConfigError, DataError

Message = dict[str, str]  # {"role", "content"}
Text = str | list[Message]
Parts = tuple[Text, Text, Text]  # prompt, chosen, rejected

ROLES = ("system", "user", "assistant", "tool", "developer")
SHAPES = (
    "prompt, chosen, rejected (texts or lists of messages); or chosen, rejected (lists of messages, HH transcripts, or "
    "texts that begin with the same words); or info, summaries, choice (TL;DR comparisons)"
)
_PAIR_COLUMNS = ("prompt", "chosen", "rejected")
_TLDR_COLUMNS = ("info", "summaries", "choice")
# The prompts of openai/summarize-from-feedback that end with "TL;DR:", to be followed by a space and the summary.
_TLDR_PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
_CNNDM_PROMPT = "Article:\n\n{article}\n\nTL;DR:"


@dataclass(frozen=True)
class Pair:
    """One comparison.

    Attributes:
        prompt: a text, or messages that end with a turn which is not the assistant's.
        chosen: the preferred response: a text that follows the prompt directly, or assistant messages (usually one).
        rejected: the other response, of the same kind; never equal to `chosen` up to outer whitespace.
        where: where the row stands ("pairs.jsonl, row 12"), for error messages.
        extra: the row's other columns, as they were.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    where: str
    extra: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """A row of the explicit shape that is read as this pair."""
        return {**self.extra, "prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


def load_pairs(source: str, **options: Any) -> list[Pair]:
    """All that `iter_pairs` yields, with its arguments."""
    return list(iter_pairs(source, **options))


def iter_pairs(
    source: str,
    *,
    split: str = "train",
    config_name: str | None = None,
    data_dir: str | None = None,
    limit: int | None = None,
    both_orders: str = "stop",
    on_bad_row: OnBad | None = None,
) -> Iterator[Pair]:
    """The pairs of a file, folder or hub data set (see `sources.read_rows`), one after the other.

    Args:
        limit: how many rows are read at most.
        both_orders: "stop": a pair whose responses stood before in the other order is a bad row; "keep": people may
            disagree.
        on_bad_row: told of each row that cannot be used (where, why, and `Pair.row` or what else was read of it), which
            is then left out; None: the first stops the reading. A file that cannot be parsed beyond a row stops it in
            any case.

    Raises:
        DataError: the source cannot be read, or a row of it cannot be used and `on_bad_row` is None.
        ConfigError: `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}: give at least 1, or leave it out to read every row.")
    seen: dict[bytes, str] = {}
    rows = read_rows(source, split=split, config_name=config_name, data_dir=data_dir, on_bad_line=on_bad_row)
    for where, row in islice(rows, limit):
        pair = None
        try:
            pair = to_pair(row, where)
            if both_orders == "stop":
                _check_order(pair, seen)
        except DataError as error:
            if on_bad_row is None:
                raise
            on_bad_row(where, error, row if pair is None else pair.row())
            continue
        yield pair


def _check_order(pair: Pair, seen: dict[bytes, str]) -> None:
    """Refuses a pair that stood before in the other order; `seen` keeps a digest of every pair and where it stands."""

    def digest(*parts: Text) -> bytes:
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()

    before = seen.get(digest(pair.prompt, pair.rejected, pair.chosen))
    if before is not None:
        raise bad(
            pair.where,
            "chosen",
            f"the pair of {before} in the other order",
            "Keep the right one, or all of them with dataset.both_orders: keep if people disagreed",
        )
    seen.setdefault(digest(pair.prompt, pair.chosen, pair.rejected), pair.where)


def to_pair(row: dict[str, Any], where: str) -> Pair:
    """The canonical example of one row; its shape is told by its columns and their types (see the module's table).

    Raises:
        DataError: a column is missing, null, of a wrong type or malformed; a response is blank; the two are equal.
    """
    used = _used_columns(row, where)
    if used == _TLDR_COLUMNS:
        parts = _tldr_parts(row, where)
        columns = ("info", f"summaries[{row['choice']}]", f"summaries[{1 - row['choice']}]")
    elif used == _PAIR_COLUMNS:
        parts = _explicit_parts(*(_text(row[name], name, where) for name in used), where=where)
        columns = _PAIR_COLUMNS
    else:
        chosen, rejected = (_text(row[name], name, where) for name in used)
        asked = question_beside(row, chosen, rejected)
        if asked is not None:
            remedy = "Rename it to 'prompt' (several, such as a system text: join them to messages), or drop the column"
            raise bad(where, asked, "a text beside 'chosen' and 'rejected', which would be left out", remedy)
        parts = _implicit_parts(chosen, rejected, where=where)
        columns = ("chosen", "chosen", "rejected")
    check_parts(parts, columns, where)
    lost = left_out(row, chat=not isinstance(parts[0], str))
    if lost is not None:
        raise bad(where, *lost)
    extra = {name: value for name, value in row.items() if name not in used}
    if used == _TLDR_COLUMNS and str(extra.get("split", "")).startswith("valid"):
        extra["split"] = "validation"  # published as valid1 and valid2
    for name, value in extra.items():
        check_encodable(value, name, where)
    return Pair(*parts, where=where, extra=extra)


# --- shapes -----------------------------------------------------------------------------------------------------------


def _used_columns(row: dict[str, Any], where: str) -> tuple[str, ...]:
    if "chosen" in row and "rejected" in row:
        return tuple(name for name in _PAIR_COLUMNS if name in row)
    if all(name in row for name in _TLDR_COLUMNS):
        return _TLDR_COLUMNS
    wanted = _TLDR_COLUMNS if "info" in row and "summaries" in row else ("chosen", "rejected")
    missing = " and ".join(repr(name) for name in wanted if name not in row)
    found = names(row)
    neighbour = no_pairs(row)
    if neighbour is not None:
        raise DataError(f"{where}: no column {missing} (columns found: {found}): {neighbour}.")
    raise DataError(
        f"{where}: no column {missing} (columns found: {found}). Rename the columns to one of the accepted shapes: "
        f"{SHAPES}."
    )


def _explicit_parts(prompt: Text, chosen: Text, rejected: Text, *, where: str) -> Parts:
    if isinstance(prompt, str):
        if isinstance(chosen, str) and isinstance(rejected, str):
            return prompt, chosen, rejected
        return _restated_text_prompt(prompt, chosen, rejected, where)
    if prompt[-1]["role"] == "assistant":
        raise bad(
            where,
            "prompt",
            "the conversation ends with an assistant turn",
            "End it with the turn to be answered; move the assistant turn into 'chosen' and 'rejected', or drop it",
        )
    if _begins_with(chosen, prompt) and _begins_with(rejected, prompt):
        # Some data sets give the prompt and repeat it in both conversations; no response can begin with a user turn.
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, _as_messages(chosen), _as_messages(rejected)


def _restated_text_prompt(prompt: str, chosen: Text, rejected: Text, where: str) -> Parts:
    """A prompt as text beside whole conversations that contain it as a user turn (UltraFeedback, binarized)."""
    column = "rejected" if isinstance(rejected, str) else "chosen"
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise bad(
            where,
            column,
            "one response is a text, the other a list of messages, and the prompt a text",
            "Give all three in one form",
        )
    seam = turn_seam(chosen, rejected)
    if {"role": "user", "content": prompt} not in chosen[:seam]:
        raise bad(
            where,
            "prompt",
            "a text, while the responses are lists of messages that do not both begin with it",
            "Give the prompt as a list of messages too, or as the first user message of both conversations",
        )
    return _implicit_parts(chosen, rejected, where=where)


def _implicit_parts(chosen: Text, rejected: Text, *, where: str) -> Parts:
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_texts(chosen, rejected, where)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise bad(
            where,
            "rejected",
            f"{kind(rejected)}, while 'chosen' is {kind(chosen)}",
            "Give both as texts or both as lists of messages",
        )
    seam = turn_seam(chosen, rejected)
    if not seam:
        raise bad(
            where,
            "rejected",
            "the conversation shares no turn before the answer with 'chosen'",
            "Begin both with the same turns, or give those as a column 'prompt'",
        )
    return chosen[:seam], chosen[seam:], rejected[seam:]


def _split_texts(chosen: str, rejected: str, where: str) -> Parts:
    # Before the split: equal texts share all their words, and would read as a response that is blank.
    check_different(chosen, rejected, ("chosen", "rejected"), where)
    if is_hh_transcript(chosen) and is_hh_transcript(rejected):
        seam, shared = hh_seam(chosen, rejected), f"no {ASSISTANT!r} in the part that both HH transcripts share"
    else:
        seam, shared = word_seam(chosen, rejected), "no words at the beginning that both texts share"
    if is_blank(chosen[:seam]):
        raise bad(where, "rejected", f"{shared}, so there is no prompt", "Give the prompt in a column 'prompt'")
    return chosen[:seam], chosen[seam:], rejected[seam:]


def _tldr_parts(row: dict[str, Any], where: str) -> Parts:
    summaries = row["summaries"]
    if not isinstance(summaries, list) or len(summaries) != 2:
        found = f"{len(summaries)} entries" if isinstance(summaries, list) else kind(summaries)
        raise bad(where, "summaries", found, "Give a list of exactly two objects with a 'text'")
    choice = row["choice"]
    if isinstance(choice, bool) or choice not in (0, 1) or not isinstance(choice, int):
        raise bad(where, "choice", kind(choice), "Give 0 or 1, the index of the better summary")
    # Published summaries begin with one space, none or several; the model is to write exactly one after "TL;DR:".
    responses = [
        " " + _field(summary, "text", f"summaries[{index}]", where).strip() for index, summary in enumerate(summaries)
    ]
    return _tldr_prompt(row["info"], where), responses[choice], responses[1 - choice]


def _tldr_prompt(info: Any, where: str) -> str:
    # On the hub a post has a null article and an article a null post.
    if isinstance(info, dict) and info.get("post") is None and info.get("article") is not None:
        return _CNNDM_PROMPT.format(article=_field(info, "article", "info", where))
    fields = ("subreddit", "title", "post")
    return _TLDR_PROMPT.format(**{name: _field(info, name, "info", where) for name in fields})


def _field(value: Any, key: str, column: str, where: str) -> str:
    if not isinstance(value, dict):
        raise bad(where, column, kind(value), f"Give an object with a text under {key!r}")
    if not isinstance(value.get(key), str):
        found = f"{kind(value[key])} under {key!r}" if key in value else f"no {key!r} (keys: {names(value)})"
        raise bad(where, column, found, f"Give a text under {key!r}")
    return str(value[key])


# --- columns ----------------------------------------------------------------------------------------------------------


def _text(value: Any, column: str, where: str) -> Text:
    if isinstance(value, str):
        if holds_messages(value):
            remedy = "Give a list of messages, in JSON Lines or Parquet: CSV has texts alone"
            raise bad(where, column, "messages written as one text", remedy)
        return value
    if not isinstance(value, list):
        hint = "; drop the column if the prompt stands in 'chosen' and 'rejected'" if column == "prompt" else ""
        raise bad(where, column, kind(value), f"Give a text or a list of messages{hint}, or remove the row")
    if not value:
        raise bad(where, column, "an empty list of messages", "Give at least one message, or remove the row")
    return [_message(message, index, column, where) for index, message in enumerate(value)]


def _message(value: Any, index: int, column: str, where: str) -> Message:
    place = f"{column}[{index}]"
    if isinstance(value, dict) and isinstance(value.get("content"), list):
        text = only_text(value["content"])
        if text is None:
            raise bad(
                where,
                place,
                "a list under 'content' that is not one text part ({'type': 'text', 'text': ...})",
                "Join the texts to one, and leave out rows with pictures: the policy reads text alone",
            )
        value = value | {"content": text}
    message = {key: _field(value, key, place, where) for key in ("role", "content")}
    if message["role"] not in ROLES:
        raise bad(where, place, f"the role {message['role']!r}", f"Use one of {', '.join(ROLES)}")
    # Parquet fills the fields that other messages have with nulls; anything else would be lost in silence.
    others = [key for key, field in value.items() if key not in message and field is not None]
    if others:
        raise bad(
            where,
            place,
            f"the fields {names(others)}",
            f"Messages are role and content: remove the others, or {RENDER}",
        )
    return message


def _begins_with(response: Text, prompt: list[Message]) -> bool:
    return isinstance(response, list) and response[: len(prompt)] == prompt


def _as_messages(response: Text) -> list[Message]:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response
