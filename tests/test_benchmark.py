"""The benchmark compares equal work: both sides' losses are one curve."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as main  # noqa: E402
from benchmarks import members, policy, reward, scoring  # noqa: E402
from benchmarks.__main__ import earlier_of, remarks_of  # noqa: E402
from benchmarks.rows import ROWS, Sizes, flops_once  # noqa: E402
from benchmarks.shapes import policy_of, prompts_of  # noqa: E402
from benchmarks.table import markdown  # noqa: E402


@pytest.mark.parametrize("trained", [policy, reward], ids=["policy", "reward"])
@pytest.mark.parametrize("shape", ["unique", "shared"])
def test_losses_are_trls(shape, trained, monkeypatch):
    """Twenty steps from the same weights on the same pairs, float32; a rate at which weights move."""
    monkeypatch.setattr(policy, "LEARNING_RATE", 1e-3)
    prompts = prompts_of(shape, 6, size="tiny", prompt_tokens=20, response_tokens=7)
    same = {"size": "tiny", "precision": "float32", "batch_prompts": 2}
    ours, trl = trained.ours(prompts, **same), trained.trl(prompts, **same, checkpointing=False)
    curves = [(ours(), trl()) for _ in range(20)]
    assert curves[-1][0] < 0.9 * curves[0][0], "nothing is compared where nothing is learnt"
    for mine, peer in curves:
        assert mine == pytest.approx(peer, rel=1e-4)


def test_flops_are_those_of_the_matrices():
    """A prompt with one response of one token needs its weights once a token and the head once."""
    prompts = prompts_of("unique", 1, size="tiny", prompt_tokens=30, response_tokens=5)
    model = policy_of("tiny")
    head = model.lm_head.weight.numel()
    body = sum(p.numel() for n, p in model.named_parameters() if "norm" not in n and "embed" not in n)
    tokens, answers = 30 + 2 * 5, 2 * 5
    seen = sum(range(1, 31)) + 2 * sum(30 + i for i in range(1, 6))
    expected = 2 * body * tokens + 2 * head * answers + 4 * 2 * 32 * seen
    assert flops_once(prompts, "tiny", training=False) == pytest.approx(expected)
    assert flops_once(prompts, "tiny", training=True) == pytest.approx(3 * expected)


def test_the_command_writes_its_results(tmp_path):
    sizes = ["--model", "tiny", "--prompt-tokens", "12", "--response-tokens", "5", "--batch-prompts", "2"]
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        *sizes,
        "--rows",
        "policy step, unique",
        "--steps",
        "2",
        "--precision",
        "float32",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "policy step, unique prompts" in done.stdout
    page = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "| policy step, unique prompts<br>DPO, a pair a prompt, reference precomputed | TRL DPOTrainer" in page
    assert (tmp_path / "results.svg").read_text(encoding="utf-8").count("<svg") == 1
    written = json.loads((tmp_path / "results.json").read_text())
    row = written["rows"][0]
    assert row["ratio"] == pytest.approx(row["peer"] / row["ours"])
    assert row["memory"]["ours"] > 0
    assert all(of.keys() == {"float32"} for of in row["trials"].values())
    assert {"machine", "versions"} <= set(written)
    assert written["versions"]["trl"] == "1.16.0"


def test_rows_are_added_to_those_of_the_same_machine_and_work(tmp_path):
    conditions = {"machine": {"cpu": "one"}, "versions": {"torch": "2"}, "sizes": {"batch_prompts": 4}}
    rows = [{"name": "step", "work": "a pair", "ratio": 2.0}, {"name": "300 steps", "work": "one prompt", "ratio": 1.0}]
    (tmp_path / "results.json").write_text(json.dumps({**conditions, "growth": [1], "rows": rows}))
    works = {"step": "a pair", "300 steps": "four prompts"}
    kept = earlier_of(tmp_path, conditions, works)
    assert kept == {**conditions, "growth": [1], "rows": rows[:1]}
    other = earlier_of(tmp_path, {**conditions, "machine": {"cpu": "other"}}, works)
    assert other["rows"] == []
    assert other["growth"] is None


@pytest.mark.parametrize("folder", ["benchmarks", "benchmarks/amx", "benchmarks/avx2"])
def test_pages_are_made_of_what_was_measured(folder):
    results = json.loads((ROOT / folder / "results.json").read_text())
    page = markdown(results, picture="results.svg", remarks=remarks_of(ROOT / folder, results))
    assert (ROOT / folder / "RESULTS.md").read_text(encoding="utf-8") == page


def test_remarks_stand_under_the_table_that_they_are_of(tmp_path):
    (tmp_path / "shortfalls.md").write_text("<!-- one CPU, 135m, 4 -->\n\n## What fell short\n", encoding="utf-8")
    results = {"machine": {"cpu": "one CPU", "gpu": None}, "sizes": {"model": "135m", "batch_prompts": 4}}
    assert remarks_of(tmp_path, results) == "## What fell short\n"
    for other in ({"machine": {"cpu": "one CPU", "gpu": "a GPU"}}, {"sizes": {"model": "tiny", "batch_prompts": 4}}):
        assert remarks_of(tmp_path, {**results, **other}) == ""


def test_reference_logps_are_trls():
    prompts = prompts_of("shared", 3, size="tiny", prompt_tokens=20, response_tokens=7)
    same = {"size": "tiny", "precision": "float32"}
    assert scoring.ours(prompts, **same)() == pytest.approx(scoring.trl(prompts, **same, batch_pairs=4)(), rel=1e-5)


def test_rewards_of_members_are_transformers():
    prompts = prompts_of("shared", 3, size="tiny", prompt_tokens=20, response_tokens=7)
    same = {"size": "tiny", "precision": "float32"}
    ours, peer = members.ours(prompts, **same), members.separate(prompts, **same, batch_rows=2)
    first = ours()
    assert first == pytest.approx(peer(), rel=1e-4)
    assert abs(first) > 0.01, "five rewards of zero would agree too"
    assert ours() == first


def test_peers_that_less_work_hardly_tells_apart_are_tried_at_all_of_it(monkeypatch):
    asked = []

    def trial(row, side, precision, sizes, *, less):
        asked.append((side, precision, less))
        return {"plain": 40.0, "checkpointing": 50.0}[side]

    monkeypatch.setattr(main, "_trial", trial)
    row = next(r for r in ROWS if r.name == "policy step, unique prompts")
    less = {"checkpointing": ("float32", 9.7), "plain": ("float32", 10.6), "slow": ("bfloat16", 30.0)}
    assert main._by_speed(row, less, Sizes()) == ["plain", "checkpointing", "slow"]
    assert asked == [("checkpointing", "float32", False), ("plain", "float32", False)]
    asked.clear()
    assert main._by_speed(row, {**less, "plain": ("float32", 20.0)}, Sizes()) == ["checkpointing", "plain", "slow"]
    assert asked == []
