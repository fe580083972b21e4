"""D_rho of prompt groups, as a command and as a run's option, and the sweep over it on a tiny model."""

from __future__ import annotations

import json
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefdistill import RunConfig, pipeline
from prefdistill.cli import main
from prefdistill.data.bias import biased_groups, common_size, length_biased, longer_chosen
from prefdistill.data.group_files import read_groups
from prefdistill.data.table import PromptGroup, Response
from prefdistill.errors import ConfigError, DataError
from prefdistill.experiments import comparison
from prefdistill.experiments.comparison import Comparison, collect, run_comparison, run_folder
from tiny_runs import rows, small, write_rows
from tiny_tokenizers import gpt2


def group(prompt: int, lengths: list[int], pairs: list[tuple[int, int]], split: str = "train") -> PromptGroup:
    responses = [Response("r" * n, tuple(range(1, n + 1))) for n in lengths]
    return PromptGroup(f"p{prompt}", (prompt,), split, {}, 0, responses, pairs)


GROUPS = [
    group(1, [3, 5, 7], [(1, 0), (2, 0), (2, 1)]),  # three prefer the longer
    group(2, [4, 2], [(1, 0)]),  # the shorter
    group(3, [6, 1, 6], [(1, 0), (0, 2), (1, 2)]),  # shorter, equal, shorter
]


def test_longer_chosen():
    assert longer_chosen(GROUPS).tolist() == [1, 1, 1, -1, -1, 0, -1]


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_biased_groups_keep_only_what_was_drawn(rho):
    found = biased_groups(GROUPS, rho, seed=1)
    signs = longer_chosen(found)
    assert (signs != 0).all()
    assert (signs > 0).mean() == rho
    for g in found:
        assert g.pairs
        assert {i for p in g.pairs for i in p} == set(range(len(g.responses)))
        before = next(b for b in GROUPS if b.ids == g.ids)
        known = {(before.responses[c].ids, before.responses[r].ids) for c, r in before.pairs}
        assert {(g.responses[c].ids, g.responses[r].ids) for c, r in g.pairs} <= known


def test_sizes_are_equal_over_rho_and_refused_beyond_the_data():
    signs = np.array([1] * 30 + [-1] * 60 + [0] * 9)
    size = common_size(signs, (0.2, 0.5, 0.8))
    assert size == 37  # 30 / 0.8
    for rho in (0.2, 0.5, 0.8):
        weights = length_biased(signs, rho, seed=0, size=size)
        assert weights.sum() == size
        assert weights.max() == 1
        assert weights[signs > 0].sum() == round(rho * size)
    with pytest.raises(DataError, match=r"needs 40 pairs that prefer the longer .* have 30; ask for at most 37"):
        length_biased(signs, 0.8, seed=0, size=50)
    repeated = length_biased(signs, 0.8, seed=0, size=50, replacement=True)
    assert (repeated[signs > 0].sum(), repeated[signs < 0].sum()) == (40, 10)
    assert repeated[signs < 0].max() == 1  # of these there are enough


# -- the command -------------------------------------------------------------------------------------------------------


