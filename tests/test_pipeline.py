"""The main job on a tiny model: twice, stopped in the middle, and on data that cannot be used."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
import transformers

from prefdistill import pipeline
from prefdistill.cli import main, parse
from prefdistill.errors import ConfigError, DataError
from prefdistill.manifest import Manifest
from prefdistill.stages import prepare
from prefdistill.training.callbacks import ProgressCallback
from tiny_runs import rows, small, write_rows

CONTRACT = {"advantage", "win_rate", "kl_policy_ref", "kl_ref_policy", "length_mean", "chosen_logp_change"}


def test_every_stage_says_how_long_is_left(data, model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "forward_seconds", lambda *arguments: 1.5)  # a GPU is not timed
    pipeline.run(small(data, model_folder, tmp_path / "run", methods="[dpo]"), until="distill")
    stages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert len(stages) == 4
    assert all(re.search(r"about \d[\d.]* (s|min) left in all", line) for line in stages)


def test_run_twice_does_nothing_the_second_time(data, model_folder, tmp_path, capsys):
    out = tmp_path / "run"
    config = small(data, model_folder, out, methods="[dpo,ipo,p-dpo,d-dpo,dp-dpo,e-dpo]")
    pipeline.run(config)
    summary = json.loads((out / "evaluation" / "summary.json").read_text())
    assert summary["version"] == 1
    assert set(summary["methods"]) == {"reference", *config.methods}
    for figures in summary["methods"].values():
        assert set(figures) >= CONTRACT
        low, high = figures["advantage"]["ci95"]
        assert low <= figures["advantage"]["mean"] <= high
    assert "chosen_logp_change" in summary["methods"]["e-dpo"]
    assert summary["methods"]["reference"]["kl_policy_ref"]["mean"] == pytest.approx(0, abs=1e-9)
    assert "<html" in (out / "report.html").read_text(encoding="utf-8").lower()
    scored = pq.read_table(out / "data" / "scored.parquet")
    assert {"prompt", "chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps"} <= set(scored.column_names)

    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    pipeline.run(config)
    assert "nothing to do" in capsys.readouterr().err
    after = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert {p for p in before if before[p] != after.get(p)} <= {out / "config.yaml"}
    assert before.keys() == after.keys()
    assert not [p for p in before if ".part-" in p.name]

    # What a killed process left half-written goes, but not what another run may be writing, nor what is not ours.
    names = [
        "data/.x.parquet.part-12-00c0ffee",
        "reward/.member-0.old-7-00c0ffee/f",
        "columns/logps-0123456789ab/.s.part-1-00c0ffee",
        ".a.part-b",
    ]
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("half")
    pipeline.run(config)
    assert [(out / name).exists() for name in names] == [False, False, True, True]
    assert not (out / "reward" / ".member-0.old-7-00c0ffee").exists()

    # Members and policies are ordinary folders.
    member = transformers.AutoModelForSequenceClassification.from_pretrained(out / "reward" / "member-0")
    assert member.config.num_labels == 1
    policy = transformers.AutoModelForCausalLM.from_pretrained(out / "policy" / "e-dpo")
    assert torch.isfinite(policy(torch.tensor([[3, 4, 5]])).logits).all()


def test_member_rewards_are_those_of_the_saved_folder(data, model_folder, tmp_path):
    """In another process, by transformers alone, prompt and response as text."""
    out = tmp_path / "run"
    pipeline.run(small(data, model_folder, out, methods="[d-dpo]"), until="score")
    scored = pq.read_table(out / "data" / "scored.parquet").to_pylist()
    code = f"""
import json, sys, torch, transformers
m = transformers.AutoModelForSequenceClassification.from_pretrained({str(out / "reward" / "member-1")!r}).eval()
t = transformers.AutoTokenizer.from_pretrained({str(out / "reward" / "member-1")!r})
out = []
for row in json.load(sys.stdin):
    pair = []
    for side in ("chosen", "rejected"):
        ids = t(row["prompt"])["input_ids"] + t(row[side])["input_ids"] + [t.eos_token_id]
        pair.append(m(torch.tensor([ids])).logits[0, 0].item())
    out.append(pair[0] - pair[1])
