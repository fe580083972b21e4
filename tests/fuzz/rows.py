"""`make fuzz N=100000`: files of mutated rows; nothing but our errors, and no row that is used has changed.

Every input is a file of some rows: whole ones of every shape, of which some were mutated at random as values, and of
which some lines were mutated as bytes. Each is read twice: stopping at the first bad row, which must raise `DataError`
with the file's name or give every row; and dropping bad rows, where used and dropped rows must be the file's, in order.
The text of every row that is used is compared with an independent reading of its line.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from prefdistill.data.formats import load_pairs
from prefdistill.errors import DataError

WORDS = ["red", "round", "ü", "日本", "\u202e", "a\nb", " ", "\t", "", "0", "Human:", "<|im_end|>", "{", '"', "\u2028"]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 1.5, 1e308, float("nan"), float("inf"), "", " ", "\n", "\x00", "\ud800", "x" * 5000,
    [], [None], [[]], {}, {"role": "user"}, {"role": "user", "content": None}, {"role": "nobody", "content": "x"},
    [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "hi"}], 10**400, "\ufeff", "a\r\nb",
]  # fmt: skip
BYTES = [
    b"",
    b"\xff",
    b"\x00",
    b"{",
    b"}",
    b'"',
    b",",
    b"\\",
    b"\n",
    b"\r\n",
    b"nul",
    b"NaN",
    b"\xef\xbb\xbf",
    b"[" * 2000,
]


def text(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 6))) + draw.choice(["x", "y", "z"])


def whole_row(draw: random.Random) -> dict[str, Any]:
    """A row of one of the shapes, mostly usable."""
    prompt, first, second = text(draw), text(draw), text(draw)
    say = lambda role, content: {"role": role, "content": content}  # noqa: E731
    shape = draw.randrange(6)
    if shape == 0:
        return {"prompt": prompt, "chosen": first, "rejected": second}
    if shape == 1:
        turns = [say("user", prompt)]
        return {"prompt": turns, "chosen": [say("assistant", first)], "rejected": [say("assistant", second)]}
    if shape == 2:
        turns = [say("system", text(draw)), say("user", prompt)]
        return {"chosen": [*turns, say("assistant", first)], "rejected": [*turns, say("assistant", second)]}
    if shape == 3:
        told = f"\n\nHuman: {prompt}\n\nAssistant:"
        return {"chosen": f"{told} {first}", "rejected": f"{told} {second}"}
    if shape == 4:
        info = {"id": "t3", "subreddit": "r", "title": text(draw), "post": prompt}
        return {"info": info, "summaries": [{"text": first}, {"text": second}], "choice": draw.randrange(2)}
    return {"chosen": f"{prompt} {first}", "rejected": f"{prompt} {second}", "id": draw.randrange(9)}


def mutated(value: Any, draw: random.Random) -> Any:
    """A copy with one place changed: replaced, removed, doubled or nested."""
    value = copy.deepcopy(value)
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        what = draw.randrange(5)
        if what == 0:
            del value[key]
        elif what == 1:
            value[draw.choice([*WORDS, "prompt", "chosen", "rejected", "role", "split"])] = value.pop(key)
        elif what == 2:
            value[key] = draw.choice(VALUES)
        else:
            value[key] = mutated(value[key], draw)
        return value
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        what = draw.randrange(4)
        if what == 0:
            del value[place]
        elif what == 1:
            value.insert(place, copy.deepcopy(value[place]))
        else:
            value[place] = mutated(value[place], draw)
        return value
    if isinstance(value, str) and value and draw.random() < 0.5:
        place = draw.randrange(len(value))
        return (
            value[:place]
            + draw.choice(["\ud83d", "\x00", "\n", "", " ", "\u200b"])
            + value[place + draw.randrange(2) :]
        )
    return draw.choice(VALUES)


def jsonl(draw: random.Random) -> bytes:
    lines = []
    for _ in range(draw.randrange(1, 6)):
        row: Any = whole_row(draw)
        if draw.random() < 0.5:
            for _ in range(draw.randrange(1, 3)):
                row = mutated(row, draw)
        if draw.random() < 0.1 and lines:
            lines.append(draw.choice(lines))
            continue
        try:
            line = json.dumps(row, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
        except ValueError:
            continue  # a number of too many digits
        if draw.random() < 0.2:
            place = draw.randrange(len(line) + 1)
            line = line[:place] + draw.choice(BYTES) + line[place + draw.randrange(3) :]
        if draw.random() < 0.03:
            line = line[:-1] + b', "chosen": "twice"}'
        lines.append(line)
    return draw.choice([b"\n", b"\n", b"\n\n", b"\r\n"]).join(lines) + draw.choice([b"\n", b""])


def csv_file(draw: random.Random) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["prompt", "chosen", "rejected", "id"])
    for _ in range(draw.randrange(1, 5)):
        row = [text(draw), text(draw), text(draw), draw.randrange(9)]
        if draw.random() < 0.3:
            row = row[: draw.randrange(5)] + [draw.choice(["", "\x00", "a,b", '"'])] * draw.randrange(2)
        writer.writerow(row)
    content = out.getvalue().encode()
    if draw.random() < 0.2:
        place = draw.randrange(len(content))
        content = content[:place] + draw.choice(BYTES) + content[place + draw.randrange(3) :]
    return content


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [s for v in value.values() for s in strings(v)]
    return [s for v in value for s in strings(v)] if isinstance(value, list) else []


def reading(path: Path, drop: Any) -> tuple[list[Any], DataError | None]:
    try:
        return load_pairs(str(path), on_bad_row=drop), None
    except DataError as error:
        return [], error


def check(path: Path, content: bytes) -> str:
    """Reads the file both ways; returns what came of it, or raises AssertionError."""
    path.write_bytes(content)
    dropped: list[str] = []

    def drop(where: str, error: DataError, row: Any) -> None:
        assert str(path) in where, where
        assert str(path) in str(error), error
        dropped.append(where)

    kept, fatal = reading(path, drop)
    strict, refused = reading(path, None)
    for error in filter(None, (fatal, refused)):
        assert str(path) in str(error), error
    assert (refused is not None) == (fatal is not None or bool(dropped)), "one reading sees a fault, the other none"
    assert refused is not None or strict == kept
    if fatal is not None:
        return "file refused"
    if path.suffix == ".jsonl":
        lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        numbers = [i for i, line in enumerate(lines, 1) if line.decode("utf-8").strip()]
        places = sorted(int(w.rpartition(" ")[2]) for w in [*dropped, *(p.where for p in kept)])
        assert places == numbers, "a row is neither used nor named"
        for pair in kept:
            row = json.loads(lines[int(pair.where.rpartition(" ")[2]) - 1])
            unchanged(pair, row)
    return "rows dropped" if dropped else "all used"


def unchanged(pair: Any, row: dict[str, Any]) -> None:
    """The pair's texts are the row's own: each of its responses ends a text of the row, each prompt begins one."""
    known = strings(row)
    compared = "chosen" in row and "rejected" in row
    if not compared:
        known += [" " + s["text"].strip() for s in row["summaries"]]
        assert pair.prompt.endswith("TL;DR:")
    else:
        parts = [pair.prompt] if isinstance(pair.prompt, str) else [m["content"] for m in pair.prompt]
        assert all(any(k.startswith(p) for k in known) for p in parts), (parts, row)
    for response in (pair.chosen, pair.rejected):
        parts = [response] if isinstance(response, str) else [m["content"] for m in response]
        assert all(any(k.endswith(p) for k in known) for p in parts), (parts, row)
    used = {"prompt", "chosen", "rejected"} if compared else {"info", "summaries", "choice"}
    extra = {k: v for k, v in row.items() if k not in used}
    assert pair.extra.keys() == extra.keys()
    assert all(pair.extra[k] == v or v != v or k == "split" for k, v in extra.items()), (pair.extra, extra)


def fuzz(n: int, seed: int, folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for i in range(n):
        draw = random.Random(f"{seed}-{i}")
        make, name = (jsonl, "pairs.jsonl") if draw.random() < 0.8 else (csv_file, "pairs.csv")
        content = make(draw)
        try:
            counts[check(folder / name, content)] += 1
        except Exception as error:
            saved = Path(f"fuzz-{seed}-{i}-{name}")
            saved.write_bytes(content)
            raise SystemExit(f"input {i} of seed {seed}, saved as {saved}: {type(error).__name__}: {error}") from error
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=int, nargs="?", default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz(asked.inputs, asked.seed, Path(folder))
    told = ", ".join(f"{what} {n:,}" for what, n in counts.most_common())
    print(f"{asked.inputs:,} inputs, no exception but ours, no row changed ({told}; {time.monotonic() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
