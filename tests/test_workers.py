"""Workers that know nothing of each other fill columns of parts of the data; the run on all of it computes nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prefdistill import pipeline
from prefdistill.stages.run import Run
from tiny_runs import rows, small, write_rows

SPLITS = ["train", "train", "train", "test", "validation", "judge"]


def written(path: Path, made: list[dict]) -> Path:
    write_rows(path, made)
    return path


def said(run: Path, stage: str) -> str:
    return json.loads((run / "manifest.json").read_text())["stages"][stage]["said"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_folder):
    """Members of both kinds, trained beforehand on some of the training rows, and all rows, each naming its split."""
    folder = tmp_path_factory.mktemp("workers")
    made = [row | {"split": SPLITS[i % len(SPLITS)]} for i, row in enumerate(rows(48))]
    some = written(folder / "some.jsonl", made[:24])
    for hold in ("head", "lora"):
        config = small(some, model_folder, folder / hold, methods="[d-dpo]", **{"reward.hold": hold})
        config.reward.members = 1
        pipeline.run(config, until="reward")
    return folder, made


def test_the_whole_run_finds_what_two_workers_computed(place, model_folder, monkeypatch):
    folder, made = place
    options = {
        "methods": "[d-dpo]",
        "reward.members": 0,
        "reward.pretrained": f"[{folder / 'head' / 'reward' / 'member-0'},{folder / 'lora' / 'reward' / 'member-0'}]",
        "score.columns": folder / "shared",
    }
    workers = []
    for half in (0, 1):
        part = written(folder / f"half-{half}.jsonl", made[24 * half :][:24])
        config = small(part, model_folder, folder / f"worker-{half}", **options)
        config.write(folder / f"worker-{half}.yaml")
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src"), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "prefdistill", "score", str(folder / f"worker-{half}.yaml")]
        workers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env))
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors[-3000:]
    for half in (0, 1):
        assert said(folder / f"worker-{half}", "score") == "2 reward columns, 96 values computed, 0 found"

    def never(*arguments, **options):
        raise AssertionError("a model was loaded")

    whole = small(written(folder / "all.jsonl", made), model_folder, folder / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "load_reference", never)
        patch.setattr(Run, "classifiers", lambda run: type("Nobody", (), {"load": never})())
        pipeline.run(whole, until="score")
    assert said(folder / "whole", "reference").startswith("reference log-probs and features of 96 responses, 96 found")
    assert said(folder / "whole", "score") == "2 reward columns, 0 values computed, 192 found"
    # A method that samples has the samples of its own training prompts to score, and nothing else.
    whole.methods = ["e-dpo"]
    pipeline.run(whole)
    total, found = map(int, re.findall(r"(\d+) (?:responses|found)", said(folder / "whole", "reference")))
    assert (total > 96, found) == (True, 96)
    assert said(folder / "whole", "score").endswith("values computed, 192 found")
    assert (folder / "whole" / "policy" / "e-dpo" / "model.safetensors").exists()
