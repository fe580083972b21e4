"""`make fuzz-bytes SECONDS=300`: any bytes at all as every file that is read: our errors or what was read.

Coverage-guided by atheris, which is no part of the development requirements: `pip install -e ".[fuzz]"`. Each target is
a process of its own and begins with small real files. Without atheris a little of it is in the test suite, with bytes
that are changed blindly.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__)
sys.path.insert(0, str(HERE.parents[1]))

INSTRUMENTED = ["prefdistill.data", "prefdistill.manifest", "prefdistill.seals", "prefdistill.cli", "csv", "json"]


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        seeds: contents of small real ones.
        read: given an empty folder and the bytes; raises whatever is a fault.
    """

    seeds: Callable[[], list[bytes]]
    read: Callable[[Path, bytes], object]


def told(error: Exception, place: str) -> None:
    """An error of ours says where the fault is."""
    assert place in str(error), error


# --- reading ----------------------------------------------------------------------------------------------------------


def rows(name: str, folder: Path, content: bytes) -> None:
    """The file as rows, as pairs, stopping and dropping; an error names the file."""
    (folder / name).write_bytes(content)
    read_source(folder / name)


def read_source(path: Path) -> None:
    from prefdistill.data.formats import load_pairs
    from prefdistill.errors import DataError

    def names(where: str, error: DataError, row: object = None) -> None:
        assert str(path) in where, where
        told(error, str(path))

    for on_bad in (None, names):
        try:
            load_pairs(str(path), on_bad_row=on_bad)
        except DataError as error:
            names(str(path), error)


def saved(folder: Path, content: bytes) -> None:
    """The Arrow file of a folder that save_to_disk wrote."""
    for name in ("dataset_info.json", "state.json"):
        shutil.copy(_saved_folder() / name, folder)
    (folder / "data-00000-of-00001.arrow").write_bytes(content)
    read_source(folder)


def saved_state(folder: Path, content: bytes) -> None:
    """The state of such a folder."""
    for name in ("dataset_info.json", "data-00000-of-00001.arrow"):
        shutil.copy(_saved_folder() / name, folder)
    (folder / "state.json").write_bytes(content)
    read_source(folder)


def transcripts(folder: Path, content: bytes) -> None:
    """Two texts: the prompt and a response give back each, whatever they hold."""
    from prefdistill.data.formats import to_pair
    from prefdistill.errors import DataError

    chosen, _, rejected = content.decode("utf-8", "surrogateescape").partition("\x00")
    try:
        pair = to_pair({"chosen": chosen, "rejected": rejected}, "row 1")
    except DataError as error:
        told(error, "row 1")
        return
    assert isinstance(pair.prompt, str)
    assert (pair.prompt + str(pair.chosen), pair.prompt + str(pair.rejected)) == (chosen, rejected)


def configuration(folder: Path, content: bytes) -> None:
    """The YAML of a run."""
    from prefdistill.cli import parse
    from prefdistill.errors import ConfigError

    file = folder / "config.yaml"
    file.write_bytes(content)
    with contextlib.suppress(ConfigError):
        parse("run", [str(file)]).check()


def manifest(folder: Path, content: bytes) -> None:
    from prefdistill.errors import DataError
    from prefdistill.manifest import Manifest

    (folder / "manifest.json").write_bytes(content)
    try:
        read = Manifest(folder)
    except DataError as error:
        told(error, "manifest.json")
        return
    for name, record in read.stages.items():
        assert read.is_done(name, record.fingerprint) in (True, False)


def seal(folder: Path, content: bytes) -> None:
    from prefdistill.seals import SEAL, is_whole

    (folder / "weights").write_bytes(b"0123456789")
    (folder / SEAL).write_bytes(content)
    assert is_whole(folder) in (True, False)


