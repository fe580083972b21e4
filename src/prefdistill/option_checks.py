"""Whether single options hold what they may: values of their type, names that make folders, no secrets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from prefdistill.errors import ConfigError
from prefdistill.training.methods import METHODS, method_named


def check_not_blank(options: Any, inside: str = "") -> None:
    """Raises ConfigError for an option that was left blank, which YAML reads as null, where it must have a value."""
    for option in fields(options):
        value, name = getattr(options, option.name), inside + option.name
        if value is None and "None" not in str(option.type):
            raise ConfigError(f"{name} has no value; give it one, or leave its line out for the usual one")
        if is_dataclass(value):
            check_not_blank(value, f"{name}.")


# Names of variants become folders, files and rows of tables.
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,99}")


def check_variant(name: str, own: dict[str, Any]) -> None:
    where = f"distill.per_method.{name}"
    if not isinstance(own, dict):
        raise ConfigError(f"{where} is {own!r}; it must be a mapping of options")
    if "method" not in own:
        if name not in METHODS:
            raise ConfigError(
                f"{where}: {name!r} is no method ({', '.join(METHODS)}); a variant must say whose it is, e.g. "
                "{method: e-dpo, beta: 0.2}"
            )
        return
    if name in METHODS or name == "reference" or not _VARIANT.fullmatch(name):
        raise ConfigError(
            f"{where} has `method`, so its name must be one of your own: letters, digits and . _ = , + - only, and no "
            "name of a method"
        )
    method_named(own["method"])


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


# What the types of DistillOptions let in.
_FITS: dict[str, Callable[[Any], bool]] = {
    "str": lambda v: isinstance(v, str),
    "bool": lambda v: isinstance(v, bool),
    "int": _is_whole,
    "float": _is_number,
    "float | None": lambda v: v is None or _is_number(v),
    "list[int] | None": lambda v: v is None or (isinstance(v, list) and all(map(_is_whole, v))),
    "dict[str, Any]": lambda v: isinstance(v, dict),
}
_LIKE = {"float | None": "like a number", "list[int] | None": "a list of whole numbers such as [0, 1], or null"}


_CHECKPOINTS = "checkpoints are the run's: a stopped training goes on from them"
# Training arguments that a run sets itself, and why it is not theirs to say.
RUNS_OWN = {
    **dict.fromkeys(("output_dir", "save_only_model", "save_total_limit", "save_strategy"), _CHECKPOINTS),
    **dict.fromkeys(("resume_from_checkpoint", "load_best_model_at_end", "push_to_hub"), _CHECKPOINTS),
    **{name: f"the option for it is distill.{name}" for name in ("save_steps", "logging_steps", "learning_rate")},
    **dict.fromkeys(("do_eval", "eval_strategy", "eval_steps"), "policies are chosen by distill.checkpoints"),
    **dict.fromkeys(("seed", "report_to", "gradient_checkpointing"), "there is an option of this name"),
    **dict.fromkeys(("bf16", "fp16"), "the option for it is precision"),
    "torch_compile": "the option for it is compile",
    "per_device_train_batch_size": "the option for it is distill.batch_prompts",
    "num_train_epochs": "the option for it is distill.epochs",
}

_SECRET = re.compile(r"(^|[_-])(token|key|secret|password|passwd|credentials?)$", re.IGNORECASE)


def check_no_secret(option: str, given: Mapping[str, Any]) -> None:
    """Raises ConfigError where an argument is a secret by its name: options are written into files and the report."""
    for name, value in given.items():
        if _SECRET.search(str(name)) and value is not None:
            raise ConfigError(
                f"{option} has {name!r}, a secret by its name, and options are written into the run directory and the "
                "report; leave it out and set it in the environment (HF_TOKEN for Hugging Face)"
            )
        for inner in value if isinstance(value, list | tuple) else [value]:
            if isinstance(inner, Mapping):
                check_no_secret(f"{option}.{name}", inner)


def check_type(name: str, value: Any, kind: str, usual: Any) -> None:
    """Raises ConfigError for a text where a number belongs, and the like."""
    if not _FITS[kind](value):
        raise ConfigError(f"{name} is {value!r}; it must be {_LIKE.get(kind, f'like {usual!r}')}")
