"""Model cards say what the evaluation found; the hub is given the policy's folder."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from prefdistill import pipeline
from prefdistill.cli import main, parse
from prefdistill.data.sources import looks_like_hub_id
from prefdistill.errors import ConfigError
from prefdistill.lock import held
from tiny_runs import rows, small, write_rows


@pytest.fixture(scope="module")
def done(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("push")
    path = folder / "pairs.jsonl"
    write_rows(path, rows())
    out = folder / "run"
    pipeline.run(small(path, model_folder, out, methods="[dpo]"))
    return out


def test_a_card_says_what_the_evaluation_found(done):
    assert main(["push", str(done), "dpo", "--license", "apache-2.0"]) == 0
    card = ModelCard.load(done / "policy" / "dpo" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert "dpo" in card.data.tags
    assert card.data.base_model is None, "a folder is no hub id"
    summary = json.loads((done / "evaluation" / "summary.json").read_text())
    figures = summary["methods"]["dpo"]
    assert summary["verdict"] in card.text
    assert f"{figures['advantage']['mean']:+.2f} [" in card.text
    assert f"{figures['win_rate']['mean']:.0%} [" in card.text
    assert f"{figures['kl_policy_ref']['mean']:.2f} [" in card.text
    assert str(done.parent) not in card.text, "no folder of this machine"
    assert "pairs.jsonl" in card.text
    for warning in summary["warnings"]:
        assert warning["what_to_do"] in card.text


def test_a_card_damages_no_run(done, capsys):
    main(["push", str(done), "dpo"])
    capsys.readouterr()
    assert main(["run", str(done / "config.yaml"), "--output-dir", str(done)]) == 0
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["push", "RUN", "dpo"], ["diagnose", "RUN"], ["judge", "RUN", "--model", "m"]])
def test_an_evaluation_of_other_policies_is_not_told_of_these(command, done, capsys):
    """Called with other options and not evaluated since; with those of the evaluation again it holds."""
    command = [{"RUN": str(done)}.get(word, word) for word in command]
    config = parse("run", [str(done / "config.yaml"), f"--output_dir={done}"])
    changed = [replace(config, methods=["dpo", "ipo"]), replace(config, distill=replace(config.distill, beta=0.3))]
    try:
        for other in changed:
            pipeline.run(other, until="reference")
            capsys.readouterr()
            assert main(command) == 2
            assert "was not evaluated since" in capsys.readouterr().err
    finally:
        pipeline.run(config, until="reference")
    capsys.readouterr()
    if command[0] != "judge":  # which has nobody to ask here
        assert main(command) in (0, 1)
        assert "evaluated since" not in capsys.readouterr().err


def test_a_card_names_no_path_as_a_place_on_the_hub():
    """One that is not there any more, or is looked for from another folder."""
    assert not looks_like_hub_id("data/pairs.jsonl")
    assert looks_like_hub_id("org/pairs")


def test_the_hub_is_given_the_folder(done, monkeypatch, capsys):
    seen = {}

    class Api:
        def create_repo(self, repo, **options):
            seen["made"] = (repo, options)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo}")

        def upload_folder(self, **options):
            seen["sent"] = options

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert main(["push", str(done), "dpo", "--repo", "me/policy", "--private"]) == 0
    assert seen["made"] == ("me/policy", {"private": True, "exist_ok": True})
    assert seen["sent"]["repo_id"] == "me/policy"
    assert seen["sent"]["folder_path"] == done / "policy" / "dpo"
    assert "https://huggingface.co/me/policy" in capsys.readouterr().out


def test_a_run_that_another_process_holds_is_not_pushed(done, capsys):
    """Nothing is written into it, and the message names the process."""
    card = done / "policy" / "dpo" / "README.md"
    card.unlink(missing_ok=True)
    code = (
        "import sys, time; from pathlib import Path; from prefdistill.lock import held\n"
        "with held(Path(sys.argv[1])):\n    print('holding', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(done)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "holding\n"
        assert main(["push", str(done), "dpo"]) == 2
        holder.kill()
    assert f"{done} is in use by process {holder.pid} on " in capsys.readouterr().err
    assert not card.exists()
    assert main(["push", str(done), "dpo"]) == 0
    assert card.exists()


def test_a_run_is_held_while_it_is_uploaded(done, monkeypatch):
    held_by_push = []

    class Api:
        def create_repo(self, repo, **options):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo}")

        def upload_folder(self, **options):
            with pytest.raises(ConfigError, match="is in use by"), held(done):
                pass
            held_by_push.append(True)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert main(["push", str(done), "dpo", "--repo", "me/policy"]) == 0
    assert held_by_push == [True]
    with held(done):
        pass


def test_a_hub_that_refuses_is_told_in_a_line(done, monkeypatch, capsys):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(401)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    real = huggingface_hub.HfApi
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint=address, token="hf_secret"))
    assert main(["push", str(done), "dpo", "--repo", "me/policy"]) == 2
    server.shutdown()
    said = capsys.readouterr().err
    assert "the hub did not take 'me/policy'" in said
    assert "hf auth login" in said
    assert "hf_secret" not in said
    assert "Traceback" not in said


def test_wrong_calls_say_what_to_do(done, tmp_path, capsys):
    assert main(["push", str(done), "ppo"]) == 2
    assert "no method 'ppo'; it has dpo" in capsys.readouterr().err
    assert main(["push", str(tmp_path), "dpo"]) == 2
    assert "no run directory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
