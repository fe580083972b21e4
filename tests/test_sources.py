"""Reading rows: what was written comes back exactly, and every fault names its file, place and remedy."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefdistill.data.sources import read_rows
from prefdistill.errors import DataError

ROWS = [
    {"prompt": "Ünï\u2028 codé 😀", "chosen": 'a,"b"\nc', "rejected": "\td "},
    {"prompt": "2", "chosen": "", "rejected": "x"},
]

# Any text that UTF-8 can hold; csv before Python 3.11 refuses the null character.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
json_rows = st.lists(st.dictionaries(texts, values, max_size=4), min_size=1, max_size=5)
text_rows = st.lists(st.fixed_dictionaries({"prompt": texts, 'chosen, "x"': texts, "": texts}), min_size=1, max_size=5)


def rows_of(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(str(path), **options)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    write_bytes(path, json.dumps(rows, indent=2).encode())


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as stream:
        # A file of bare "\r" line ends is refused, so a bare "\r" in a text must stand in quotes.
        writer = csv.DictWriter(stream, list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


WRITERS: list[tuple[str, Callable[[Path, list[dict[str, Any]]], None]]] = [
    ("a.jsonl", write_jsonl),
    ("a.jsonl.gz", write_jsonl),
    ("A.JSONL", write_jsonl),
    ("a.json", write_json),
    ("a.json.gz", write_json),
    ("a.csv", write_csv),
    ("a.csv.gz", write_csv),
    ("a.parquet", write_parquet),
]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_reads_back_what_was_written(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name, ROWS)
    places, rows = zip(*read_rows(str(tmp_path / name)), strict=True)
    assert list(rows) == ROWS
    assert places == (f"{tmp_path / name}, row 1", f"{tmp_path / name}, row 2")


@settings(max_examples=50, deadline=None)
@given(rows=json_rows)
@pytest.mark.parametrize(("name", "write"), [("a.jsonl", write_jsonl), ("a.json", write_json)])
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, name: str, write: Any, rows: Any) -> None:
    path = tmp_path_factory.getbasetemp() / name
    write(path, rows)
    assert rows_of(path) == rows


@settings(max_examples=50, deadline=None)
@given(rows=text_rows)
@pytest.mark.parametrize(("name", "write"), [("a.csv", write_csv), ("a.parquet", write_parquet)])
def test_table_round_trip(tmp_path_factory: pytest.TempPathFactory, name: str, write: Any, rows: Any) -> None:
    path = tmp_path_factory.getbasetemp() / name
    write(path, rows)
    assert rows_of(path) == rows


def test_parquet_keeps_messages_and_nulls_over_several_batches(tmp_path: Path) -> None:
    rows = [{"chosen": [{"role": "user", "content": str(n)}], "score": None if n % 2 else n} for n in range(2500)]
    write_parquet(tmp_path / "a.parquet", rows)
    assert rows_of(tmp_path / "a.parquet") == rows


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    text = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"a": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 1, column 'a': .*UTF-8"):
        rows_of(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("bom.jsonl", b'\xef\xbb\xbf{"a": "1"}\n', [{"a": "1"}]),
        ("bom.json", b'\xef\xbb\xbf[{"a": "1"}]', [{"a": "1"}]),
        ("bom.csv", b"\xef\xbb\xbfa\r\n1\r\n", [{"a": "1"}]),
        ("crlf.jsonl", b'{"a": "1"}\r\n\r\n{"a": "2"}', [{"a": "1"}, {"a": "2"}]),
        ("blank.csv", b"a,b\n\n1,2\n\n", [{"a": "1", "b": "2"}]),
        ("data.json", b'{"version": 1, "data": [{"a": "1"}]}', [{"a": "1"}]),
        # The published TL;DR comparisons are JSON Lines with the ending .json.
        ("lines.json", b'{"a": "1"}\n{"a": "2"}\n', [{"a": "1"}, {"a": "2"}]),
        ("long.csv", b"a\n" + b"x" * 200_000 + b"\n", [{"a": "x" * 200_000}]),
    ],
)
def test_accepts(tmp_path: Path, name: str, content: bytes, expected: Any) -> None:
    write_bytes(tmp_path / name, content)
    assert rows_of(tmp_path / name) == expected


def test_a_blank_line_counts_in_the_place_of_a_jsonl_row(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.jsonl", b'\n{"a": 1}\n')
    assert [where for where, _ in read_rows(str(tmp_path / "a.jsonl"))] == [f"{tmp_path / 'a.jsonl'}, row 2"]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.jsonl", b"", ["no rows"]),
        ("blank.json", b" \n", ["no rows"]),
        ("empty.json", b"[]", ["no rows"]),
        ("empty.csv", b"", ["no rows"]),
        ("header.csv", b"a,b\n", ["no rows"]),
        ("broken.jsonl", b'{"a": 1}\n{"a": 1,, }\n', ["line 2, column 9", "not valid JSON"]),
        ("cut.jsonl.gz", b'{"a": 1}\n{"a": "', ["line 2, column 7", "not valid JSON"]),
        ("broken.json", b'[{"a": 1},\n {"a" 2}]', ["line 2, column 7", "not valid JSON"]),
        ("broken_lines.json", b'{"a": 1}\n{"a" 2}\n', ["line 2, column 6", "not valid JSON"]),
        ("twice.jsonl", b'{"a": 1}\n{"b": 1, "a": 1, "b": 2}\n', ["line 2", "key 'b' twice", "'b', 'a', 'b'"]),
        ("twice.json", b'[{"a": {"b": 1, "b": 1}}]', ["row 1", "key 'b' twice"]),
        ("twice_data.json", b'{"data": [{"a": 1}], "data": []}', ["key 'data' twice"]),
        ("twice_around.json", b'{"meta": {"v": 1, "v": 2}, "data": [{"a": 1}]}', ["key 'v' twice"]),
        ("twice_instead.json", b'{"data": {"v": 1, "v": 2}}', ["key 'v' twice"]),
        ("list.jsonl", b'[{"a": 1}]\n', ["line 1", "a list", "end in .json"]),
        ("text.jsonl", b'"a"\n', ["line 1", "a text"]),
        ("single.json", b'{"a": 1}', ["an object without a list of rows", "'data'"]),
        ("number.json", b"3", ["a number without a list"]),
        ("rows.json", b'[{"a": 1}, null]', ["row 2", "null where an object"]),
        ("digits.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", ["line 1", "cannot be read"]),
        ("digits.json", b'[{"a": 1}, {"a": [' + b"9" * 5000 + b"]}]", ["row 2", "a number of 5000 characters"]),
        ("digits_lines.json", b'{"a": ' + b"9" * 5000 + b'}\n{"a": 1}\n', ["line 1", "a number of 5000 characters"]),
        ("number_digits.json", b"9" * 5000, ["a number of 5000 characters"]),
        ("deep.json", b"[" * 200_000, ["cannot be read"]),
        ("deep.jsonl", b"[" * 200_000 + b"\n", ["line 1", "cannot be read"]),
        ("few.csv", b'a,b\n1,"2\n3"\n4\n', ["line 4", "1 fields where the header has 2", "'a', 'b'"]),
        ("many.csv", b"a,b\n1,2,3\n", ["line 2", "3 fields where the header has 2"]),
        ("open.csv", b'a,b\n1,"2\n3,4\n', ["line 2", "not valid CSV"]),
        ("quote.csv", b'a,b\n1,2\n1,"2"3\n', ["line 3", "not valid CSV"]),
        ("mac.csv", b"a,b\r1,2\r", ["line 1", "not valid CSV", "\\r\\n"]),
        ("twice.csv", b"a,b,a\n1,2,3\n", ["line 1", "'a' twice"]),
        ("junk.parquet", b"PAR1 nothing of the kind", ["not valid Parquet"]),
        ("notes.txt", b"hello", ["not a kind of file", ".jsonl"]),
    ],
)
def test_names_the_fault(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    write_bytes(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path / name)
    assert [part for part in [name, *parts] if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        (
            "latin.jsonl",
            b'{"a": "x"}\n{"a": "caf\xe9"}\n',
            ["line 2, byte 11 (offset 21)", "0xe9", "iconv -f WINDOWS-1252"],
        ),
        ("latin.jsonl.gz", b'{"a": "\xe9"}\n', ["line 1, byte 8 (offset 7 of the unpacked file)"]),
        ("latin.csv", b"a\n\xe9\n", ["line 2, byte 1 (offset 2)"]),
        ("latin.json", b'[\n"\xe9"]', ["line 2, byte 2 (offset 3)"]),
        ("bom.json", b'\xef\xbb\xbf["\xe9"]', ["line 1, byte 6 (offset 5)"]),
        ("utf16.csv", "a,b\n1,2\n".encode("utf-16"), ["line 1, byte 1", "iconv -f UTF-16 -t utf-8"]),
        ("surrogate.jsonl", b'{"a": "\xed\xa0\x80"}\n', ["line 1, byte 8", "not UTF-8"]),
    ],
)
def test_names_the_byte_that_is_not_utf8(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    write_bytes(tmp_path / name, content)
    with pytest.raises(DataError, match="not UTF-8") as caught:
        rows_of(tmp_path / name)
    assert [part for part in [name, *parts] if part not in str(caught.value)] == []


def test_jsonl_is_streamed(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.jsonl", b'{"a": 1}\nbroken\n')
    rows = read_rows(str(tmp_path / "a.jsonl"))
    assert next(rows)[1] == {"a": 1}
    with pytest.raises(DataError, match="line 2"):
        next(rows)


@pytest.mark.parametrize(
    "content", [gzip.compress(b'{"a": 1}\n' * 99)[:-12], b"plain text"], ids=["cut off", "not gzip"]
)
def test_damaged_gzip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read"):
        rows_of(tmp_path / "a.jsonl.gz")


# --- folders and missing paths ----------------------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write_csv(tmp_path / "b.csv", ROWS)
    write_jsonl(tmp_path / "a.jsonl.gz", [{"a": 1}])
    for other in ("README.md", ".hidden.jsonl", "c.parquet.crc"):
        (tmp_path / other).write_text("not rows")
    (tmp_path / "0.jsonl").mkdir()
    assert rows_of(tmp_path) == [{"a": 1}, *ROWS]


def test_an_empty_file_in_a_folder_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(DataError, match=r"b\.jsonl: no rows"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [(["README.md"], "without any data file"), (["dataset_info.json", "state.json", "data.arrow"], "to_parquet")],
)
def test_a_folder_that_cannot_be_read(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(DataError, match=message):
        list(read_rows(str(tmp_path)))


@pytest.mark.parametrize(
    "source",
    ["no.jsonl", "org/no.CSV", "no.json.gz", "./no", "/no/such", "../no", "a/b/c", "~/no-such", "no/", "", " "],
)
def test_a_missing_path_is_reported_by_the_call(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder") as caught:
        read_rows(source)
    assert repr(source) in str(caught.value)
    assert str(tmp_path) in str(caught.value)


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None, str], Any]:
    """A hub that holds what a test puts into it, by id, configuration and split."""
    import datasets

    content: dict[tuple[str, str | None, str], Any] = {}

    def load_dataset(path: str, name: str | None, *, data_dir: str | None, split: str) -> Any:
        if data_dir is not None:
            path = f"{path}/{data_dir}"
        if (path, name, split) not in content:
            raise ConnectionError(f"Couldn't reach {path!r} on the Hub\nmore lines")
        return content[path, name, split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return content


@pytest.mark.parametrize("source", ["name", "org/name", "org/name-1.5_x"])
def test_a_hub_data_set(source: str, hub: dict[Any, Any]) -> None:
    hub[source, "default", "test"] = ROWS
    rows = list(read_rows(source, split="test", config_name="default"))
    assert rows == [(f"{source} (test), row {number}", row) for number, row in enumerate(ROWS, 1)]


def test_a_folder_of_a_hub_data_set(hub: dict[Any, Any]) -> None:
    hub["org/name/helpful-base", None, "test"] = ROWS
    assert [row for _, row in read_rows("org/name", split="test", data_dir="helpful-base")] == ROWS


def test_a_hub_data_set_that_cannot_be_loaded(hub: dict[Any, Any]) -> None:
    with pytest.raises(DataError) as caught:
        next(read_rows("org/name", split="test", config_name="small"))
    assert isinstance(caught.value.__cause__, ConnectionError)
    for part in ("'org/name'", "split 'test'", "configuration 'small'", "Couldn't reach", "local file"):
        assert part in str(caught.value)
    assert "more lines" not in str(caught.value)


def test_an_empty_split_of_a_hub_data_set(hub: dict[Any, Any]) -> None:
    hub["org/name", None, "train"] = []
    with pytest.raises(DataError, match="no rows"):
        next(read_rows("org/name"))


def test_what_exists_here_is_not_looked_for_on_the_hub(
    hub: dict[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "name").mkdir()
    write_jsonl(tmp_path / "name" / "a.jsonl", ROWS)
    hub["name", None, "train"] = [{"from": "the hub"}]
    assert rows_of(Path("name")) == ROWS
