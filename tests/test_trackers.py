"""Trackers get what the trainer logs, every training apart, beside the run."""

from __future__ import annotations

import json

import pytest

from prefdistill import pipeline
from prefdistill.errors import ConfigError
from prefdistill.training import trackers
from tiny_runs import small


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_DIR"):
        monkeypatch.setenv(name, "x")  # so that monkeypatch takes it away at the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(trackers, "_SET_HERE", set())


def test_tensorboard_holds_the_history(data, model_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    options = {"methods": "[dpo,ipo]", "report_to": "[tensorboard]", "distill.logging_steps": 1}
    pipeline.run(small(data, model_folder, out, **options), until="distill")
    for method in ("dpo", "ipo"):
        (folder,) = (out / "logs" / "tensorboard").glob(f"distill-{method}")
        events = EventAccumulator(str(folder))
        events.Reload()
        history = json.loads((out / "policy" / method / "history.json").read_text())
        for name in ("loss", "rewards/margins", "logps/chosen_change"):
            written = [e.value for e in events.Scalars(f"train/{name}")]
            assert written == pytest.approx([h[name] for h in history], rel=1e-5)


def test_wandb_offline_has_a_run_a_training(data, model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    options = {"methods": "[dpo,ipo]", "report_to": "[wandb]", "distill.logging_steps": 1}
    pipeline.run(small(data, model_folder, out, **options), until="distill")
    runs = list((out / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    told = [path.read_bytes() for path in runs]
    for method in ("dpo", "ipo"):
        assert sum(f"run-distill-{method}".encode() in t for t in told) == 1
    assert all(b"rewards/margins" in t for t in told)


def test_a_users_own_place_wins(monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "mine")
    trackers.track_in(tmp_path, "x", ["tensorboard"])
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(data, model_folder, tmp_path):
    with pytest.raises(ConfigError, match="report_to: mlflow needs the package mlflow; pip install mlflow"):
        pipeline.run(small(data, model_folder, tmp_path / "run", methods="[dpo]", report_to="[mlflow]"))
    assert not (tmp_path / "run").exists()
