"""Rewards that the data gives: those of the right rows, or a clear error."""

from __future__ import annotations

import csv
import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefdistill import DistillExample, Tree, pipeline
from prefdistill.data.tokenise import Encoder
from prefdistill.errors import ConfigError, DataError
from prefdistill.stages.distill import examples_of
from prefdistill.stages.run import Run
from prefdistill.training.distill import join_columns, with_pairs
from tiny_runs import rows, small, write_rows

GIVEN = {"reward.given": "score", "reward.members": 0}


def scored_rows(n: int = 30) -> list[dict]:
    """Rows whose rewards tell which response of which row they are of: two members, 1000 apart."""
    out = rows(n)
    for i, row in enumerate(out):
        row["score_chosen"] = [i + 0.25, 1000 + i]
        row["score_rejected"] = [i - 0.5, 1000 - i]
    return out


def file_of(folder, made):
    path = folder / "pairs.jsonl"
    write_rows(path, made)
    return path


def test_every_response_gets_the_rewards_of_its_row(model_folder, tmp_path):
    made = scored_rows()
    config = small(file_of(tmp_path, made), model_folder, tmp_path / "run", methods="[dpo,e-dpo]", **GIVEN)
    pipeline.run(config)
    run = Run(config)
    by_text = {r[side]: r[f"score_{side}"] for r in made for side in ("chosen", "rejected")}
    examples = examples_of(run, "train", rewards=True)
    groups = [g for g in run.groups if g.split == "train"]
    drawn = 0
    for e, g in zip(examples, groups, strict=True):
        expected = np.array([by_text[r.text] for r in g.responses if r.source == "data"]).T
        assert [g.responses[i].source for i in e.known] == ["data"] * expected.shape[1]
        found = np.array([[k[i] for i in e.known] for k in e.rewards])
        # One constant a member, the same in all prompts, is taken off.
        off = expected - found
        drawn += len(g.responses) - len(e.known)
        assert np.ptp(off, axis=1) == pytest.approx([0, 0], abs=1e-9)
    assert drawn > 0, "no response of the reference took part"
    summary = json.loads((tmp_path / "run" / "evaluation" / "summary.json").read_text())
    assert set(summary["methods"]) == {"reference", "dpo", "e-dpo"}
    members = json.loads((tmp_path / "run" / "evaluation" / "ensemble.json").read_text())["members"]
    assert [m["resample"] for m in members] == ["given: score"] * 2
    assert members[0]["accuracy"] == 1.0
    assert "given: score" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["numbers.csv", "lists.csv", "decimals.parquet"])
