"""Reward models against brute force, against transformers' own classifiers, and against themselves once reloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

import plain
from prefdistill.data.tree import Tree
from prefdistill.errors import ConfigError
from prefdistill.models.adapters import Classifiers
from prefdistill.models.forward import TreeModel
from prefdistill.models.loading import (
    add_lora,
    load_classifier,
    new_classifier,
    save_adapter,
    save_head,
    save_model,
)
from prefdistill.scoring import model_fingerprint
from prefdistill.training.reward import (
    RewardExample,
    RewardTrainer,
    distinct_pad_id,
    scale_head,
)
from tiny_models import QUIET, VOCAB, first_step, letters_tokenizer, tiny

TREES = [
    Tree((5, 6, 7), ((20, 21, 2), (22, 2), (23, 24, 25, 2))),
    Tree((8, 9), ((30, 2), (31, 32, 2))),
    Tree((10,), ((40, 41, 42, 2), (43, 2))),
]
EXAMPLES = [
    RewardExample(TREES[0], ((0, 1), (0, 2), (2, 1)), (1, 3, 0)),
    RewardExample(TREES[1], ((1, 0),), (2,)),
    RewardExample(TREES[2], ((0, 1),), (0,)),  # not drawn: must not count
]


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), **{**QUIET, "per_device_train_batch_size": 3, **options})


def classifier(family="llama", **options):
    return tiny(family, classifier=True, **{"num_hidden_layers": 2, **options})


def bradley_terry(model, examples) -> torch.Tensor:
    """The mean of -log sigmoid over pairs, a pair of weight n written out n times, from plain float64 logits."""
    losses = []
    for e in examples:
        rewards = plain.rewards(model, e.tree)
        for (c, r), weight in zip(e.pairs, e.weights, strict=True):
            losses += [torch.log(1 + torch.exp(rewards[r] - rewards[c]))] * weight
    return torch.stack(losses).mean()


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "pad"), [("llama", 0), ("llama", 2), ("gemma3", 0)])
def test_loss_and_gradient_are_bradley_terrys(family, pad, tmp_path):
    """Also where the pad token is the end token, so that transformers reads the reward one token earlier."""
    model = classifier(family, pad_token_id=pad)
    truth = plain.doubled(model)
    expected = bradley_terry(truth, EXAMPLES)
    expected.backward()
    expected = expected.item()
    trainer = RewardTrainer(model, arguments(tmp_path, max_steps=1), examples=EXAMPLES)
    assert len(trainer.train_dataset) == 2
    logged, grads = first_step(trainer)
    assert logged["loss"] == pytest.approx(expected, rel=1e-5)
    expected_grads = {n: p.grad.float() for n, p in truth.named_parameters()}
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], atol=1e-4, rtol=2e-3, msg=name)


def test_metrics_and_evaluation_count_weights(tmp_path):
    model = classifier()
    with torch.no_grad():
        r = [[float(v) for v in plain.rewards(plain.doubled(model), t)] for t in TREES]
        expected = float(bradley_terry(plain.doubled(model), EXAMPLES))
    margins = [r[0][0] - r[0][1], *[r[0][0] - r[0][2]] * 3, *[r[1][1] - r[1][0]] * 2]
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0, per_device_eval_batch_size=3)
    trainer = RewardTrainer(model, args, examples=EXAMPLES, eval_examples=EXAMPLES)
    trainer.train()
    logged = trainer.state.log_history[0]
    evaluated = trainer.evaluate()
    for prefix, found in (("", logged), ("eval_", evaluated | trainer.state.log_history[-1])):
        assert found[prefix + "loss"] == pytest.approx(expected, rel=1e-5)
        assert found[prefix + "margin"] == pytest.approx(np.mean(margins), rel=1e-4)
        assert found[prefix + "accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))


@pytest.mark.parametrize("kind", ["full", "lora", "dora"])
def test_training_lowers_the_loss(kind, tmp_path):
    model = classifier()
    if kind != "full":
        model = add_lora(model, rank=4, use_dora=kind == "dora", task="SEQ_CLS")
    args = arguments(tmp_path, max_steps=12, learning_rate=5e-3, lr_scheduler_type="constant")
    trainer = RewardTrainer(model, args, examples=EXAMPLES)
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert losses[-1] < 0.3 * losses[0]
    assert trainer.state.log_history[11]["accuracy"] == 1.0


def test_gradient_accumulation_is_the_mean_of_its_parts(tmp_path):
    model = classifier()
    with torch.no_grad():
        parts = [float(bradley_terry(plain.doubled(model), [e])) for e in EXAMPLES[:2]]
    args = arguments(
        tmp_path, max_steps=1, learning_rate=0.0, per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    trainer = RewardTrainer(model, args, examples=EXAMPLES)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.mean(parts), rel=1e-5)


def test_a_lora_member_goes_on_from_its_checkpoint(tmp_path):
    """LlamaFactory 1567; to the last bit, the dropout of its adapters included."""

    def train(folder, resume=None):
        transformers.set_seed(3)
        model = add_lora(classifier(), rank=2, dropout=0.2, task="SEQ_CLS")
        args = arguments(
            folder, max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=1, learning_rate=1e-3
        )
        trainer = RewardTrainer(model, args, examples=EXAMPLES)
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict(), trainer.state.log_history

    whole, history = train(tmp_path / "whole")
    resumed, resumed_history = train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any("score.modules_to_save" in name for name in whole)
    assert [h.get("margin") for h in resumed_history[:4]] == [h.get("margin") for h in history[:4]]


# -- saved and reloaded ----------------------------------------------------------------------------------------------

READER = """
import json, sys, torch, transformers
out = {}
for folder, sequences in json.load(sys.stdin).items():
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
    with torch.no_grad():
        alone = [float(model(input_ids=torch.tensor([s])).logits[0, 0]) for s in sequences]
        together = model(**batch).logits[:, 0].tolist()
    out[folder] = {"alone": alone, "together": together, "labels": model.config.num_labels}
