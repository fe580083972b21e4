"""Adapters on 4-bit weights: what is trained, what it is measured against, and that just this is what is saved."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import plain
from prefdistill.cli import main, parse
from prefdistill.data.tree import Tree
from prefdistill.errors import ConfigError
from prefdistill.models import quantise
from prefdistill.models.backbone import tolerance_of, unwrap
from prefdistill.models.loading import add_lora, load_policy, save_model
from prefdistill.models.merging import is_4bit, merged, written_out
from prefdistill.models.quantise import check_4bit, in_4bit, load_policy_4bit, new_classifier_4bit
from prefdistill.training.distill import DistillConfig, DistillExample, DistillTrainer
from prefdistill.training.reward import RewardExample, RewardTrainer
from test_reward import EXAMPLES, arguments
from tiny_models import QUIET, letters_tokenizer, tiny
from tiny_tokenizers import gpt2

CPU = torch.device("cpu")
WIDE = {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128}  # rows of whole blocks
TREES = [Tree((5, 6, 7), ((20, 21, 2), (22, 23, 2))), Tree((8, 9), ((30, 2), (31, 32, 2)))]
IDS = torch.tensor([[5, 6, 7, 20, 21, 2]])


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


@pytest.fixture
def base(tmp_path):
    tiny("llama", **WIDE).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("model"), gpt2()
    shape = {"vocab_size": len(tokenizer), "pad_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    tiny("llama", **WIDE, **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--distill.load_in_4bit=true", "--distill.lora_rank=0"], r"distill\.load_in_4bit needs .*distill\.lora_rank"),
        (["--distill.use_dora=true", "--distill.lora_rank=0"], r"distill\.use_dora .*distill\.lora_rank"),
        (["--sft.load_in_4bit=true", "--sft.lora_rank=0"], r"sft\.load_in_4bit needs .*sft\.lora_rank"),
        (["--sft.use_dora=true", "--sft.lora_rank=0"], r"sft\.use_dora"),
        (["--reward.load_in_4bit=true"], r"reward\.load_in_4bit needs .*reward\.hold: lora"),
        (["--reward.use_dora=true", "--reward.hold=full"], r"reward\.use_dora .*reward\.hold: lora"),
        (["--distill.per_method={dpo: {load_in_4bit: true, lora_rank: 0}}"], r"per_method\.dpo .*load_in_4bit needs"),
        (["--distill.per_method={dpo: {load_in_4bit: 4}}"], r"per_method\.dpo\.load_in_4bit is 4"),
    ],
)
def test_an_adapter_is_needed(flags, said):
    with pytest.raises(ConfigError, match=said):
        parse("run", flags).check()


def test_only_what_a_run_trains_asks_for_4_bits():
    def asked(*flags):
        return parse("run", [*flags]).in_4bit()

    reward = ["--reward.load_in_4bit=true", "--reward.hold=lora"]
    assert asked() == []
    assert asked("--sft.load_in_4bit=true") == []
    assert asked("--sft.load_in_4bit=true", "--sft.enabled=true") == ["sft.load_in_4bit"]
    assert asked("--methods=[dpo]", "--evaluate.judge=some:oracle", *reward) == []
    assert asked("--methods=[dpo]", "--evaluate.judge=heldout", *reward) == ["reward.load_in_4bit"]
    assert asked("--methods=[d-dpo]", "--evaluate.judge=some:oracle", *reward) == ["reward.load_in_4bit"]
    own = "--distill.per_method={mine: {method: dpo, load_in_4bit: true}}"
    assert asked("--methods=[dpo]", own) == []
    assert asked("--methods=[dpo, mine]", own) == ["distill.load_in_4bit"]


def test_without_bitsandbytes_nothing_is_written(data, model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quantise, "is_bitsandbytes_available", lambda: False)
    flags = ["--data", str(data), "--model", str(model_folder), "--output-dir", str(tmp_path / "out")]
    assert main(["run", *flags, "--distill.load_in_4bit", "true"]) == 2
    said = capsys.readouterr().err
    assert "distill.load_in_4bit needs the package bitsandbytes" in said
    assert "pip install prefdistill[qlora]" in said
    assert not (tmp_path / "out").exists()


def test_a_device_that_bitsandbytes_does_not_know(bnb):
    check_4bit("distill.load_in_4bit", torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"distill\.load_in_4bit: bitsandbytes .* cannot work .* meta"):
        check_4bit("distill.load_in_4bit", torch.device("meta"))


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_are_nf4_doubly_quantised(precision, dtype, bnb, monkeypatch):
    made = in_4bit(precision, CPU)
    config = made["quantization_config"]
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == dtype
    assert made["device_map"] == {"": "cpu"}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert in_4bit(precision, torch.device("cuda"))["device_map"] == {"": 3}


# -- models ----------------------------------------------------------------------------------------------------------


def rounded_weights(bnb, model):
    """By bitsandbytes alone: the 4-bit weights of a model, written out."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): bnb.functional.dequantize_4bit(
            m.weight.data, m.weight.quant_state
        )
        for name, m in model.named_modules()
        if isinstance(m, bnb.nn.Linear4bit)
    }


