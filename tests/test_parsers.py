"""A little of `make fuzz-bytes`: seeds and blindly changed ones; what was found by it and its like, one test each."""

from __future__ import annotations

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
