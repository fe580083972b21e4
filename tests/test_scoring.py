"""Columns against transformers itself, and what a change computes again (trl 3985, NeMo-RL 2484, LlamaFactory 4810)."""

from __future__ import annotations

import contextlib
import copy
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import plain
from prefdistill import scoring
from prefdistill.data.table import response_key
from prefdistill.data.tree import Tree
from prefdistill.errors import DataError
from prefdistill.models.loading import load_classifier, load_policy
from prefdistill.scoring import (
    Column,
    fill_columns,
    logps_and_features_forward,
    logps_forward,
    model_fingerprint,
    rewards_forward,
)
from prefdistill.training.distill import DistillConfig, DistillExample, DistillTrainer
from tiny_models import QUIET, VOCAB, tiny

_models: dict = {}


def model_of(family: str, classifier: bool = False):
    if (family, classifier) not in _models:
        _models[family, classifier] = tiny(family, classifier=classifier)
    return _models[family, classifier]


def some_trees(n: int, seed: int = 0) -> list[Tree]:
    g = torch.Generator().manual_seed(seed)

    def draw(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most + 1, (1,), generator=g))
        return tuple(torch.randint(3, VOCAB, (length,), generator=g).tolist())

    # The first token tells prompts and responses apart, so that no two are one by chance.
    return [Tree((3 + i, *draw(9)), tuple((50 + j, *draw(6), 2) for j in range(1 + i % 3))) for i in range(n)]


TREES = some_trees(7)
RESPONSES = sum(len(t.responses) for t in TREES)


class Watched:
    """`load` and `forward` that count."""

    def __init__(self, model, forward=logps_forward) -> None:
        self.model, self.inner = model, forward
        self.loads = self.batches = self.responses = self.largest = 0

    def load(self):
        self.loads += 1
        return self.model

    def forward(self, model, batch):
        self.batches += 1
        self.responses += batch.responses
        self.largest = max(self.largest, batch.input_ids.numel())
        return self.inner(model, batch)


def fill(columns, trees, watched, *, token_budget=80, precision="float32", **options) -> int:
    return fill_columns(
        columns, trees, watched.load, watched.forward, token_budget=token_budget, precision=precision, **options
    )


def values_of(column: Column, trees) -> np.ndarray:
    return np.concatenate([column.of(t) for t in trees])


def small_shards(monkeypatch) -> None:
    monkeypatch.setattr(scoring, "SHARD_TOKENS", 30)