def nearest_in_nf4(bnb, weight):
    """By the definition: blocks of 64 over their largest number, each to the nearest of 16 levels."""
    levels = bnb.functional.get_4bit_type("nf4", device="cpu")
    blocks = weight.detach().reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    return (levels[((blocks / largest)[..., None] - levels).abs().argmin(-1)] * largest).reshape(weight.shape)


def test_two_ways_through_4_bit_weights_may_differ_by_bfloat16s_rounding(bnb, base):
    """Embeddings stay in float32, and say nothing of the layers."""
    model = load_policy_4bit(base, precision="bfloat16", device=CPU)
    assert next(model.parameters()).dtype == torch.float32
    assert tolerance_of(model) == tolerance_of(model.bfloat16()) == 0.1 > tolerance_of(tiny("llama"))


@pytest.mark.parametrize("classifier", [False, True])
def test_all_linear_layers_but_the_head_are_rounded(classifier, bnb, base):
    if classifier:
        model, head = new_classifier_4bit(base, 0, precision="float32", device=CPU), "score"
        assert not model.score.weight.any()
    else:
        model, head = load_policy_4bit(base, precision="float32", device=CPU), "lm_head"
    kinds = {n: type(m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds.pop(head) is torch.nn.Linear
    assert len(kinds) == 2 * 7
    assert set(kinds.values()) == {bnb.nn.Linear4bit}
    assert is_4bit(model)
    true = load_policy(base)
    for name, weight in rounded_weights(bnb, model).items():
        gap = (weight - nearest_in_nf4(bnb, true.get_submodule(name).weight)).abs()
        assert gap.max() < 0.02, "the double quantisation of the scales is all that may differ"
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(model.get_parameter(name), true.get_parameter(name))


@pytest.mark.parametrize("width", [32, 64, 96, 128, 33])
def test_rows_that_come_back_are_told_from_those_that_bitsandbytes_garbles(width, bnb):
    """Which these are hangs on the code that bitsandbytes has for this machine."""
    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    found = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(weight, quant_type="nf4"))
    gap = (found - nearest_in_nf4(bnb, weight)).abs().max()
    assert quantise.reads_back(width, CPU) == (gap < 0.02)
    assert gap < 0.02 or gap > 0.3
    assert width % 64 or gap < 0.02


def test_rows_that_bitsandbytes_garbles_are_refused(bnb, tmp_path, monkeypatch):
    tiny("llama", num_hidden_layers=2).save_pretrained(tmp_path / "narrow")
    monkeypatch.setattr(quantise, "reads_back", lambda width, device: width != 32)
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj reads 32 numbers.* garbles such rows"):
        load_policy_4bit(str(tmp_path / "narrow"), precision="float32", device=CPU)


def test_rows_that_come_back_are_used(bnb, tmp_path):
    """As without bitsandbytes' own code for CPUs: its products in PyTorch, which know blocks across rows."""
    tiny("llama", num_hidden_layers=2).save_pretrained(tmp_path / "narrow")
    if not quantise.reads_back(32, CPU):
        pytest.skip("bitsandbytes garbles rows of 32 on this machine")
    model = load_policy_4bit(str(tmp_path / "narrow"), precision="float32", device=CPU)
    true = load_policy(str(tmp_path / "narrow"))
    for name, weight in rounded_weights(bnb, model).items():
        assert (weight - nearest_in_nf4(bnb, true.get_submodule(name).weight)).abs().max() < 0.02


def test_a_policy_that_is_put_together_is_rounded_as_a_whole(bnb, base, tmp_path):
    adapted = add_lora(load_policy(base), rank=2, task="CAUSAL_LM")
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn(p.shape) * 0.3)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(tmp_path / "adapter")
    save_model(adapted, letters_tokenizer(), tmp_path / "whole")
    found, expected = (
        rounded_weights(bnb, load_policy_4bit(str(tmp_path / name), precision="float32", device=CPU))
        for name in ("adapter", "whole")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    plain_base = rounded_weights(bnb, load_policy_4bit(base, precision="float32", device=CPU))
    assert not any(torch.equal(found[name], plain_base[name]) for name in found)


def test_written_out_weights_are_the_rounded_ones(bnb, base, tmp_path):
    model = load_policy_4bit(base, precision="float32", device=CPU)
    weights = rounded_weights(bnb, model)
    with torch.no_grad():
        before = model(IDS).logits
        found = written_out(model)
        torch.testing.assert_close(found(IDS).logits, before, atol=1e-4, rtol=1e-4)
    assert not is_4bit(found)
    save_model(found, letters_tokenizer(), tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, weight in weights.items():
        assert torch.equal(read.get_submodule(name).weight, weight)


def with_adapter(bnb, model, base):
    """A plain model by hand: the rounded weights plus scaling B A, from the parts of a trained LoRA."""
    found = load_policy(base)
    rounded = rounded_weights(bnb, model)
    with torch.no_grad():
        for name, module in unwrap(model).named_modules():
            if hasattr(module, "lora_A"):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                found.get_submodule(name).weight.copy_(rounded[name] + module.scaling["default"] * b @ a)
    return found


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_saved_policy_is_the_one_that_was_trained(use_dora, bnb, base, tmp_path):
    transformers.set_seed(0)
    model = load_policy_4bit(base, precision="float32", device=CPU)
    before = rounded_weights(bnb, model)
    with torch.no_grad():
        reference = [tuple(float(v) for v in plain.logps(model, t)) for t in TREES]
    policy = add_lora(model, rank=4, use_dora=use_dora, task="CAUSAL_LM")
    examples = [
        DistillExample(t, r, rewards=((1.0, -1.0), (0.5, -2.0)), pairs=((0, 1),))
        for t, r in zip(TREES, reference, strict=True)
    ]
    args = DistillConfig(
        output_dir=str(tmp_path / "work"), **QUIET, method="d-dpo", max_steps=25, learning_rate=1e-2,
        lr_scheduler_type="constant", per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = DistillTrainer(policy, args, examples=examples)
    trainer.train()
    logged = [h for h in trainer.state.log_history if "loss" in h]
    assert abs(logged[0]["rewards/margins"]) < 1e-5
    assert logged[-1]["loss"] < 0.05 * logged[0]["loss"]
    after = rounded_weights(bnb, policy)
    assert all(torch.equal(before[name], after[name]) for name in before), "4-bit weights must not be trained"

    policy.eval()
    with torch.no_grad():
        trained = policy(IDS).logits
        by_hand = None if use_dora else with_adapter(bnb, policy, base)(IDS).logits
    save_model(policy, letters_tokenizer(), tmp_path / "policy")
    saved, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        torch.testing.assert_close(saved(IDS).logits, trained, atol=1e-3, rtol=1e-3)
        if by_hand is not None:
            torch.testing.assert_close(saved(IDS).logits, by_hand, atol=1e-4, rtol=1e-4)
        # On the weights from before the rounding it would be another model.
        assert (load_policy(base)(IDS).logits - trained).abs().max() > 0.1


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_member_goes_on_from_its_checkpoint(use_dora, bnb, base, tmp_path):
    def train(folder, resume=None):
        transformers.set_seed(3)
        model = new_classifier_4bit(base, 0, precision="float32", device=CPU)
        model = add_lora(model, rank=2, use_dora=use_dora, task="SEQ_CLS")
        args = arguments(
            folder, max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=1, learning_rate=1e-2
        )
        RewardTrainer(model, args, examples=EXAMPLES).train(resume_from_checkpoint=resume)
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    assert any("score" in name for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_merging_leaves_other_models_as_they_are(base):
    """Full precision: the sum of weights; no adapter: the very model."""
    model = load_policy(base)
    assert merged(model) is model
    lora = add_lora(model, rank=2, task="CAUSAL_LM")
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn(p.shape) * 0.1)
        before = lora.eval()(IDS).logits
        torch.testing.assert_close(merged(lora)(IDS).logits, before, atol=1e-4, rtol=1e-4)


def test_examples_of_4_bit_members(bnb, base, tmp_path):
    """The loss falls, and a member's rewards are those of the folder that is saved."""
    transformers.set_seed(1)
    model = add_lora(new_classifier_4bit(base, 0, precision="float32", device=CPU), rank=4, task="SEQ_CLS")
    args = arguments(tmp_path / "work", max_steps=12, learning_rate=1e-2, lr_scheduler_type="constant")
    trainer = RewardTrainer(model, args, examples=[RewardExample(t, ((0, 1),), (1,)) for t in TREES])
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert losses[-1] < 0.3 * losses[0]
    model.eval()
    with torch.no_grad():
        expected = [plain.rewards(model, t) for t in TREES]
    save_model(model, letters_tokenizer(), tmp_path / "member")
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "member").eval()
    with torch.no_grad():
        for tree, values in zip(TREES, expected, strict=True):
            torch.testing.assert_close(
                torch.stack(plain.rewards(saved, tree)), torch.stack(values), atol=1e-3, rtol=1e-3
            )
