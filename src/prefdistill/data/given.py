"""Rewards that come with the data: columns NAME_chosen and NAME_rejected, a number each or one for each member."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from prefdistill.data.formats import Pair
from prefdistill.errors import DataError

Values = tuple[float, ...]


class GivenRewards:
    """Reads and checks the rewards of pairs, one after the other.

    Args:
        name: of the columns, without _chosen and _rejected.
    """

    def __init__(self, name: str) -> None:
        self.columns = (f"{name}_chosen", f"{name}_rejected")
        self._first: tuple[int, str] | None = None  # how many a response has, and the row that said so
        self._seen: dict[str, tuple[Values, str]] = {}

    def of(self, pair: Pair) -> tuple[Values, Values]:
        """The rewards of the chosen and of the rejected response, one for each member.

        Raises:
            DataError: a column is missing, holds what is no finite number, or not as many as the rows before.
        """
        for column in self.columns:
            if column not in pair.extra:
                raise DataError(
                    f"column {column!r}, which reward.given asks for, is missing; the row's columns besides the pair "
                    f"are: {', '.join(pair.extra) or 'none'}"
                )
        chosen, rejected = (self._values(column, pair.extra[column]) for column in self.columns)
        for column, values in zip(self.columns, (chosen, rejected), strict=True):
            known, where = self._first = self._first or (len(values), pair.where)
            if len(values) != known:
                raise DataError(
                    f"column {column!r} has rewards of {len(values)} members, and {where} of {known}; every response "
                    "needs one of each member"
                )
        return chosen, rejected

    def check_same(self, response: str, values: Values, where: str) -> None:
        """Raises DataError where another row gave other rewards to this response, known by its `response_key`."""
        known, earlier = self._seen.setdefault(response, (values, where))
        if known != values:
            raise DataError(
                f"{' and '.join(self.columns)}: a response has the rewards {list(values)} here and {list(known)} in "
                f"{earlier}; a reward is one of prompt and response, so look which row is wrong"
            )

    @staticmethod
    def _values(column: str, value: Any) -> Values:
        read = _parsed(value) if isinstance(value, str) else value  # CSV has texts alone
        many = read if isinstance(read, list | tuple) else [read]
        if not many:
            raise DataError(f"column {column!r} is an empty list; give a number, or one for each member")
        for number in many:
            if isinstance(number, bool) or not isinstance(number, int | float | Decimal) or not math.isfinite(number):
                raise DataError(
                    f"column {column!r} is {value!r}; a reward is a finite number, or a list of one for each member"
                )
        return tuple(float(number) for number in many)


def _parsed(text: str) -> Any:
    """The number or list that a text holds; the text itself where it holds neither."""
    try:
        return json.loads(text) if text.lstrip().startswith("[") else float(text)
    except (ValueError, RecursionError):
        return text
