"""Faults of the main job that were found by looking, each with the run that showed it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from prefdistill import pipeline
from prefdistill.data.group_files import read_groups
from prefdistill.errors import ConfigError, DataError
from prefdistill.evaluation import sampling
from prefdistill.models.backbone import backbone_of
from prefdistill.models.loading import load_policy
from prefdistill.seals import SEAL, seal
from prefdistill.stages import members, rewards
from prefdistill.stages.run import Run
from prefdistill.training.callbacks import ProgressCallback
from prefdistill.training.checkpoints import last_checkpoint
from tiny_models import save_some_adapter, tiny
from tiny_runs import rows, small, write_rows
from tiny_tokenizers import gpt2, llama3


def test_an_end_token_inside_a_text_is_a_bad_row(tmp_path, model_folder):
    """A policy would stop there: the row is named, or dropped with its reason."""
    path = tmp_path / "pairs.jsonl"
    lines = rows()
    lines[4]["rejected"] = " red<|endoftext|> blue"
    write_rows(path, lines)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"row 5.*rejected.*end token '<\|endoftext\|>'"):
        pipeline.run(small(path, model_folder, out, methods="[dpo]"), until="data")
    assert not out.exists()
    pipeline.run(small(path, model_folder, out, methods="[dpo]", **{"dataset.on_bad_row": "drop"}), until="data")
    (dropped,) = map(json.loads, (out / "data" / "rejected.jsonl").read_text().splitlines())
    assert "end token" in dropped["reason"]


def test_demonstrations_that_do_not_fit_are_counted(tmp_path, model_folder, capsys):
    path = tmp_path / "pairs.jsonl"
    demos = [{**r, "demo": " red" * (60 if i % 2 else 2)} for i, r in enumerate(rows())]
    write_rows(path, demos)
    options = {"sft.enabled": True, "sft.on": "demo", "dataset.max_response_tokens": 50}
    pipeline.run(small(path, model_folder, tmp_path / "out", methods="[dpo]", **options), until="start")
    groups = [g for g in read_groups(tmp_path / "out" / "data" / "prompts.parquet") if g.split == "train"]
    long = sum(len(g.extra["demo"]) > 100 for g in groups)
    said = capsys.readouterr().err
    assert f"supervised start on {len(groups) - long} prompts, {long} demonstrations left out as too long" in said


def test_other_weights_under_the_same_name_are_noticed(data, model_folder, tmp_path, capsys):
    """A ready member, which is the judge too, is trained again in its place: what hangs on it is done again."""
    first, member = tmp_path / "first", tmp_path / "first" / "reward" / "member-0"
    pipeline.run(small(data, model_folder, first, methods="[d-dpo]"), until="reward")
    options = {"reward.members": 0, "reward.pretrained": f"[{member}]", "evaluate.judge": member}
    config = small(data, model_folder, tmp_path / "run", methods="[d-dpo]", **options)
    pipeline.run(config)
    scores = json.loads((tmp_path / "run" / "evaluation" / "scores.json").read_text())
    head = member / "model-00002-of-00002.safetensors"
    weights = load_file(head)
    save_file({"score.weight": torch.randn_like(weights["score.weight"])}, head, metadata={"format": "pt"})
    capsys.readouterr()
    pipeline.run(config)
    said = capsys.readouterr().err
    for stage in ("score", "distill:d-dpo", "evaluate"):
        assert f"{stage}: done before" not in said
    assert json.loads((tmp_path / "run" / "evaluation" / "scores.json").read_text()) != scores


def test_data_under_the_home_folder_are_noticed_too(data, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = small("~/pairs.jsonl", model_folder, tmp_path / "run", methods="[dpo]")
    pipeline.run(config, until="data")
    write_rows(data, rows(24, seed=5))
    pipeline.run(config, until="data")
    assert sum(len(g.pairs) for g in read_groups(tmp_path / "run" / "data" / "prompts.parquet")) == 24


def test_samples_longer_than_the_datas_bound_are_judged(data, model_folder, tmp_path):
    out = tmp_path / "run"
    options = {"dataset.max_response_tokens": 40, "evaluate.max_new_tokens": 60}
    config = small(data, model_folder, out, methods="[dpo]", **options)
    pipeline.run(config)
    drawn = json.loads((out / "evaluation" / "samples" / "reference.json").read_text())["samples"]
    assert max(len(s["ids"]) for d in drawn for s in d) > 40
    scores = json.loads((out / "evaluation" / "scores.json").read_text())
    assert [len(s) for s in scores["reference"]] == [2] * len(drawn)


def test_columns_in_another_folder_are_computed_there(data, model_folder, tmp_path):
    out, shared = tmp_path / "run", tmp_path / "shared"
    pipeline.run(small(data, model_folder, out, methods="[d-dpo]"), until="score")
    config = small(data, model_folder, out, methods="[d-dpo]", **{"score.columns": shared})
    pipeline.run(config, until="distill")
    assert list(shared.glob("reference-logps-*/shard-*"))
    for folder in list(shared.iterdir()):
        shutil.rmtree(folder)
    pipeline.run(config, until="score")
    assert list(shared.glob("reference-logps-*/shard-*")), "columns that were removed are computed again"


def test_an_adapter_as_the_policy(data, model_folder, tmp_path):
    """Heads on it, and the judge, keep its weights; what is saved loads whole."""
    save_some_adapter(model_folder, tmp_path / "adapter")
    out = tmp_path / "run"
    config = small(data, tmp_path / "adapter", out, methods="[d-dpo]", precision="auto")
    pipeline.run(config)
    merged = load_policy(str(tmp_path / "adapter"))
    for folder in ("reward/member-0", "judge"):
        loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            out / folder, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for name, tensor in backbone_of(merged).state_dict().items():
            torch.testing.assert_close(backbone_of(loaded).state_dict()[name], tensor)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    moved = [not torch.equal(a, b) for a, b in zip(merged.parameters(), plain.parameters(), strict=True)]
    assert any(moved)


@pytest.mark.parametrize("other", [False, True])
def test_members_read_the_same_tokens_in_training_and_in_scoring(other, data, model_folder, tmp_path, monkeypatch):
    """Members on another base: its tokenizer alike or not, prompts are cut as the run's are."""
    base = tmp_path / "base"
    tokenizer = llama3() if other else gpt2()
    tiny(
        "llama", seed=5, vocab_size=len(tokenizer), pad_token_id=None, eos_token_id=tokenizer.eos_token_id
    ).save_pretrained(base)
    tokenizer.save_pretrained(base)
    seen = []
    real = members.member_trees

    def spy(run, groups, encoder):
        trees = real(run, groups, encoder)
        seen.append({(t.prompt_ids, t.responses) for t in trees})
        return trees

    for module in (members, rewards):
        monkeypatch.setattr(module, "member_trees", spy)
    options = {"reward.hold": "lora", "reward.members": 1, "reward.models": f"[{base}]", "dataset.max_prompt_tokens": 8}
    config = small(data, model_folder, tmp_path / "run", methods="[d-dpo]", **options)
    pipeline.run(config, until="score")
    train, _, scored = seen[:3]
    assert train <= scored
    assert max(len(p) for p, _ in train) == 8
    same = {(g.ids, tuple(r.ids for r in g.responses)) for g in Run(config).groups}
    assert (train <= same) != other