def test_rewards_of_files_without_floats(kind, model_folder, tmp_path):
    """CSV has texts alone, Parquet may have decimals."""
    made = rows()
    for i, row in enumerate(made):
        for side, value in (("chosen", f"{i}.25"), ("rejected", f"-{i}e-1")):
            row[f"score_{side}"] = {"n": value, "l": f"[{value}, 2]", "d": Decimal(i) / 4}[kind[0]]
    path = tmp_path / kind
    if kind.endswith(".csv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, made[0].keys())
            table.writeheader()
            table.writerows(made)
    else:
        pq.write_table(pa.Table.from_pylist(made), path)
    config = small(path, model_folder, tmp_path / "run", methods="[d-dpo]", **GIVEN)
    pipeline.run(config, until="data")
    prompts = pq.read_table(tmp_path / "run" / "data" / "prompts.parquet").to_pylist()
    found = {tuple(r["given"]) for p in prompts for r in p["responses"]}
    scores = [row[f"score_{side}"] for row in made for side in ("chosen", "rejected")]
    assert found == {tuple(json.loads(s)) if kind[0] == "l" else (float(s),) for s in scores}


def test_a_runs_own_columns_give_the_policy_that_its_members_gave(model_folder, tmp_path):
    """scored.parquet is data with rewards: distilled again, the labelled pairs lead to the same policy."""
    common = {"methods": "[e-dpo]", "distill.pairs": "labelled", "distill.kl_alpha": 0, "distill.logging_steps": 1}
    first = small(file_of(tmp_path, rows()), model_folder, tmp_path / "one", **common, **{"reward.members": 2})
    pipeline.run(first, until="distill")
    again = small(
        tmp_path / "one" / "data" / "scored.parquet",
        model_folder,
        tmp_path / "two",
        **common,
        **{"reward.given": "rewards", "reward.members": 0},
    )
    pipeline.run(again, until="distill")
    one, two = (json.loads((tmp_path / n / "policy" / "e-dpo" / "history.json").read_text()) for n in ("one", "two"))
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r[3].pop("score_chosen"), "row 4.*column 'score_chosen', which reward.given asks for, is missing"),
        (lambda r: r[3].update(score_rejected=[1.0, float("nan")]), "row 4.*must|row 4.*is a finite number"),
        (lambda r: r[3].update(score_rejected="high"), "row 4.*column 'score_rejected' is 'high'"),
        (lambda r: r[3].update(score_chosen=[True, 1.0]), "row 4.*a reward is a finite number"),
        (lambda r: r[3].update(score_chosen=[]), "row 4.*empty list"),
        (lambda r: r[3].update(score_chosen=[1.0]), "row 4.*rewards of 1 members, and .*row 1 of 2"),
        (
            lambda r: r.append({**r[0], "rejected": " soft", "score_chosen": [9.0, 9.0]}),
            r"row 31.*has the rewards \[9.0, 9.0\] here and \[0.25, 1000.0\] in .*row 1",
        ),
    ],
)
def test_bad_rewards_are_named_and_can_be_dropped(change, said, model_folder, tmp_path):
    made = scored_rows()
    change(made)
    config = small(file_of(tmp_path, made), model_folder, tmp_path / "run", methods="[d-dpo]", **GIVEN)
    with pytest.raises(DataError, match=said):
        pipeline.run(config, until="data")
    assert not (tmp_path / "run").exists()
    config.dataset.on_bad_row = "drop"
    pipeline.run(config, until="data")
    rejected = [json.loads(r) for r in (tmp_path / "run" / "data" / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == 1
    assert "reward" in rejected[0]["reason"] or "score" in rejected[0]["reason"]
    kept = pq.read_table(tmp_path / "run" / "data" / "prompts.parquet")["pairs"].to_pylist()
    assert sum(map(len, kept)) == len(made) - 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reward.given": "score"}, "set reward.members: 0"),
        ({"reward.given": "", "reward.members": 0}, "reward.given is empty"),
        ({**GIVEN, "reward.pretrained": "[org/model]"}, "no reward.pretrained"),
        ({**GIVEN, "methods": "[hull-dpo]"}, "hull-dpo: the hull's weights need rewards"),
        ({**GIVEN, "distill.members": "[-1]"}, "distill.members names -1"),
    ],
)
def test_what_given_rewards_cannot_do_is_said(options, said, model_folder, tmp_path):
    config = small(
        file_of(tmp_path, scored_rows()), model_folder, tmp_path / "run", **{"methods": "[e-dpo]", **options}
    )
    with pytest.raises(ConfigError, match=said):
        pipeline.run(config)


def test_a_member_that_the_data_does_not_have(model_folder, tmp_path):
    options = {**GIVEN, "methods": "[e-dpo]", "distill.members": "[0,2]"}
    config = small(file_of(tmp_path, scored_rows()), model_folder, tmp_path / "run", **options)
    with pytest.raises(ConfigError, match="names 2; the data has rewards of 2 members"):
        pipeline.run(config, until="distill")


def test_responses_of_the_same_tokens_have_no_rewards_to_compare(model_folder, tmp_path, monkeypatch):
    """Texts that a tokenizer's normaliser makes equal: dropped and counted, as without rewards."""
    made = scored_rows()
    made[3]["rejected"] = made[3]["chosen"].upper()
    real = Encoder.response_ids
    monkeypatch.setattr(
        Encoder, "response_ids", lambda self, prompt, response, **k: real(self, prompt, response.lower(), **k)
    )
    config = small(file_of(tmp_path, made), model_folder, tmp_path / "run", methods="[d-dpo]", **GIVEN)
    pipeline.run(config, until="data")
    found = json.loads((tmp_path / "run" / "data" / "data.json").read_text())
    assert (found["same_tokens"], found["bad_rows"], found["pairs"]) == (1, 0, len(made) - 1)


def test_unknown_rewards_stand_in_no_pair():
    tree = Tree((1,), ((2,), (3,), (4,)))
    e = DistillExample(tree, (-1.0, -2.0, -3.0), ((0.5, None, 1.5),), ((2, 0),), (1,))
    columns = join_columns([{"example": e}], pairs="all")
    assert columns["pairs"].tolist() == [[0, 2]]
    assert columns["kl_samples"].tolist() == [1]
    assert with_pairs([e], "all") == [e]
    with pytest.raises(DataError, match="the reward of response 1 is None"):
        DistillExample(tree, (-1.0, -2.0, -3.0), ((0.5, None, 1.5),), ((1, 0),))
    with pytest.raises(DataError, match="the reward of response 1 is nan"):
        DistillExample(tree, (-1.0, -2.0, -3.0), ((0.5, float("nan"), 1.5),), ((2, 0),))
    with pytest.raises(DataError, match="the reward of response 1 is None"):
        DistillExample(tree, (-1.0, -2.0, -3.0), ((0.5, 0.1, 1.5), (0.5, None, 1.5)), ((2, 0),))
