"""Two processes take the steps that one takes on the same trees."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from prefdistill import cli, pipeline, ranks
from prefdistill.cli import parse
from prefdistill.errors import ConfigError
from prefdistill.stages.bases import new_policy
from prefdistill.stages.run import Run
from tiny_runs import rows, small, write_rows

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"


def launch(processes: int, *arguments: str, by: list[str] | None = None) -> subprocess.Popen:
    return started(processes, str(HERE / "two_processes.py"), *arguments, by=by)


def started(processes: int, *command: str, by: list[str] | None = None) -> subprocess.Popen:
    """A script with its arguments, in so many processes, by torchrun if nothing else is said."""
    if by is not None:
        command = [*by, f"--num_processes={processes}", *command]
    elif processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command]
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {
        "DS_ACCELERATOR": "cpu",
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": paths,
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def done(process: subprocess.Popen, status: int = 0) -> str:
    """What a process said until its end."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err[-3000:]
    return out + err


def accelerate(file: str, *flags: str) -> list[str]:
    """`accelerate launch` with a file of the examples, on a port that is free."""
    config = str(EXAMPLES / "accelerate" / file)
    return ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port=0", *flags]


KINDS = ["distill", "reward", "sft", "fsdp2"]
# `accelerate launch --cpu` would start one process, whatever --num_processes says; without GPUs ddp.yaml starts them.
LAUNCHERS = {"torchrun": None, "accelerate launch": accelerate("ddp.yaml")}


