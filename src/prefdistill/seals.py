"""Checksums of what a later process reads: a file that is not as it was written is named and never used."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

from prefdistill.atomic import fresh_file, read_json, write_json

logger = logging.getLogger(__name__)

SEAL = "checksums.json"
DIGITS = 32


def checksum(file: Path) -> str:
    """BLAKE2 of a file's bytes, 128 bits in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()[:DIGITS]


# -- folders: a file of checksums, written last --------------------------------------------------------------------


def seal(folder: Path) -> None:
    """Writes the checksums of a folder's files into it; it is whole from then on."""
    write_json(folder / SEAL, _checksums(folder))


def _checksums(folder: Path) -> dict[str, str]:
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != SEAL]
    return {f.relative_to(folder).as_posix(): checksum(f) for f in files}


def is_whole(folder: Path) -> bool:
    """Whether a folder was sealed and is as it was then; damage is named in the log, a seal that lacks is none."""
    if not (folder / SEAL).exists():
        return False  # it was being written when the process was stopped
    try:
        sealed = read_json(folder / SEAL)
    except ValueError:
        sealed = None  # seals appear whole
    now = _checksums(folder)
    if now == sealed:
        return True
    broken = SEAL
    if isinstance(sealed, dict):
        broken = next(name for name in sorted(sealed.keys() | now.keys()) if sealed.get(name) != now.get(name))
    logger.warning("%s is damaged (%s is not as it was written); it is not used", folder, broken)
    return False


# -- files: the checksum is part of the name -----------------------------------------------------------------------


@contextlib.contextmanager
def sealed_file(path: Path) -> Iterator[Path]:
    """A path to write to, as `fresh_file`; what appears is called `stem-CHECKSUM.suffix`."""
    with fresh_file(path, lambda part: path.with_name(f"{path.stem}-{checksum(part)}{path.suffix}")) as part:
        yield part


def sealed_files(folder: Path, stem: str, suffix: str) -> list[Path]:
    """The whole files of a stem (a glob) in order of name; damaged ones are named in the log and left out."""
    return [f for f in sorted(folder.glob(f"{stem}-{'?' * DIGITS}{suffix}")) if is_as_named(f)]


def is_as_named(file: Path) -> bool:
    """Whether a file's bytes are those that its name tells of."""
    if file.stem.rpartition("-")[2] == checksum(file):
        return True
    logger.warning("%s is damaged; what it held is computed again", file)
    return False
