"""The tree forward equals the plain, one-sequence-at-a-time forward of transformers itself."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from prefdistill.data.tree import Tree, batches_by_tokens, collate_plain, collate_trees, tree_mask
from prefdistill.errors import ConfigError
from prefdistill.models.forward import TreeModel
from tiny_models import VOCAB, tiny

FAMILIES = ["llama", "qwen3", "gemma3", "qwen3_moe"]
_cache: dict = {}


def model_of(family: str) -> TreeModel:
    if family not in _cache:
        _cache[family] = TreeModel(tiny(family))
    return _cache[family]


def one_at_a_time(model, trees) -> torch.Tensor:
    """log pi(y|x) straight from transformers: one unpadded sequence, its full logits, a float64 sum."""
    sums = []
    for tree in trees:
        for response in tree.responses:
            ids = torch.tensor([tree.prompt_ids + response])
            logits = model(input_ids=ids).logits[0].double()
            logps = logits.log_softmax(-1)
            p = len(tree.prompt_ids)
            sums.append(sum(float(logps[p - 1 + i, t]) for i, t in enumerate(response)))
    return torch.tensor(sums, dtype=torch.float64)


tokens = st.integers(3, VOCAB - 1)
sequence = st.lists(tokens, min_size=1, max_size=24).map(tuple)
tree_strategy = st.builds(Tree, sequence, st.lists(sequence, min_size=1, max_size=4).map(tuple))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(trees=st.lists(tree_strategy, min_size=1, max_size=3))
def test_tree_forward_equals_plain_forward(family, trees):
    model = model_of(family)
    assert model.path == "packed"
    with torch.no_grad():
        ours = model.logps(model.collate(trees))
        truth = one_at_a_time(model.model, trees)
        plain = model.logps(collate_plain(trees, pad_id=0))
    torch.testing.assert_close(ours, truth, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(plain, truth, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_hundred_tokens_agree_to_1e_5(family):
    """The design's bound: float32, 1e-5 absolute on summed log-probs of 100 tokens, at the default initialisation."""
    g = torch.Generator().manual_seed(0)
    draw = lambda n: tuple(torch.randint(3, VOCAB, (n,), generator=g).tolist())  # noqa: E731
    trees = [Tree(draw(50), (draw(100), draw(1), draw(37))), Tree(draw(1), (draw(100), draw(100)))]
    raw = tiny(family)
    for parameter in raw.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02, generator=g)
    model = TreeModel(raw)
    with torch.no_grad():
        gap = (model.logps(model.collate(trees)) - one_at_a_time(raw, trees)).abs().max()
    assert gap < 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "gemma2", "granite"])
