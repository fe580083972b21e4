"""The lighter norms give transformers' numbers and gradients, and keep less."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from prefdistill.models.norms import lighten_norms
from tiny_models import VOCAB, tiny

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def gradients(model, *, autocast=False):
    kept = 0

    def pack(t):
        nonlocal kept
        kept += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(input_ids=IDS).logits
        logits.float().square().sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters()}, kept


@pytest.mark.parametrize(("family", "norms"), [("llama", 8), ("qwen3", 8), ("mistral", 8), ("gemma3", 0)])
def test_same_numbers(family, norms):
    raw = tiny(family)
    light = copy.deepcopy(raw)
    assert lighten_norms(light.get_decoder()) == norms
    logits, grads, _ = gradients(raw)
    ours, our_grads, _ = gradients(light)
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=1e-3 * float(grad.abs().max()), rtol=1e-3, msg=name)


def test_less_is_kept_under_autocast():
    raw = tiny("llama")
    light = copy.deepcopy(raw)
    lighten_norms(light.get_decoder())
    logits, _, kept = gradients(raw, autocast=True)
    ours, _, lighter = gradients(light, autocast=True)
    assert lighter < 0.9 * kept
    torch.testing.assert_close(ours.float(), logits.float(), atol=0.1, rtol=0.05)


def test_a_norm_with_another_formula_is_left():
    raw = tiny("llama")
    norm = raw.model.layers[0].input_layernorm
    norm.forward = lambda x: 2 * x
    assert lighten_norms(raw.model) == 6, "those of the three other layers"
    assert torch.equal(norm(IDS), 2 * IDS)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_used_again():
    """Pages that a process asks for anew, in a loop over one large array."""
    code = """
import resource, sys
import numpy as np
from prefdistill.models.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
pages = []
for _ in range(6):
    np.ones(2**24)
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(pages[-1] - pages[0])
"""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "leave")
    }
    assert faults["keep"] < 0.1 * faults["leave"]
