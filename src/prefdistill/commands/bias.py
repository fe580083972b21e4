"""`prefdistill bias`: D_rho of any preference data: a resample in which a fraction rho prefers the longer response."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefdistill.atomic import json_line, write_text
from prefdistill.errors import ConfigError, DataError

USUAL = (0.2, 0.8)  # sizes are kept equal over at least this range, whatever --rho asks for


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="prefdistill bias",
        description="Writes one JSONL file for every rho, all with as many pairs: the most that every rho from 0.2 to "
        "0.8 allows without replacement, or --pairs.",
    )
    made.add_argument("--data", required=True, help="file, folder or hub id, in any shape that `run` reads")
    made.add_argument("--model", required=True, help="whose tokenizer counts a response's tokens")
    made.add_argument("--rho", required=True, help="fractions that prefer the longer response, e.g. 0.2,0.5,0.8")
    made.add_argument("--output-dir", type=Path, required=True, help="where rho-R.jsonl goes")
    made.add_argument("--pairs", type=int, help="pairs of every file")
    made.add_argument("--with-replacement", action="store_true", help="repeat pairs where there are too few")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--split", default="train", help="of a hub data set")
    made.add_argument("--config-name", help="of a hub data set")
    made.add_argument("--data-dir", help="of a hub data set, such as helpful-base of Anthropic/hh-rlhf")
    made.add_argument("--limit", type=int, help="rows that are read at most")
    made.add_argument(
        "--on-bad-row",
        choices=("stop", "drop"),
        default="stop",
        help="at a row that cannot be used, or leave such rows out",
    )
    made.add_argument(
        "--both-orders", choices=("stop", "keep"), default="stop", help="a pair that stood before the other way round"
    )
    return made


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)

    from prefdistill.data.bias import common_size, length_biased
    from prefdistill.data.formats import load_pairs
    from prefdistill.data.tokenise import Encoder
    from prefdistill.models.loading import load_tokenizer

    rhos = _fractions(options.rho)
    if options.pairs is not None and options.pairs < 1:
        raise ConfigError(f"--pairs is {options.pairs}; it must be at least 1")
    if options.with_replacement and options.pairs is None:
        raise ConfigError("--with-replacement needs --pairs; without it every file has pairs that occur once")
    left_out: list[str] = []
    pairs = load_pairs(
        options.data,
        split=options.split,
        config_name=options.config_name,
        data_dir=options.data_dir,
        limit=options.limit,
        both_orders=options.both_orders,
        on_bad_row=None if options.on_bad_row == "stop" else lambda where, error, row: left_out.append(str(error)),
    )
    if left_out:
        print(f"{len(left_out)} rows left out, the first because: {left_out[0]}", file=sys.stderr)
    if not pairs:
        raise DataError(f"{options.data}: no row can be used")
    signs = token_signs(Encoder(load_tokenizer(options.model)), pairs)
    size = options.pairs or common_size(signs, {*rhos, *USUAL})
    # All are drawn before any is written: a rho that the data refuse leaves nothing behind.
    weights = {
        rho: length_biased(signs, rho, seed=options.seed, size=size, replacement=options.with_replacement)
        for rho in rhos
    }
    longer, shorter, equal = (int((signs == s).sum()) for s in (1, -1, 0))
    print(
        f"{len(pairs)} pairs: {longer} prefer the longer response, {shorter} the shorter one, {equal} are of equal "
        f"length and left out; natural rate {longer / max(1, longer + shorter):.3f}",
        file=sys.stderr,
    )
    for rho, drawn in weights.items():
        path = options.output_dir / f"rho-{rho:g}.jsonl"
        rows = [pair.row() for pair, weight in zip(pairs, drawn.tolist(), strict=True) for _ in range(weight)]
        write_text(path, "".join(json_line(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} pairs, {int(drawn[signs > 0].sum()) / len(rows):.3f} prefer the longer response")
    return 0


def token_signs(encoder: Any, pairs: Sequence[Any]) -> np.ndarray:
    """+1, -1 or 0 a pair: whether the chosen response has more, fewer or as many tokens [P]."""

    def length(prompt: Any, response: Any) -> int:
        return len(encoder.response_ids(prompt, response))

    return np.array([np.sign(length(p.prompt, p.chosen) - length(p.prompt, p.rejected)) for p in pairs], dtype=np.int64)


def _fractions(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--rho is {text!r}; give fractions such as 0.2,0.5,0.8") from error
    if not all(0 <= rho <= 1 for rho in found):
        raise ConfigError(f"--rho is {text!r}; every fraction must lie in [0, 1]")
    return tuple(dict.fromkeys(found))
