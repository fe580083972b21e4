"""A little of `make fuzz-bytes`: seeds and blindly changed ones; what was found by it and its like, one test each."""

from __future__ import annotations

import base64
import os
import subprocess
import sys

import numpy as np
import pytest

from fuzz.parsers import TARGETS, blindly
from prefdistill.cli import main, parse
from prefdistill.errors import ConfigError
from prefdistill.scoring import Column
from prefdistill.seals import checksum


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_read_or_refused(name, tmp_path):
    blindly(name, 20 if name in ("yaml", "arrow", "state") else 100, 0, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed:", "seed has no value"),
        ("sft:", "sft has no value"),
        ("seed: 1\nreport_to: null\n", "report_to has no value"),
        ("evaluate: {samples: null}", "evaluate.samples has no value"),
        ("dataset:\n  limit:\n", None),  # null is a value of this one
        ("[1]", "holds no options"),
        ("", "holds no options"),
        ("a: [", "is no YAML"),
        ("a: &a [*a]", "maximum recursion|not accepted"),
        ("config: /etc/hostname", "the key 'config'"),
    ],
)
def test_a_configuration_that_is_none(text, said, tmp_path):
    """An option left blank is null: it came to a comparison with a number, and a traceback."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    if said is None:
        parse("run", [str(file)]).check()
        return
    with pytest.raises(ConfigError, match=said):
        parse("run", [str(file)]).check()


@pytest.mark.parametrize(
    "text",
    [
        "class_path: evil_module.X",
        '"class\\x5fpath": evil_module.X',
        "distill: {class_path: evil_module.X}",
        'distill: "{class_path: evil_module.X}"',
        "distill: {per_method: {dpo: {class_path: evil_module.X}}}",
    ],
)
@pytest.mark.parametrize("given", ["FILE", "--config FILE", "--config=FILE", "--distill FILE", "--distill=FILE"])
def test_a_configuration_imports_nothing(text, given, tmp_path, monkeypatch, capsys):
    """The parser imported the module of a class_path before it said that no class was asked for."""
    (tmp_path / "evil_module.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "c.yaml").write_text(text)
    assert main(["config", *given.replace("FILE", str(tmp_path / "c.yaml")).split()]) == 2
    assert "evil_module" not in sys.modules
    assert "class_path, which no option takes" in capsys.readouterr().err


# Of `make fuzz`, seed 12: no column, and a group of -2,496 rows.
NEGATIVE = base64.b64decode(
    "UEFSMRUEGRw1ABgGc2NoZW1hFQAAFgAZHBkMFgAW/yYAFgAAGRwYDEFSUk9XOnNjaGVtYRhMLy8vLy96QUFBQUFRQUFBQUFBQUtBQXdBQmdBRkFBZ0FDZ"
    "0FBQUFBQkJBQU1BQUFBQ0FBSUFBQUFCQUFJQUFBQUJBQUFBQUFBQUFBPQAYIHBhcnF1ZXQtY3BwLWFycm93IHZlcnNpb24gMjYuMC4xGQwApAAAAFBB"
    "UjE="
)


def test_a_footer_of_negative_rows_ends_no_process(tmp_path, caplog):
    """Arrow ended the process on it, with no exception that Python could catch."""
    (tmp_path / "pairs.parquet").write_bytes(NEGATIVE)
    code = f"from prefdistill.data.formats import load_pairs; load_pairs({str(tmp_path / 'pairs.parquet')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1, done.stderr[-500:]
    assert "its footer tells of 0 rows, and of [-2496] in its groups" in done.stderr
    (shard := tmp_path / "shard-00000.parquet").write_bytes(NEGATIVE)
    shard.rename(tmp_path / f"shard-00000-{checksum(shard)}.parquet")
    assert Column(tmp_path, "model").stale_shards == 1
    assert "its footer tells of 0 rows" in caplog.text


def test_a_shard_that_is_none_is_stale(tmp_path, caplog):
    """Its name tells of its bytes, and they are no column: computed again, instead of an error of pyarrow's."""
    file = tmp_path / "shard-00003.parquet"
    file.write_bytes(b"PAR1 nothing of the kind")
    named = file.rename(tmp_path / f"shard-00003-{checksum(file)}.parquet")
    column = Column(tmp_path, "model")
    assert (column.stale_shards, column.values) == (1, {})
    assert f"{named} is no shard of a column" in caplog.text
    column.add(["a"], np.array([1.0]))
    assert Column(tmp_path, "model").values == {"a": 1.0}
