"""SIGINT and SIGTERM in every stage: a clean line, the exit status, nothing lost and nothing done twice."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys

import pytest

from prefdistill import pipeline
from prefdistill.cli import main
from prefdistill.manifest import Manifest
from prefdistill.stopping import Terminated, stop_requests
from prefdistill.training.callbacks import ProgressCallback
from tiny_runs import rows, small, write_rows

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture
def heard(monkeypatch):
    """Both signals are heard here: a shell has its background jobs ignore SIGINT, and the tests may run in one."""
    before = {s: signal.signal(s, signal.default_int_handler) for s in STATUS}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop(sent, status, data, model_folder, tmp_path):
    """A clean line and exit status, and the same command goes on to the end."""
    out = tmp_path / "run"
    config = small(data, model_folder, out, methods="[dpo]", **{"distill.epochs": 2000})
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    command = [sys.executable, "-m", "prefdistill", "distill", str(tmp_path / "c.yaml")]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as run:
        for line in run.stderr:
            if "distill:dpo" in line:
                break
        run.send_signal(sent)
        said = run.stderr.read()
        assert run.wait(timeout=120) == status
    assert said.splitlines()[-1].endswith("the same command goes on")
    assert "Traceback" not in said
    assert not (out / ".holder.json").exists()
    assert not (out / "policy").exists()
    config.distill.epochs = 1
    pipeline.run(config, until="distill")
    assert (out / "policy" / "dpo" / "config.json").exists()


def test_every_stage_can_be_stopped(model_folder, tmp_path, monkeypatch, capsys, heard):
    """In its midst and before it is written down, the signals in turn; the run comes out as one that nobody stopped."""
    path = tmp_path / "pairs.jsonl"
    write_rows(path, [{**r, "demo": " red"} for r in rows()])
    options = {
        "methods": "[d-dpo,e-dpo]",
        "sft.enabled": True,
        "reward.hold": "lora",
        "evaluate.judge": "heldout",
        "sample.reference_per_prompt": 1,
        "distill.kl_alpha": 0.05,
    }
    command = {}
    for name in ("whole", "stopped"):
        (tmp_path / f"{name}.yaml").write_text(small(path, model_folder, tmp_path / name, **options).as_yaml())
        command[name] = ["run", str(tmp_path / f"{name}.yaml")]
    assert main(command["whole"]) == 0
    stages = list(Manifest(tmp_path / "whole").stages)
    real_finish, real_work, now, sent = Manifest.finish, pipeline._work, "", []

    def stop(where):
        if (now, where) not in sent:
            sent.append((now, where))
            signal.raise_signal(list(STATUS)[len(sent) % 2])

    def work(stage, *arguments):
        nonlocal now
        now = stage.name
        return real_work(stage, *arguments)

    def finish(*arguments):
        stop("end")
        return real_finish(*arguments)

    @contextlib.contextmanager
    def progress(total, unit):
        yield lambda amount: stop("midst")

    monkeypatch.setattr(pipeline, "_work", work)
    monkeypatch.setattr(pipeline, "on_terminal", progress)
    monkeypatch.setattr(Manifest, "finish", finish)
    capsys.readouterr()
    status = -1
    while status:
        before = len(sent)
        status = main(command["stopped"])
        said = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "stopped" / ".holder.json").exists()
        if status:
            assert len(sent) == before + 1, said
            asked = list(STATUS)[len(sent) % 2]
            assert status == STATUS[asked]
            word = "terminated" if asked == signal.SIGTERM else "interrupted"
            assert said[-1] == f"prefdistill: {word}; the same command goes on"
            assert not any("Traceback" in line for line in said)
    assert [stage for stage, where in sent if where == "end"] == stages
    in_midst = {stage for stage, where in sent if where == "midst"}
    assert in_midst >= {"start", "sample", "reference", "evaluate", *(s for s in stages if s.startswith("distill:"))}
    assert any("reward" in s for s in in_midst)
    for stage in stages:
        assert sum(f"] {stage}: done before" in line for line in said) == (stage != stages[-1])
    files = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()]
    assert len(files) > 40
    for file in files:
        if file.suffix in (".safetensors", ".parquet") or file.parts[0] == "evaluation":
            expected = (tmp_path / "whole" / file).read_bytes().replace(b"/whole/", b"/stopped/")  # members' folders
            assert (tmp_path / "stopped" / file).read_bytes() == expected, file


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint(sent, data, model_folder, tmp_path, monkeypatch, capsys, heard):
    """Of the step under way, from which the same command goes on; the weights are those of a run nobody stopped."""
    options = {"methods": "[d-dpo]", "distill.logging_steps": 50, "distill.save_steps": 50, "distill.epochs": 3}
    whole, stopped = (small(data, model_folder, tmp_path / name, **options) for name in ("whole", "stopped"))
    pipeline.run(whole, until="distill")
    real, steps = ProgressCallback.on_step_end, []

    def stop(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        steps.append(state.global_step)
        if len(steps) == 3:
            signal.raise_signal(sent)

    monkeypatch.setattr(ProgressCallback, "on_step_end", stop)
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt) as raised:
        pipeline.run(stopped, until="distill")
    assert isinstance(raised.value, Terminated) == (sent == signal.SIGTERM)
    assert "stopping after this step, with a checkpoint" in capsys.readouterr().err
    assert steps == [1, 2, 3]
    pipeline.run(stopped, until="distill")
    assert steps[3] == 4
    weights = [(tmp_path / n / "policy" / "d-dpo" / "model.safetensors").read_bytes() for n in ("whole", "stopped")]
    assert weights[0] == weights[1]
    history = json.loads((tmp_path / "stopped" / "policy" / "d-dpo" / "history.json").read_text())
    assert history[0]["step"] == 3, "a line of what was recorded until then"


def test_the_second_signal_stops_at_once():
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with stop_requests() as request:
            signal.raise_signal(signal.SIGTERM)
            assert isinstance(request.reason, Terminated)
            with pytest.raises(Terminated):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
