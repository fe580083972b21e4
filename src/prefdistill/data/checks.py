"""What every row must hold whatever its shape, and the words in which its faults are told."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prefdistill.errors import DataError

if TYPE_CHECKING:
    from prefdistill.data.formats import Parts, Text

_UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Zs"}  # control characters, format characters such as U+200B, separators


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: whitespace, control and format characters (zero-width spaces, U+FEFF) alone."""
    return all(character.isspace() or unicodedata.category(character) in _UNSEEN for character in text)


def check_parts(parts: Parts, columns: tuple[str, str, str], where: str) -> None:
    """Checks prompt, chosen and rejected; `columns` names the column that each came from."""
    prompt, chosen, rejected = parts
    for column, text in zip(columns, parts, strict=True):
        check_encodable(text, column, where)
    if all(map(is_blank, _contents(prompt))):
        raise bad(where, columns[0], "a blank prompt", "Give the prompt its text, or remove the row")
    for column, response in zip(columns[1:], (chosen, rejected), strict=True):
        _check_response(response, column, where)
    check_different(chosen, rejected, columns[1:], where)


def _check_response(response: Text, column: str, where: str) -> None:
    if isinstance(response, list):
        if all(message["role"] != "assistant" for message in response):
            remedy = "Add the response, or remove the row"
            raise bad(where, column, "a conversation without an assistant response", remedy)
        other = next((message["role"] for message in response if message["role"] != "assistant"), None)
        if other is not None:
            # Its tokens would count as if the policy had written them.
            raise bad(
                where,
                column,
                f"a turn of role {other!r} among the response's own turns",
                "Let a response hold assistant turns alone: put shared turns into the prompt, cut off later ones",
            )
    if any(map(is_blank, _contents(response))):
        found = f"a blank response ({_contents(response)[0]!r})" if isinstance(response, str) else "a blank message"
        raise bad(where, column, f"{found} after the prompt", "Give the response its text, or remove the row")


def check_different(chosen: Text, rejected: Text, columns: tuple[str, str], where: str) -> None:
    if [text.strip() for text in _contents(chosen)] == [text.strip() for text in _contents(rejected)]:
        remedy = "A pair needs two responses that differ: remove the row"
        raise bad(where, columns[1], f"a response equal to {columns[0]!r}", remedy)


def check_encodable(value: Any, column: str, where: str) -> None:
    """Refuses lone surrogates, anywhere in a column: no tokeniser and no file format takes them."""
    for text in _strings(value):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise bad(
                where,
                column,
                f"the lone surrogate U+{ord(text[error.start]):04X} at character {error.start + 1}",
                "It is half of a character cut in two: mend the text, or remove the row",
            ) from error


def _strings(value: Any) -> Iterator[str]:
    # With a list of what is left instead of calls: a value may be nested deeper than Python calls.
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            waiting += [side for field in reversed(part.items()) for side in reversed(field)]
        elif isinstance(part, list):
            waiting += reversed(part)


# --- words of the messages --------------------------------------------------------------------------------------------


def _contents(text: Text) -> list[str]:
    return [text] if isinstance(text, str) else [message["content"] for message in text]


def bad(where: str, column: str, found: str, remedy: str) -> DataError:
    return DataError(f"{where}, column {short(repr(column))}: found {short(found)}. {remedy}.")


def short(text: str, most: int = 400) -> str:
    """A text for a message, without the middle of one that is longer: a row's values may have megabytes."""
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"


def words_of(error: Exception) -> str:
    """An error of another library for a log line: its kind and the first line of what it says."""
    return short(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", 200)


def names(found: Iterable[str]) -> str:
    return short(", ".join(map(repr, found))) or "none"


def kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return f"the {'truth value' if isinstance(value, bool) else 'number'} {value!r}"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return f"a value of type {type(value).__name__}"
