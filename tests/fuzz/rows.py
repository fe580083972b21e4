"""`make fuzz N=100000`: files of mutated rows; nothing but our errors, and no row that is used has changed.

Every input is a file that hypothesis makes of some rows (JSON Lines, a JSON list, CSV, Parquet): whole ones of every
shape, of which some were mutated as values, and of which some lines were mutated as bytes. Each is read twice: stopping
at the first bad row, which must raise `DataError` with the file's name or give every row; and dropping bad rows, where
used and dropped rows must be the file's. The text of every row that is used is compared with an independent reading, or
with what was written; bytes changed inside a Parquet file may be anything, so only its errors are looked at.
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

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from prefdistill.data.formats import load_pairs
from prefdistill.errors import DataError

CHUNK = 10_000  # inputs that hypothesis remembers, so as to make no other like them
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


# A file's bytes, and its rows by their numbers where they are known: those that cannot be read are None.
Made = tuple[bytes, dict[int, Any] | None]


def some_rows(draw: random.Random) -> list[Any]:
    out: list[Any] = []
    for _ in range(draw.randrange(1, 6)):
        row: Any = whole_row(draw)
        if draw.random() < 0.5:
            for _ in range(draw.randrange(1, 3)):
                row = mutated(row, draw)
        out.append(draw.choice(out) if draw.random() < 0.1 and out else row)
    return out


def damaged(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + draw.choice(BYTES) + content[place + draw.randrange(3) :]


def json_lines(draw: random.Random) -> list[bytes]:
    """A row each, of which some are broken."""
    lines = []
    for row in some_rows(draw):
        line = json.dumps(row, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
        if draw.random() < 0.2:
            line = damaged(line, draw)
        if draw.random() < 0.03:
            line = line[:-1] + b', "chosen": "twice"}'
        lines.append(line)
    return lines


def jsonl(draw: random.Random) -> Made:
    lines = json_lines(draw)
    content = draw.choice([b"\n", b"\n", b"\n\n", b"\r\n"]).join(lines) + draw.choice([b"\n", b""])
    return content, read_lines(content)


def read_lines(content: bytes) -> dict[int, Any] | None:
    try:
        lines = [line.decode("utf-8") for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    except UnicodeDecodeError:
        return None
    return {number: read_json(line) for number, line in enumerate(lines, 1) if line.strip()}


def read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def json_list(draw: random.Random) -> Made:
    listed = b"[" + draw.choice([b",", b", ", b",\n"]).join(json_lines(draw)) + b"]"
    content = b'{"data": ' + listed + b"}" if draw.random() < 0.3 else listed
    try:
        read = read_json(content.decode("utf-8"))
    except UnicodeDecodeError:
        return content, None
    listed_rows = read.get("data") if isinstance(read, dict) else read
    return content, dict(enumerate(listed_rows, 1)) if isinstance(listed_rows, list) else None


def csv_file(draw: random.Random) -> Made:
    columns = ["prompt", "chosen", "rejected", "id"]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns)
    written = []
    for _ in range(draw.randrange(1, 5)):
        row = [text(draw), text(draw), text(draw), str(draw.randrange(9))]
        if draw.random() < 0.3:
            row = row[: draw.randrange(5)] + [draw.choice(["", "\x00", "a,b", '"'])] * draw.randrange(2)
        writer.writerow(row)
        written.append(row)
    content = out.getvalue().encode()
    if draw.random() < 0.2:
        return damaged(content, draw), None
    rows = [dict(zip(columns, row, strict=True)) if len(row) == 4 else None for row in written if row]
    return content, dict(enumerate(rows, 1))


def parquet(draw: random.Random) -> Made:
    table = None
    while table is None:
        try:
            table = pa.Table.from_pylist([row for row in some_rows(draw) if isinstance(row, dict)])
            pq.write_table(table, out := io.BytesIO())
        except (pa.ArrowException, ValueError, OverflowError, TypeError):
            table = None  # columns of several types, or texts that are none
    content = out.getvalue()
    if draw.random() < 0.2:
        return damaged(content, draw), None
    return content, dict(enumerate(table.to_pylist(), 1))


MAKERS = {
    "pairs.jsonl": (jsonl, 6),
    "pairs.json": (json_list, 2),
    "pairs.csv": (csv_file, 1),
    "pairs.parquet": (parquet, 1),
}


def turns(value: Any) -> list[tuple[str, str]]:
    """Messages as role and text; a text is the assistant's answer."""
    if isinstance(value, str):
        return [("assistant", value)]
    return [(m["role"], only_text(m["content"])) for m in value]


