"""The benchmark compares equal work: both sides' losses are one curve."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import benchmarks.__main__ as main  # noqa: E402
from benchmarks import members, policy, reward, sampling, scoring, shapes, table, trials  # noqa: E402
from benchmarks.__main__ import asked_of, earlier_of, remarks_of  # noqa: E402
from benchmarks.rows import ROWS, Sizes, flops_once  # noqa: E402
from benchmarks.shapes import policy_of, prompts_of  # noqa: E402
from benchmarks.table import markdown, picture  # noqa: E402
from benchmarks.worker import Fallen  # noqa: E402

from prefdistill.report.canvas import svg_of  # noqa: E402

# As the shapes that are measured have them: heads of 64, more words than a piece of the head holds.
WIDE = {
    "vocab_size": 5000,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize("trained", [policy, reward], ids=["policy", "reward"])
@pytest.mark.parametrize("shape", ["unique", "shared"])
@pytest.mark.parametrize(
    ("size", "accumulating", "rate"), [("tiny", False, 1e-3), ("tiny", True, 1e-3), ("wide", False, 1e-4)]
)
def test_losses_are_trls(size, accumulating, rate, shape, trained, monkeypatch):
    """Twenty steps from the same weights on the same pairs, float32; a rate at which weights move.

    At ten times this rate the wide shape's losses by TRL, at once and by accumulation, are 1e-4 apart themselves.
    """
    monkeypatch.setattr(policy, "LEARNING_RATE", rate)
    monkeypatch.setitem(shapes.SIZES, "wide", WIDE)
    prompts = prompts_of(shape, 6, size=size, prompt_tokens=20, response_tokens=7)
    same = {"size": size, "precision": "float32", "batch_prompts": 2}
    ours, trl = trained.ours(prompts, **same), trained.trl(prompts, **same, accumulating=accumulating)
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
        "e-DPO",
        "--steps",
        "2",
        "--precision",
        "float32",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "e-DPO step, K = 5: ours" in done.stdout
    page = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "| e-DPO step, K = 5<br>e-DPO with five reward columns, without the KL term | own DPO step, float32" in page
    written = json.loads((tmp_path / "results.json").read_text())
    row = written["rows"][0]
    assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
    assert len(row["seconds"]["ours"]) == len(row["seconds"]["own DPO"]) == 2
    assert row["memory"]["ours"] > 0
    assert row["losses_differ_by"] is None, "two methods' losses"
    assert "Medians of 2 steps" in page
    assert "in float32, the only precision that was tried." in page
    assert all(of.keys() == {"float32"} for of in row["trials"].values())
    assert {"machine", "versions"} <= set(written)
    assert row["utilisation"] == pytest.approx(row["flops"] / row["ours"] / written["rate"])
    assert written["versions"]["trl"] == "1.16.0"


def test_rows_are_added_to_those_of_the_same_machine_and_work(tmp_path, capsys):
    conditions = {"machine": {"cpu": "one"}, "versions": {"torch": "2"}, "sizes": {"batch_prompts": 4}}
    rows = [{"name": "step", "work": "a pair", "ratio": 2.0}, {"name": "300 steps", "work": "one prompt", "ratio": 1.0}]
    (tmp_path / "results.json").write_text(json.dumps({**conditions, "growth": [1], "rows": rows}))
    works = {"step": "a pair", "300 steps": "four prompts"}
    kept = earlier_of(tmp_path, conditions, works, whole=False)
    assert kept == {**conditions, "growth": [1], "rows": rows[:1]}
    elsewhere = {**conditions, "machine": {"cpu": "other"}}
    with pytest.raises(SystemExit, match=r"results\.json holds rows of machine .*one.*--output"):
        earlier_of(tmp_path, elsewhere, works, whole=False)
    other = earlier_of(tmp_path, elsewhere, works, whole=True)
    assert "they are replaced" in capsys.readouterr().out
    assert other["rows"] == []
    assert other["growth"] is None


def test_rows_are_asked_for_by_a_part_of_their_names():
    names = ["policy step", "reward step", "growth"]
    assert asked_of(names, None) == set(names)
    assert asked_of(names, "policy|growth") == {"policy step", "growth"}
    assert asked_of(names, "step") == {"policy step", "reward step"}
    with pytest.raises(SystemExit, match=r"'polycy'; rows are policy step; reward step; growth"):
        asked_of(names, "reward|polycy")


def test_a_page_says_how_far_losses_were_apart_and_what_was_tried():
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    rows = [dict(row, losses_differ_by=None) for row in results["rows"]]
    assert "Losses" not in markdown({**results, "rows": rows}, picture="p")
    precisions = ["bfloat16", "bfloat16", "float32"]
    rows = [
        dict(
            row,
            losses_differ_by=apart,
            precision={"ours": "float32", "peer": precision},
            trials={"ours": {precision: 1}},
        )
        for row, apart, precision in zip(rows, [2e-3, 1e-3, 3e-6], precisions, strict=False)
    ]
    page = markdown({**results, "rows": rows}, picture="p")
    assert "differ by at most 2e-03 in bfloat16 and float32, 3e-06 in float32. Utilisation" in page
    assert "each in the faster of what was tried of float32 and bfloat16" in page


@pytest.mark.parametrize("folder", ["benchmarks", "benchmarks/avx512", "benchmarks/avx2"])
def test_pages_are_made_of_what_was_measured(folder):
    results = json.loads((ROOT / folder / "results.json").read_text())
    page = markdown(results, picture="results.svg", remarks=remarks_of(ROOT / folder, results))
    assert (ROOT / folder / "RESULTS.md").read_text(encoding="utf-8") == page
    drawn = picture(results["rows"])
    assert drawn is not None
    assert (ROOT / folder / "results.svg").read_text(encoding="utf-8").count("<path") == svg_of(drawn).count("<path")


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


@pytest.mark.parametrize("name", ["policy step, unique prompts", "reference log-probs of a data set"])
def test_peers_that_less_work_hardly_tells_apart_are_tried_at_all_of_it(name, monkeypatch):
    asked = []

    def trial(row, side, precision, sizes, *, less):
        asked.append((side, precision, less))
        return trials.Trial({"plain": 40.0, "checkpointing": 50.0, "slow": 90.0}[side], 5.0)

    monkeypatch.setattr(trials, "trial", trial)
    row = next(r for r in ROWS if r.name == name)
    less = {"checkpointing": ("float32", 9.7), "plain": ("float32", 10.6), "slow": ("bfloat16", 30.0)}
    again = trials.at_all_work(row, less, Sizes())
    assert again == {"checkpointing": (50.0, 5.0), "plain": (40.0, 5.0)}
    assert asked == [("checkpointing", "float32", False), ("plain", "float32", False)]
    assert trials.by_speed(less, {s: t.seconds for s, t in again.items()}) == ["plain", "checkpointing", "slow"]
    told_apart = {**less, "plain": ("float32", 20.0)}
    assert trials.at_all_work(row, told_apart, Sizes()) == {}
    assert trials.at_all_work(row, told_apart, Sizes(), also=["slow"]).keys() == {"slow"}
    assert trials.at_all_work(row, less, Sizes(), also=["slow", "plain"]).keys() == less.keys()
    assert trials.by_speed(told_apart, {}) == ["checkpointing", "plain", "slow"]


def test_peers_that_are_near_take_their_steps_in_turn_and_the_faster_there_counts(monkeypatch):
    order = ["a", "b", "c"]
    assert trials.groups_of(order, {"a": 36.0, "b": 39.0, "c": 39.5}) == [["a", "b"], ["a"], ["b"], ["c"]]
    assert trials.groups_of(order, {"a": 36.0, "b": 49.0}) == [["a"], ["b"], ["c"]]
    assert trials.groups_of(order, {}) == [["a"], ["b"], ["c"]]
    assert trials.groups_of(["a"], {"a": 36.0}) == [["a"]]

    row = next(r for r in ROWS if r.name == "policy step, unique prompts")
    plain, other, third, fourth = [side for side in row.sides if side != "ours"]
    alone = {"ours": 1.0, plain: 9.0, other: 9.1, third: 20.0, fourth: 21.0}
    asked = []

    def in_turn(_row, sides, *_):
        asked.append(list(sides))
        if len(sides) == 3 and lacking:
            raise Fallen
        took = {"ours": [2.0, 3.0], plain: [12.0, 14.0], other: [8.0, 11.0]}
        return {side: main._Taken(took[side], [0.5, 0.25], 1.0) for side in sides}

    monkeypatch.setattr(main, "trials", lambda _row, side, *_: {"float32": alone[side]})
    named = {plain: trials.Trial(36.0, 9.0), other: trials.Trial(39.0, 4.0)}
    monkeypatch.setattr(main, "at_all_work", lambda *_, also: named)
    assert set(row.memory_of) == {plain, other}
    monkeypatch.setattr(main, "_in_turn", in_turn)
    options = argparse.Namespace(precision="float32")
    lacking = False
    found = main._measure(row, Sizes("tiny", 20, 7, 2), options)
    assert found["peer_is"].endswith(f"({other})")
    assert (found["ours"], found["peer"], found["ratio"]) == (2.5, 9.5, 3.8)
    assert found["seconds"][plain] == [12.0, 14.0]
    assert found["memory"] == {"ours": 1.0, "peer": 1.0, "against": plain, "against_peak": 9.0, "ratio": 9.0}
    lacking = True
    assert main._measure(row, Sizes("tiny", 20, 7, 2), options)["ratio"] == 13.0 / 2.5
    assert asked == [["ours", plain, other], ["ours", plain, other], ["ours", plain]]


def test_memory_counts_against_the_faster_setting_that_the_target_names():
    """The fastest of all may be another: what is asked of memory is asked of those at once."""
    fast, slow, none = trials.Trial(10.0, 9.0), trials.Trial(12.0, 5.0), trials.Trial(math.inf, None)
    for named, against, peak in (
        ({"trl": fast, "trl, checkpointing": slow}, "trl", 9.0),
        ({"trl": none, "trl, checkpointing": slow}, "trl, checkpointing", 5.0),
        ({"trl": none, "trl, checkpointing": none}, "trl, a prompt at a time", 6.0),
        ({}, "trl, a prompt at a time", 6.0),
    ):
        memory = main.memory_of(3.0, "trl, a prompt at a time", 6.0, named)
        assert memory == {"ours": 3.0, "peer": 6.0, "against": against, "against_peak": peak, "ratio": peak / 3.0}
    row = {"memory": main.memory_of(3.0, "trl, a prompt at a time", 6.0, {"trl": fast}), "memory_target": 2.0}
    row["peer_is"] = "TRL (trl, a prompt at a time)"
    assert table._memory(row) == "3.0 / 6.0; 9.0 of trl"
    row["memory_target"] = 4.0
    assert table._memory(row) == "3.0 / 6.0; 9.0 of trl, 4x missed"
    row = {"memory": main.memory_of(3.0, "trl", 9.0, {"trl": fast}), "memory_target": 2.0, "peer_is": "TRL (trl)"}
    assert table._memory(row) == "3.0 / 9.0"
    assert table._memory({**row, "memory_target": None}) == "3.0 / 9.0"


@pytest.mark.parametrize(
    ("seconds", "least", "taken"),
    [([9.0, 3.0, 2.0, 4.0, 1.0], 2.0, 4), ([60.0, 50.0, 40.0], 50.0, 2), ([120.0, 1.0], 120.0, 1)],
)
def test_a_trial_takes_the_least_of_as_many_steps_as_there_is_patience_for(seconds, least, taken, monkeypatch):
    left = iter(seconds)

    class Alone:
        peak = 3.5

        def step(self):
            return next(left)

    monkeypatch.setattr(trials, "worker", lambda *_, **__: contextlib.nullcontext(Alone()))
    assert trials.trial(ROWS[0], "ours", "float32", Sizes(), less=True) == (least, 3.5)
    assert len(list(left)) == len(seconds) - taken


def test_samples_count_as_what_was_drawn():
    """Both sides draw responses of about the same lengths, ended by a thirtieth of all words."""
    prompts = prompts_of("unique", 40, size="tiny", prompt_tokens=5, response_tokens=42)
    same = {"size": "tiny", "samples": 2, "max_new_tokens": 42}
    # A word in about 30 ends a response; the mean of 80 lengths that are geometric but for a bound of 42.
    stays = 1 - len(range(3, 64, sampling.ENDS_EVERY)) / 64
    expected = sum(stays**k for k in range(42))
    for step in (
        sampling.ours(prompts, precision="float32", **same),
        sampling.generate(prompts, precision="float32", batch_rows=80, **same),
        sampling.generate(prompts, precision="bfloat16", batch_rows=33, **same),
    ):
        assert step() / 80 == pytest.approx(expected, abs=7)  # four standard errors
