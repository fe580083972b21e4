"""Folders of PEFT adapters: what they stand on, and whether their weights may be read."""

from __future__ import annotations

import json
from pathlib import Path

from prefdistill.errors import ConfigError

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def is_adapter(name: str) -> bool:
    return (Path(name) / ADAPTER_CONFIG).exists()


def adapter_base(name: str) -> str:
    """Folder or hub id of the model that a PEFT adapter folder stands on.

    Raises:
        ConfigError: the folder's configuration does not say.
    """
    file = Path(name) / ADAPTER_CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read ({type(error).__name__}: {error}); save the adapter again") from error
    if not isinstance(found, str) or not found:
        raise ConfigError(f"{file} names no base (base_model_name_or_path is {found!r}); put in its folder or hub id")
    return found


def check_weights(name: str) -> None:
    """Raises ConfigError where an adapter's weights lie in no safetensors file: pickled ones are not read."""
    if not (Path(name) / WEIGHTS).exists():
        raise ConfigError(
            f"the adapter {name!r} has no {WEIGHTS}; save it again with safe_serialization=True: weights in other "
            "files are not read"
        )
