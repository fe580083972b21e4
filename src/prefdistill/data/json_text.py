"""JSON texts in which a value that cannot be used, such as an object with a key twice, is told for its row alone.

Python's parser keeps the last of two equal keys in silence, and stops at a number of over 4,300 digits.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from prefdistill.data.checks import names, short


class _Twice(list[tuple[str, Any]]):
    """An object that names a key twice, as its keys and values."""


class _Digits(str):
    """A number of more digits than Python makes a number of."""


class Parser:
    """Parses texts, one after the other."""

    def __init__(self) -> None:
        self._faulty = False  # whether the last text holds such a value anywhere, so that few are searched for it
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._number)

    def parse(self, text: str) -> Any:
        """The value of a text.

        Raises:
            json.JSONDecodeError: it is not JSON.
            RecursionError: it is nested too deep.
        """
        self._faulty = False
        return self._decoder.decode(text)

    def first(self, text: str) -> tuple[Any, int]:
        """The value that a text begins with after white space, and where it ends; raises as `parse` does."""
        return self._decoder.raw_decode(text, len(text) - len(text.lstrip()))

    def fault(self, value: Any) -> str | None:
        """What cannot be used in a value, or part of a value, parsed last, and what to do; None if all of it can be."""
        waiting = [value] if self._faulty else []
        while waiting:
            part = waiting.pop()
            if isinstance(part, _Twice):
                counts = Counter(key for key, _ in part)
                twice = next(key for key, n in counts.items() if n > 1)
                return (
                    f"an object has the key {short(repr(twice))} twice (its keys: {names(key for key, _ in part)}). "
                    "Keep one of the two."
                )
            if isinstance(part, _Digits):
                return f"JSON that cannot be read (a number of {len(part)} characters). Shorten that value."
            if isinstance(part, dict):
                waiting += reversed(part.values())
            elif isinstance(part, list):
                waiting += reversed(part)
        return None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Twice:
        result = dict(pairs)
        if len(result) == len(pairs):
            return result
        self._faulty = True
        return _Twice(pairs)

    def _number(self, digits: str) -> int | _Digits:
        try:
            return int(digits)
        except ValueError:
            self._faulty = True
            return _Digits(digits)


def is_object(value: Any) -> bool:
    """Whether a parsed value was an object, one that names a key twice included."""
    return isinstance(value, dict | _Twice)
