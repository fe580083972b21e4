"""Members that are adapters on one base: in memory once, the same rewards as PEFT's own."""

from __future__ import annotations

import copy
import gc
import importlib.util
import weakref

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from prefdistill.data.tree import Tree
from prefdistill.errors import ConfigError
from prefdistill.models.adapters import Classifiers
from prefdistill.models.forward import TreeModel
from prefdistill.models.loading import add_lora, new_classifier, save_adapter, save_head, save_model
from prefdistill.models.merging import on_written_out, written_out
from prefdistill.models.quantise import load_policy_4bit, new_classifier_4bit
from prefdistill.training.reward import RewardTrainer, scale_head
from test_reward import EXAMPLES, arguments, letters_tokenizer
from tiny_models import tiny

TREES = [Tree((5, 6, 7), ((20, 21, 22, 2), (23, 2))), Tree((9,), ((30, 31),))]


@pytest.fixture
def members(tmp_path):
    """A base and three adapters on it with weights and heads of their own, one of which is a DoRA."""
    tokenizer = letters_tokenizer()
    tiny("llama", num_hidden_layers=2, pad_token_id=2).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folders = []
    for k in range(3):
        transformers.set_seed(k)
        made = new_classifier(str(tmp_path / "base"), 2)
        if k == 2:
            config = peft.LoraConfig(
                r=2, use_dora=True, target_modules=["q_proj", "up_proj"], modules_to_save=["score"], task_type="SEQ_CLS"
            )
            model = peft.get_peft_model(made, config)
        else:
            model = add_lora(made, rank=2 + k, task="SEQ_CLS")
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.copy_(torch.randn(p.shape) * (0.3 if "lora" in name else 1.0))
        folders.append(tmp_path / f"member.{k}")
        save_adapter(model, tokenizer, folders[-1], str(tmp_path / "base"))
    return [str(f) for f in folders]


def rewards(model) -> torch.Tensor:
    tree_model = TreeModel(model)
    with torch.no_grad():
        return tree_model.rewards(tree_model.collate(TREES, pool_pad_id=tree_model.config.pad_token_id))


def truth(folder) -> torch.Tensor:
    """PEFT's own model, one sequence at a time, nothing merged."""
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    model.get_base_model().config.pad_token_id = letters_tokenizer().pad_token_id  # the one that lies beside an adapter
    with torch.no_grad():
        return torch.stack(
            [model(input_ids=torch.tensor([t.prompt_ids + r])).logits[0, 0] for t in TREES for r in t.responses]
        )


def test_every_member_keeps_its_rewards_in_any_order(members):
    expected = [truth(f) for f in members]
    assert (expected[0] - expected[1]).abs().min() > 0.01
    classifiers = Classifiers()
    for k in (0, 1, 2, 1, 0):
        torch.testing.assert_close(rewards(classifiers.load(members[k])), expected[k], atol=1e-5, rtol=1e-4)
    # To the bit, whoever was loaded before.
    assert torch.equal(rewards(classifiers.load(members[1])), rewards(Classifiers().load(members[1])))


def test_a_tokenizer_without_a_pad_token_reads_by_the_bases(members):
    """Not by that of the member which was loaded before."""
    bare = letters_tokenizer()
    bare.pad_token = None
    bare.save_pretrained(members[1])
    alone = Classifiers().load(members[1]).get_base_model().config.pad_token_id
    classifiers = Classifiers()
    assert (
        classifiers.load(members[0]).get_base_model().config.pad_token_id == letters_tokenizer().pad_token_id != alone
    )
    assert classifiers.load(members[1]).get_base_model().config.pad_token_id == alone


def test_the_base_is_in_memory_once(members, monkeypatch):
    read = []
    real = peft.AutoPeftModelForSequenceClassification.from_pretrained
    monkeypatch.setattr(
        peft.AutoPeftModelForSequenceClassification,
        "from_pretrained",
        lambda *args, **options: read.append(args) or real(*args, **options),
    )
    classifiers = Classifiers()
    weights = {classifiers.load(f).get_base_model().model.embed_tokens.weight.data_ptr() for f in members}
    assert len(weights) == len(read) == 1


CPU = torch.device("cpu")
KINDS = ["full", "head", "lora", "dora"] + (["qlora", "qdora"] if importlib.util.find_spec("bitsandbytes") else [])


def trained(kind: str, base: str, work):
    """A member of this kind as a run trains it, and its head scaled."""
    transformers.set_seed(len(kind))
    if kind.startswith("q"):
        model = new_classifier_4bit(base, 0, precision="float32", device=CPU)
    else:
        model = new_classifier(base, 0)
    if kind.endswith(("lora", "dora")):
        model = add_lora(model, rank=3, use_dora=kind.endswith("dora"), task="SEQ_CLS")
    if kind == "head":
        model.requires_grad_(False)
        model.score.requires_grad_(True)
    RewardTrainer(model, arguments(work, max_steps=5, learning_rate=2e-2), examples=EXAMPLES).train()
    scale_head(model, 1.7)
    return model.eval()