def test_seeds_of_members_differ_between_runs():
    assert len({members.seed_of(seed, k) for seed in range(20) for k in range(20)}) == 400


def sealed(folder, step, text="{}"):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(text)
    seal(checkpoint)
    return checkpoint


def test_a_half_written_checkpoint_is_not_read(tmp_path, caplog):
    for step in (2, 4):
        sealed(tmp_path, step)
    for step in (6, 8):
        (sealed(tmp_path, step) / SEAL).unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert last_checkpoint(tmp_path / "nothing") is None
    assert not caplog.records, "a stop is no damage"


@pytest.mark.parametrize("seal_of", ["", '{"half', "[1]", "{}"])
def test_a_damaged_seal_is_named(seal_of, tmp_path, caplog):
    """Seals appear whole, so this one was damaged later."""
    (sealed(tmp_path, 2) / SEAL).write_text(seal_of)
    assert last_checkpoint(tmp_path) is None
    (record,) = caplog.records
    assert f"checkpoint-2 is damaged ({'trainer_state.json' if seal_of == '{}' else SEAL}" in record.getMessage()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "add"])
def test_a_damaged_checkpoint_is_named_and_not_read(damage, tmp_path, caplog):
    sealed(tmp_path, 2)
    file = sealed(tmp_path, 4, "0123456789") / "trainer_state.json"
    if damage == "flip":
        file.write_text("0123056789")
    elif damage == "cut":
        file.write_text("01234")
    elif damage == "remove":
        file.unlink()
    else:
        (file.parent / "optimizer.pt").write_bytes(b"another's")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()
    (record,) = caplog.records
    assert "checkpoint-4 is damaged" in record.getMessage()
    assert ("optimizer.pt" if damage == "add" else "trainer_state.json") in record.getMessage()


