"""Rows that other trainers read: what they are, which of their columns must not be lost, and what to do with them."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection
from typing import Any

from prefdistill.data.transcripts import is_hh_transcript

RENDER = "render the row before, as trl.apply_chat_template does: its prompt, chosen and rejected are read exactly"

_NO_PAIRS = (
    (
        {"completion", "label"},
        "unpaired preference, one completion and whether it is good (as TRL's KTOTrainer reads). Put a completion "
        "labelled true ('chosen') and one labelled false ('rejected') of the same prompt into one row",
    ),
    (
        {"completions", "labels"},
        "the steps of an answer with a label each, which compare no two answers. Give two answers to a prompt as "
        "'chosen' and 'rejected'",
    ),
    *(
        ({name}, "demonstrations, which compare nothing. Give each prompt a worse response too, as 'rejected'")
        for name in ("completion", "messages")
    ),
    (
        {"prompt"},
        "prompts without responses. Draw two responses to each, have them compared, and give them as 'chosen' and "
        "'rejected'",
    ),
)
# Left out in silence, the pair would be another one than TRL's.
_PICTURES = ("image", "images")
_TEMPLATED = {
    "tools": "tools, which a chat template would write into the prompt",
    "chat_template_kwargs": "arguments of the chat template, which is given none here",
}
# What published pairs call it: Orca's, distilabel's, CodeUltraFeedback's.
_QUESTIONS = ("question", "instruction", "input", "query", "system")
LONGEST_LIST = 1_000_000  # characters; longer ones are not parsed to be told from texts
_NOTHING = (None, "", "[]", "{}", "null")


def no_pairs(columns: Collection[str]) -> str | None:
    """What rows with these columns are and how they become pairs, where they are of a kind that TRL documents."""
    if {"chosen", "rejected", "info"} & set(columns):
        return None
    return next((told for known, told in _NO_PAIRS if known <= set(columns)), None)


def left_out(row: dict[str, Any], *, chat: bool) -> tuple[str, str, str] | None:
    """A column, what it holds and what to do, if TRL would put it into what it trains on and nothing here reads it."""
    for name in _PICTURES:
        if _given(row.get(name)):
            remedy = "The policy reads text alone: leave the row out, or the column if the pair can be judged without"
            return name, "a picture", remedy
    for name, found in _TEMPLATED.items():
        if chat and _given(row.get(name)):
            return name, found, f"Take the column away if the policy is to do without, or {RENDER}"
    return None


def question_beside(row: dict[str, Any], chosen: Any, rejected: Any) -> str | None:
    """The column that asks what two texts answer, where there is no `prompt`: they would share a first word at most.

    Texts that are HH transcripts hold what was asked.
    """
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return None
    if is_hh_transcript(chosen) and is_hh_transcript(rejected):
        return None
    return next((n for n in _QUESTIONS if isinstance(row.get(n), str) and row[n].strip()), None)


def holds_messages(text: str) -> bool:
    """Whether a text is a list of messages as JSON or as Python writes it."""
    text = text.strip()
    if not (text.startswith("[{") and text.endswith("}]") and len(text) <= LONGEST_LIST):
        return False
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found)
    return False


def only_text(content: list[Any]) -> str | None:
    """The text of a content that is a list of one text part, as vision models are given texts; None for another."""
    # Parquet fills the fields that other parts have with nulls.
    parts = [{k: v for k, v in p.items() if v is not None} if isinstance(p, dict) else p for p in content]
    if len(parts) != 1 or not isinstance(parts[0], dict) or parts[0].keys() != {"type", "text"}:
        return None
    kind, text = parts[0]["type"], parts[0]["text"]
    return text if kind == "text" and isinstance(text, str) else None


def _given(value: Any) -> bool:
    # Parquet gives a row without arguments those of the other rows, as nulls.
    if isinstance(value, dict):
        return any(_given(field) for field in value.values())
    return bool(value) if isinstance(value, list) else value not in _NOTHING