def length(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture
def data(tmp_path):
    """90 prompts; a third prefer the longer response."""
    path = tmp_path / "pairs.jsonl"
    made = [r if i % 3 else {**r, "chosen": r["rejected"], "rejected": r["chosen"]} for i, r in enumerate(rows(90))]
    write_rows(path, [{**r, "n": i} for i, r in enumerate(made)])
    return path


def test_the_command_writes_one_file_a_rho(data, model_folder, tmp_path, capsys):
    out = tmp_path / "biased"
    args = ["bias", "--data", str(data), "--model", str(model_folder), "--rho", "0.2,0.8", "--output-dir", str(out)]
    assert main(args) == 0
    said = capsys.readouterr()
    tokens = gpt2()
    signs = [length(tokens, r["chosen"]) - length(tokens, r["rejected"]) for r in map(json.loads, data.open())]
    longer, shorter = sum(s > 0 for s in signs), sum(s < 0 for s in signs)
    assert longer < shorter < 90 - longer  # some are of equal length
    assert f"{longer} prefer the longer response, {shorter} the shorter one" in said.err
    assert f"natural rate {longer / (longer + shorter):.3f}" in said.err
    size = int(min(longer / 0.8, shorter / 0.8))
    first = {rho: [json.loads(line) for line in (out / f"rho-{rho}.jsonl").open()] for rho in ("0.2", "0.8")}
    assert len(first["0.2"]) == len(first["0.8"]) == size
    for rho, found in first.items():
        kinds = [length(tokens, r["chosen"]) - length(tokens, r["rejected"]) for r in found]
        assert 0 not in kinds
        assert sum(k > 0 for k in kinds) == round(float(rho) * size)
        assert len({r["n"] for r in found}) == size  # nothing twice, other columns kept
    assert main(args) == 0
    again = [json.loads(line) for line in (out / "rho-0.8.jsonl").open()]
    assert again == first["0.8"]


def test_a_rows_own_columns_take_no_texts_place(model_folder, tmp_path):
    """A TL;DR comparison may have a column that is called as a text of ours."""
    path, out = tmp_path / "tldr.jsonl", tmp_path / "biased"
    info = {"subreddit": "r", "title": "t", "post": "p"}
    texts = [{"text": "a much longer summary"}, {"text": "short"}]
    made = [{"info": info | {"post": f"post {i}"}, "summaries": texts, "choice": i % 2} for i in range(12)]
    made = [row | {"prompt": "their own", "chosen": "column", "n": i} for i, row in enumerate(made)]
    write_rows(path, made)
    args = ["bias", "--data", str(path), "--model", str(model_folder), "--output-dir", str(out), "--rho", "0.5"]
    assert main(args) == 0
    found = [json.loads(line) for line in (out / "rho-0.5.jsonl").open()]
    assert len({r["n"] for r in found}) == 7
    for row in found:
        assert f"post {row['n']}" in row["prompt"]
        assert row["chosen"].strip() == texts[row["n"] % 2]["text"]


def test_the_command_leaves_bad_rows_out_and_writes_what_json_has_not(model_folder, tmp_path, capsys):
    """As the data sets have them that it is for: rows that no run reads, columns of dates."""
    path, out = tmp_path / "pairs.parquet", tmp_path / "biased"
    made = [r if i % 3 else {**r, "chosen": r["rejected"], "rejected": r["chosen"]} for i, r in enumerate(rows(40))]
    made = [{**row, "when": datetime(2024, 1, 1 + i % 28)} for i, row in enumerate(made)]
    made[3]["rejected"] = made[3]["chosen"]
    made[7] = {**made[6], "chosen": made[6]["rejected"], "rejected": made[6]["chosen"]}
    pq.write_table(pa.Table.from_pylist(made), path)
    args = ["bias", "--data", str(path), "--model", str(model_folder), "--output-dir", str(out), "--rho", "0.5"]
    assert main(args) == 2
    assert "row 4" in capsys.readouterr().err
    args += ["--on-bad-row", "drop"]
    assert main(args) == 0
    assert "2 rows left out, the first because" in capsys.readouterr().err
    assert main([*args, "--both-orders", "keep", "--limit", "39"]) == 0
    said = capsys.readouterr().err
    assert "1 rows left out" in said
    assert "38 pairs" in said
    assert json.loads((out / "rho-0.5.jsonl").open().readline())["when"].startswith("2024-01-")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rho", "0.9", "--pairs", "80"], "ask for at most"),
        (["--rho", "1.2"], "must lie in"),
        (["--rho", "half"], "give fractions"),
        (["--rho", "0.5", "--pairs", "0"], "at least 1"),
        (["--rho", "0.5", "--with-replacement"], "needs --pairs"),
    ],
)
def test_the_command_refuses(flags, said, data, model_folder, tmp_path, capsys):
    out = tmp_path / "biased"
    assert main(["bias", "--data", str(data), "--model", str(model_folder), "--output-dir", str(out), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


# -- as an option of a run ---------------------------------------------------------------------------------------------


def test_a_run_on_d_rho(data, model_folder, tmp_path):
    out = tmp_path / "run"
    config = small(data, model_folder, out, methods="[dpo]", **{"dataset.rho": 0.8, "dataset.rho_pairs": 15})
    pipeline.run(config, until="distill")
    groups = read_groups(out / "data" / "prompts.parquet")
    train = longer_chosen([g for g in groups if g.split == "train"])
    assert len(train) == 15
    assert (train > 0).sum() == 12
    test = longer_chosen([g for g in groups if g.split == "test"])
    assert 0 < (test > 0).mean() < 0.6  # as the data have it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dataset.rho": 1.5}, "dataset.rho"),
        ({"dataset.rho_pairs": 5}, "needs dataset.rho"),
        ({"distill.members": "[3]"}, "there are 3 members"),
        ({"distill.members": "[]"}, "empty"),
    ],
)
def test_wrong_options_are_named(options, said, data, model_folder, tmp_path):
    with pytest.raises(ConfigError, match=said):
        pipeline.run(small(data, model_folder, tmp_path / "run", **options))


# -- the sweep ---------------------------------------------------------------------------------------------------------


def sweep(data, model_folder, out, **changes) -> Comparison:
    config = small(data, model_folder, out, **{"dataset.validation_fraction": 0.3, "evaluate.judge": JUDGE})
    return Comparison(config, **{"rhos": (0.2, 0.8), "methods": ("dpo", "d-dpo", "e-dpo", "hull-dpo"), **changes})