print(json.dumps(out))
"""


def test_saved_members_give_the_same_rewards_in_another_process(tmp_path):
    """By transformers alone: OpenRLHF 1342, 873, 682, 209, 872; LlamaFactory 430; sentence-transformers 3980."""
    tokenizer = letters_tokenizer()
    causal = tiny("llama", num_hidden_layers=2)
    causal.save_pretrained(tmp_path / "base")
    expected, folders = {}, {}
    for kind in ("full", "lora", "dora", "head"):
        model = new_classifier(str(tmp_path / "base"), distinct_pad_id(tokenizer, [2, 5], VOCAB))
        if kind in ("lora", "dora"):
            transformers.set_seed(0)
            model = add_lora(model, rank=4, use_dora=kind == "dora", task="SEQ_CLS")
        folders[kind] = folder = tmp_path / kind
        if kind == "head":
            with torch.no_grad():
                model.score.weight.copy_(torch.randn(1, 32, generator=torch.Generator().manual_seed(1)))
            save_head(model, tokenizer, folder, tmp_path / "backbone.safetensors")
        else:
            args = arguments(tmp_path / "work", max_steps=4, learning_rate=1e-2)
            RewardTrainer(model, args, examples=EXAMPLES).train()
            scale_head(model, 2.5)
        model.eval()
        with torch.no_grad():
            tree_model = TreeModel(model)
            expected[kind] = tree_model.rewards(tree_model.collate(TREES, pool_pad_id=0)).tolist()
        if kind != "head":
            save_model(model, tokenizer, folder)
        assert np.ptp(expected[kind]) > 0.3, "rewards that are all alike prove nothing"
    sequences = [list(t.prompt_ids + r) for t in TREES for r in t.responses]
    read = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps({str(f): sequences for f in folders.values()}),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    found = json.loads(read.stdout)
    for kind, folder in folders.items():
        assert found[str(folder)]["labels"] == 1
        for how in ("alone", "together"):
            np.testing.assert_allclose(found[str(folder)][how], expected[kind], atol=1e-5, rtol=1e-4, err_msg=kind)
        assert not (folder / "adapter_config.json").exists()


def test_a_saved_folder_lacks_nothing(tmp_path):
    """A head that is missing would be drawn anew, with a warning that nobody reads."""
    model = add_lora(classifier(), rank=2, task="SEQ_CLS")
    save_model(model, letters_tokenizer(), tmp_path / "m")
    _, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())
    assert isinstance(load_classifier(str(tmp_path / "m")).score, torch.nn.Linear)


ADAPTER_READER = """
import json, sys, torch, transformers, peft
folder, sequences = json.load(sys.stdin)
model = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
with torch.no_grad():
    print(json.dumps([float(model(input_ids=torch.tensor([s])).logits[0, 0]) for s in sequences]))