def test_members_of_every_kind_are_themselves_once_loaded(tmp_path):
    """Merged and as adapters, alone and after one another, adapters on one base in memory: the rewards of training."""
    tokenizer, base = letters_tokenizer(), str(tmp_path / "base")
    tiny("llama", num_hidden_layers=2, hidden_size=64, head_dim=16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    expected = {}
    for kind in KINDS:
        model = trained(kind, base, tmp_path / "work")
        truth = rewards(model)
        assert truth.std() > 0.1, "rewards that are all alike prove nothing"
        if kind == "head":
            save_head(model, tokenizer, tmp_path / kind, tmp_path / "backbone.safetensors")
            expected[str(tmp_path / kind)] = truth
            continue
        if kind != "full":
            stands_on = base
            if kind.startswith("q"):
                stands_on = str(tmp_path / "rounded")
                rounded = load_policy_4bit(base, precision="float32", device=CPU)
                save_model(written_out(rounded), tokenizer, tmp_path / "rounded")
                model = on_written_out(model).eval()
            save_adapter(copy.deepcopy(model), tokenizer, tmp_path / f"{kind}-adapter", stands_on)
            expected[str(tmp_path / f"{kind}-adapter")] = truth
        save_model(model, tokenizer, tmp_path / kind)
        expected[str(tmp_path / kind)] = truth
    assert len(expected) == 2 * len(KINDS) - 2
    shared = Classifiers()
    for folder in [*expected, *reversed(expected)]:
        found = rewards(shared.load(folder))
        torch.testing.assert_close(found, expected[folder], atol=2e-4, rtol=1e-3, msg=folder)
        assert torch.equal(found, rewards(Classifiers().load(folder))), folder


def test_another_base_takes_the_place_of_the_first(members, tmp_path):
    tokenizer = letters_tokenizer()
    tiny("qwen3", num_hidden_layers=2, pad_token_id=2).save_pretrained(tmp_path / "other")
    save_adapter(
        add_lora(new_classifier(str(tmp_path / "other"), 2), rank=2, task="SEQ_CLS"),
        tokenizer,
        tmp_path / "on-other",
        str(tmp_path / "other"),
    )
    classifiers = Classifiers()
    first = weakref.ref(classifiers.load(members[0]).get_base_model())
    assert classifiers.load(str(tmp_path / "on-other")).get_base_model().config.model_type == "qwen3"
    gc.collect()
    assert first() is None


def test_plain_lora_layers_multiply_once(members):
    """The low-rank layers themselves are not run, but for those of the DoRA, which no sum of weights gives."""
    classifiers = Classifiers()
    for k in (0, 2):
        model, calls = classifiers.load(members[k]), []
        for name, module in model.named_modules():
            if ".lora_" in name and isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda *args, name=name, calls=calls: calls.append(name))
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]))
        assert bool(calls) == (k == 2), calls


def test_an_adapter_that_cannot_be_read_is_named(members, tmp_path):
    (tmp_path / "member.1" / "adapter_model.safetensors").write_bytes(b"broken")
    classifiers = Classifiers()
    classifiers.load(members[0])
    with pytest.raises(ConfigError, match=r"member\.1"):
        classifiers.load(members[1])


def rewrite(folder, change) -> None:
    file = f"{folder}/adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_an_adapter_without_its_head_is_refused(members):
    """PEFT leaves a head that is not there as it was drawn, and says nothing: rewards would be random numbers."""
    for k in (0, 1):
        rewrite(members[k], lambda weights: weights.pop("base_model.model.score.weight"))
    classifiers = Classifiers()
    with pytest.raises(ConfigError, match=r"member\.0' lacks 1 weights, such as score\.weight"):
        classifiers.load(members[0])
    classifiers.load(members[2])
    with pytest.raises(ConfigError, match=r"member\.1' lacks 1 weights"):  # on a base that is there
        classifiers.load(members[1])
    torch.testing.assert_close(rewards(classifiers.load(members[2])), truth(members[2]), atol=1e-5, rtol=1e-4)


def test_an_adapter_with_more_labels_is_refused(members):
    rewrite(members[0], lambda weights: weights.update({"base_model.model.score.weight": torch.randn(2, 32)}))
    with pytest.raises(ConfigError, match=r"score\.weight of shape \(2, 32\).* exactly 1 label"):
        Classifiers().load(members[0])


def test_an_adapter_that_leaves_its_head_to_the_base_is_refused(members, tmp_path):
    """PEFT cannot load one."""
    made = tiny("llama", classifier=True, num_hidden_layers=2)
    save_model(made, letters_tokenizer(), tmp_path / "ready")
    model = peft.get_peft_model(made, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, letters_tokenizer(), tmp_path / "on ready", str(tmp_path / "ready"))
    with pytest.raises(ConfigError, match=r"on ready' cannot be loaded .*score\.weight"):
        Classifiers().load(str(tmp_path / "on ready"))