print(json.dumps(out))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(scored), capture_output=True, text=True, check=True
    )
    ours = [row["rewards_chosen"][1] - row["rewards_rejected"][1] for row in scored]
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(ours, abs=1e-4)


def test_a_stopped_run_goes_on_where_it_was(data, model_folder, tmp_path, monkeypatch, capsys):
    options = {"methods": "[d-dpo]", "distill.save_steps": 1, "distill.logging_steps": 2}
    config, whole = (small(data, model_folder, tmp_path / name, **options) for name in ("run", "whole"))
    pipeline.run(whole, until="distill")

    real, steps = ProgressCallback.on_step_end, []

    def stop(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        steps.append(state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressCallback, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, until="distill")
    assert not (tmp_path / "run" / "policy" / "d-dpo").exists()
    capsys.readouterr()
    pipeline.run(config, until="distill")
    said = capsys.readouterr().err
    assert "score: done before" in said
    assert steps[4] == 3, "it goes on from the checkpoint of step 2, not from the start"
    for name in ("run", "whole"):
        assert not list((tmp_path / name / ".work").glob("distill*"))
    histories = [
        json.loads((tmp_path / name / "policy" / "d-dpo" / "history.json").read_text()) for name in ("run", "whole")
    ]
    assert histories[0] == histories[1], "nothing that was recorded before the stop is lost"
    weights = [(tmp_path / name / "policy" / "d-dpo" / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


def test_another_option_does_only_what_hangs_on_it(data, model_folder, tmp_path, capsys):
    out = tmp_path / "run"
    pipeline.run(small(data, model_folder, out, methods="[dpo,d-dpo]"), until="distill")
    capsys.readouterr()
    pipeline.run(small(data, model_folder, out, methods="[dpo,d-dpo]", **{"reward.l2": 0.5}), until="distill")
    said = capsys.readouterr().err
    for stage in ("data", "reference", "distill:dpo"):
        assert f"{stage}: done before" in said
    for stage in ("reward", "score", "distill:d-dpo"):
        assert f"{stage}: done before" not in said


@pytest.mark.parametrize("hold", ["lora", "full"])
def test_members_of_every_kind_and_pretrained_ones(hold, data, model_folder, tmp_path):
    first = tmp_path / "first"
    # All chosen responses of `rows` are shorter, so that only rho = 0 can be made of them.
    sections = {"reward.hold": hold, "reward.members": 2, "reward.resample": "length-bias", "reward.rho": "[0.0]"}
    pipeline.run(small(data, model_folder, first, methods="[e-dpo]", **sections), until="score")
    pretrained = {"reward.members": 1, "reward.pretrained": f"[{first / 'reward' / 'member-1'}]"}
    second = tmp_path / "second"
    pipeline.run(small(data, model_folder, second, methods="[e-dpo]", **pretrained), until="evaluate")
    a, b = (pq.read_table(p / "data" / "scored.parquet").to_pylist() for p in (first, second))
    for x, y in zip(a, b, strict=True):
        margin = [r["rewards_chosen"][1] - r["rewards_rejected"][1] for r in (x, y)]
        assert margin[0] == pytest.approx(margin[1], abs=1e-4)


def test_supervised_start(data, model_folder, tmp_path):
    out = tmp_path / "run"
    pipeline.run(small(data, model_folder, out, methods="[dpo]", **{"sft.enabled": "true"}), until="start")
    start = transformers.AutoModelForCausalLM.from_pretrained(out / "start")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    changed = [not torch.equal(a, b) for a, b in zip(start.parameters(), base.parameters(), strict=True)]
    assert any(changed)


def bad_files(tmp_path):
    good = rows(5)
    files = {
        "missing column": ("a.jsonl", json.dumps({"prompt": "x", "chosen": "y"}).encode(), ["a.jsonl", "rejected"]),
        "empty response": ("b.jsonl", json.dumps({**good[0], "chosen": " "}).encode(), ["b.jsonl", "row 1", "chosen"]),
        "equal": ("c.jsonl", json.dumps({**good[0], "rejected": good[0]["chosen"]}).encode(), ["c.jsonl", "row 1"]),
        "not UTF-8": ("d.jsonl", b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}', ["d.jsonl", "UTF-8"]),
        "empty": ("e.jsonl", b"", ["e.jsonl"]),
    }
    for kind, (name, content, words) in files.items():
        (tmp_path / name).write_bytes(content)
        yield kind, tmp_path / name, words
    yield "does not exist", tmp_path / "nowhere.jsonl", ["nowhere.jsonl"]


def test_bad_data_stops_with_2_and_nothing_is_written(tmp_path, model_folder, capsys):
    for kind, path, words in bad_files(tmp_path):
        out = tmp_path / "out"
        code = main(["run", "--data", str(path), "--model", str(model_folder), "--output-dir", str(out)])
        said = capsys.readouterr().err
        assert code == 2, kind
        assert all(w in said for w in words), (kind, said)
        assert "Traceback" not in said
        assert not out.exists(), kind


def test_rows_are_read_again_only_where_they_changed(data, model_folder, tmp_path, monkeypatch, capsys):
    out, read = tmp_path / "run", []
    real = prepare.read_pairs
    monkeypatch.setattr(prepare, "read_pairs", lambda run: read.append(1) or real(run))
    config = small(data, model_folder, out, methods="[dpo]")
    pipeline.run(config, until="data")
    pipeline.run(config, until="distill")
    assert "left in all" in capsys.readouterr().err  # the time is told from the rows that were kept
    pipeline.run(config, until="distill")
    assert "nothing to do" in capsys.readouterr().err
    assert len(read) == 1
    kept = (out / "data" / "prompts.parquet").read_bytes()
    (out / "data" / "prompts.parquet").write_bytes(kept[:-9])
    pipeline.run(config, until="data")
    assert (out / "data" / "prompts.parquet").read_bytes() == kept
    assert len(read) == 2
    data.write_text(data.read_text() + '{"prompt": "p", "chosen": " ", "rejected": "b"}\n')
    with pytest.raises(DataError, match="row 31"):
        pipeline.run(config, until="distill")
    config.dataset.on_bad_row = "drop"
    pipeline.run(config, until="data")
    assert len(read) == 4


def test_a_training_that_was_not_yet_written_down_is_not_repeated(data, model_folder, tmp_path, monkeypatch):
    config = small(data, model_folder, tmp_path / "run", methods="[dpo]")
    step_end, finish, steps, ends = ProgressCallback.on_step_end, Manifest.finish, [], []

    def count(self, args, state, *rest, **more):
        steps.append(state.global_step)
        step_end(self, args, state, *rest, **more)

    def stop(self, stage, *rest):
        if stage == "distill:dpo" and not ends:
            ends.append(stage)
            raise KeyboardInterrupt
        finish(self, stage, *rest)

    monkeypatch.setattr(ProgressCallback, "on_step_end", count)
    monkeypatch.setattr(Manifest, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, until="distill")
    taken = list(steps)
    assert taken == list(range(1, len(taken) + 1))
    pipeline.run(config, until="distill")
    assert steps == taken
    assert not list((tmp_path / "run" / ".work").iterdir())


def test_what_a_killed_process_left_of_a_finished_stage_goes(data, model_folder, tmp_path):
    config = small(data, model_folder, tmp_path / "run", methods="[dpo]")
    pipeline.run(config, until="distill")
    record = Manifest(tmp_path / "run").stages["distill:dpo"]
    left = tmp_path / "run" / ".work" / f"distill-dpo-{record.fingerprint[:12]}" / "checkpoint-1"
    left.mkdir(parents=True)
    pipeline.run(config, until="distill")
    assert not left.parent.exists()


def test_bad_rows_can_be_dropped(tmp_path, model_folder):
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps(r) for r in rows()]
    lines.insert(3, json.dumps({"prompt": "x", "chosen": " ", "rejected": "y"}))
    path.write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "out"
    config = small(path, model_folder, out, methods="[dpo]", **{"dataset.on_bad_row": "drop"})
    pipeline.run(config, until="data")
    dropped = [json.loads(line) for line in (out / "data" / "rejected.jsonl").read_text().splitlines()]
    assert [d["where"].endswith("row 4") for d in dropped] == [True]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "nope"], ["nope", "e-dpo"]),
        (["--distill.beta", "0"], ["distill.beta"]),
        (["--reward.hold", "x"], ["reward.hold", "lora"]),
        (["--distill.bata", "1"], ["bata"]),
        (["--distill.per_method", "{dpo: {bata: 1}}"], ["per_method.dpo", "bata"]),
        (["--distill.per_method", "{dpo: {beta: -1}}"], ["per_method.dpo", "distill.beta"]),
        (["--dataset.test_fraction", "0.9"], ["fraction"]),
        (["--distill.per_method", "{dpo: {learning_rate: fast}}"], ["per_method.dpo.learning_rate", "fast"]),
        (["--distill.training_arguments", "{nonsense: 1}"], ["nonsense", "TrainingArguments"]),
        *(
            (["--distill.training_arguments", f"{{{n}: 1}}"], [f"'{n}'", "leave it out"])
            for n in ("output_dir", "seed")
        ),
        (["--distill.training_arguments", "{save_only_model: true}"], ["save_only_model", "goes on from them"]),
        (["--distill.per_method", "{dpo: {training_arguments: {save_steps: 5}}}"], ["dpo", "is distill.save_steps"]),
        *(
            ([f"--{o}", ".nan"], [o, "nan"])
            for o in ("evaluate.temperature", "distill.warmup_fraction", "evaluate.top_p")
        ),
        (["--distill.label_smoothing", "0.7"], ["label_smoothing"]),
        (["--distill.reward_scale", "0"], ["reward_scale"]),
        (["--distill.learning_rate", "-1"], ["distill.learning_rate"]),
        (["--distill.members", "0,7"], ["distill.members", "7"]),
        (["--reward.l2", "-1"], ["reward.l2"]),
        (["--sample.reference_per_prompt", "-1"], ["reference_per_prompt"]),
        (["--evaluate.temperature", "-1"], ["evaluate.temperature"]),
        (["--evaluate.top_p", "0"], ["evaluate.top_p"]),
        (["--evaluate.tie_margin", "-1"], ["tie_margin"]),
        (["--seed", "-1"], ["seed"]),
        (["--evaluate.judge", "nowhere:f", "--data", "DATA"], ["nowhere"]),
        (["--evaluate.judge", "no/such/folder", "--data", "DATA"], ["no/such/folder"]),
        (["--evaluate.judge", "MODEL", "--data", "DATA"], ["no reward model", "SequenceClassification"]),
        (["--reward.pretrained", "no/such/folder", "--data", "DATA"], ["no/such/folder"]),
        (
            ["--sample.reference_per_prompt", "0", "--methods", "dpo,p-dpo"],
            ["p-dpo needs samples", "reference_per_prompt"],
        ),
        (["--reward.resample", "length-bias", "--reward.rho", "20,80"], ["reward.rho", "[0, 1]"]),
        (["--report_to", "tensorbord"], ["'tensorbord' is no tracker", "tensorboard"]),
        (["--distill.training_arguments", "{optim: adamw8}"], ["training_arguments of", "adamw8"]),
        (["--distill.training_arguments", "{eval_strategy: steps}"], ["eval_strategy", "distill.checkpoints"]),
        (["missing.yaml"], ["missing.yaml"]),
    ],
)
def test_options_are_checked_before_anything_is_written(flags, words, tmp_path, model_folder, data, capsys):
    out = tmp_path / "out"
    flags = [{"DATA": str(data), "MODEL": str(model_folder)}.get(f, f) for f in flags]
    code = main(["run", *flags, "--model", str(model_folder), "--output-dir", str(out)])
    said = capsys.readouterr().err
    assert code == 2
    assert all(w in said for w in words), said
    assert not out.exists()