# -- the values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "mamba"])
def test_logps_and_features_are_those_of_transformers(family, tmp_path):
    model = model_of(family)
    columns = {name: Column(tmp_path / name, "m") for name in ("logps", "features")}
    done = fill(columns, TREES, Watched(model, logps_and_features_forward))
    assert done == RESPONSES
    truth = plain.doubled(model)
    with torch.no_grad():
        logps = [float(v) for t in TREES for v in plain.logps(truth, t)]
        features = torch.cat([plain.last_hidden(truth, t) for t in TREES]).numpy()
    for read in (columns, {name: Column(tmp_path / name, "m") for name in columns}):  # in memory, and from disk
        np.testing.assert_allclose(values_of(read["logps"], TREES), logps, atol=2e-4, rtol=1e-6)
        np.testing.assert_allclose(values_of(read["features"], TREES), features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rewards_are_those_of_transformers(family, tmp_path):
    model = model_of(family, classifier=True)
    column = Column(tmp_path, "m")
    trees = [*TREES, Tree((5, 6), ((7, 0), (0, 0)))]  # a response's last tokens may be the pad token
    fill({"rewards": column}, trees, Watched(model, rewards_forward), pool=True)
    truth = plain.doubled(model)
    with torch.no_grad():
        rewards = [float(v) for t in trees for v in plain.rewards(truth, t)]
    np.testing.assert_allclose(values_of(column, trees), rewards, atol=1e-5, rtol=1e-4)


def test_rewards_in_bfloat16_are_not_rounded_to_it(tmp_path):
    """The backbone is; the head is one row of weights, and its rounding would make ties of near rewards."""
    model = tiny("llama", classifier=True)
    with torch.no_grad():
        model.score.weight.mul_(20)
    column = Column(tmp_path, "m")
    fill({"rewards": column}, TREES, Watched(model, rewards_forward), pool=True, precision="bfloat16")
    rewards = torch.tensor(values_of(column, TREES))
    assert (rewards != rewards.bfloat16()).sum() > 0.8 * RESPONSES


def test_features_are_read_where_a_later_classifier_pools(tmp_path):
    """Heads are fitted on the policy's features and saved as classifiers whose pad token may be the end token."""
    classifier = tiny("llama", classifier=True, pad_token_id=2)
    policy = tiny("llama", pad_token_id=0)
    policy.model.load_state_dict(classifier.model.state_dict())
    columns = {name: Column(tmp_path / name, "m") for name in ("logps", "features")}
    fill(columns, TREES, Watched(policy, logps_and_features_forward), pool_pad_id=2)
    ours = values_of(columns["features"], TREES) @ classifier.score.weight.detach().double().numpy()[0]
    with torch.no_grad():
        truth = [float(v) for t in TREES for v in plain.rewards(plain.doubled(classifier), t)]
    np.testing.assert_allclose(ours, truth, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("budget", [1, 37, 100_000])
def test_values_do_not_hang_on_the_token_budget(budget, tmp_path):
    """Scoring has a batch size of its own (trl 2421, 2426)."""
    watched = Watched(model_of("llama"))
    column = Column(tmp_path, "m")
    fill({"logps": column}, TREES, watched, token_budget=budget)
    assert watched.responses == RESPONSES
    assert watched.batches == {1: len(TREES), 37: watched.batches, 100_000: 1}[budget]
    assert budget < 37 or watched.largest <= budget
    with torch.no_grad():
        truth = [float(v) for t in TREES for v in plain.logps(plain.doubled(model_of("llama")), t)]
    np.testing.assert_allclose(values_of(column, TREES), truth, atol=2e-4, rtol=1e-6)


def test_bfloat16_is_used_where_it_is_asked_for(tmp_path):
    model, seen = model_of("llama"), []
    hook = model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    try:
        for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            column = Column(tmp_path / precision, "m")
            fill({"logps": column}, TREES, Watched(model), precision=precision)
            assert seen[-1] == dtype
    finally:
        hook.remove()
    coarse, fine = (values_of(Column(tmp_path / p, "m"), TREES) for p in ("bfloat16", "float32"))
    assert 0 < np.abs(coarse - fine).max() < 0.05 * np.abs(fine).max()


# -- computed once ---------------------------------------------------------------------------------------------------


def test_the_second_time_nothing_is_computed_or_loaded(tmp_path):
    fill({"logps": Column(tmp_path, "m")}, TREES, Watched(model_of("llama")))
    before = values_of(Column(tmp_path, "m"), TREES)

    def load():
        raise AssertionError("the model was loaded")

    column = Column(tmp_path, "m")
    assert fill_columns({"logps": column}, TREES, load, logps_forward, token_budget=80, precision="float32") == 0
    assert (values_of(column, TREES) == before).all()


def test_a_changed_row_is_computed_alone(tmp_path):
    fill({"logps": Column(tmp_path, "m")}, TREES, Watched(model_of("llama")))
    old = TREES[2]
    changed = Tree(old.prompt_ids, (*old.responses[:-1], (99, 98, 2)))
    new = Tree((4, 5, 6), ((7, 2), (8, 2)))
    trees = [*TREES[:2], changed, *TREES[3:], new]
    watched = Watched(model_of("llama"))
    column = Column(tmp_path, "m")
    assert fill({"logps": column}, trees, watched) == watched.responses == 3
    with torch.no_grad():
        truth = [float(v) for t in trees for v in plain.logps(plain.doubled(model_of("llama")), t)]
    np.testing.assert_allclose(values_of(column, trees), truth, atol=2e-4, rtol=1e-6)


def test_a_changed_prompt_computes_all_its_responses(tmp_path):
    fill({"logps": Column(tmp_path, "m")}, TREES, Watched(model_of("llama")))
    changed = Tree((*TREES[2].prompt_ids, 9), TREES[2].responses)
    assert fill({"logps": Column(tmp_path, "m")}, [changed], Watched(model_of("llama"))) == len(changed.responses)


def test_another_model_computes_all_again_and_leaves_no_stale_value(tmp_path):
    fill({"logps": Column(tmp_path, "one")}, TREES, Watched(model_of("llama")))
    column = Column(tmp_path, "two")
    assert column.stale_shards == 1
    assert not column.values
    assert fill({"logps": column}, TREES, Watched(model_of("qwen3"))) == RESPONSES
    with torch.no_grad():
        truth = [float(v) for t in TREES for v in plain.logps(plain.doubled(model_of("qwen3")), t)]
    np.testing.assert_allclose(values_of(Column(tmp_path, "two"), TREES), truth, atol=2e-4, rtol=1e-6)
    assert not Column(tmp_path, "one").values


def test_what_is_stale_stays_until_something_new_is_written(tmp_path):
    """Looking at a column with the wrong model must not cost the hours that the right one took."""
    fill({"logps": Column(tmp_path, "one")}, TREES, Watched(model_of("llama")))
    Column(tmp_path, "two")
    assert len(Column(tmp_path, "one").values) == RESPONSES


def test_a_column_that_lacks_is_filled_beside_one_that_does_not(tmp_path):
    fill({"logps": Column(tmp_path / "logps", "m")}, TREES, Watched(model_of("llama")))
    columns = {name: Column(tmp_path / name, "m") for name in ("logps", "features")}
    assert fill(columns, TREES, Watched(model_of("llama"), logps_and_features_forward)) == RESPONSES
    again = {name: Column(tmp_path / name, "m") for name in columns}
    assert fill(again, TREES, Watched(model_of("llama"), logps_and_features_forward)) == 0


class Killed(BaseException):
    """As Ctrl-C: no `except Exception` holds it up."""


def test_a_pass_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    small_shards(monkeypatch)
    trees = some_trees(20, seed=1)
    total = sum(len(t.responses) for t in trees)

    @contextlib.contextmanager
    def dying(amount, unit):
        assert (amount, unit) == (sum(t.tokens for t in trees), "tokens")
        seen = 0

        def tick(tokens):
            nonlocal seen
            seen += tokens
            if seen > amount / 2:
                raise Killed

        yield tick

    with pytest.raises(Killed):
        fill({"logps": Column(tmp_path, "m")}, trees, Watched(model_of("llama")), progress=dying)
    kept = Column(tmp_path, "m")
    assert total / 4 < len(kept.values) < total * 3 / 4
    assert {p.suffix for p in tmp_path.iterdir()} == {".parquet"}
    lacking = total - len(kept.values)
    watched = Watched(model_of("llama"))
    assert fill({"logps": kept}, trees, watched) == watched.responses == lacking
    assert len(Column(tmp_path, "m").values) == total
    with torch.no_grad():
        truth = [float(v) for t in trees for v in plain.logps(plain.doubled(model_of("llama")), t)]
    np.testing.assert_allclose(values_of(Column(tmp_path, "m"), trees), truth, atol=2e-4, rtol=1e-6)


def test_a_broken_shard_is_computed_again(tmp_path, monkeypatch, caplog):
    small_shards(monkeypatch)
    trees = some_trees(12, seed=2)
    fill({"logps": Column(tmp_path, "m")}, trees, Watched(model_of("llama")), token_budget=1)
    shards = sorted(tmp_path.glob("*.parquet"))
    assert len(shards) > 3
    lost = pq.read_table(shards[1])["key"].to_pylist()
    shards[1].write_bytes(shards[1].read_bytes()[:-20])
    column = Column(tmp_path, "m")
    assert f"{shards[1]} is damaged" in caplog.text
    watched = Watched(model_of("llama"))
    assert fill({"logps": column}, trees, watched) == watched.responses == len(lost)
    assert not Column(tmp_path, "m").stale_shards


@pytest.mark.parametrize("broken", ["logps", "features"])
def test_values_that_are_not_finite_are_an_error_and_not_kept(broken, tmp_path):
    def forward(model, batch):
        out = logps_and_features_forward(model, batch)
        out[broken][1] = math.nan
        return out

    columns = {name: Column(tmp_path / name, "m") for name in ("logps", "features")}
    with pytest.raises(
        DataError,
        match=f"1 of {RESPONSES} values of the column '{broken}' are not finite, .* 1 prompts \\(\\d+ tokens from",
    ):
        fill(columns, TREES, Watched(model_of("llama"), forward), token_budget=10_000)
    assert not Column(tmp_path / broken, "m").values


def test_a_model_that_overflows_is_an_error(tmp_path):
    model = tiny("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(DataError, match="precision: float32"):
        fill({"logps": Column(tmp_path, "m")}, TREES, Watched(model))


# -- fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprint_of_a_folder_is_of_its_weights_and_shape(tmp_path):
    model = tiny("llama", num_hidden_layers=1)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    first = model_fingerprint(str(tmp_path / "a"), "float32")
    assert first == model_fingerprint(str(tmp_path / "b"), "float32")
    assert first != model_fingerprint(str(tmp_path / "a"), "bfloat16")
    (tmp_path / "b" / "README.md").write_text("words")
    assert first == model_fingerprint(str(tmp_path / "b"), "float32")
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    model.save_pretrained(tmp_path / "b")
    assert first != model_fingerprint(str(tmp_path / "b"), "float32")
    model.config.rope_parameters["rope_theta"] = 5000.0
    model.config.save_pretrained(tmp_path / "a")
    assert first != model_fingerprint(str(tmp_path / "a"), "float32")


def test_folders_score_as_the_models_that_were_saved(tmp_path):
    for load, classifier, forward in ((load_policy, False, logps_forward), (load_classifier, True, rewards_forward)):
        model = model_of("llama", classifier)
        folder = str(tmp_path / load.__name__)
        model.save_pretrained(folder)
        name = "rewards" if classifier else "logps"
        columns = [Column(tmp_path / f"{name}-{i}", "m") for i in range(2)]
        fill({name: columns[0]}, TREES, Watched(model, forward), pool=classifier)
        fill({name: columns[1]}, TREES, Watched(load(folder), forward), pool=classifier)
        assert (values_of(columns[0], TREES) == values_of(columns[1], TREES)).all()


# -- columns and the training loop agree (trl 2423) --------------------------------------------------------------------


def first_step(model, trees, column, tmp_path, *, bf16=False, batch=1, **options) -> dict[str, float]:
    """Metrics of a first step on these columns, with the learning rate at 0."""
    args = DistillConfig(
        output_dir=str(tmp_path / "run"),
        method="dpo",
        per_device_train_batch_size=batch,
        max_steps=1,
        learning_rate=0.0,
        bf16=bf16,
        **QUIET,
        **options,
    )
    examples = [DistillExample(t, tuple(column.of(t)), pairs=((0, 1),)) for t in trees]
    trainer = DistillTrainer(copy.deepcopy(model), args, examples=examples)
    trainer.train()
    return trainer.state.log_history[0]


PAIRED = [t for t in some_trees(9, seed=3) if len(t.responses) > 1]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_first_margin_is_exactly_zero(family, bf16, tmp_path):
    """Same model, same precision, same batch: the policy is the reference to the last bit, and the loss is log 2."""
    model = model_of(family)
    column = Column(tmp_path / "logps", "m")
    precision = "bfloat16" if bf16 else "float32"
    fill({"logps": column}, PAIRED[:1], Watched(model), token_budget=1, precision=precision)
    logged = first_step(model, PAIRED[:1], Column(tmp_path / "logps", "m"), tmp_path, bf16=bf16)
    assert logged["rewards/margins"] == logged["rewards/chosen"] == logged["logps/level_change"] == 0.0
    assert logged["loss"] == pytest.approx(math.log(2), rel=1e-7)


def test_the_first_margin_is_zero_in_other_batches_too(tmp_path):
    model = model_of("llama")
    column = Column(tmp_path / "logps", "m")
    fill({"logps": column}, some_trees(9, seed=3), Watched(model), token_budget=200)
    logged = first_step(model, PAIRED, column, tmp_path, batch=len(PAIRED), gradient_checkpointing=True)
    assert abs(logged["rewards/margins"]) < 1e-5
    assert abs(logged["logps/level_change"]) < 1e-4
    assert logged["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_models_dropout_is_off_while_log_probs_are_compared(family, tmp_path):
    """Layers of dropout (GPT-2) and rates handed to functions (Llama's attention): the first margin is still zero."""
    model = tiny(family, **({"attention_dropout": 0.5} if family == "llama" else {}))
    column = Column(tmp_path / "logps", "m")
    fill({"logps": column}, PAIRED, Watched(model), token_budget=200)
    logged = first_step(model, PAIRED, column, tmp_path, batch=len(PAIRED))
    assert abs(logged["rewards/margins"]) < 1e-5
    assert abs(logged["logps/level_change"]) < 1e-4


def test_a_response_of_several_trees_is_computed_once(tmp_path):
    column, tree = Column(tmp_path, "m"), TREES[0]
    halves = [Tree(tree.prompt_ids, tree.responses[:2]), Tree(tree.prompt_ids, (tree.responses[0], tree.responses[0]))]
    computed = fill({"logps": column}, [tree, *halves, tree], Watched(model_of("llama")))
    assert computed == len(set(tree.responses)) == len(column.values)
    assert len(column.of(halves[1])) == 2


def test_keys_are_of_prompt_and_response(tmp_path):
    fill({"logps": Column(tmp_path, "m")}, TREES, Watched(model_of("llama")))
    assert set(Column(tmp_path, "m").values) == {response_key(t.prompt_ids, r) for t in TREES for r in t.responses}
