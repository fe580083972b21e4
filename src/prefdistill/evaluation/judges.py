"""Who says how good a response is: an oracle function, or a reward model that the training has not seen."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefdistill.data.table import shorten
from prefdistill.errors import ConfigError, DataError

Oracle = Callable[[Sequence[Mapping[str, Any]], Sequence[str]], list[float]]


def is_oracle(name: str) -> bool:
    """Whether a judge's name is module:function, not a folder or a hub id."""
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in module.split(".")) and function.isidentifier()


def load_oracle(name: str) -> Oracle:
    """The function behind module:function; it takes rows and response texts, one of each a response.

    A row holds the prompt, as the data have it (text or messages), and the columns besides the pair: of a prompt's
    first row, where it has several.

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
    if not callable(found):
        raise ConfigError(
            f"evaluate.judge {name!r} is a {type(found).__name__}, which cannot be called; name a function"
        )
    return found


def oracle_fingerprint(name: str) -> str:
    """A fingerprint of the file that an oracle's function is written in: edited, it judges anew.

    Of a partial the function's, of another object its class's; "" where there is no such file (a notebook, built-ins).
    """
    found: Any = inspect.unwrap(load_oracle(name))
    while isinstance(found, functools.partial):
        found = found.func
    try:
        file = inspect.getsourcefile(found if inspect.isroutine(found) or inspect.isclass(found) else type(found))
    except TypeError:  # built in
        return ""
    if file is None or not Path(file).is_file():
        return ""
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()


def oracle_scores(name: str, rows: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> np.ndarray:
    """Scores [N] of responses by the function behind module:function, checked.

    Raises:
        ConfigError: as `load_oracle`.
        DataError: it gave something else than a finite number for every response.
    """
    given = load_oracle(name)(rows, responses)
    try:
        scores = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"the judge {name!r} gave no list of numbers ({error}); mend the function") from error
    if scores.shape != (len(responses),):
        raise DataError(
            f"the judge {name!r} gave scores of shape {scores.shape} for {len(responses)} responses; it must give a "
            "number for each, in their order"
        )
    if not np.isfinite(scores).all():
        first = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise DataError(
            f"the judge {name!r} gave {scores[first]} for {shorten(responses[first])}; a score is a finite number: "
            "mend the function, or take the prompts out that it cannot judge"
        )
    return scores


def describe(oracle: Oracle) -> str:
    """The first line of the oracle's own documentation."""
    text = (oracle.__doc__ or "").strip()
    return text.splitlines()[0].rstrip(".") if text else "a function given by the user"