def test_a_run_inside_its_data_folder_is_done_once(model_folder, tmp_path, capsys):
    """What is not read there is nothing that the run hangs on."""
    write_rows(tmp_path / "a.jsonl", rows(20))
    write_rows(tmp_path / "b.jsonl", rows(20, seed=1))
    config = small(tmp_path, model_folder, tmp_path / "run", methods="[dpo]")
    pipeline.run(config, until="data")
    (tmp_path / "README.md").write_text("about")
    capsys.readouterr()
    pipeline.run(config, until="data")
    assert "nothing to do" in capsys.readouterr().err
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    pipeline.run(config, until="data")
    assert "nothing to do" not in capsys.readouterr().err


def test_yaml_and_flags_are_one(tmp_path):
    path = tmp_path / "c.yaml"
    config = parse("run", ["--distill.beta", "0.3", "--methods", "dpo,e-dpo", "--output-dir", "x"])
    path.write_text(config.as_yaml(), encoding="utf-8")
    assert parse("run", [str(path)]) == config
    assert parse("run", [str(path), "--distill.beta=0.5"]).distill.beta == 0.5


def test_config_check_names_the_option():
    with pytest.raises(ConfigError, match=r"reward\.rho"):
        parse("run", ["--reward.resample", "length-bias"]).check()


