"""`prefdistill sweep`: points are trained once, chosen on validation prompts, tested on others, and it resumes."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prefdistill import RunConfig, losses, pipeline
from prefdistill.cli import main
from prefdistill.commands.sweep import _grid
from prefdistill.errors import ConfigError
from prefdistill.experiments.search import optuna_search
from prefdistill.experiments.sweep import Point, chosen_of, frontier, grid, points_of
from prefdistill.stages import distill as distill_stage
from prefdistill.training.methods import METHODS, LossOptions, pair_losses, reads
from tiny_runs import small


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def config(methods) -> RunConfig:
    return RunConfig(methods=methods)


def test_a_grid_trains_nothing_twice():
    points = grid(config(["dpo", "ipo", "e-dpo"]), {"beta": [0.1, 0.2], "kl_alpha": [0.0, 0.01, 0.1], "tau": [0.5]})
    names = [p.name for p in points]
    assert len(set(names)) == len(names)
    assert names[:3] == ["dpo,beta=0.1", "dpo,beta=0.2", "ipo,tau=0.5"]
    assert len([p for p in points if p.method == "e-dpo"]) == 6
    assert [p.name for p in grid(config(["dpo"]), {"tau": [0.1, 0.2]})] == ["dpo"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("option", ["beta", "tau", "label_smoothing", "reward_scale", "kl_alpha"])
def test_an_option_is_read_where_it_changes_the_loss(method, option):
    """Against the losses themselves: two values of the option give two losses or one."""
    draw = torch.Generator().manual_seed(0)
    h, margins = torch.randn(5, generator=draw), torch.randn(3, 5, generator=draw)
    policy, reference = torch.randn(4, generator=draw), torch.randn(4, generator=draw)
    row = METHODS[method]

    def result(value):
        options = LossOptions() if option == "kl_alpha" else LossOptions(**{option: value})
        loss = pair_losses(row.loss, h, margins, options)[0].mean()
        if row.forward_kl:
            alpha = value if option == "kl_alpha" else 0.1
            loss = loss + alpha * losses.forward_kl(policy, reference).mean()
        return float(loss)

    assert (result(0.1) != result(0.4)) == reads(method, option)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_frontier_is_what_nothing_beats(places):
    found = frontier(places)
    assert any(found)
    for (kl, advantage), on in zip(places, found, strict=True):
        beaten = any((k < kl and a >= advantage) or (k <= kl and a > advantage) for k, a in places)
        assert on == (not beaten)


def test_the_best_of_each_method_is_chosen_and_ties_stay_near_the_reference():
    points = [Point("dpo", {"beta": b}) for b in (1, 2, 3)] + [Point("e-dpo", {"beta": 1})]
    values = [(0.1, 1), (0.5, 9), (0.5, 2), (-1, 0)]
    of = {p.name: {"advantage": {"mean": a}, "kl_policy_ref": {"mean": k}} for p, (a, k) in zip(points, values)}  # noqa: B905
    assert [p.name for p in chosen_of(points, of)] == ["dpo,beta=3", "e-dpo,beta=1"]


OPTIONS = {"distill.lora_rank": 2, "distill.learning_rate": 0.01, "reward.members": 2}


def flags(data, model, out):
    fixed = {"data": data, "model": model, "output_dir": out, "precision": "float32", "distill.checkpoints": 2}
    sizes = {
        "evaluate.max_new_tokens": 6,
        "sample.max_new_tokens": 6,
        "evaluate.chosen_prompts": 4,
        "dataset.limit": 24,
    }
    return [f"--{k}={v}" for k, v in {**fixed, **sizes, **OPTIONS}.items()]


def test_a_sweep_chooses_on_validation_and_tests_the_chosen(data, model_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "sweep"
    argv = ["sweep", *flags(data, model_folder, out), "--methods=[dpo,e-dpo]", "--grid", "beta=0.1,0.5"]
    trained = []
    real = distill_stage.train_policy

    def counted(run, method, fingerprint):
        trained.append(method)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return real(run, method, fingerprint)

    monkeypatch.setattr(distill_stage, "train_policy", counted)
    assert main(argv) == 130
    assert main(argv) == 0
    once = ["dpo,beta=0.1", "dpo,beta=0.5", "e-dpo,beta=0.1", "e-dpo,beta=0.5"]
    assert sorted(trained) == sorted([*once, "e-dpo,beta=0.1"]), "only what was stopped is trained again"
    table = read(out / "sweep.json")
    validation, test = (read(out / name / "summary.json") for name in ("validation", "evaluation"))
    assert table["prompts"] == validation["prompts"] != 0
    assert set(validation["methods"]) == {"reference", *(r["name"] for r in table["runs"])}
    for method in ("dpo", "e-dpo"):
        own = [r for r in table["runs"] if r["method"] == method]
        chosen = [r for r in own if r["chosen"]]
        assert [r["advantage"]["mean"] for r in chosen] == [max(r["advantage"]["mean"] for r in own)]
        assert chosen[0]["name"] in test["methods"]
        assert all(r["checkpoint"] for r in own)
        assert all(r["frontier_of_method"] for r in own if r["frontier"])
    assert len(test["methods"]) == 3
    places = [(r["kl_policy_ref"]["mean"], r["advantage"]["mean"]) for r in table["runs"]]
    for r, (kl, advantage) in zip(table["runs"], places, strict=True):
        better = [(k, a) for k, a in places if (k <= kl and a > advantage) or (k < kl and a >= advantage)]
        assert r["frontier"] == (not better)
    page = (out / "sweep.html").read_text(encoding="utf-8")
    assert "<svg" not in page
    assert "data:image/svg+xml" in page
    assert "against itself" in page
    before = len(trained)
    capsys.readouterr()
    assert main(argv) == 0
    assert len(trained) == before
    assert capsys.readouterr().err.count("nothing to do") == 2


def test_a_list_of_points(data, model_folder, tmp_path):
    points = tmp_path / "points.yaml"
    points.write_text(yaml.safe_dump([{"method": "dpo"}, {"method": "dpo", "learning_rate": 0.001}]), encoding="utf-8")
    out = tmp_path / "sweep"
    assert main(["sweep", *flags(data, model_folder, out), "--points", str(points)]) == 0
    assert [r["name"] for r in read(out / "sweep.json")["runs"]] == ["dpo", "dpo,learning_rate=0.001"]


def test_a_search_proposes_the_same_points_again(data, model_folder, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    argv = ["sweep", *flags(data, model_folder, out), "--methods=[dpo,e-dpo]"]
    argv += ["--range", "beta=0.05:1", "--grid", "kl_alpha=0,0.1", "--trials", "2"]
    assert main(argv) == 0
    first = read(out / "sweep.json")
    names = [r["name"] for r in first["runs"]]
    assert len(names) == len(set(names)) == 4
    assert all("kl_alpha" not in n for n in names if n.startswith("dpo"))
    monkeypatch.setattr(distill_stage, "train_policy", lambda *a: pytest.fail("trained again"))
    assert main(argv) == 0
    assert read(out / "sweep.json") == first


def test_a_search_goes_where_it_is_good():
    """The sampler is asked and told as it should be: it ends nearer to the best value than it began."""

    def evaluate(points):
        return [-abs(p.options["beta"] - 0.3) for p in points]

    tried = optuna_search(config(["dpo"]), {"beta": (0.01, 10.0)}, {}, trials=40)(evaluate)
    miss = [abs(p.options["beta"] - 0.3) for p in tried]
    assert sum(miss[-10:]) < 0.5 * sum(miss[:10])


def test_a_grid_varies_what_is_true_or_false():
    options = config(["dpo"])
    name, values = _grid("use_dora=true,false")
    assert [p.options[name] for p in grid(options, {name: values})] == [True, False]
    name, values = _grid("learning_rate=null,1e-4")
    assert [p.options[name] for p in grid(options, {name: values})] == [None, 1e-4]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--grid", "gamma=1,2"], "cannot vary 'gamma'"),
        (["--grid", "beta"], "write it like --grid"),
        (["--grid", "beta=0.1,0.1"], "names a value twice"),
        (["--grid", "beta=0.1,-1"], "must be positive"),
        (["--grid", "beta=big"], "must be like 0.1"),
        (["--range", "beta=1:2"], "belong together"),
        (["--range", "beta=2:1", "--trials", "3"], "low end"),
        (["--range", "beta=a:b", "--trials", "3"], "write it like --range"),
        (["--range", "beta=1:2", "--trials", "0"], "at least 1"),
        (["--trials", "3"], "belong together"),
        (["--points", "nowhere.yaml"], "cannot be read"),
        (["--grid", "beta=1", "--grid", "beta=2"], "twice"),
        (["--grid", "beta=1", "--range", "beta=1:2", "--trials", "1"], "twice"),
        (["--range", "beta=-1:1", "--trials", "1"], "must be positive"),
        (["--range", "beta=1:inf", "--trials", "1"], "both finite"),
        (["--grid", "pairs=labelled,alll", "--range", "beta=1:2", "--trials", "1"], "alll"),
        (["--grid", "members=a"], "no list such as 0+1"),
        (["--grid", "members=0,7"], "there are 2 members"),
        (["--points", "nowhere.yaml", "--grid", "beta=1"], "without --grid"),
    ],
)
def test_sweeps_that_cannot_be(argv, said, data, model_folder, tmp_path, capsys):
    out = tmp_path / "sweep"
    assert main(["sweep", *flags(data, model_folder, out), *argv]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "a list of points"),
        ({"method": "dpo"}, "a list of points"),
        ([{"beta": 1}], "point 1"),
        ([{"method": "dpo"}, {"method": "dpo"}], "point 2: dpo stands there twice"),
        ([{"method": "dpo", "kl_alpha": 0.1}], "dpo does not read kl_alpha"),
        ([{"method": "ppo"}], "unknown method"),
        ([{"method": "dpo", "per_method": {}}], "cannot vary 'per_method'"),
    ],
)
def test_lists_that_are_none(rows, said):
    with pytest.raises(ConfigError, match=said):
        points_of(rows, "points.yaml", config(["dpo"]))


def test_a_point_alone_is_the_same_training(data, model_folder, tmp_path):
    """A variant of a sweep gives the weights of a plain run with its options."""
    out = tmp_path / "sweep"
    argv = ["sweep", *flags(data, model_folder, out), "--methods=[e-dpo]", "--grid", "beta=0.5"]
    assert main(argv) == 0
    options = {**OPTIONS, "distill.beta": 0.5, "distill.checkpoints": 2, "dataset.limit": 24}
    pipeline.run(small(data, model_folder, tmp_path / "plain", methods="[e-dpo]", **options), until="distill")
    file = "model.safetensors"
    swept = (out / "policy" / "e-dpo,beta=0.5" / file).read_bytes()
    assert swept == (tmp_path / "plain" / "policy" / "e-dpo" / file).read_bytes()


def test_whole_numbers_are_searched_as_such_and_hulls_sample_the_reference():
    """The corners hold every choice: what one of them needs of the run is there for all."""
    from prefdistill.experiments.search import corners
    from prefdistill.experiments.sweep import with_points

    job = config(["e-dpo"])
    points = corners(job, {"lora_rank": (4, 16)}, {"pessimism": ["pair", "hull"], "kl_alpha": [0.0]})
    assert {p.options["lora_rank"] for p in points} == {4, 16}
    assert all(isinstance(p.options["lora_rank"], int) for p in points)
    assert with_points(job, points, reference_samples=None, split="test").reference_samples == 2
    tried = optuna_search(job, {"lora_rank": (4, 16)}, {}, trials=3)(lambda ps: [0.0 for _ in ps])
    assert all(isinstance(p.options["lora_rank"], int) for p in tried)


def test_variants_and_hulls_in_a_grid():
    job = config(["mild", "hull-dpo"])
    job.distill.per_method = {"mild": {"method": "ipo", "learning_rate": 0.001}}
    points = grid(job, {"beta": [0.1, 0.2], "pessimism": ["pair", "batch", "hull-per-prompt"]})
    assert points[0].name == "mild"
    assert len(points) == 3, "hull-dpo knows no pair and no batch"
    assert [p.name for p in points_of([{"method": "mild", "tau": 0.2}], "p.yaml", job)] == ["mild,tau=0.2"]
