"""Rows from a file, a folder of files, or a data set on the Hugging Face hub.

`read_rows` yields ``(where, row)``: ``row`` maps column names to values exactly as stored, ``where`` ("pairs.jsonl, row
12") says where the row stands, for error messages. What the columns mean is the business of `formats`.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from prefdistill.data.arrow_checks import check_count, check_footer, check_names
from prefdistill.data.datasets_rows import hub_rows, is_saved, saved_rows
from prefdistill.data.json_text import Parser, is_object
from prefdistill.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
OnBad = Callable[[str, DataError, Any], None]  # told of a row that is left out: where, why, and what was read of it

_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
# Endings that mark a string as a file, readable here or not: such a string is never looked for on the hub.
_FILE_ENDING = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet|arrow|feather|ya?ml|xlsx?|gz|zip|zst|bz2|xz)$", re.IGNORECASE)
_NEXT_OBJECT = re.compile(r"[ \t\r]*\n\s*\{")
_CSV_FIELD_LIMIT = 2**31 - 1
_BATCH_ROWS = 1024


def read_rows(
    source: str,
    *,
    split: str = "train",
    config_name: str | None = None,
    data_dir: str | None = None,
    on_bad_line: OnBad | None = None,
) -> Rows:
    """Yields ``(where, row)`` for every row of `source`.

    Args:
        source: a file (.jsonl, .json, .csv, each also with .gz; .parquet), a folder of such files (read in the order of
            their names; its subfolders and hidden files are not read), a folder written by datasets' save_to_disk, or
            else the id of a hub data set.
        split: the split of a hub data set, or of a saved folder that has several. Other files and folders have no
            splits: all their rows are read.
        config_name: the configuration of a hub data set, where it has several.
        data_dir: the folder of a hub data set, where it keeps several in one repository.
        on_bad_line: told of each row that its format leaves alone in its fault (where, why, and what could be read of
            it, of a broken line its text), which is then left out: a line of JSON Lines that is no object, an entry of
            a JSON list that is none, an object that names a key twice, a CSV row with another number of fields than the
            header, a row of Parquet with a value that Python cannot hold. None: the first stops the reading.

    Raises:
        DataError: the source does not exist, cannot be read, holds no rows, is not UTF-8, or breaks its own format.
            A missing source is reported by the call, a fault inside a file when the iterator comes to it.
    """
    path = Path(source).expanduser()
    # Path("") is the current folder, which nobody means by an empty source.
    if source.strip() and path.exists():
        if is_saved(path):
            return saved_rows(path, split)
        return _file_after_file(_folder_files(path) if path.is_dir() else [path], on_bad_line or _stop)
    if looks_like_hub_id(source):
        return hub_rows(source, split, config_name, data_dir)
    raise DataError(
        f"{source!r}: no such file or folder (looked from {Path.cwd()}). Give a file that ends in one of "
        f"{_endings()}, a folder of such files or of save_to_disk, or the id of a hub data set such as 'org/name'."
    )


def _stop(where: str, error: DataError, row: Any) -> None:
    raise error


def looks_like_hub_id(source: str) -> bool:
    """Whether a text could be NAME or ORG/NAME on the hub and not the name of a data file."""
    return _HUB_ID.fullmatch(source) is not None and _FILE_ENDING.search(source) is None


def _endings() -> str:
    return ", ".join(_READERS)


def _reader(path: Path) -> Callable[[Path, OnBad], Rows] | None:
    name = path.name.lower()
    return next((reader for ending, reader in _READERS.items() if name.endswith(ending)), None)


def files_of(path: Path) -> list[Path]:
    """The files that `read_rows` reads of a file or folder, in order.

    Raises:
        DataError: a folder has none.
    """
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file()) if is_saved(path) else _folder_files(path)


def _folder_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    readable = [path for path in files if _reader(path)]
    if not readable:
        raise DataError(
            f"{folder}: a folder without any data file. Put files that end in one of {_endings()} directly into it; "
            f"if a hub data set of this name was meant, start from another folder."
        )
    return readable


def _file_after_file(paths: list[Path], on_bad: OnBad) -> Rows:
    for path in paths:
        yield from _file_rows(path, on_bad)


def _file_rows(path: Path, on_bad: OnBad) -> Rows:
    reader = _reader(path)
    if reader is None:
        raise DataError(f"{path}: not a kind of file that can be read. Convert it to one of {_endings()}.")
    empty = True

    def told(where: str, error: DataError, row: Any) -> None:
        nonlocal empty
        empty = False  # it has rows, though bad ones
        on_bad(where, error, row)

    try:
        for where, row in reader(path, told):
            empty = False
            yield where, row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}). Check its permissions, or fetch it again whole.") from error
    if empty:
        raise DataError(f"{path}: no rows in it. Check that it was written to the end, or leave it out.")


# --- bytes to text ----------------------------------------------------------------------------------------------------


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, split at "\\n" alone; a byte order mark is left out."""
    offset = 0
    with _open(path) as stream:
        # Lines are split as bytes: text mode would also split at the U+2028 and "\r" that texts may hold.
        for number, line in enumerate(stream, 1):
            skipped = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            try:
                yield line[skipped:].decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, line, offset, skipped + error.start) from error
            offset += len(line)


