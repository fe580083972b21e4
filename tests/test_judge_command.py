"""`prefdistill judge` on runs: what it counts, shows, refuses, and how it stops."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from judge_server import Server
from prefdistill import pipeline
from prefdistill.cli import main, opened
from prefdistill.manifest import Manifest
from prefdistill.stages.report import make_report
from tiny_models import tiny
from tiny_runs import rows, small, write_rows
from tiny_tokenizers import llama3


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("judged")
    write_rows(folder / "pairs.jsonl", rows())
    pipeline.run(small(folder / "pairs.jsonl", model_folder, folder / "run", methods="[dpo]"))
    return folder / "run"


@pytest.fixture
def run_folder(evaluated, tmp_path):
    """A copy of an evaluated run."""
    return Path(shutil.copytree(evaluated, tmp_path / "run"))


def test_the_command_judges_a_run(data, model_folder, tmp_path, monkeypatch, capsys):
    """The longer response wins at this server: what comes out is counted again from the samples themselves."""
    out = tmp_path / "run"
    pipeline.run(small(data, model_folder, out, methods="[dpo,ipo]"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with Server([429, 500]) as server:
        command = ["judge", str(out), "--model", "org/judge", "--base-url", server.url, "--price", "1000,20000"]
        assert main(command) == 0
        said, asked = capsys.readouterr().out, len(server.seen)
        assert server.seen[0]["key"] == "Bearer secret-key"
        assert server.seen[0]["path"] == "/v1/chat/completions"
        assert main([*command, "--methods", "ipo"]) == 0
        assert len(server.seen) == asked
    questions = asked - 2  # two tries were refused, and cost nothing
    assert f"{questions * (100 * 1000 + 10 * 20000) / 1e6:,.2f} dollars" in said
    assert f"{questions * 100:,} tokens sent, {questions * 10:,} received" in " ".join(said.split())
    written = json.loads((out / "evaluation" / "llm-judge.json").read_text())
    assert list(written["methods"]) == ["ipo"]
    assert written["usage"]["asked"] == 0
    assert "dpo" in said
    assert not [f for f in out.rglob("*") if f.is_file() and b"secret-key" in f.read_bytes()]
    rate = written["methods"]["ipo"]["win_rate"]["mean"]
    assert rate == pytest.approx(longer_share(out), abs=1e-12)


def test_the_report_tells_what_the_language_model_prefers(data, model_folder, tmp_path, capsys):
    """For the samples that it saw; the run stays done, and other samples are not told of by it."""
    out = tmp_path / "run"
    pipeline.run(small(data, model_folder, out, methods="[dpo]"))
    page = out / "report.html"
    assert "What a language model prefers" not in page.read_text(encoding="utf-8")
    with Server() as server:
        assert main(["judge", str(out), "--model", "org/<judge>", "--base-url", server.url]) == 0
    written = page.read_text(encoding="utf-8")
    section = written[written.index('<section id="llm-judge">') : written.index('<section id="training">')]
    assert "org/&lt;judge&gt;" in section
    assert '<th scope="row">' in section
    capsys.readouterr()
    pipeline.run(small(data, model_folder, out, methods="[dpo]"))
    assert "nothing to do" in capsys.readouterr().err
    pipeline.run(small(data, model_folder, out, methods="[dpo]", **{"evaluate.temperature": 0.5}))
    assert "What a language model prefers" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_judge_that_is_told_to_stop(sent, status, run_folder):
    """At once, though the server leaves two questions waiting; what it has answered is not asked again."""
    command = [sys.executable, "-m", "prefdistill", "judge", str(run_folder), "--model", "m", "--workers", "2"]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with Server(answers=3) as server:
        command += ["--base-url", server.url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
            while len(server.seen) < 5 and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(sent)
            try:
                said = process.communicate(timeout=20)[1]
            finally:
                process.kill()
        assert process.returncode == status
        assert len(server.seen) == 5
    word = "terminated" if sent == signal.SIGTERM else "interrupted"
    assert said.splitlines()[-1] == f"prefdistill: {word}; the same command goes on"
    assert "Traceback" not in said
    (answers,) = run_folder.glob("evaluation/llm-judge/*.jsonl")
    assert len(answers.read_text().splitlines()) == 3
    assert not (run_folder / ".holder.json").exists()
    with Server() as server:
        assert main(["judge", str(run_folder), "--model", "m", "--base-url", server.url]) == 0
        asked = len(server.seen)
    usage = json.loads((run_folder / "evaluation" / "llm-judge.json").read_text())["usage"]
    assert asked > 2
    assert (usage["asked"], usage["from_cache"]) == (asked, 3)


def test_a_judge_holds_the_run_directory(run_folder, capsys):
    """From its first question on: neither a second judge nor a run goes on beside it."""
    command = [sys.executable, "-m", "prefdistill", "judge", str(run_folder), "--model", "m"]
    server = Server(answers=0)
    command += ["--base-url", server.url]
    with server, subprocess.Popen(command, stderr=subprocess.DEVNULL) as first:
        try:
            while not server.seen and first.poll() is None:
                time.sleep(0.05)
            for beside in (
                ["judge", str(run_folder), "--model", "m", "--base-url", server.url],
                ["report", str(run_folder / "config.yaml"), "--output-dir", str(run_folder)],
            ):
                assert main(beside) == 2
                assert f"{run_folder} is in use by process {first.pid} on " in capsys.readouterr().err
        finally:
            first.kill()
    with Server() as server:
        assert main(["judge", str(run_folder), "--model", "m", "--base-url", server.url]) == 0


def test_a_conversation_is_judged_with_its_roles(tmp_path):
    tokenizer = llama3()
    model = tiny("llama", vocab_size=len(tokenizer), pad_token_id=None, eos_token_id=tokenizer.eos_token_id)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    say = lambda role, content: {"role": role, "content": content}  # noqa: E731
    before = [say("system", "Be brief."), say("user", "Hi"), say("assistant", "Hello.")]
    answer = lambda text: [say("assistant", text)]  # noqa: E731
    made = [
        {
            "prompt": [*before, say("user", r["prompt"])],
            "chosen": answer(r["chosen"].strip()),
            "rejected": answer(r["rejected"].strip()),
        }
        for r in rows()
    ]
    path = tmp_path / "pairs.jsonl"
    write_rows(path, made)
    pipeline.run(small(path, tmp_path / "model", tmp_path / "run", methods="[dpo]"))
    with Server() as server:
        assert main(["judge", str(tmp_path / "run"), "--model", "m", "--base-url", server.url, "--prompts", "1"]) == 0
    shown = "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello.\n\nUser: Describe "
    assert all(f">\n{shown}" in s["messages"][-1]["content"] for s in server.seen)
    side_by_side = json.loads((tmp_path / "run" / "evaluation" / "side_by_side.json").read_text(encoding="utf-8"))
    assert shown in json.dumps(side_by_side).replace("\\n", "\n")


def longer_share(out) -> float:
    from prefdistill.cli import parse
    from prefdistill.stages.draw import read_samples
    from prefdistill.stages.run import Run

    run = Run(parse("run", [str(out / "config.yaml"), "--output_dir", str(out)]))
    wins = []
    for ours, theirs in zip(read_samples(run, "ipo"), read_samples(run, "reference"), strict=True):
        for a, b in zip(ours, theirs, strict=False):
            x, y = (len(run.encoder.decode_response(s.ids)) for s in (a, b))
            wins.append(0.5 if x == y else float(x > y))
    return sum(wins) / len(wins)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["nowhere", "--model", "m"], "no run directory"),
        (["RUN", "--model", "m", "--methods", "ppo"], "no method 'ppo'; it has dpo"),
        (["RUN", "--model", "m", "--price", "much"], "--price is 'much'"),
        (["RUN", "--model", "m", "--price", "1,-1"], "--price is '1,-1'"),
        (["RUN", "--model", "m", "--temperature", "nan"], "--temperature is 'nan'; it must be none or a number"),
        (["RUN", "--model", "m", "--workers", "0"], "--workers is 0; it must be at least 1"),
        (["RUN", "--model", "m", "--prompts", "-1"], "--prompts is -1; it must be at least 1"),
        (["RUN", "--model", "m"], "summary.json does not exist; evaluate the run first"),
    ],
)
def test_wrong_calls_say_what_to_do(flags, said, data, model_folder, tmp_path, capsys):
    out = tmp_path / "run"
    pipeline.run(small(data, model_folder, out, methods="[dpo]"), until="data")
    assert main(["judge", *(str(out) if f == "RUN" else f for f in flags)]) == 2
    assert said in capsys.readouterr().err


def test_a_key_is_asked_for(data, model_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    pipeline.run(small(data, model_folder, out, methods="[dpo]"))
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert main(["judge", str(out), "--model", "m"]) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b'{"version": 1, "samp', b"[]", b'{"samples": 3}', b"\xff"])
def test_a_damaged_verdict_is_left_out_of_the_report_by_name(content, run_folder, caplog):
    path = run_folder / "evaluation" / "llm-judge.json"
    path.write_bytes(content)
    run = opened(run_folder)
    make_report(run, Manifest(run_folder))
    assert f"{path} is broken" in caplog.text
    assert "run prefdistill judge again" in caplog.text
    assert 'id="llm-judge"' not in run.report_path.read_text(encoding="utf-8")
