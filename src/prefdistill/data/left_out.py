"""Rows that a run leaves out: which, why, and what was read of them; kept on disk while there are many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa

from prefdistill.atomic import json_line
from prefdistill.data.on_disk import Spool
from prefdistill.errors import DataError

Kind = Literal["bad", "too long", "same tokens"]
_LINE = pa.schema([("line", pa.string())])


class LeftOut:
    """Rows left out, in the order in which they were.

    Attributes:
        counts: how many of each kind.
        first: why the first was.
    """

    def __init__(self) -> None:
        self._spool = Spool(_LINE)
        self.counts: Counter[Kind] = Counter()
        self.first: DataError | None = None

    def add(self, kind: Kind, where: str, error: DataError, row: Any) -> None:
        """A row: where it stood, why it is left out, and what could be read of it."""
        told = {"where": where, "kind": kind, "reason": str(error)}
        try:
            line = json_line(told | {"row": row})
        except (ValueError, RecursionError):  # numbers of over 4,300 digits, values nested a thousand deep
            line = json_line(told | {"row": None})
        self._spool.add({"line": line})
        self.counts[kind] += 1
        self.first = self.first or error

    def bad(self, where: str, error: DataError, row: Any) -> None:
        """`add` for a row that cannot be used."""
        self.add("bad", where, error, row)

    def lines(self) -> Iterator[str]:
        """A JSON object a row; nothing can be added after it."""
        for row in self._spool.rows():
            yield row["line"]
