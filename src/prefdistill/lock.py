"""One process at a time in a run directory: the second is told who holds it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from prefdistill.atomic import write_json
from prefdistill.errors import ConfigError

LOCK, HOLDER = ".lock", ".holder.json"


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Holds a run directory; the system frees it when the process ends, however it ends.

    Raises:
        ConfigError: another process holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"{root} is in use by {_holder(root)}; wait for it, stop it, or give another output_dir"
        ) from error
    try:
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(root / HOLDER, {"pid": os.getpid(), "host": platform.node(), "since": since})
        yield
    finally:
        (root / HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(root: Path) -> str:
    try:
        who = json.loads((root / HOLDER).read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError):
        # It has taken the lock and not yet written its name.
        return "another process"
