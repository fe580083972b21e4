"""Encoders (BERT and its kin) as ready reward models and as judges: the rewards are those of transformers itself."""

from __future__ import annotations

import json
import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from prefdistill import pipeline
from prefdistill.data.text_pairs import PairEncoder
from prefdistill.data.tree import Tree
from prefdistill.errors import ConfigError, DataError
from prefdistill.models.adapters import Classifiers
from prefdistill.models.loading import load_classifier, reads_text_pairs
from prefdistill.models.sequence import SequenceModel
from prefdistill.scoring import Column, fill_columns, rewards_forward
from tiny_models import tiny
from tiny_runs import WORDS, rows, small, write_rows
from tiny_tokenizers import chatml, gpt2

LLAMA_WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LONGEST = 40


def words(kind: str):
    """A tokenizer of whole words that puts pairs together as BERT does, or as RoBERTa does with two separators."""
    vocabulary = {w: i for i, w in enumerate([*SPECIAL, "Describe", ":", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1" if kind == "bert" else "[CLS] $A [SEP] [SEP] $B [SEP]"
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=LONGEST,
        model_input_names=["input_ids", "attention_mask", *(["token_type_ids"] if kind == "bert" else [])],
        **{f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")},
    )


def saved(kind: str, folder):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tokenizer = words(kind)
    fixed = {**sizes, "vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": 0, "initializer_range": 0.5}
    if kind == "bert":
        made = transformers.BertForSequenceClassification(
            transformers.BertConfig(max_position_embeddings=LONGEST, **fixed)
        )
    else:
        made = transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(max_position_embeddings=LONGEST + 1, type_vocab_size=1, **fixed)
        )
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["bert", "roberta"])
def encoder_folder(request, tmp_path_factory):
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def truth(folder, prompt: str, response: str) -> float:
    """As a user of transformers would ask it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = tokenizer(prompt, response, return_tensors="pt")
    inputs = {k: v for k, v in inputs.items() if k != "token_type_ids" or model.config.type_vocab_size > 1}
    with torch.no_grad():
        return float(model(**inputs).logits[0, 0])


def test_rewards_are_those_of_transformers(encoder_folder):
    assert reads_text_pairs(str(encoder_folder))
    encoder = PairEncoder(words_of(encoder_folder), max_tokens=LONGEST, max_prompt_tokens=99, max_response_tokens=20)
    prompts = ["Describe red green :", "Describe soft :"]
    responses = [["blue round", "old new bright dark"], ["hard", "hard"]]
    trees = [
        Tree(encoder.prompt_ids(p).ids, tuple(encoder.response_ids(p, r) for r in rs))
        for p, rs in zip(prompts, responses, strict=True)
    ]
    model = SequenceModel(load_classifier(str(encoder_folder)).eval())
    with torch.no_grad():
        found = model.rewards(model.collate(trees)).tolist()
    expected = [truth(encoder_folder, p, r) for p, rs in zip(prompts, responses, strict=True) for r in rs]
    assert found == pytest.approx(expected, abs=1e-5)


def test_rewards_in_bfloat16_are_not_rounded_to_it(encoder_folder):
    model = SequenceModel(load_classifier(str(encoder_folder)).eval())
    batch = model.collate([Tree((2, 5, 6, 3), tuple((7 + i, 8, 3) for i in range(10)))])
    with torch.no_grad():
        exact = model.rewards(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rewards = model.rewards(batch)
    assert (rewards != rewards.bfloat16()).sum() > 8
    torch.testing.assert_close(rewards, exact, atol=0.2, rtol=0.1)


def words_of(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_long_texts_are_cut_at_the_prompts_left_and_the_responses_right(encoder_folder, caplog):
    tokenizer = words_of(encoder_folder)
    encoder = PairEncoder(tokenizer, max_tokens=20, max_prompt_tokens=99, max_response_tokens=6)
    specials = tokenizer.num_special_tokens_to_add(pair=True)
    many = " ".join(WORDS * 4)
    prompt = encoder.prompt_ids(f"Describe {many}").ids
    with caplog.at_level(logging.WARNING):
        response = encoder.response_ids("", many)
        encoder.response_ids("", many)
    long_prompt = encoder.response_ids(f"Describe {many}", many)
    assert len(prompt) + len(long_prompt) == 20
    assert len(encoder.prompt_ids("red").ids) + len(encoder.response_ids("red", many)) == 20
    response = long_prompt
    assert len(response) == 6 + 1
    ends = tokenizer(many, add_special_tokens=False)["input_ids"]
    kept = 20 - specials - 6
    assert prompt[1 : 1 + kept] == tuple(ends[-kept:])
    assert response[:6] == tuple(ends[:6])
    assert len([r for r in caplog.records if r.name.startswith("prefdistill")]) == 1
    assert "judged by their beginning" in caplog.text


def test_an_encoder_stands_in_as_member_and_as_judge(data, model_folder, encoder_folder, tmp_path):
    out = tmp_path / "run"
    options = {"reward.members": 1, "reward.pretrained": f"[{encoder_folder}]", "evaluate.judge": encoder_folder}
    pipeline.run(small(data, model_folder, out, methods="[d-dpo]", **options))
    scored = pq.read_table(out / "data" / "scored.parquet").to_pylist()
    margins = [row["rewards_chosen"][1] - row["rewards_rejected"][1] for row in scored[:6]]
    expected = [
        truth(encoder_folder, row["prompt"], row["chosen"]) - truth(encoder_folder, row["prompt"], row["rejected"])
        for row in scored[:6]
    ]
    assert margins == pytest.approx(expected, abs=1e-4)
    shown = json.loads((out / "evaluation" / "side_by_side.json").read_text(encoding="utf-8"))
    for card in shown[:3]:
        judged = truth(encoder_folder, card["prompt"], card["responses"]["d-dpo"])
        assert card["scores"]["d-dpo"] == pytest.approx(judged, abs=1e-4)
    assert np.isfinite(json.loads((out / "evaluation" / "summary.json").read_text())["judge"]["heldout_accuracy"])


def test_no_member_is_trained_on_an_encoder(data, model_folder, encoder_folder, tmp_path):
    options = {"reward.hold": "lora", "reward.models": f"[{encoder_folder}]"}
    with pytest.raises(ConfigError, match=r"is an encoder.*reward\.pretrained"):
        pipeline.run(small(data, model_folder, tmp_path / "run", methods="[d-dpo]", **options), until="reward")
    assert not (tmp_path / "run").exists()


def test_an_adapter_on_an_encoder_is_an_encoder(encoder_folder, tmp_path):
    """Its folder has no configuration of the model: what it is hangs on its base."""
    from peft import LoraConfig, get_peft_model

    base = transformers.AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=1)
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    words_of(encoder_folder).save_pretrained(tmp_path / "adapter")
    assert reads_text_pairs(str(tmp_path / "adapter"))
    model = SequenceModel(Classifiers().load(str(tmp_path / "adapter")))
    encoder = PairEncoder(words_of(encoder_folder), max_tokens=LONGEST, max_prompt_tokens=99, max_response_tokens=20)
    tree = Tree(encoder.prompt_ids("Describe :").ids, (encoder.response_ids("Describe :", "blue red"),))
    with torch.no_grad():
        found = float(model.rewards(model.collate([tree]))[0])
    assert found == pytest.approx(truth(encoder_folder, "Describe :", "blue red"), abs=1e-5)


def test_the_token_budget_counts_every_repeated_prompt(encoder_folder, tmp_path, monkeypatch):
    prompt, responses = tuple(range(5, 15)), tuple((i, 3) for i in range(5, 9))
    widths = []
    real = SequenceModel.collate

    def counted(self, trees, **options):
        batch = real(self, trees, **options)
        widths.append(batch.input_ids.numel())
        return batch

    monkeypatch.setattr(SequenceModel, "collate", counted)
    column = Column(tmp_path, "x")
    load = lambda: load_classifier(str(encoder_folder))  # noqa: E731
    fill_columns(
        {"rewards": column}, [Tree(prompt, responses)], load, rewards_forward, token_budget=24, precision="float32"
    )
    assert len(column.of(Tree(prompt, responses))) == 4
    assert max(widths) <= 24


@pytest.mark.parametrize("option", ["evaluate.judge", "reward.pretrained"])
def test_a_reward_model_that_cannot_read_the_prompts_is_told_of_first(option, data, model_folder, tmp_path):
    """Not after all policies: no chat template, or one that knows no system turn, beside data of messages."""
    policy = chatml()
    made = tiny("llama", vocab_size=len(policy), pad_token_id=None, eos_token_id=policy.eos_token_id)
    made.save_pretrained(tmp_path / "policy")
    policy.save_pretrained(tmp_path / "policy")
    say = lambda role, content: {"role": role, "content": content}  # noqa: E731
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    pairs = [{column: [say(roles[column], text)] for column, text in row.items()} for row in rows()]
    pairs[20]["prompt"].insert(0, say("system", "Be brief."))
    judge = str(tmp_path / "judge")
    asked = {"methods": "[d-dpo]", option: f"[{judge}]" if option == "reward.pretrained" else judge}
    config = small(write_rows(tmp_path / "p.jsonl", pairs), tmp_path / "policy", tmp_path / "run", **asked)
    for template, said in ((None, "row 1.*no chat template"), (LLAMA_WITHOUT_SYSTEM, "row 21.*refuses the messages")):
        tokenizer = gpt2(template)
        made = tiny("llama", classifier=True, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        made.save_pretrained(judge)
        tokenizer.save_pretrained(judge)
        with pytest.raises((DataError, ConfigError), match=f"(?s){said}"):
            pipeline.run(config)
        assert not (tmp_path / "run").exists()