JUDGE = "test_diagnosis:score_words"


def test_the_sweep_trains_once_and_collects(data, model_folder, tmp_path, capsys):
    job = sweep(data, model_folder, tmp_path / "sweep")
    table = run_comparison(job)
    assert [(r["rho"], r["method"]) for r in table["rows"]] == [(rho, m) for rho in job.rhos for m in job.methods]
    assert 0.25 < table["natural_rate"] < 0.45
    for rho in job.rhos:
        folder = run_folder(tmp_path / "sweep", 0, rho)
        summary = json.loads((folder / "evaluation" / "summary.json").read_text())
        scores = json.loads((folder / "evaluation" / "scores.json").read_text())
        for row in (r for r in table["rows"] if r["rho"] == rho):
            assert row["advantage"]["mean"] == pytest.approx(summary["methods"][row["method"]]["advantage"]["mean"])
            assert row["win_rate"]["mean"] == pytest.approx(summary["methods"][row["method"]]["win_rate"]["mean"])
            assert row["by_seed"] == [summary["methods"][row["method"]]["advantage"]["mean"]]
            if row["method"] != "dpo":
                gap = np.mean(scores[row["method"]]) - np.mean(scores["dpo"])
                assert row["against_dpo"]["mean"] == pytest.approx(gap)
                assert row["against_dpo"]["p_holm"] >= row["against_dpo"]["p_value"]
        # Own reward model first, the other rho's beside it.
        scored = pq.read_table(folder / "data" / "scored.parquet").to_pydict()
        assert all(len(r) == 2 for r in scored["rewards_chosen"])
        mixture = json.loads((folder / "policy" / "hull-dpo" / "mixture.json").read_text())
        assert len(mixture["weights"]) == 2
        assert not (folder / "policy" / "d-dpo" / "mixture.json").exists()
        train = longer_chosen([g for g in read_groups(folder / "data" / "prompts.parquet") if g.split == "train"])
        assert len(train) == table["pairs"]
    capsys.readouterr()
    again = run_comparison(job)
    said = capsys.readouterr().err
    assert again == table
    assert "training" not in said
    assert said.count("nothing to do") == 2 * len(job.rhos)
    assert [m["rho"] for m in table["members"]] == [0.2, 0.8]
    assert collect(tmp_path / "sweep", job, natural_rate=0.5, pairs=1)["rows"] == table["rows"]


def test_an_ensemble_of_more_rho_than_are_trained_on(data, model_folder, tmp_path):
    """The ends of the sweep alone, pessimistic over reward models of all rho."""
    job = sweep(data, model_folder, tmp_path / "sweep", rhos=(0.2,), methods=("dpo", "e-dpo"), member_rhos=(0.4, 0.6))
    table = run_comparison(job)
    assert table["member_rhos"] == [0.2, 0.4, 0.6]
    assert [m["rho"] for m in table["members"]] == [0.2, 0.4, 0.6]
    assert {r["rho"] for r in table["rows"]} == {0.2}
    scored = pq.read_table(run_folder(tmp_path / "sweep", 0, 0.2) / "data" / "scored.parquet").to_pydict()
    assert all(len(r) == 3 for r in scored["rewards_chosen"])
    for rho in (0.4, 0.6):
        assert (run_folder(tmp_path / "sweep", 0, rho) / "reward" / "member-0").is_dir()
        assert not (run_folder(tmp_path / "sweep", 0, rho) / "policy").exists()