@pytest.mark.parametrize("stage", ["sample", "evaluate"])
def test_a_stopped_sampling_goes_on_after_its_last_batch(stage, data, model_folder, tmp_path, monkeypatch):
    """What was drawn is not drawn again, and the samples are those of a run that nobody stopped."""
    options = {"methods": "[dp-dpo]", "score.token_budget": 40, "evaluate.temperature": 0.7}
    whole, stopped = (small(data, model_folder, tmp_path / name, **options) for name in ("whole", "stopped"))
    until = "sample" if stage == "sample" else None
    pipeline.run(whole, until=until)
    if stage == "evaluate":
        pipeline.run(stopped, until="distill")
    real, batches = sampling._sample_batch, []

    def stop(*args):
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(args[1])
        return real(*args)

    monkeypatch.setattr(sampling, "_sample_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(stopped, until=until)
    first, batches[:] = [p for b in batches for p in b], [None]

    def count(*args):
        batches.append(args[1])
        return real(*args)

    monkeypatch.setattr(sampling, "_sample_batch", count)
    pipeline.run(stopped, until=until)
    assert first
    again = [p for b in batches[1:] for p in b]
    if stage == "sample":
        assert not set(first) & set(again)
        files = ["data/sampled.parquet"]
    else:
        files = [f"evaluation/samples/{m}.json" for m in ("reference", "dp-dpo")]
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()
    assert not list((tmp_path / "stopped" / ".work").rglob("part-*"))


@pytest.mark.parametrize(
    ("until", "options"),
    [
        ("start", {"sft.enabled": True, "methods": "[dpo]"}),
        ("reward", {"reward.hold": "lora", "reward.members": 2, "methods": "[d-dpo]"}),
        ("judge", {"reward.hold": "full", "methods": "[dpo]"}),
    ],
)
def test_every_training_goes_on_from_its_checkpoint(until, options, data, model_folder, tmp_path, monkeypatch):
    """Supervised start, members and judge: stopped in the middle, their weights are those of a run nobody stopped."""
    real_arguments, real_step, steps = Run.training_arguments, ProgressCallback.on_step_end, []

    def often(self, *where, **given):
        return real_arguments(self, *where, **{**given, "logging_steps": 1, "save_steps": 1})

    def stop(self, args, state, control, **kwargs):
        real_step(self, args, state, control, **kwargs)
        steps.append(state.global_step)
        if len(steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "training_arguments", often)
    small_batches = {"sft.batch_prompts": 3, "reward.batch_prompts": 2, "reward.epochs": 2, "sft.epochs": 2}
    whole, stopped = (small(data, model_folder, tmp_path / n, **small_batches, **options) for n in ("whole", "stopped"))
    pipeline.run(whole, until=until)
    monkeypatch.setattr(ProgressCallback, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(stopped, until=until)
    pipeline.run(stopped, until=until)
    assert steps[2] == 2, "it goes on from the checkpoint of step 1"
    weights = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.safetensors"))
    assert weights
    for path in weights:
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "stopped" / path).read_bytes(), path


def test_two_runs_into_one_directory(data, model_folder, tmp_path):
    """The second is told who holds it and touches nothing; a holder that was killed holds nothing."""
    out = tmp_path / "run"
    code = (
        "import sys, time; from pathlib import Path; from prefdistill.lock import held\n"
        "with held(Path(sys.argv[1])):\n    print('holding', flush=True); time.sleep(60)\n"
    )
    config = small(data, model_folder, out, methods="[dpo]")
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "holding\n"
        with pytest.raises(ConfigError, match=rf"is in use by process {holder.pid} on .* since .*another output_dir"):
            pipeline.run(config, until="data")
        assert not (out / "config.yaml").exists()
        holder.kill()
    pipeline.run(config, until="data")
    assert (out / "data" / "prompts.parquet").exists()
    assert not (out / ".holder.json").exists()


@pytest.mark.parametrize("damaged", ["policy/dpo/model.safetensors", "data/prompts.parquet", "evaluation/summary.json"])
def test_a_flipped_bit_in_what_is_done_is_found(damaged, data, model_folder, tmp_path, caplog):
    """The file is named, its stage runs again, and the run comes out as it was."""
    config = small(data, model_folder, tmp_path / "run", methods="[dpo]")
    pipeline.run(config)
    file = tmp_path / "run" / damaged
    whole = file.read_bytes()
    broken = bytearray(whole)
    broken[len(broken) // 2] ^= 1
    file.write_bytes(bytes(broken))
    caplog.clear()
    pipeline.run(config)
    assert file.read_bytes() == whole
    assert any(str(file) in r.getMessage() and "is not as it was written" in r.getMessage() for r in caplog.records)


def test_a_flipped_bit_in_a_column_is_computed_again(data, model_folder, tmp_path, caplog):
    config = small(data, model_folder, tmp_path / "run", methods="[d-dpo]")
    pipeline.run(config, until="score")
    scored = (tmp_path / "run" / "data" / "scored.parquet").read_bytes()
    shards = list((tmp_path / "run").rglob("shard-*.parquet"))
    assert len(shards) > 2
    for shard in shards:
        broken = bytearray(shard.read_bytes())
        broken[len(broken) // 3] ^= 16
        shard.write_bytes(bytes(broken))
    pipeline.run(config, until="score")
    assert (tmp_path / "run" / "data" / "scored.parquet").read_bytes() == scored
    assert all(any(str(s) in r.getMessage() for r in caplog.records) for s in shards)


def test_a_damaged_backbone_that_heads_share_is_written_again(data, model_folder, tmp_path, caplog):
    """It stayed as it was, and heads that were made again were linked to it: its checksum became theirs."""
    config = small(data, model_folder, tmp_path / "run", methods="[d-dpo]")
    pipeline.run(config, until="reward")
    names = [f"member-{k}/model-00001-of-00002.safetensors" for k in range(config.reward.members)]
    files = [tmp_path / "run" / "reward" / name for name in names]
    whole = files[0].read_bytes()
    assert all(f.samefile(files[0]) for f in files)
    with files[0].open("r+b") as opened:
        opened.seek(len(whole) // 2)
        opened.write(bytes([whole[len(whole) // 2] ^ 1]))
    pipeline.run(config, until="reward")
    assert all(f.read_bytes() == whole for f in files)
    assert any("backbone-" in r.getMessage() and "is damaged" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("change", [('"cost": 0.1', '"cost": 0.3'), ('"version": 1', '"version": 3'), ("{", "[")])
def test_a_changed_manifest_is_refused(change, data, model_folder, tmp_path):
    """Also where it is JSON still: what it says of a stage would be believed. The remedy computes the run again."""
    config = small(data, model_folder, tmp_path / "run", methods="[dpo]")
    pipeline.run(config, until="data")
    manifest, pairs = tmp_path / "run" / "manifest.json", tmp_path / "run" / "data" / "prompts.parquet"
    whole = pairs.read_bytes()
    text = manifest.read_text()
    assert change[0] in text
    manifest.write_text(text.replace(*change, 1))
    with pytest.raises(DataError, match=r"manifest\.json (is broken|has version 3).*remove it to compute"):
        pipeline.run(config, until="data")
    manifest.unlink()
    pipeline.run(config, until="data")
    assert pairs.read_bytes() == whole


def test_a_file_that_is_gone_is_named(data, model_folder, tmp_path, caplog):
    config = small(data, model_folder, tmp_path / "run", methods="[dpo]")
    pipeline.run(config, until="data")
    pairs = tmp_path / "run" / "data" / "prompts.parquet"
    pairs.unlink()
    (tmp_path / "run" / "config.yaml").unlink()
    pipeline.run(config, until="data")
    assert pairs.exists()
    assert f"{pairs} is gone; data is done again" in caplog.text


@pytest.mark.parametrize(
    "kept", ["", "{}", "[]", '{"precision": "float3"}', '{"precision": {}}', '{"precision": "auto"}']
)
def test_a_damaged_precision_is_measured_again(kept, data, model_folder, tmp_path, capsys):
    run = Run(small(data, model_folder, tmp_path / "run", methods="[dpo]", precision="auto"))
    chosen = run.precision
    (tmp_path / "run" / "precision.json").write_text(kept)
    again = Run(run.config)
    assert again.precision == chosen
    assert "precision.json is damaged" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "precision.json").read_text()) == {"precision": chosen}