def curves(folder: Path, processes: int, by: list[str] | None = None) -> dict:
    """What so many processes make of every kind of training, on batches of four."""
    done(launch(processes, "train", str(folder / "curves.json"), str(4 // processes), by=by))
    return json.loads((folder / "curves.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The curves of one process and those of two, by each launcher."""
    folder = tmp_path_factory.mktemp("trained")
    return curves(folder, 1), {launcher: curves(folder, 2, by) for launcher, by in LAUNCHERS.items()}


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(kind, launcher, trained):
    """The same global batch, float32: loss, gradient norm and every metric to 1e-5, though shares differ in pairs."""
    one, two = trained[0][kind], trained[1][launcher][kind]
    assert len(one["curve"]) == len(two["curve"]) >= 4
    assert one["curve"][0]["loss"] != pytest.approx(one["curve"][-1]["loss"], rel=1e-2), "nothing was learnt"
    for a, b in zip(one["curve"], two["curve"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6), name
    assert (one["sharded"], two["sharded"]) == (False, kind == "fsdp2")
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-6)


# -- a whole run ---------------------------------------------------------------------------------------------------


def flags_of_run(folder: Path, model: Path) -> list[str]:
    """Of a run in which every stage that processes share has several shards, batches and steps; writes its data."""
    # What is chosen can be told, or a member would be calibrated to rewards of 0.
    made = [{**r, "chosen": r["chosen"] + " red red", "rejected": r["rejected"] + " big big"} for r in rows(40)]
    write_rows(folder / "pairs.jsonl", made)
    options = {
        "data": folder / "pairs.jsonl",
        "model": model,
        "precision": "float32",
        "methods": "[dpo,e-dpo]",
        "sample.reference_per_prompt": 2,
        "reward.members": 2,
        "reward.hold": "lora",
        "reward.learning_rate": 1e-2,
        "reward.epochs": 2,
        "reward.batch_prompts": 4,
        "distill.batch_prompts": 4,
        "distill.epochs": 2,
        "distill.checkpoints": 2,
        "distill.save_steps": 1,
        "distill.logging_steps": 1,
        "distill.learning_rate": 1e-3,
        "distill.kl_alpha": 0.05,
        "score.token_budget": 100,
        "sample.max_new_tokens": 6,
        "evaluate.max_new_tokens": 6,
        "evaluate.judge": "heldout",
    }
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("runs")
    return folder, flags_of_run(folder, model_folder)


@pytest.fixture(scope="module")
def runs(made):
    """The same run in one process and in two, and what the two said."""
    folder, flags = made
    said = {n: done(launch(n, "run", *flags, f"--output_dir={folder / str(n)}")) for n in (1, 2)}
    return folder, said


def columns(folder, column, n):
    """The first n values by key, in the shards' order: later ones are of the policies' samples."""
    found, shards = [], sorted((folder / "columns" / column).glob("*.parquet"))
    assert len(shards) > 4
    for shard in shards:
        found += pq.read_table(shard).to_pylist()
    assert len({row["key"] for row in found}) == len(found)
    return {row["key"]: row["value"] for row in found[:n]}


def test_columns_are_those_of_one_process(runs):
    """Each row once, in order; the reference's to the bit, since batches are the same.

    Members are trained anew in two processes: AdamW's first steps, of the size of the learning rate however small the
    gradient, carry other roundings of its sums on.
    """
    folder, _ = runs
    scored = pq.read_table(folder / "1" / "data" / "sampled.parquet")["responses"].to_pylist()
    expected = sum(map(len, scored))
    for column in ("reference-logps", "rewards-0", "rewards-1"):
        one, two = columns(folder / "1", column, expected), columns(folder / "2", column, expected)
        assert list(one) == list(two)
        assert np.std(list(one.values())) > 0.1
        assert len(one) == expected
        assert list(two.values()) == (
            list(one.values()) if column == "reference-logps" else pytest.approx(list(one.values()), rel=1e-3, abs=1e-3)
        )


def test_the_same_members_give_the_same_rewards(runs, made):
    """Scored by `accelerate launch` in two processes, trained in one."""
    folder, flags = made
    members = [str(folder / "1" / "reward" / f"member-{k}") for k in (0, 1)]
    own = ["--reward.members=0", f"--reward.pretrained=[{','.join(members)}]", f"--output_dir={folder / 'scored'}"]
    done(launch(2, "score", *flags, *own, by=accelerate("ddp.yaml")))
    scored = pq.read_table(folder / "1" / "data" / "sampled.parquet")["responses"].to_pylist()
    for column in ("reference-logps", "rewards-0", "rewards-1"):
        one, two = (columns(folder / n, column, sum(map(len, scored))) for n in ("1", "scored"))
        assert list(one) == list(two)
        assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5, abs=1e-6)
        assert np.std(list(one.values())) > 0.1


def test_samples_are_those_of_one_process(runs):
    folder, _ = runs
    one, two = (pq.read_table(folder / n / "data" / "sampled.parquet").to_pylist() for n in "12")
    assert one == two
    assert any(r["drawn"] for prompt in two for r in prompt["responses"])


def test_a_whole_run_comes_out_as_in_one_process(runs):
    folder, said = runs
    for method in ("dpo", "e-dpo"):
        one, two = (json.loads((folder / n / "policy" / method / "history.json").read_text()) for n in "12")
        assert len(one) == len(two) > 4
        for a, b in zip(one, two, strict=True):
            assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    # What was chosen and drawn after that hangs on comparisons that rounding can turn; the reference does not.
    one, two = (json.loads((folder / n / "evaluation" / "summary.json").read_text()) for n in "12")
    assert one["prompts"] == two["prompts"]
    one, two = (of["methods"]["reference"] for of in (one, two))
    assert two["advantage"] == {k: pytest.approx(v, abs=1e-4) for k, v in one["advantage"].items()}
    assert two["length_mean"] == one["length_mean"]
    # One process speaks: stages and table stand once.
    assert said[2].count("] distill:e-dpo:") == 1
    assert said[2].count("\nreport: ") == 1
    assert "Traceback" not in said[2]


def test_two_processes_go_on_where_they_were_stopped(runs, made):
    """SIGTERM in a training: all stop after one step with one checkpoint; what comes out is equal to the bit."""
    folder, flags = made
    whole, stopped = folder / "2", folder / "stopped"
    running = launch(2, "run", *flags, f"--output_dir={stopped}")
    deadline = time.monotonic() + 200
    while not list(stopped.glob(".work/distill-e-dpo-*/checkpoint-*/checksums.json")):
        assert running.poll() is None, running.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=120)[1]
    assert running.returncode != 0
    assert "prefdistill: terminated; the same command goes on" in said
    assert "KeyboardInterrupt" not in said  # torchrun has a traceback of its own
    assert not list(stopped.glob(".holder.json"))
    assert not (stopped / "policy" / "e-dpo").exists()
    said = done(launch(2, "run", *flags, f"--output_dir={stopped}"))
    assert "distill:dpo: done before" in said
    assert "distill:e-dpo: training" in said
    for name in ("policy/e-dpo/model.safetensors", "policy/e-dpo/history.json", "evaluation/samples/e-dpo.json"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


def log_of(folder: Path) -> list[dict[str, float]]:
    """What a Trainer wrote of its steps beside its last checkpoint."""
    last = max(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    return [h for h in json.loads((last / "trainer_state.json").read_text())["log_history"] if "loss" in h]


def example(processes: int, run: Path, out: Path) -> str:
    return done(started(processes, str(EXAMPLES / "distributed.py"), str(run), "e-dpo", str(out)))


def test_the_example_takes_the_steps_of_the_run(runs, tmp_path):
    """examples/distributed.py in two processes, on the columns that one process scored."""
    folder, _ = runs
    example(2, folder / "1", tmp_path / "out")
    lines = log_of(tmp_path / "out")
    history = json.loads((folder / "1" / "policy" / "e-dpo" / "history.json").read_text())
    assert len(lines) == len(history) > 4
    for line, of_run in zip(lines, history, strict=True):
        assert line == pytest.approx(of_run, rel=1e-4, abs=1e-5)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def with_rank(run: Path, to: Path, rank: int) -> Path:
    """A copy of a run whose policies are adapters of another rank."""
    shutil.copytree(run, to)
    config = yaml.safe_load((to / "config.yaml").read_text())
    config["distill"]["lora_rank"] = rank
    (to / "config.yaml").write_text(yaml.safe_dump(config))
    return to


def sharded_example(run: Path, out: Path, kind: str) -> subprocess.Popen:
    """The example in two processes that share the weights by FSDP2 or ZeRO-3."""
    script = [str(EXAMPLES / "distributed.py"), str(run), "e-dpo", str(out)]
    if kind == "zero3":
        return started(2, *script, by=accelerate("zero3.yaml"))
    by = accelerate("fsdp2.yaml", "--mixed_precision=bf16")
    return started(2, str(HERE / "sharded_on_cpu.py"), *script, by=by)


@pytest.mark.parametrize("rank", [0, 16])
def test_the_example_shards_as_its_launcher_says(rank, runs, tmp_path):
    """accelerate's FSDP2 by examples/accelerate/fsdp2.yaml, all weights or an adapter, against one process.

    The run's precision counts, float32: the launcher's is another one.
    """
    folder, _ = runs
    run = with_rank(folder / "1", tmp_path / "run", rank)
    example(1, run, tmp_path / "one")
    said = done(sharded_example(run, tmp_path / "two", "fsdp2"))
    assert said.count("sharded: 50% of the weights here, 0 parameters whole") == 2
    one, two = (log_of(tmp_path / n) for n in ("one", "two"))
    assert len(one) == len(two) > 4
    assert one[0]["loss"] != pytest.approx(one[-1]["loss"], rel=1e-2)
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=5e-5)  # changes are small differences of sums over tokens
    # What it saved is whole again, and an ordinary folder; with an adapter transformers puts it on its base.
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "two")
    ids = torch.tensor([tokenizer("Describe red green: old new")["input_ids"]])
    saved = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("one", "two")]
    start = transformers.AutoModelForCausalLM.from_pretrained(Run(parse("run", [f"{run}/config.yaml"])).reference)
    with torch.no_grad():
        one, two, before = (m(ids).logits.log_softmax(-1) for m in (*saved, start))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
    assert (one - before).abs().max() > 1e-2


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="no deepspeed (pip install deepspeed)")


@pytest.fixture(scope="module", params=["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def sharded(request, runs):
    """A kind of sharding, and the folder of a training by it that nobody stops."""
    folder, _ = runs
    done(sharded_example(folder / "1", folder / request.param, request.param))
    return request.param, folder / request.param


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_sharded_training_goes_on_where_it_was_stopped(sent, runs, sharded, tmp_path):
    """Killed, or told to stop, after a checkpoint; steps and weights are to the bit as if nobody had."""
    (folder, _), (kind, whole) = runs, sharded
    running = sharded_example(folder / "1", tmp_path / "stopped", kind)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("stopped/checkpoint-*/checksums.json")):
        assert running.poll() is None, running.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for child in psutil.Process(running.pid).children(recursive=True) if sent == signal.SIGKILL else [running]:
        child.send_signal(sent)
    said = running.communicate(timeout=120)[1]
    assert running.returncode != 0
    assert not (tmp_path / "stopped" / "adapter_model.safetensors").exists()
    assert sent == signal.SIGKILL or "KeyboardInterrupt" not in said
    done(sharded_example(folder / "1", tmp_path / "stopped", kind))
    assert log_of(tmp_path / "stopped") == log_of(whole)
    found, expected = (load_file(n / "adapter_model.safetensors") for n in (tmp_path / "stopped", whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_the_example_says_what_it_cannot_do(runs):
    folder, _ = runs
    said = done(started(3, str(EXAMPLES / "distributed.py"), str(folder / "1"), "e-dpo", str(folder / "no")), status=1)
    assert "is 4; a batch is shared by the 3 processes" in said
    assert not (folder / "no").exists()


@needs_deepspeed
@pytest.mark.parametrize("rank", [0, 16])
def test_zero3_takes_the_steps_of_one_process(rank, runs, tmp_path):
    """DeepSpeed itself by examples/accelerate/zero3.yaml, all weights or an adapter: steps and what is saved."""
    folder, _ = runs
    run = with_rank(folder / "1", tmp_path / "run", rank)
    example(1, run, tmp_path / "one")
    done(sharded_example(run, tmp_path / "two", "zero3"))
    states = {p.name for p in tmp_path.glob("two/checkpoint-*/global_step*/*")}
    assert {f"zero_pp_rank_{n}_mp_rank_00_model_states.pt" for n in (0, 1)} <= states
    one, two = (log_of(tmp_path / n) for n in ("one", "two"))
    assert len(one) == len(two) > 4
    assert one[0]["loss"] != pytest.approx(one[-1]["loss"], rel=1e-2)
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=5e-5)
    file = "adapter_model.safetensors" if rank else "model.safetensors"
    one, two = (load_file(tmp_path / n / file) for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)


def test_what_is_sharded_is_never_whole_on_a_device(data, model_folder, tmp_path, monkeypatch):
    """The example's policy waits in the host's memory; a run's own goes to the run's device."""
    job = Run(small(data, model_folder, tmp_path / "run", methods="[dpo]"))
    monkeypatch.setattr(Run, "device", torch.device("meta"))
    for on_host, expected in ((True, "cpu"), (False, "meta")):
        for rank in (0, 4):
            options = dataclasses.replace(job.config.distill, lora_rank=rank)
            found = {p.device.type for p in new_policy(job, options, on_host=on_host).base_model.parameters()}
            assert expected in found
            assert found <= {expected, "cpu"} if rank else found == {expected}
    assert "on_host=True" in (EXAMPLES / "distributed.py").read_text(encoding="utf-8")


def test_what_a_launch_cannot_do_is_said(data, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"shards them .FSDP"):
        pipeline.run(small(data, model_folder, tmp_path / "run", methods="[dpo]"))
    assert not (tmp_path / "run").exists()
    assert cli.main(["sweep", "--help"]) == 2
    assert "sweep works in one process" in capsys.readouterr().err
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(ranks, "count", lambda: 3)
    with pytest.raises(ConfigError, match=r"distill.batch_prompts of dpo is 4.*3 processes"):
        pipeline._check_batches(
            small(data, model_folder, tmp_path / "run", methods="[dpo]", **{"distill.batch_prompts": 4})
        )