def shard(folder: Path, content: bytes) -> None:
    """A column's shard whose name tells of its bytes, and one whose name does not."""
    from prefdistill.scoring import Column
    from prefdistill.seals import checksum

    file = folder / "shard-00000.parquet"
    file.write_bytes(content)
    file.rename(folder / f"shard-00000-{'0' * 32}.parquet")
    assert Column(folder, "model").stale_shards == 1
    (folder / f"shard-00000-{'0' * 32}.parquet").rename(file)
    file.rename(folder / f"shard-00000-{checksum(file)}.parquet")
    column = Column(folder, "model")
    assert column.stale_shards == (not column.values)


# --- seeds ------------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "Größe:\n", "chosen": " 1", "rejected": " 2", "id": 7},
    {"prompt": "p", "chosen": 'a "b", c', "rejected": "{", "id": None},
]
CHATS = [
    {
        side: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": side}]
        for side in ("chosen", "rejected")
    }
]
TLDR = [
    {
        "info": {"subreddit": "s", "title": "t", "post": "p"},
        "summaries": [{"text": "a"}, {"text": "b"}],
        "choice": 0,
    }
]


def lines(rows_of: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows_of).encode()


def parquet(rows_of: list[dict], **options: object) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows_of), out, **options)
    return out.getvalue()


def parquet_seeds() -> list[bytes]:
    kinds = [(ROWS, {"compression": "none"}), (CHATS, {"compression": "zstd"}), (TLDR, {"use_dictionary": False})]
    return [parquet(rows_of, **options) for rows_of, options in kinds]


_SAVED: list[Path] = []


def _saved_folder() -> Path:
    if not _SAVED:
        import atexit

        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        Dataset.from_list(ROWS).save_to_disk(folder / "saved")
        _SAVED.append(folder / "saved")
    return _SAVED[0]


def yaml_seeds() -> list[bytes]:
    from prefdistill.config import RunConfig

    whole = RunConfig(data="pairs.jsonl", model="org/name", output_dir="out").as_yaml().encode()
    short = b"data: a.jsonl\nmodel: m\noutput_dir: o\nmethods: [dpo, mine]\n"
    return [whole, short + b"distill:\n  per_method: {mine: {method: e-dpo, beta: 0.2}}\nreward: {rho: [0.2]}\n"]


def manifest_seeds() -> list[bytes]:
    from prefdistill.manifest import Manifest, StageRecord

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "data").write_bytes(b"content")
        written = Manifest(root)
        written.finish("data", StageRecord("abc", 1.5, 0.1, said="3 pairs"), [root / "data"])
        whole = written.path.read_bytes()
    read = json.loads(whole)
    del read["blake2b"]
    return [whole, json.dumps(read).encode()]


def seal_seeds() -> list[bytes]:
    from prefdistill.seals import SEAL
    from prefdistill.seals import seal as write

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "weights").write_bytes(b"0123456789")
        write(Path(folder))
        return [(Path(folder) / SEAL).read_bytes()]


def shard_seeds() -> list[bytes]:
    import numpy as np

    from prefdistill.scoring import Column

    out = []
    with tempfile.TemporaryDirectory() as folder:
        for name, values in (("numbers", np.array([1.0, -2.5])), ("vectors", np.ones((2, 3)))):
            Column(Path(folder) / name, "model").add(["a", "b"], values)
            out += [f.read_bytes() for f in (Path(folder) / name).iterdir()]
    return out


