"""Errors a user can mend; the command line prints them without a traceback and exits with 2."""

from __future__ import annotations

import errno


class PrefdistillError(Exception):
    """Base of every error that names its cause and what to do about it."""


class DataError(PrefdistillError):
    """A file, row or column that cannot be used; the message names it and the remedy."""


class ConfigError(PrefdistillError):
    """An option or combination of options that cannot be used."""


class TrainingError(PrefdistillError):
    """A training whose loss or gradients are no longer numbers; its last good checkpoint is kept."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine has no memory left, as Python or PyTorch say it."""
    said = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return said or isinstance(error, MemoryError)


def is_disk_full(error: BaseException) -> bool:
    """Whether a library says, each in its own way, that a file system has no room left."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors passes on Rust's words; torch.save says where in its archive it could not go on, and no more.
    said = str(error)
    torchs = "PytorchStreamWriter failed writing file" in said or (
        "inline_container" in said and "unexpected pos" in said
    )
    return f"os error {errno.ENOSPC}" in said or torchs