def test_gradients_equal_plain_gradients(family):
    model = TreeModel(tiny(family))
    assert model.path == ("tree" if family == "gemma2" else "packed")
    trees = [Tree((5, 6, 7, 8, 9, 10, 11, 12), ((20, 21, 22, 2), (23, 2), (24,))), Tree((9,), ((30, 31), (32, 2)))]
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)
    grads = []
    for batch in (model.collate(trees), collate_trees(trees, pad_id=0), collate_plain(trees, pad_id=0)):
        model.model.zero_grad()
        (model.logps(batch) * weights).sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.model.named_parameters() if p.grad is not None})
    for own in grads[:2]:
        assert own.keys() == grads[2].keys()
        for name, grad in own.items():
            torch.testing.assert_close(grad, grads[2][name], atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_logits_that_models_rescale(family):
    model = model_of(family)
    trees = [Tree((5, 6, 7), ((20, 21, 22, 2), (23, 2)))]
    with torch.no_grad():
        gap = model.logps(model.collate(trees)) - one_at_a_time(model.model, trees)
    assert gap.abs().max() < 1e-4


@pytest.mark.parametrize("family", ["mamba", "mamba2", "bloom"])
def test_models_that_do_not_fit_take_the_plain_path_and_say_so(family, caplog):
    with caplog.at_level(logging.WARNING):
        model = TreeModel(tiny(family))
    assert model.path == "plain"
    assert sum("plain path" in r.message for r in caplog.records) == 1
    trees = [Tree((5, 6, 7), ((20, 21, 22, 2), (23, 2))), Tree((9,), ((30, 31),))]
    with torch.no_grad():
        ours = model.logps(model.collate(trees))
        truth = one_at_a_time(model.model, trees)
    torch.testing.assert_close(ours, truth, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("attribute", ["lm_head_multiplier", None])
def test_a_model_with_a_scaling_nobody_knows_is_asked_for_its_own_logits(attribute, caplog):
    """A family that multiplies its logits under a name of its own: the probe sees it, the log-probs are its own."""

    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * getattr(self.config, "lm_head_multiplier", 1.0)
            return out

    plain = tiny("llama")
    config = plain.config
    if attribute:
        setattr(config, attribute, 2.0)
    raw = Scaled(config)
    raw.load_state_dict(plain.state_dict())
    raw.eval()
    with caplog.at_level(logging.WARNING):
        model = TreeModel(raw)
    assert sum("way of its own" in r.message for r in caplog.records) == bool(attribute)
    trees = [Tree((5, 6, 7), ((20, 21, 22, 2), (23, 2))), Tree((9,), ((30, 31),))]
    with torch.no_grad():
        ours = model.logps(model.collate(trees))
        torch.testing.assert_close(ours, one_at_a_time(raw, trees), atol=1e-4, rtol=1e-6)
    model.logps(model.collate(trees)).sum().backward()
    assert all(p.grad is not None for p in raw.parameters())


def test_eager_attention_takes_the_tree_path():
    raw = tiny("llama")
    raw.set_attn_implementation("eager")
    model = TreeModel(raw)
    assert model.path == "tree"
    trees = [Tree((5, 6, 7), ((20, 21, 22, 2), (23, 2))), Tree((9,), ((30, 31),))]
    with torch.no_grad():
        torch.testing.assert_close(model.logps(model.collate(trees)), one_at_a_time(raw, trees), atol=1e-4, rtol=1e-6)
    with pytest.raises(ConfigError, match="does not attend by sdpa"):
        TreeModel(raw, path="packed")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_padded_tree_batch_is_equal_too(family):
    """What a GPU reads: a row a tree under a dense mask."""
    model = TreeModel(tiny(family), path="tree")
    trees = [Tree((5, 6, 7), ((20, 21, 22, 2), (23, 2))), Tree((9,), ((30, 31),))]
    with torch.no_grad():
        ours = model.logps(model.collate(trees))
        torch.testing.assert_close(ours, one_at_a_time(model.model, trees), atol=1e-4, rtol=1e-6)


def test_a_packed_model_still_generates_as_transformers_does():
    """The attention that packs answers every other mask as sdpa does, caches included."""
    raw = tiny("llama")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = raw.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    assert TreeModel(raw).path == "packed"
    assert torch.equal(raw.generate(ids, attention_mask=torch.ones_like(ids), **asked), before)
    assert raw.config.to_dict().get("_attn_implementation") in (None, "sdpa")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad", [0, 2])
def test_rewards_equal_those_of_transformers(family, pad):
    """Also where the pad token is the end token: transformers then pools one token earlier, and so do we."""
    raw = tiny(family, classifier=True, pad_token_id=pad)
    model = TreeModel(raw)
    assert model.path == "packed"
    trees = [Tree((5, 6, 7, 2), ((20, 21, 22, 2), (23, 2), (2,))), Tree((9,), ((30, 31),))]
    with torch.no_grad():
        ours = model.rewards(model.collate(trees, pool_pad_id=pad))
        truth = torch.stack(
            [raw(input_ids=torch.tensor([t.prompt_ids + r])).logits[0, 0] for t in trees for r in t.responses]
        )
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-4)


def test_mask_by_brute_force():
    trees = [Tree((5, 6, 7), ((20, 21), (23,))), Tree((9,), ((30, 31, 32),))]
    batch = collate_trees(trees, pad_id=0)
    for window in (None, 2):
        mask = tree_mask(batch.segments, batch.position_ids, window=window)
        for b in range(2):
            for q in range(batch.input_ids.shape[1]):
                for k in range(batch.input_ids.shape[1]):
                    sq, sk = int(batch.segments[b, q]), int(batch.segments[b, k])
                    near = window is None or int(batch.position_ids[b, q] - batch.position_ids[b, k]) < window
                    expected = q == k or (k <= q and sk != -1 and sk in (0, sq) and near)
                    assert bool(mask[b, 0, q, k]) == expected


@given(trees=st.lists(tree_strategy, min_size=1, max_size=20), budget=st.integers(1, 200))
def test_token_budget(trees, budget):
    batches = batches_by_tokens(trees, budget)
    assert sorted(i for b in batches for i in b) == list(range(len(trees)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(trees[i].tokens for i in batch) <= budget


@pytest.mark.parametrize("bad", [((), ((1,),)), ((1,), ()), ((1,), ((),))])
def test_empty_trees_are_refused(bad):
    with pytest.raises(ValueError, match="at least one"):
        Tree(*bad)
