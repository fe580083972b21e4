"""vLLM as the sampler: against a stand-in as strict as its API, and against vLLM itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from scipy import stats

import fake_vllm
from prefdistill import pipeline
from prefdistill.cli import main
from prefdistill.errors import ConfigError, DataError
from prefdistill.evaluation import engine, sampling
from prefdistill.evaluation.engine import VLLMEngine, check_vllm
from prefdistill.evaluation.sampling import SamplingOptions, sample
from prefdistill.training.trees import TreeTrainer
from tiny_models import save_some_adapter, tiny
from tiny_runs import small

PROMPTS = [(5, 6, 7, 8, 9, 10, 11, 12, 13), (9,), (20, 21, 22)]
GREEDY = SamplingOptions(max_new_tokens=12, temperature=0)


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object() if name == "vllm" else real(name, *a))
    fake_vllm.reset()
    yield fake_vllm
    assert not fake_vllm.alive, "an engine was left running"


@pytest.fixture
def folder(tmp_path):
    tiny("llama", num_hidden_layers=2).save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


def test_greedy_samples_are_those_of_our_own_sampler(vllm, folder):
    with VLLMEngine(folder) as policy:
        theirs = policy.sample(PROMPTS, n=2, end_ids=[2, 30], options=GREEDY)
    assert theirs == sample(tiny("llama", num_hidden_layers=2), PROMPTS, n=2, end_ids=[2, 30], options=GREEDY)
    assert len({s.ids for d in theirs for s in d}) == 3


def test_every_sample_has_a_seed_of_its_own(vllm, folder):
    options = SamplingOptions(max_new_tokens=8, top_p=0.9, seed=3)
    with VLLMEngine(folder) as policy:
        together = policy.sample(PROMPTS, n=3, end_ids=[2], options=options)
        assert len({seed for _, seed in vllm.asked}) == 9
        alone = [policy.sample([p], n=3, end_ids=[2], options=options, keys=[i])[0] for i, p in enumerate(PROMPTS)]
        other = policy.sample(PROMPTS, n=3, end_ids=[2], options=SamplingOptions(8, 1.0, 0.9, seed=4))
    assert together == alone
    assert len({s.ids for s in together[0]}) > 1
    assert together != other


def test_only_our_end_tokens_end_a_response(vllm, folder):
    """The model's own end token, 2, is not one here; a response keeps the token that ended it."""
    model, ends = tiny("llama", num_hidden_layers=2), list(range(3, 40))
    with torch.no_grad():
        model.lm_head.weight[2] *= 3
    model.save_pretrained(folder)
    with VLLMEngine(folder) as policy:
        drawn = policy.sample(PROMPTS, n=20, end_ids=ends, options=SamplingOptions(max_new_tokens=6))
    samples = [s for d in drawn for s in d]
    for s in samples:
        assert all(t not in ends for t in s.ids[:-1])
        assert s.finished == (s.ids[-1] in ends)
        assert s.finished or len(s.ids) == 6
    assert {s.finished for s in samples} == {False, True}
    assert any(2 in s.ids[:-1] for s in samples), "no response went on after 2: the test shows nothing"


def test_an_engine_is_started_once_and_only_if_something_must_be_drawn(vllm, folder, monkeypatch):
    monkeypatch.setattr(engine, "REQUESTS_AT_ONCE", 2)
    parts, done = [], []
    with VLLMEngine(folder) as policy:
        first = policy.sample(PROMPTS, n=2, end_ids=[2], options=GREEDY, keep=parts.append, progress=done.append)
        policy.sample(PROMPTS, n=1, end_ids=[2], options=GREEDY)
        assert len(vllm.started) == 1
        assert vllm.started[0]["max_model_len"] == 9 + 12
        policy.sample([(5,) * 20], n=1, end_ids=[2], options=GREEDY)  # longer than the first one can read
        assert [s["max_model_len"] for s in vllm.started] == [21, 32]
    assert [list(p) for p in parts] == [[0], [1], [2]]
    assert done == [1, 1, 1]
    known = {i: d for part in parts for i, d in part.items()}
    vllm.reset()
    with VLLMEngine(folder) as policy:
        assert policy.sample(PROMPTS, n=2, end_ids=[2], options=GREEDY, known=known) == first
    assert not vllm.started
    del known[1]
    with VLLMEngine(folder) as policy:
        assert policy.sample(PROMPTS, n=2, end_ids=[2], options=GREEDY, known=known) == first
    assert {p for p, _ in vllm.asked} == {PROMPTS[1]}