TARGETS: dict[str, Target] = {
    "jsonl": Target(lambda: [lines(ROWS), lines(CHATS), lines(TLDR)], partial(rows, "a.jsonl")),
    "json": Target(lambda: [json.dumps(r).encode() for r in (ROWS, {"data": CHATS})], partial(rows, "a.json")),
    "csv": Target(
        lambda: [b'prompt,chosen,rejected\na,"b ""c"", d",e\nf,g,h\n', b"chosen,rejected\r\na b,a c\r\n"],
        partial(rows, "a.csv"),
    ),
    "gzip": Target(lambda: [gzip.compress(lines(r), mtime=0) for r in (ROWS, CHATS)], partial(rows, "a.jsonl.gz")),
    "parquet": Target(parquet_seeds, partial(rows, "a.parquet")),
    "arrow": Target(lambda: [f.read_bytes() for f in _saved_folder().glob("*.arrow")], saved),
    "state": Target(lambda: [(_saved_folder() / "state.json").read_bytes()], saved_state),
    "transcripts": Target(
        lambda: [
            b"\n\nHuman: Hi\n\nAssistant: Yes\x00\n\nHuman: Hi\n\nAssistant: No\n\nHuman: So?\n\nAssistant: a",
            "The sky is blue\x00The sky is brün".encode(),
        ],
        transcripts,
    ),
    "yaml": Target(yaml_seeds, configuration),
    "manifest": Target(manifest_seeds, manifest),
    "seal": Target(seal_seeds, seal),
    "shard": Target(shard_seeds, shard),
}


# --- running ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """A folder for one input, whose files go afterwards."""
    place = folder / "input"
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place)


def changed(content: bytes, draw: random.Random) -> bytes:
    """Bytes with a few places changed, blindly."""
    out = bytearray(content)
    for _ in range(draw.randrange(1, 5)):
        place = draw.randrange(len(out) + 1)
        how = draw.randrange(5)
        if how == 0 and place < len(out):
            out[place] ^= 1 << draw.randrange(8)
        elif how == 1 and place < len(out):
            out[place] = draw.choice(b'\x00\xff{}[]",:\n0-')
        elif how == 2:
            del out[place : place + draw.randrange(1, 9)]
        elif how == 3:
            out[place:place] = out[place : place + draw.randrange(1, 9)]
        else:
            del out[place:]
    return bytes(out)


def blindly(name: str, n: int, seed: int, folder: Path) -> None:
    """Reads the seeds of a target and `n` changed ones."""
    draw = random.Random(f"{name}-{seed}")
    seeds = TARGETS[name].seeds()
    for content in [*seeds, *(changed(draw.choice(seeds), draw) for _ in range(n))]:
        with emptied(folder) as place:
            try:
                TARGETS[name].read(place, content)
            except Exception as error:
                error.add_note(f"{name}: {content!r}")
                raise


def guided(name: str, seconds: int, corpus: Path) -> None:
    """Runs atheris on a target in this process, which it ends."""
    import atheris

    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=INSTRUMENTED):
        import prefdistill.cli
        import prefdistill.data.formats
        import prefdistill.manifest
        import prefdistill.scoring  # noqa: F401
    for i, content in enumerate(TARGETS[name].seeds()):
        (corpus / f"seed-{i}").write_bytes(content)
    scratch = Path(tempfile.mkdtemp())

    def one(content: bytes) -> None:
        with emptied(scratch) as place:
            TARGETS[name].read(place, content)

    faults = f"-artifact_prefix=fuzz-{name}-"
    # libFuzzer's process ends itself, so the scratch folder is left to whoever started it.
    atheris.Setup([sys.argv[0], str(corpus), f"-max_total_time={seconds}", "-rss_limit_mb=4096", faults], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=300, help="for all targets together")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    unknown = set(asked.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are: {', '.join(TARGETS)}")
    if asked.here:
        guided(asked.targets[0], asked.seconds, Path(asked.here))
    each = max(1, asked.seconds // len(asked.targets))
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.targets:
            corpus = Path(folder) / name
            corpus.mkdir()
            command = [sys.executable, str(HERE), name, "--seconds", str(each), "--here", str(corpus)]
            environment = {**os.environ, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
            end = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("Done ")), "")
            print(f"{name}: {end or 'stopped'}; {len(list(corpus.iterdir()))} files in the corpus", flush=True)
            if done.returncode:
                failed.append(name)
                print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", flush=True)
    print(f"{len(asked.targets) - len(failed)} of {len(asked.targets)} targets without a fault")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
