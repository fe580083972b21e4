"""Who says how good a response is: an oracle function, or a reward model that the training has not seen."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefdistill.errors import ConfigError

Oracle = Callable[[Sequence[Mapping[str, Any]], Sequence[str]], list[float]]


def is_oracle(name: str) -> bool:
    """Whether a judge's name is module:function, not a folder or a hub id."""
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in module.split(".")) and function.isidentifier()


def load_oracle(name: str) -> Oracle:
    """The function behind module:function; it takes the rows (their columns besides the pair) and response texts.

    Raises:
        ConfigError: the module or the function does not exist.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"evaluate.judge {name!r} cannot be imported ({error}); give module:function of an importable module, a "
            "folder or hub id of a reward model, or heldout"
        ) from error
    return found


def oracle_fingerprint(name: str) -> str:
    """A fingerprint of the file that an oracle's function is written in: edited, it judges anew."""
    file = inspect.getsourcefile(inspect.unwrap(load_oracle(name)))
    if file is None:
        return ""
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()


def describe(oracle: Oracle) -> str:
    """The first line of the oracle's own documentation."""
    text = (oracle.__doc__ or "").strip()
    return text.splitlines()[0].rstrip(".") if text else "a function given by the user"
