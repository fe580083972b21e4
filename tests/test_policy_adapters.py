"""Policies that are saved as adapters: the merged ones, a few megabytes large."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM

from prefdistill import pipeline
from prefdistill.cli import main
from test_quantise import model_folder as wide_folder  # noqa: F401
from tiny_models import save_some_adapter
from tiny_runs import small


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora", "qdora"])
def test_a_policy_saved_as_an_adapter_is_the_merged_one(kind, data, wide_folder, tmp_path, capsys):  # noqa: F811
    """Loaded by PEFT alone on the base that it names, and in all figures of the run."""
    if kind.startswith("q"):
        pytest.importorskip("bitsandbytes")
    options = {
        "methods": "[dpo]",
        "distill.lora_rank": 2,
        "distill.learning_rate": 0.02,
        "distill.checkpoints": 2,
        "distill.use_dora": kind.endswith("dora"),
        "distill.load_in_4bit": kind.startswith("q"),
    }
    figures, folders = [], []
    for name, adapters in (("merged", False), ("adapter", True)):
        config = small(data, wide_folder, tmp_path / name, **options, **{"distill.adapters": adapters})
        pipeline.run(config)
        folders.append(tmp_path / name / "policy" / "dpo")
        summary = json.loads((tmp_path / name / "evaluation" / "summary.json").read_text())
        figures.append(summary["methods"]["dpo"])
    merged, adapter = folders
    assert not (adapter / "model.safetensors").exists()
    size = sum(f.stat().st_size for f in adapter.glob("*.safetensors"))
    assert size < 0.5 * (merged / "model.safetensors").stat().st_size
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
    ids = torch.tensor([[5, 6, 7, 20, 21, 2]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-4)
        with loaded.disable_adapter():
            start = transformers.AutoModelForCausalLM.from_pretrained(wide_folder).eval()
            same = torch.allclose(loaded(ids).logits, start(ids).logits, atol=1e-5)
    assert same == (not kind.startswith("q")), "the base is the reference, or the reference rounded"
    for name in ("chosen_logp_change", "heldout_chosen_logp_change"):
        assert figures[1][name] == pytest.approx(figures[0][name], abs=1e-4)
    assert figures[0]["chosen_logp_change"] != 0
    assert main(["push", str(tmp_path / "adapter"), "dpo", "--repo", "org/name"]) == 2
    assert "a folder of this machine" in capsys.readouterr().err


def test_an_adapter_stands_on_no_adapter(data, model_folder, tmp_path, capsys):
    save_some_adapter(model_folder, tmp_path / "start")
    flags = ["--data", str(data), "--model", str(tmp_path / "start"), "--output-dir", str(tmp_path / "run")]
    assert main(["run", *flags, "--methods", "dpo", "--distill.adapters", "true"]) == 2
    assert "is itself an adapter" in capsys.readouterr().err
    assert main(["run", *flags, "--methods", "dpo", "--distill.adapters", "true", "--distill.lora_rank", "0"]) == 2
    assert "distill.lora_rank" in capsys.readouterr().err
    assert main(["run", *flags, "--reward.hold", "lora", "--reward.adapters", "true"]) == 2
    assert "reward.adapters: the model" in capsys.readouterr().err
    models = ["--reward.models", f"[{model_folder},embedded]", "--evaluate.judge", "embedded"]
    flags[3] = str(model_folder)
    assert main(["run", *flags, *models, "--reward.hold", "lora", "--reward.adapters", "true"]) == 2
    assert "reward.adapters: the model 'embedded' is put together" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
