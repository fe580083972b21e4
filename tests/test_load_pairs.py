"""Files to pairs: limits, bad rows, pairs in both orders, and mutated files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fuzz.rows import fuzz
from prefdistill.data.formats import Pair, load_pairs
from prefdistill.errors import ConfigError, DataError
from test_formats import pair_row
from tiny_runs import write_rows


def test_load_pairs(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", [pair_row(prompt=str(number), id=number) for number in range(5)])
    assert load_pairs(source, limit=2) == [
        Pair(str(number), "c", "r", f"{source}, row {number + 1}", {"id": number}) for number in range(2)
    ]
    assert [len(load_pairs(source, limit=limit)) for limit in (None, 5, 9)] == [5, 5, 5]


def test_load_pairs_stops_at_a_bad_row_and_reads_none_beyond_the_limit(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", [pair_row(), pair_row(chosen="r")])
    assert len(load_pairs(source, limit=1)) == 1
    with pytest.raises(DataError, match=r"pairs\.jsonl, row 2, column 'rejected'"):
        load_pairs(source)


@pytest.mark.parametrize("limit", [0, -1])
def test_load_pairs_refuses_a_limit_below_one(limit: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        load_pairs("pairs.jsonl", limit=limit)


LINES = """{"prompt": "a", "chosen": "b", "rejected": "c"}
{"prompt": "a", "chosen": "b"
[1, 2]
{"prompt": "a", "chosen": "b", "chosen": "d", "rejected": "c"}
{"prompt": "a", "chosen": " ", "rejected": "c"}
{"prompt": "a", "chosen": "x", "rejected": "y"}
"""


def test_lines_that_are_no_rows_are_dropped_like_rows(tmp_path: Path) -> None:
    """A broken line in the middle of JSON Lines costs that line, if dropping was asked for."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(LINES, encoding="utf-8")
    told: dict[str, str] = {}
    pairs = load_pairs(str(path), on_bad_row=lambda where, error, row: told.update({where: str(error)}))
    assert [p.chosen for p in pairs] == ["b", "x"]
    reasons = ["not valid JSON", "a list where an object", "has the key 'chosen' twice", "a blank response"]
    for number, ((where, reason), expected) in enumerate(zip(told.items(), reasons, strict=True), start=2):
        assert where == f"{path}, row {number}"
        assert expected in reason
    with pytest.raises(DataError, match=r"line 2, column .*not valid JSON"):
        load_pairs(str(path))


def test_csv_rows_of_another_length_are_dropped_like_rows(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\na,b,c\na,b\na,x,y\n", encoding="utf-8")
    told: list[str] = []
    pairs = load_pairs(str(path), on_bad_row=lambda where, error, row: told.append(where))
    assert [p.chosen for p in pairs] == ["b", "x"]
    assert told == [f"{path}, row 2"]


@pytest.mark.parametrize("messages", [False, True])
def test_a_pair_in_both_orders(messages: bool, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"

    def row(chosen: str, rejected: str) -> dict[str, Any]:
        if not messages:
            return {"prompt": "p", "chosen": chosen, "rejected": rejected}
        say = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
        return {"prompt": [{"role": "user", "content": "p"}], "chosen": say(chosen), "rejected": say(rejected)}

    rows = [row("a", "b"), row("a", "b"), row("b", "c"), row("b", "a"), row("c", "a")]
    write_rows(path, rows)
    with pytest.raises(DataError, match=r"row 4, column 'chosen'.*the pair of .*row 1 in the other order.*both_orders"):
        load_pairs(str(path))
    told: list[str] = []
    kept = load_pairs(str(path), on_bad_row=lambda where, error, row: told.append(where))
    assert len(kept) == 4
    assert told == [f"{path}, row 4"]
    assert len(load_pairs(str(path), both_orders="keep")) == 5


def test_mutated_files_raise_nothing_but_our_errors(tmp_path: Path) -> None:
    """A little of `make fuzz`."""
    counts = fuzz(500, 1, tmp_path)
    ends = [counts[what] for what in ("all used", "rows dropped", "file refused")]
    assert sum(ends) == 500
    assert min(*ends, *(counts[ending] for ending in (".jsonl", ".json", ".csv", ".parquet"))) > 20


@pytest.mark.parametrize("change", ["swapped", "shortened", "a column"])
def test_the_fuzzing_sees_a_row_that_was_changed(change: str, tmp_path: Path, monkeypatch: Any) -> None:
    def changed(*arguments: Any, **options: Any) -> list[Any]:
        found = load_pairs(*arguments, **options)
        new = {
            "swapped": lambda p: {"chosen": p.rejected, "rejected": p.chosen},
            "shortened": lambda p: {"chosen": p.chosen[1:]},
            "a column": lambda p: {"extra": {**p.extra, "id": -7}},
        }[change]
        return [dataclasses.replace(pair, **new(pair)) for pair in found]

    monkeypatch.setattr("fuzz.rows.load_pairs", changed)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"an input of seed 2, saved as fuzz-2-\d+-pairs.*: AssertionError"):
        fuzz(200, 2, tmp_path)
    assert len(list(tmp_path.glob("fuzz-2-*"))) == 1
