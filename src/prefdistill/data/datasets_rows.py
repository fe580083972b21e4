"""Rows through the `datasets` library: a data set on the hub, or a folder that its save_to_disk wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefdistill.data.arrow_checks import check_names
from prefdistill.errors import DataError

Rows = Iterator[tuple[str, dict[str, Any]]]

_SAVED_STATE = "state.json"
_SAVED = {"dataset_info.json", _SAVED_STATE}
_SAVED_SPLITS = "dataset_dict.json"


def is_saved(path: Path) -> bool:
    """Whether a folder was written by save_to_disk, of a Dataset or of a DatasetDict."""
    return (path / _SAVED_SPLITS).is_file() or all((path / name).is_file() for name in _SAVED)


def saved_rows(folder: Path, split: str) -> Rows:
    """Yields ``(where, row)`` as `sources.read_rows` does; a DatasetDict has this split, or it is refused."""
    # Imported here: it takes seconds, and other files do not need it.
    import datasets
    import pyarrow as pa

    number = 0
    try:
        _check_files(folder)
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                found = ", ".join(map(repr, saved))
                raise DataError(f"{folder}: no split {split!r}. Set dataset.split to one of those it has: {found}.")
            saved = saved[split]
        # The file is mapped into memory unread: an offset that points outside it would crash the process.
        saved.data.table.validate(full=True)
        for row in saved.with_format(None):
            number += 1
            yield f"{folder}, row {number}", row
    except DataError:
        raise
    except (
        pa.ArrowException,
        OSError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,  # a date beyond those that Python has
        RecursionError,
    ) as error:
        raise DataError(
            f"{folder}: cannot be read as what datasets' save_to_disk writes, after row {number} "
            f"({type(error).__name__}: {error}). Save it again, or as Parquet with dataset.to_parquet(FILE); an "
            "empty data set cannot be read."
        ) from error
    if not number:
        raise DataError(f"{folder}: no rows in the split {split!r}. Choose another split, or check what was saved.")


def _check_files(folder: Path) -> None:
    """Refuses names that lead out of the folder, which `datasets` would follow, and columns of one name."""
    import pyarrow as pa

    splits = folder / _SAVED_SPLITS
    if splits.is_file():
        parts = [folder / _bare(name, splits, "split") for name in json.loads(splits.read_text("utf-8"))["splits"]]
    else:
        parts = [folder]
    for part in parts:
        state = part / _SAVED_STATE
        for entry in json.loads(state.read_text("utf-8"))["_data_files"]:
            file = part / _bare(entry["filename"], state, "data file")
            with pa.memory_map(str(file)) as stream, pa.ipc.open_stream(stream) as opened:
                check_names(opened.schema, str(file))


def _bare(name: str, file: Path, what: str) -> str:
    """The name that a file gives of another beside it; a path is refused, be it absolute or one with folders."""
    if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
        raise DataError(
            f"{file}: names the {what} {name!r}, which is no bare name of something in {file.parent}. Save the data "
            "set again with save_to_disk; if you did not write this folder yourself, do not trust it."
        )
    return name


def hub_rows(source: str, split: str, config_name: str | None, data_dir: str | None) -> Rows:
    # Imported here: it takes seconds, and local files do not need it.
    import datasets

    try:
        dataset = datasets.load_dataset(source, config_name, data_dir=data_dir, split=split)
    except Exception as error:  # the library raises anything from ValueError to the HTTP client's own errors
        raise DataError(_hub_message(source, split, config_name, error)) from error
    empty = True
    for number, row in enumerate(dataset, 1):
        empty = False
        yield f"{source} ({split}), row {number}", row
    if empty:
        raise DataError(f"{source} ({split}): no rows in this split of the hub data set. Choose another split.")


def _hub_message(source: str, split: str, config_name: str | None, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0]
    asked = f"split {split!r}" + (f", configuration {config_name!r}" if config_name else "")
    return (
        f"{source!r}: no file or folder of this name in {Path.cwd()}, and the hub data set could not be loaded "
        f"({asked}; {type(error).__name__}: {reason}). Check the name, split and configuration; for a gated data set "
        f"run `hf auth login`; without a network, download it elsewhere and give the local file or folder."
    )
