"""What SECURITY.md says, tried: code that data, models or configurations carry is not run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefdistill import pipeline
from prefdistill.cli import main
from prefdistill.errors import ConfigError, PrefdistillError
from prefdistill.evaluation.judges import load_oracle
from prefdistill.models.adapters import Classifiers
from prefdistill.models.loading import load_classifier, load_policy, new_classifier
from test_report import _replaced, full_run, write_report
from tiny_models import save_some_adapter
from tiny_runs import rows, small, write_rows

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ATTACK = (
    "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    "<svg onload=\"document.title='pwned'\"></svg><iframe srcdoc=\"<script>parent.document.title='pwned'</script>\">"
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("escaped", [True, False])
def test_hostile_text_is_dead_in_a_browser(escaped, tmp_path):
    """Also where it stands in the page unescaped: the policy forbids scripts. The same text alone does its work."""

    def title(page: str) -> str:
        file = tmp_path / "page.html"
        file.write_text(page, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
        dom = subprocess.run([BROWSER, *flags, f"file://{file}"], capture_output=True, text=True, timeout=120).stdout
        return dom.partition("<title>")[2].partition("</title>")[0]

    assert title(f"<title>calm</title>{ATTACK}") == "pwned"
    page = write_report(_replaced(full_run(), str, lambda text: text + ATTACK))
    assert ATTACK not in page
    calm = title(page)
    assert calm
    assert calm != "pwned"
    if not escaped:
        assert title(page.replace("<main", f"{ATTACK}<main", 1)) == calm


@pytest.mark.parametrize("load", [load_policy, load_classifier, lambda name: new_classifier(name, 0)])
def test_pickled_weights_are_not_read(load, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    weights.unlink()

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("pickled", ["adapter", "base"])
@pytest.mark.parametrize("load", [load_policy, Classifiers().load])
def test_pickled_weights_of_an_adapter_are_not_read(load, pickled, model_folder, tmp_path):
    """Neither its own nor those of the base that it names; nor does a base that is gone give a traceback."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(model_folder, base)
    save_some_adapter(base, adapter)
    folder, name = (adapter, "adapter_model") if pickled == "adapter" else (base, "model")
    weights = folder / f"{name}.safetensors"
    torch.save(load_file(weights), folder / ("adapter_model.bin" if pickled == "adapter" else "pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(
        ConfigError, match=r"adapter_model\.safetensors" if pickled == "adapter" else "cannot be loaded"
    ):
        load(str(adapter))
    shutil.rmtree(base)
    with pytest.raises(ConfigError, match="adapter"):
        load(str(adapter))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"adapter_config\.json cannot be read"):
        load(str(adapter))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--distill.training_arguments", "{hub_token: hf_x}"], "distill.training_arguments has 'hub_token'"),
        (["--distill.per_method", "{dpo: {training_arguments: {hub_token: x}}}"], "per_method.dpo"),
        (["--sample.engine", "vllm", "--sample.engine_arguments", "{hf_token: x}"], "'hf_token'"),
        (
            ["--sample.engine", "vllm", "--sample.engine_arguments", "{a: [1, {api-key: x}]}"],
            "engine_arguments.a has 'api-key'",
        ),
        (
            ["--sample.engine", "vllm", "--sample.engine_arguments", "{a: {api_key: x}}"],
            "engine_arguments.a has 'api_key'",
        ),
    ],
)
def test_secrets_are_no_options(flags, named, data, model_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["run", "--data", str(data), "--model", str(model_folder), "--output-dir", str(out), *flags]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert "environment" in said
    assert not out.exists()


def test_a_models_own_code_is_not_run(data, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    written = json.loads((folder / "config.json").read_text())
    written |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(PrefdistillError):
        pipeline.run(small(data, folder, tmp_path / "run", methods="[dpo]"))
    assert not (tmp_path / "ran").exists()


def test_a_configuration_makes_no_objects(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(f"data: !!python/object/apply:builtins.open ['{tmp_path / 'ran'}', 'w']\n")
    assert main(["run", str(config)]) == 2
    assert not (tmp_path / "ran").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_a_chat_template_is_in_a_sandbox(model_folder, tmp_path, capsys):
    folder, path = tmp_path / "model", tmp_path / "pairs.jsonl"
    shutil.copytree(model_folder, folder)
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)

    def chat(row):
        user, reply = ("user", row["prompt"]), "assistant"
        turn = lambda role, content: {"role": role, "content": content}  # noqa: E731
        return {
            "prompt": [turn(*user)],
            "chosen": [turn(reply, row["chosen"])],
            "rejected": [turn(reply, row["rejected"])],
        }

    write_rows(path, [chat(r) for r in rows()])
    flags = ["--data", str(path), "--model", str(folder), "--output-dir", str(tmp_path / "run"), "--methods", "dpo"]
    assert main(["run", *flags]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "template" in said


def test_no_text_of_the_data_becomes_a_path(model_folder, tmp_path):
    path, out = tmp_path / "pairs.jsonl", tmp_path / "deep" / "run"
    lines = [{**r, "prompt": f"../../{r['prompt']}", "chosen": f"../{r['chosen']}", "id": "/etc/x"} for r in rows()]
    write_rows(path, lines)
    pipeline.run(small(path, model_folder, out, methods="[dpo]"))
    assert {p.name for p in tmp_path.iterdir()} == {"pairs.jsonl", "deep"}
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"run"}


def test_an_oracle_is_named_as_it_is_said():
    text = (Path(__file__).parent.parent / "SECURITY.md").read_text(encoding="utf-8")
    (name,) = re.findall(r"the oracle given as `([^`]+)`", text)
    with pytest.raises(ConfigError, match=f"give {name} of an importable module"):
        load_oracle("file.py:function")
