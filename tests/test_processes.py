"""Two processes take the steps that one takes on the same trees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefdistill import pipeline
from prefdistill.errors import ConfigError
from test_pipeline import data, model_folder, small  # noqa: F401

HERE = Path(__file__).parent


def curve(kind, processes, folder, *, batch, **options):
    out = folder / f"{kind}-{processes}.json"
    command = [str(HERE / "two_processes.py"), kind, str(folder / "out"), str(out), str(batch), json.dumps(options)]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", ["distill", "reward", "sft", "fsdp2"])
def test_two_processes_are_one(kind, tmp_path):
    """The same global batch, float32: loss, gradient norm and every metric to 1e-5, though shares differ in pairs."""
    one = curve(kind, 1, tmp_path, batch=4, **({"sharded": False} if kind == "fsdp2" else {}))
    two = curve(kind, 2, tmp_path, batch=2, **({"sharded": True} if kind == "fsdp2" else {}))
    assert len(one["curve"]) == len(two["curve"]) >= 4
    assert one["curve"][0]["loss"] != pytest.approx(one["curve"][-1]["loss"], rel=1e-2), "nothing was learnt"
    for a, b in zip(one["curve"], two["curve"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6), name
    assert (one["sharded"], two["sharded"]) == (False, kind == "fsdp2")
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-6)


def test_a_run_says_that_its_stages_work_in_one(data, model_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process, and this is one of 2"):
        pipeline.run(small(data, model_folder, tmp_path / "run", methods="[dpo]"))
    assert not (tmp_path / "run").exists()
