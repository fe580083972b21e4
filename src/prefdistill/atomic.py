"""Files and folders that appear whole or not at all: written beside, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_UNFINISHED = re.compile(r"\..+\.(part|old)-\d+-[0-9a-f]{8}")  # what _beside makes


def _beside(path: Path, kind: str = "part") -> Path:
    """A name of this process's own; containers and hosts on one file system may have the same process id."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def is_unfinished(path: Path) -> bool:
    """Whether somebody writes this file or folder now, or was killed while they did."""
    return _UNFINISHED.fullmatch(path.name) is not None


def remove_unfinished(root: Path, but: Callable[[Path], bool]) -> None:
    """Removes what killed processes left half-written anywhere in a folder that this process alone writes into.

    Args:
        but: whether a path may be another's, who is writing it now.
    """
    for left in [p for p in root.rglob(".*") if is_unfinished(p) and not but(p)]:
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


@contextlib.contextmanager
def fresh_file(path: Path, name: Callable[[Path], Path] | None = None) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends well, and is removed when it does not.

    Args:
        name: given what was written; the path that it becomes instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    try:
        yield part
        _on_disk(part)
        os.replace(part, path if name is None else name(part))
        _on_disk(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill; it replaces `path` when the block ends well, and is removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    part.mkdir()
    try:
        yield part
        for written in [*part.rglob("*"), part]:
            _on_disk(written)
        old = _beside(path, "old") if path.exists() else None
        if old is not None:
            os.replace(path, old)
        os.replace(part, path)
        _on_disk(path.parent)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _on_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would outlive a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_text(path: Path, text: str) -> None:
    with fresh_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """JSON with NaN and infinities as null, since they are not JSON."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_line(value: Any) -> str:
    """JSON on one line of ASCII: NaN and infinities as null, half characters escaped, other values as their text.

    Raises:
        ValueError, RecursionError: a number of over 4,300 digits, or values nested too deep.
    """
    return json.dumps(_plain(value), default=str, allow_nan=False)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and callable(value.item):
        value = value.item()
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
