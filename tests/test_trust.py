"""The page of the proofs: its table is what scripts/process_table.py makes, and none of its differences is large."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("process_table", ROOT / "scripts" / "process_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_stands_on_the_page_and_its_differences_are_rounding(script):
    found = script.TABLE.findall(script.PAGE.read_text(encoding="utf-8"))
    assert len(found) == 1
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()]
    assert tuple(head) == script.HEAD
    named = " ".join(row[0] for row in rows)
    for what in (*script.KINDS.values(), "FSDP2 by hand", "FSDP2 of accelerate", "scoring, reference-logps"):
        assert what in named
    for what, _, size, value, norm in rows:
        # One step of float32 on both sides is 1e-7; steps and sums over tokens add to it.
        assert float(value) < 1e-4, what
        assert float(norm or 0) < 1e-4, what
        assert size.endswith("steps") or size.endswith("rows, each once, in order")
    assert next(row[3] for row in rows if row[0] == "scoring, reference-logps") == "0"


def test_a_difference_is_told(script):
    one = [{"loss": 1.0, "grad_norm": 2.0}, {"loss": 3.0, "grad_norm": 2.0}]
    two = [{"loss": 1.0, "grad_norm": 2.0}, {"loss": 3.5, "grad_norm": 1.0}]
    row = script.of_curves("a training", "torchrun", one, two)
    assert row == ("a training", "torchrun", "2 steps", 0.25, 0.5)
    assert script.table([row]).splitlines()[-1] == "| a training | torchrun | 2 steps | 2e-01 | 5e-01 |"
    with pytest.raises(AssertionError):
        script.off([1.0], [1.0, 2.0])
