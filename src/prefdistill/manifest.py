"""manifest.json: which stages are done, from which inputs, with which files. Its format stands in docs/files.md.

It holds a checksum of itself: a number that changed in it is found as one in any other file is.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefdistill.atomic import is_unfinished, write_json
from prefdistill.errors import DataError
from prefdistill.seals import checksum

logger = logging.getLogger(__name__)

VERSION = 1


@dataclass
class StageRecord:
    """A stage that is done.

    Attributes:
        fingerprint: of its options and of the fingerprints of the stages that it reads.
        seconds: how long it took.
        cost: its work in passes over the training tokens, as the time left is told by.
        outputs: path, relative to the run directory or of a shared column absolute -> {"bytes", "blake2b"}.
        said: a line on what came out.
    """

    fingerprint: str
    seconds: float
    cost: float
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    said: str = ""


class Manifest:
    """The stages of a run directory that are done.

    Attributes:
        stages: by their names.
        asked: the fingerprint that every stage has under the options that the run was last called with, done or not.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "manifest.json"
        self.stages: dict[str, StageRecord] = {}
        self.asked: dict[str, str] = {}
        if self.path.exists():
            try:
                read = json.loads(self.path.read_text(encoding="utf-8"))
                if not isinstance(read, dict):
                    raise ValueError("no object")
                if read.get("version") != VERSION:
                    raise DataError(
                        f"{self.path} has version {read.get('version')}, this prefdistill reads {VERSION}; use another "
                        "output_dir, or remove it to compute the run again in this directory"
                    )
                self.stages, self.asked = _stages(read), read.get("asked", {})
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{self.path} is broken ({error}); remove it to compute again what cannot be found in this "
                    "directory"
                ) from error

    def is_done(self, stage: str, fingerprint: str) -> bool:
        """Whether the stage was done from the same inputs and its files are still those that it wrote, to the byte.

        A file that is damaged or gone is named in the log: the stage has to be done again.
        """
        record = self.stages.get(stage)
        if record is None or record.fingerprint != fingerprint:
            return False
        for path, entry in record.outputs.items():
            file = self.root / path
            if not file.is_file():
                logger.warning("%s is gone; %s is done again", file, stage)
                return False
            if file.stat().st_size != entry["bytes"] or checksum(file) != entry["blake2b"]:
                logger.warning("%s is not as it was written; %s is done again", file, stage)
                return False
        return True

    def ask(self, prints: dict[str, str]) -> None:
        """Writes down what all stages hang on from now on."""
        if prints != self.asked:
            self.asked = prints
            self.write()

    def is_stale(self, stage: str) -> bool:
        """Whether what a stage left is of other options, rows or models than the run was last called with."""
        record, asked = self.stages.get(stage), self.asked.get(stage)
        return record is not None and asked is not None and record.fingerprint != asked

    def finish(self, stage: str, record: StageRecord, outputs: list[Path]) -> None:
        for output in outputs:
            for file in sorted(output.rglob("*")) if output.is_dir() else [output]:
                if not file.is_file() or is_unfinished(file):
                    continue
                # Columns that runs share lie elsewhere and stand with their absolute path.
                own = self.root in file.parents
                path = file.relative_to(self.root).as_posix() if own else str(file.resolve())
                try:
                    record.outputs[path] = {"bytes": file.stat().st_size, "blake2b": checksum(file)}
                except FileNotFoundError:
                    if own:
                        raise
                    continue  # another run of those that share it has removed it: it was stale
        self.stages[stage] = record
        self.write()

    def write(self) -> None:
        stages = {name: asdict(record) for name, record in self.stages.items()}
        own = fingerprint_of(stages, self.asked)
        write_json(self.path, {"version": VERSION, "stages": stages, "asked": self.asked, "blake2b": own})


def _stages(read: dict[str, Any]) -> dict[str, StageRecord]:
    """The records of a manifest.

    Raises:
        ValueError: they are not as they were written.
    """
    # Before it held a checksum there were these two alone, then there was no `asked`.
    held = [read.get("stages"), *([read["asked"]] if "asked" in read else [])]
    if read.keys() != {"version", "stages"} and fingerprint_of(*held) != read.get("blake2b"):
        raise ValueError("its checksum is not that of its stages")
    try:
        found = {name: StageRecord(**record) for name, record in read["stages"].items()}
        for record in found.values():
            for entry in record.outputs.values():
                entry["bytes"], entry["blake2b"]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"a stage's record is none: {error}") from error
    return found


def fingerprint_of(*parts: Any) -> str:
    """A fingerprint of anything JSON can hold."""
    text = json.dumps(parts, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