def only_text(content: Any) -> str:
    return content if isinstance(content, str) else content[0]["text"]


def reading(path: Path, drop: Any) -> tuple[list[Any], DataError | None]:
    try:
        return load_pairs(str(path), on_bad_row=drop), None
    except DataError as error:
        return [], error


def check(path: Path, content: bytes, rows: dict[int, Any] | None) -> str:
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
    assert refused is not None or repr(strict) == repr(kept)  # NaN is not itself
    if fatal is not None:
        return "file refused"
    if rows is not None:
        places = sorted(int(w.rpartition(" ")[2]) for w in [*dropped, *(p.where for p in kept)])
        assert places == sorted(rows), "a row is neither used nor named"
        for pair in kept:
            unchanged(pair, rows[int(pair.where.rpartition(" ")[2])])
    return "rows dropped" if dropped else "all used"


def unchanged(pair: Any, row: dict[str, Any]) -> None:
    """The pair is the row: prompt and responses are its columns, or put together give them again, each its own."""
    read = (pair.prompt, pair.chosen, pair.rejected)
    compared = "chosen" in row and "rejected" in row
    if not compared:
        expected = tldr(row)
        assert read == expected, (read, expected)
    elif all(isinstance(row.get(name, ""), str) for name in ("prompt", "chosen", "rejected")):
        if "prompt" in row:
            assert read == (row["prompt"], row["chosen"], row["rejected"])
        else:
            assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])
    else:
        prompt, *answers = map(turns, read)
        given = [turns(row[name]) for name in ("chosen", "rejected")]
        whole = [prompt + answer for answer in answers] == given
        if isinstance(row.get("prompt"), list):
            assert prompt == turns(row["prompt"])
            assert whole or answers == given
        else:
            assert whole
            assert "prompt" not in row or ("user", row["prompt"]) in prompt
    used = {"prompt", "chosen", "rejected"} if compared else {"info", "summaries", "choice"}
    extra = {k: v for k, v in row.items() if k not in used}
    assert pair.extra.keys() == extra.keys()
    # NaN is not itself, and a TL;DR row's "valid1" is read as "validation".
    assert all(pair.extra[k] == v or v != v or (k == "split" and not compared) for k, v in extra.items()), row


def tldr(row: dict[str, Any]) -> tuple[str, str, str]:
    """The texts of a TL;DR comparison, as its authors publish the prompts."""
    info, texts = row["info"], [" " + summary["text"].strip() for summary in row["summaries"]]
    if info.get("post") is None and info.get("article") is not None:
        prompt = f"Article:\n\n{info['article']}\n\nTL;DR:"
    else:
        prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"
    return prompt, texts[row["choice"]], texts[1 - row["choice"]]


def fuzz(n: int, seed: int, folder: Path) -> Counter[str]:
    """Checks so many files that hypothesis makes; of one that fails it looks for a small one, which is saved."""
    counts: Counter[str] = Counter()
    last: dict[str, bytes] = {}

    def read(draw: random.Random) -> None:
        name = draw.choices(list(MAKERS), [share for _, share in MAKERS.values()])[0]
        content, rows = MAKERS[name][0](draw)
        last.clear()
        last[name] = content
        counts[check(folder / name, content, rows)] += 1
        counts[Path(name).suffix] += 1
        counts["inputs"] += 1

    quiet = {
        "deadline": None,
        "database": None,
        "suppress_health_check": list(HealthCheck),
        "print_blob": False,
        "report_multiple_bugs": False,
    }
    while counts["inputs"] < n:
        asked = settings(max_examples=min(CHUNK, n - counts["inputs"]), phases=[Phase.generate, Phase.shrink], **quiet)
        part = hypothesis.seed(f"{seed}-{counts['inputs']}")(asked(given(st.randoms(use_true_random=False))(read)))
        try:
            part()
        except Exception as error:
            name, content = last.popitem()
            saved = Path(f"fuzz-{seed}-{counts['inputs']}-{name}")
            saved.write_bytes(content)
            raise SystemExit(f"an input of seed {seed}, saved as {saved}: {type(error).__name__}: {error}") from error
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=int, nargs="?", default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz(asked.inputs, asked.seed, Path(folder))
    told = ", ".join(f"{what} {n:,}" for what, n in sorted(counts.items()))
    print(f"{asked.inputs:,} inputs, no exception but ours, no row changed ({told}; {time.monotonic() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