def test_an_engine_is_shut_down_when_a_sampling_fails(vllm, folder):
    policy = VLLMEngine(folder)

    def stop(drawn):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), policy:
        policy.sample(PROMPTS, n=1, end_ids=[2], options=GREEDY, keep=stop)
    assert vllm.started
    assert not vllm.alive


def test_vllm_takes_its_share_of_what_is_free(vllm, folder, monkeypatch):
    """It counts in shares of the whole GPU, and fails where this process holds the rest."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * 2**30, 80 * 2**30))
    for arguments, share in (({}, 0.225), ({"gpu_memory_utilization": 0.5, "enforce_eager": True}, 0.5)):
        with VLLMEngine(folder, precision="bfloat16", arguments=arguments) as policy:
            policy.sample(PROMPTS, n=1, end_ids=[2], options=GREEDY)
        assert vllm.started[-1]["gpu_memory_utilization"] == share
        assert vllm.started[-1]["dtype"] == "bfloat16"
    assert vllm.started[-1]["enforce_eager"] is True


def test_what_vllm_refuses_is_said(vllm, folder):
    with pytest.raises(ConfigError, match=r"tensor_parallel.*sample\.engine_arguments"):
        VLLMEngine(folder, arguments={"tensor_parallel": 2}).sample(PROMPTS, n=1, end_ids=[2], options=GREEDY)
    with pytest.raises(ConfigError, match=r"max_model_len \(600\)"):
        VLLMEngine(folder).sample([(5,) * 500], n=1, end_ids=[2], options=SamplingOptions(max_new_tokens=100))
    short = VLLMEngine(folder, arguments={"max_model_len": 12})
    with pytest.raises(ConfigError, match=r"max_model_len 12, .* up to 21 tokens"), short as policy:
        policy.sample(PROMPTS, n=1, end_ids=[], options=GREEDY)
    assert not vllm.started


def test_an_engine_with_a_length_of_its_own_is_started_once(vllm, folder):
    with VLLMEngine(folder, arguments={"max_model_len": 60}) as policy:
        policy.sample(PROMPTS, n=1, end_ids=[2], options=GREEDY)
        policy.sample([(5,) * 40], n=1, end_ids=[2], options=GREEDY)
    assert [s["max_model_len"] for s in vllm.started] == [60]


@pytest.mark.parametrize(
    ("ids", "reason"), [([5, 6], "stop"), ([5], "length"), ([5] * 12, "abort"), ([], "stop"), ([5, 2], "repetition")]
)
def test_a_response_that_ended_in_another_way_is_refused(ids, reason, vllm, folder, monkeypatch):
    real = fake_vllm.LLM._output
    monkeypatch.setattr(fake_vllm.LLM, "_output", staticmethod(lambda *_: real(ids, reason)))
    with pytest.raises(DataError, match=f"reason '{reason}'"), VLLMEngine(folder) as policy:
        policy.sample(PROMPTS, n=1, end_ids=[2], options=GREEDY)


def test_options_are_checked_before_anything_is_written(data, model_folder, tmp_path, capsys, vllm, monkeypatch):
    def said(*flags):
        out = tmp_path / "out"
        flags = ["run", "--data", str(data), "--model", str(model_folder), "--output-dir", str(out), *flags]
        assert main(flags) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "sample.engine is 'x'; it must be one of own, vllm" in said("--sample.engine", "x")
    assert "set sample.engine: vllm" in said("--sample.engine_arguments", "{enforce_eager: true}")
    assert "has model" in said("--sample.engine", "vllm", "--sample.engine_arguments", "{model: other}")
    assert "not at 3.0" in said("--sample.engine", "vllm", "--evaluate.temperature", "3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(ConfigError, match=r"pip install prefdistill\[vllm\]"):
        check_vllm("sample.engine")


RUN = {
    "methods": "[dp-dpo]",
    "sample.engine": "vllm",
    "evaluate.temperature": 0.7,
    "evaluate.samples": 2,
    "distill.checkpoints": 2,
    "distill.lora_rank": 2,
    "distill.learning_rate": 0.02,
}


def samples(out):
    read = {p.name: json.loads(p.read_text()) for p in (out / "evaluation" / "samples").glob("*.json")}
    assert set(read) == {"reference.json", "dp-dpo.json"}
    return read, (out / "policy" / "dp-dpo" / "checkpoints.json").read_text()


def test_a_run_samples_by_vllm_alone_and_trains_without_it(vllm, data, model_folder, tmp_path, monkeypatch):
    real, steps = TreeTrainer.training_step, []

    def step(self, *arguments, **options):
        steps.append(len(vllm.alive))
        return real(self, *arguments, **options)

    monkeypatch.setattr(TreeTrainer, "training_step", step)
    monkeypatch.setattr(sampling, "_sample_batch", lambda *a, **k: pytest.fail("sampled by the own sampler"))
    out = tmp_path / "run"
    pipeline.run(small(data, model_folder, out, **RUN))
    assert steps
    assert not any(steps), "vLLM held its memory while a model was trained"
    # The reference for training prompts, two checkpoints, the reference and the policy on the test prompts.
    assert len(vllm.started) == 5
    assert [s["model"] for s in vllm.started[3:]] == [str(model_folder), str(out / "policy" / "dp-dpo")]

    # Another engine draws other samples: what was sampled is sampled again, what was trained on them too.
    own = small(data, model_folder, out, **{**RUN, "sample.engine": "own"})
    with pytest.raises(pytest.fail.Exception, match="own sampler"):
        pipeline.run(own)


def test_a_stopped_sampling_goes_on(vllm, data, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "REQUESTS_AT_ONCE", 4)
    pipeline.run(small(data, model_folder, tmp_path / "whole", **RUN))
    whole = list(vllm.asked)
    vllm.reset()
    real, calls = fake_vllm.LLM.generate, []

    def stop(self, *arguments, **options):
        calls.append(1)
        if len(calls) in (3, 12, 20):
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(fake_vllm.LLM, "generate", stop)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(small(data, model_folder, tmp_path / "stopped", **RUN))
        assert not vllm.alive
    pipeline.run(small(data, model_folder, tmp_path / "stopped", **RUN))
    assert samples(tmp_path / "stopped") == samples(tmp_path / "whole")
    assert sorted(vllm.asked) == sorted(whole), "what was drawn before a stop was drawn again"


def test_an_adapter_is_put_together_for_vllm(vllm, data, model_folder, tmp_path):
    """vLLM reads plain folders; the policy may be an adapter."""
    save_some_adapter(model_folder, tmp_path / "adapter")
    drawn = {}
    for name in ("own", "vllm"):
        options = {"methods": "[p-dpo]", "sample.engine": name, "evaluate.temperature": 0}
        out = tmp_path / name
        pipeline.run(small(data, tmp_path / "adapter", out, **options), until="evaluate")
        drawn[name] = json.loads((out / "evaluation" / "samples" / "reference.json").read_text())["samples"]
    assert drawn["own"] == drawn["vllm"]


def test_vllm_itself(tmp_path):
    """Where it is installed, on a GPU or a CPU: greedy samples, seeds, end tokens and the distribution of samples.

    Head width and vocabulary are such that its kernels can take them.
    """
    pytest.importorskip("vllm")
    model = tiny("llama", hidden_size=256, head_dim=64, vocab_size=128)
    model.save_pretrained(tmp_path / "policy")
    greedy = SamplingOptions(max_new_tokens=16, temperature=0)
    drawing = SamplingOptions(max_new_tokens=8, seed=3)
    ends = list(range(3, 40))
    with VLLMEngine(str(tmp_path / "policy"), arguments={"enforce_eager": True}) as policy:
        theirs = policy.sample(PROMPTS, n=2, end_ids=[2, 30], options=greedy)
        together = policy.sample(PROMPTS, n=3, end_ids=[2], options=drawing)
        alone = [policy.sample([p], n=3, end_ids=[2], options=drawing, keys=[i])[0] for i, p in enumerate(PROMPTS)]
        other = policy.sample(PROMPTS, n=3, end_ids=[2], options=SamplingOptions(8, seed=4))
        ended = policy.sample(PROMPTS, n=50, end_ids=ends, options=SamplingOptions(max_new_tokens=6))
        many = policy.sample(PROMPTS[:1], n=4000, end_ids=[2], options=SamplingOptions(max_new_tokens=1, top_p=0.5))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert theirs == sample(model.to(device), PROMPTS, n=2, end_ids=[2, 30], options=greedy)
    assert together == alone != other
    assert len({s.ids for d in together for s in d}) > 3
    for s in (s for d in ended for s in d):
        assert all(t not in ends for t in s.ids[:-1])
        assert s.finished == (s.ids[-1] in ends)
        assert s.finished or len(s.ids) == 6
    with torch.no_grad():
        p = model(torch.tensor([PROMPTS[0]], device=device)).logits[0, -1].double().softmax(-1).cpu()
    order = p.sort(descending=True)
    kept = order.indices[: int((order.values.cumsum(0) < 0.5).sum()) + 1]
    counts = torch.bincount(torch.tensor([s.ids[0] for s in many[0]]), minlength=128)
    assert counts[kept].sum() == 4000, "a token outside the nucleus was drawn"
    expected = 4000 * p[kept] / p[kept].sum()
    assert stats.chisquare(counts[kept].numpy(), expected.numpy()).pvalue > 1e-4
