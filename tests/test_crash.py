"""A little of `make crash-test`: killed runs of both kinds come out bit-identical, and the harness can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from crash import harness

CODE = """
import sys, tempfile
from pathlib import Path
from crash import harness
sys.argv[1:] = []
harness.asked(None, "kills", 2)
with tempfile.TemporaryDirectory() as folder:
    sys.exit(harness.crash(2, 0, Path(folder), prompts=16))
"""


def test_two_kills_are_two_identical():
    """In a process of its own, which has no threads to be forked away from."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent / "src")])
    env = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env, timeout=300)
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert [line.split(":")[0] for line in said[:2]] == [f"undisturbed, {kind}" for kind in harness.KINDS]
    assert said[-1] == "2 kills, 2 identical (2 runs, seed 0)"


def test_a_result_that_differs_is_told(tmp_path, monkeypatch):
    """Runs are played: the second of them, which is killed once, leaves another policy."""
    starts = []

    def attempt(config, out, log, deadline, stage=None):
        starts.append(deadline)
        (out / "policy").mkdir(parents=True, exist_ok=True)
        (out / "policy" / "model.safetensors").write_text("other" if len(starts) > 4 else "same")
        log.write_text("[1/1] distill:dpo: training\n")
        if deadline is None:
            (out / "manifest.json").write_text('{"stages": {"distill:dpo": {"seconds": 1.0}}}')
        return deadline is None

    monkeypatch.setattr(harness, "attempt", attempt)
    monkeypatch.setattr(harness, "prepare", lambda folder, options, prompts: folder)
    said = []
    assert harness.crash(2, 0, tmp_path, said.append) == 1
    assert "run 2, 1 kills: differs in policy/model.safetensors" in said
    assert said[-1] == "2 kills, 1 identical (2 runs, seed 0)"