"""


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_saved_adapter_gives_the_same_rewards(use_dora, tmp_path):
    """To prefdistill from a folder that was moved, and to PEFT alone in another process."""
    tokenizer = letters_tokenizer()
    tiny("llama", num_hidden_layers=2, pad_token_id=2).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    transformers.set_seed(0)
    pad = distinct_pad_id(tokenizer, [2, 5], VOCAB)
    model = add_lora(new_classifier(str(tmp_path / "base"), pad), rank=4, use_dora=use_dora, task="SEQ_CLS")
    RewardTrainer(model, arguments(tmp_path / "work", max_steps=4, learning_rate=1e-2), examples=EXAMPLES).train()
    scale_head(model, 2.5)
    model.eval()
    with torch.no_grad():
        tree_model = TreeModel(model)
        expected = tree_model.rewards(tree_model.collate(TREES, pool_pad_id=pad)).tolist()
    assert np.ptp(expected) > 0.3
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    save_adapter(model, tokenizer, tmp_path / "here", str(tmp_path / "base"))
    folder = (tmp_path / "here").rename(tmp_path / "there")
    assert not list(folder.glob("model*.safetensors"))
    loaded = Classifiers().load(str(folder))
    assert loaded.config.pad_token_id == pad != 2
    with torch.no_grad():
        tree_model = TreeModel(loaded)
        found = tree_model.rewards(tree_model.collate(TREES, pool_pad_id=loaded.config.pad_token_id)).tolist()
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)
    sequences = [list(t.prompt_ids + r) for t in TREES for r in t.responses]
    # The base's pad token is its end token: PEFT alone reads one token too early where that ends a response.
    sequences_and_pad = [[*s[:-1], s[-1] if s[-1] != 2 else 6] for s in sequences]
    read = subprocess.run(
        [sys.executable, "-c", ADAPTER_READER],
        input=json.dumps([str(folder), sequences_and_pad]),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    with torch.no_grad():
        truth = [float(loaded(input_ids=torch.tensor([s])).logits[0, 0]) for s in sequences_and_pad]
    np.testing.assert_allclose(json.loads(read.stdout), truth, atol=1e-5, rtol=1e-4)


def test_an_adapters_fingerprint_covers_its_base(tmp_path):
    base = classifier()
    base.save_pretrained(tmp_path / "base")
    model = add_lora(base, rank=2, task="SEQ_CLS")
    save_adapter(model, letters_tokenizer(), tmp_path / "adapter", str(tmp_path / "base"))
    before = model_fingerprint(str(tmp_path / "adapter"))
    assert before == model_fingerprint(str(tmp_path / "adapter"))
    with torch.no_grad():
        changed = classifier()
        changed.score.weight.add_(1)
    changed.save_pretrained(tmp_path / "base")
    assert model_fingerprint(str(tmp_path / "adapter")) != before


@pytest.mark.parametrize("lora", [False, True])
def test_scale_head_multiplies_rewards(lora):
    model = classifier()
    if lora:
        model = add_lora(model, rank=2, task="SEQ_CLS").eval()
    tree_model = TreeModel(model)
    batch = tree_model.collate(TREES, pool_pad_id=0)
    with torch.no_grad():
        before = tree_model.rewards(batch)
        head = "score.modules_to_save.default.weight" if lora else "score.weight"
        untouched = {n: p.clone() for n, p in model.named_parameters() if not n.endswith(head)}
        scale_head(model, 0.25)
        torch.testing.assert_close(tree_model.rewards(batch), 0.25 * before)
    assert all(torch.equal(p, untouched[n]) for n, p in model.named_parameters() if n in untouched)


# -- the pad token of a classifier -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("special_tokens", "ends", "expected"),
    [
        ({}, (2, 5), 0),
        ({"pad_token": "</s>"}, (2, 5), 3),
        ({"pad_token": "</s>", "unk_token": "</s>"}, (2, 5), 4),
        ({"pad_token": "</s>", "unk_token": "</s>"}, (2, 4, 5), None),
        ({"pad_token": "<|im_end|>"}, (2, 5), 3),
        ({"pad_token": "<s>", "unk_token": "<s>"}, (2, 5), 4),
    ],
)
def test_distinct_pad_id(special_tokens, ends, expected):
    assert distinct_pad_id(letters_tokenizer(**special_tokens), ends, VOCAB) == expected


def test_a_pad_token_that_only_the_tokenizer_knows():
    """Added to it, while the model's embeddings stayed as they were."""
    tokenizer = letters_tokenizer(pad_token="[PAD]")
    added = tokenizer.pad_token_id
    assert distinct_pad_id(tokenizer, (2, 5), added + 1) == added
    assert distinct_pad_id(tokenizer, (2, 5), added) == tokenizer.unk_token_id


def test_with_a_distinct_pad_the_end_token_is_seen():
    """Two responses that differ in being finished alone have two rewards, in transformers and here."""
    tree = Tree((5, 6), ((20, 21, 2), (20, 21)))
    for pad, differ in ((0, True), (2, False)):
        model = classifier(pad_token_id=pad)
        tree_model = TreeModel(model)
        with torch.no_grad():
            ours = tree_model.rewards(tree_model.collate([tree], pool_pad_id=pad))
            truth = [float(r) for r in plain.rewards(model, tree)]
        np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=1e-5)
        assert (abs(truth[0] - truth[1]) > 1e-3) == differ


def test_reward_models_that_are_none_are_refused(tmp_path):
    """Weights that are missing would be random numbers."""
    model = tiny("llama", classifier=True)
    model.save_pretrained(tmp_path / "whole")
    load_classifier(str(tmp_path / "whole"))
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights, such as score\.weight"):
        load_classifier(str(tmp_path / "whole"))
    (tmp_path / "whole" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_classifier(str(tmp_path / "whole"))