def test_the_sweep_is_checked(data, model_folder, tmp_path):
    for changes, said in (
        ({"methods": ("d-dpo",)}, "must hold dpo"),
        ({"rhos": (0.2, 0.2)}, "--rhos"),
        ({"seeds": ()}, "--seeds"),
        ({"rhos": (0.2, 1.5)}, r"hold 1\.5"),
        ({"member_rhos": (-1.0,)}, "hold -1"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_comparison(sweep(data, model_folder, tmp_path / "no", **changes))
    biased = sweep(data, model_folder, tmp_path / "no")
    biased.config.dataset.rho = 0.3
    with pytest.raises(ConfigError, match=r"dataset\.rho"):
        run_comparison(biased)
    elsewhere = sweep(data, model_folder, tmp_path / "no")
    elsewhere.config.evaluate.split = "validation"
    with pytest.raises(ConfigError, match=r"evaluate\.split"):
        run_comparison(elsewhere)
    assert not (tmp_path / "no").exists()


def test_an_experiment_is_of_the_options_seed(data, model_folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(comparison, "run_comparison", lambda job: seen.append(job.seeds) or 1 / 0)
    (tmp_path / "c.yaml").write_text(small(data, model_folder, tmp_path / "out", seed=7).as_yaml())
    for flags in ([], ["--seed", "8"], ["--seed", "8", "--seeds", "1,2"]):
        with pytest.raises(ZeroDivisionError):
            main(["experiment", "length-bias", str(tmp_path / "c.yaml"), *flags])
    assert seen == [(7,), (8,), (1, 2)]


def test_the_experiment_command(data, model_folder, tmp_path, capsys):
    out = tmp_path / "sweep"
    config: RunConfig = small(data, model_folder, out, **{"dataset.validation_fraction": 0.3, "evaluate.judge": JUDGE})
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    flags = ["--rhos", "0.2,0.8", "--methods", "dpo,d-dpo", "--seeds", "0,1"]
    assert main(["experiment", "length-bias", str(tmp_path / "c.yaml"), *flags]) == 0
    page = (out / "length-bias.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml") == 3
    assert "by seed" in page
    table = (out / "length-bias.md").read_text(encoding="utf-8")
    assert table.count("| 0.2 |") == 2 + 1  # two methods, one reward model
    assert "(length-bias.svg)" in table
    assert (out / "length-bias.svg").read_text(encoding="utf-8").lstrip().startswith("<")
    table = json.loads((out / "length-bias.json").read_text())
    assert all(len(r["by_seed"]) == 2 for r in table["rows"])
    assert main(["experiment", "length-bias", "--seeds", "one"]) == 2
    assert "--seeds" in capsys.readouterr().err


def test_helpfulness_compares_on_the_pairs_as_labelled(data, model_folder, tmp_path):
    """One supervised start and one test split for all seeds, members of biased resamples beside that of all pairs."""
    out = tmp_path / "helpful"
    fixed = {"dataset.validation_fraction": 0.3, "sft.enabled": "true", "sft.lora_rank": 2, "evaluate.judge": JUDGE}
    (tmp_path / "c.yaml").write_text(small(data, model_folder, out, **fixed).as_yaml())
    flags = ["--methods", "dpo,d-dpo,e-dpo", "--seeds", "0,1", "--member-rhos", "0.2,0.8"]
    assert main(["experiment", "helpfulness", str(tmp_path / "c.yaml"), *flags]) == 0
    table = json.loads((out / "helpfulness.json").read_text())
    assert [(r["rho"], r["method"]) for r in table["rows"]] == [(None, "dpo"), (None, "d-dpo"), (None, "e-dpo")]
    assert [m["rho"] for m in table["members"]] == [None, 0.2, 0.8]
    assert table["pairs"] is not None
    folders = [run_folder(out, seed, rho) for seed in (0, 1) for rho in (None, 0.2)]
    assert not any((f / "start").exists() for f in folders)
    tests = [{g.ids for g in read_groups(f / "data" / "prompts.parquet") if g.split == "test"} for f in folders]
    assert all(t == tests[0] for t in tests)
    trained = [
        sum(len(g.pairs) for g in read_groups(f / "data" / "prompts.parquet") if g.split == "train") for f in folders
    ]
    assert trained[1] == table["pairs"] < trained[0]
    summaries = [json.loads((run_folder(out, s, None) / "evaluation" / "summary.json").read_text()) for s in (0, 1)]
    for row in table["rows"]:
        wins = [s["methods"][row["method"]]["win_rate"]["mean"] for s in summaries]
        assert row["win_rate"]["mean"] == pytest.approx(np.mean(wins))
    page = (out / "helpfulness.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml") == 1
    assert "as labelled" in page
    assert "Whatever the bias" not in page
    assert (out / "helpfulness.md").read_text(encoding="utf-8").count("| as labelled |") == 4


def test_the_experiments_own_options_are_whole():
    """Each has a YAML of its name that can be read and checked."""
    from importlib.resources import files

    from prefdistill.cli import parse
    from prefdistill.commands.experiment import EXPERIMENTS

    for name in EXPERIMENTS:
        parse("run", [str(files("prefdistill.embedded").joinpath(f"{name}.yaml"))]).check()


def test_methods_of_labels_alone_need_no_reward_models(data, model_folder, tmp_path):
    table = run_comparison(sweep(data, model_folder, tmp_path / "labels", rhos=(0.2,), methods=("dpo", "ipo")))
    assert table["members"] == []
    assert not (run_folder(tmp_path / "labels", 0, 0.2) / "reward").exists()


def test_a_variant_of_d_dpo_distils_its_own_reward_model(data, model_folder, tmp_path):
    from prefdistill.experiments.comparison import _config

    job = sweep(data, model_folder, tmp_path / "x", methods=("dpo", "mine", "e-dpo"))
    job.config.distill.per_method = {"mine": {"method": "d-dpo", "beta": 0.2}}
    made = _config(job, 0, 0.2, 10, others=True)
    assert made.distill.of("mine").members == [0]
    assert made.distill.of("mine").beta == 0.2
    assert made.distill.of("e-dpo").members is None