def test_a_method_can_have_options_of_its_own():
    config = parse("run", ["--distill.beta=0.2", "--distill.per_method", "{dpo: {learning_rate: 0.5}}"])
    config.check()
    assert config.distill.of("dpo").learning_rate == 0.5
    assert config.distill.of("dpo").beta == 0.2
    assert config.distill.of("e-dpo").learning_rate is None


def test_data_too_few_for_the_splits_write_nothing(tmp_path, model_folder):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(rows(1)[0]), encoding="utf-8")
    with pytest.raises(DataError, match="too few"):
        pipeline.run(small(path, model_folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_tuning_reads_the_validation_split(data, model_folder, tmp_path, capsys):
    """What is chosen on the test prompts says nothing of them: evaluate.split keeps them out of sight."""
    out = tmp_path / "run"
    config = small(data, model_folder, out, methods="[dpo]", **{"evaluate.split": "validation"})
    pipeline.run(config)
    counts = json.loads((out / "data" / "data.json").read_text())["prompts"]
    summary = json.loads((out / "validation" / "summary.json").read_text())
    assert summary["split"] == "validation"
    assert summary["prompts"] == counts["validation"] != counts["test"]
    assert not (out / "evaluation").exists()
    # The test stands beside it: neither takes the other's place.
    pipeline.run(small(data, model_folder, out, methods="[dpo]"))
    assert json.loads((out / "evaluation" / "summary.json").read_text())["prompts"] == counts["test"]
    capsys.readouterr()
    pipeline.run(config)
    assert "nothing to do" in capsys.readouterr().err
    assert (out / "report.html").read_text() != (out / "report-validation.html").read_text()


def test_members_as_adapters(data, model_folder, tmp_path):
    """Small folders on one base, the same rewards, and usable as ready reward models of another run."""
    rewards = {}
    for adapters in (False, True):
        out = tmp_path / f"run-{adapters}"
        lora = {"reward.hold": "lora", "reward.lora_rank": 2, "reward.members": 2, "reward.learning_rate": 0.01}
        config = small(data, model_folder, out, methods="[d-dpo]", **lora, **{"reward.adapters": str(adapters).lower()})
        pipeline.run(config, until="score")
        rewards[adapters] = pq.read_table(out / "data" / "scored.parquet").to_pydict()
        assert (out / "reward" / "member-0" / "adapter_config.json").exists() == adapters
        assert (out / "reward" / "member-0" / "model.safetensors").exists() != adapters
    columns = [c for c in rewards[True] if "reward" in c]
    assert columns
    for column in columns:
        torch.testing.assert_close(
            torch.tensor(rewards[True][column]), torch.tensor(rewards[False][column]), atol=1e-5, rtol=1e-4
        )
    member = tmp_path / "run-True" / "reward" / "member-0"
    second = small(
        data,
        model_folder,
        tmp_path / "second",
        methods="[d-dpo]",
        **{"reward.members": 0, "reward.pretrained": f"[{member}]"},
    )
    pipeline.run(second, until="score")
    found = pq.read_table(tmp_path / "second" / "data" / "scored.parquet").to_pydict()
    assert sum(len(v) for c, v in found.items() if "reward" in c) > 0