def _not_utf8(path: Path, number: int, line: bytes, line_offset: int, at: int) -> DataError:
    encoding = "UTF-16" if line_offset == 0 and line.startswith(_UTF16_BOMS) else "WINDOWS-1252"
    unpacked = " of the unpacked file" if path.name.lower().endswith(".gz") else ""
    return DataError(
        f"{path}, line {number}, byte {at + 1} (offset {line_offset + at}{unpacked}): not UTF-8 (0x{line[at]:02x}). "
        f"Convert the file from the encoding it is in: iconv -f {encoding} -t utf-8 OLD > NEW"
    )


# --- JSON -------------------------------------------------------------------------------------------------------------


def _parse(parser: Parser, text: str, path: Path, line: int | None) -> Any:
    """The value of a JSON text that stands on line `line` of the file, or is the whole file (None)."""
    try:
        return parser.parse(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno if line is None else line}, column {error.colno}: "
            f"not valid JSON ({error.msg}). Mend that place or write the file again."
        ) from error
    except RecursionError as error:
        # Lists nested a thousand deep: valid JSON that Python will not read.
        place = str(path) if line is None else f"{path}, line {line}"
        raise DataError(f"{place}: JSON that cannot be read ({error}). Flatten that value.") from error


def _jsonl_rows(path: Path, on_bad: OnBad) -> Rows:
    parser = Parser()
    for number, line in enumerate(_text_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, row {number}"
        try:
            row = _parse(parser, line.rstrip("\r\n"), path, number)
        except DataError as error:
            on_bad(where, error, line.rstrip("\r\n"))
            continue
        fault = parser.fault(row)
        if fault is None and not isinstance(row, dict):
            fault = (
                f"{_kind(row)} where an object with columns should stand. Write one object a line; a file that is one "
                "JSON list must end in .json instead of .jsonl."
            )
        if fault is None:
            yield where, row
        else:
            on_bad(where, DataError(f"{path}, line {number}: {fault}"), row)


def _json_rows(path: Path, on_bad: OnBad) -> Rows:
    text = "".join(_text_lines(path))
    if not text.strip():
        return
    # Published .json files are often JSON Lines (the TL;DR comparisons are): an object that ends before the file does.
    parser = Parser()
    if _is_json_lines(parser, text):
        yield from _jsonl_rows(path, on_bad)
        return
    content = _parse(parser, text, path, None)
    rows = content.pop("data", None) if isinstance(content, dict) else content
    fault = parser.fault(content) if is_object(content) else None  # of what stands around the rows
    if fault is None and (is_object(rows) or not isinstance(rows, list)):
        fault = parser.fault(rows) or (
            f"{_kind(content)} without a list of rows. Write a list of objects, or {{'data': [...]}}; a file with one "
            "object a line must end in .jsonl."
        )
    if fault is not None:
        raise DataError(f"{path}: {fault}")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        fault = parser.fault(row)
        if fault is None and not isinstance(row, dict):
            fault = f"{_kind(row)} where an object with columns should stand."
        if fault is None:
            yield where, row
        else:
            on_bad(where, DataError(f"{where}: {fault}"), row)


def _is_json_lines(parser: Parser, text: str) -> bool:
    """Whether the text is an object, a line end, and the beginning of another object."""
    try:
        first, end = parser.first(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return is_object(first) and _NEXT_OBJECT.match(text, end) is not None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


# --- CSV --------------------------------------------------------------------------------------------------------------


def _csv_rows(path: Path, on_bad: OnBad) -> Rows:
    # The module's limit of 131,072 characters a field is shorter than a long conversation; it can only be set globally.
    csv.field_size_limit(max(csv.field_size_limit(), _CSV_FIELD_LIMIT))
    # strict: an open quote is an error, instead of swallowing the rest of the file as one field.
    reader = csv.reader(_text_lines(path), strict=True)
    header: list[str] | None = None
    number, last_line = 0, 0
    try:
        for fields in reader:
            first_line, last_line = last_line + 1, reader.line_num
            if not fields:
                continue
            if header is None:
                header = _checked_header(fields, path)
                continue
            number += 1
            where = f"{path}, row {number}"
            if len(fields) != len(header):
                error = DataError(
                    f"{path}, line {first_line}: {len(fields)} fields where the header has {len(header)} "
                    f"({', '.join(map(repr, header))}). Put texts that hold commas or line ends in double quotes."
                )
                on_bad(where, error, fields)
                continue
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as broken:
        raise DataError(
            f"{path}, line {last_line + 1}: not valid CSV ({broken}). Quote fields with double quotes, "
            f"double the quotes inside them, and end lines with \\n or \\r\\n."
        ) from broken


def _checked_header(header: list[str], path: Path) -> list[str]:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}, line 1: the header names {', '.join(map(repr, twice))} twice. Rename one of them.")
    return header


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, on_bad: OnBad) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            check_footer(file)
            check_names(file.schema_arrow, str(path))
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row, fault in _batch_rows(batch):
                    number += 1
                    where = f"{path}, row {number}"
                    if fault is None:
                        yield where, row
                    else:
                        on_bad(where, DataError(f"{where}, {fault}"), row)
            check_count(number, file)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not valid Parquet after row {number} ({error}). Write or fetch the file again."
        ) from error


def _batch_rows(batch: pa.RecordBatch) -> Iterator[tuple[Row, str | None]]:
    """The rows of a batch, and what is wrong with each: a value that Python cannot hold, which is None in the row."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # Arrow's own are ValueErrors; whose fault it is shows when each is read alone
        for i in range(batch.num_rows):
            yield _read_alone(batch, i)
    else:
        yield from ((row, None) for row in rows)


def _read_alone(batch: pa.RecordBatch, i: int) -> tuple[Row, str | None]:
    row: Row = {}
    fault = None
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[i].as_py()
        except (ValueError, OverflowError) as error:
            row[name] = None
            fault = (
                f"column {name!r}: a value that cannot be read ({error}). Texts must be UTF-8 and dates within the "
                "years 1 to 9999: mend it, or remove the row."
            )
    return row, fault


_READERS: dict[str, Callable[[Path, OnBad], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".jsonl.gz": _jsonl_rows,
    ".json": _json_rows,
    ".json.gz": _json_rows,
    ".csv": _csv_rows,
    ".csv.gz": _csv_rows,
    ".parquet": _parquet_rows,
}
