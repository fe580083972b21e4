"""The cost model counts what a model holds and computes; its tables are those of what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import cost, scaling  # noqa: E402
from benchmarks.shapes import policy_of, prompts_of  # noqa: E402


def test_weights_are_those_of_the_model():
    for size in ("tiny", "30m"):
        weights = sum(p.numel() for n, p in policy_of(size).named_parameters() if "norm" not in n)
        assert cost.parameters(size) == weights
    # Names of published models: 1.24, 8.03 and 70.6 thousand million.
    assert [round(cost.parameters(size) / 1e9, 2) for size in ("1b", "8b", "70b")] == [1.24, 8.03, 70.55]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_operations_are_those_that_torch_counts(kind):
    """One response, whose tokens a plain forward computes once as well; attention is counted over seen pairs only."""
    prompts = prompts_of("unique", 1, size="30m", prompt_tokens=40, response_tokens=8)
    response = prompts[0].responses[0]
    model = policy_of("30m").train()
    if kind == "lora":
        for name, p in model.named_parameters():
            p.requires_grad_("norm" in name)  # weights without gradients, states with
    ids = torch.tensor([[*prompts[0].ids, *response]])
    with FlopCounterMode(display=False) as counted:
        hidden = model.model(input_ids=ids).last_hidden_state
        model.lm_head(hidden[:, -len(response) :]).sum().backward()
    one = type(prompts[0])(prompts[0].ids, (response,), ())
    assert cost.flops(kind, [one], "30m") == pytest.approx(counted.get_total_flops(), rel=0.05)


def test_memory_grows_with_what_is_trained_and_with_tokens():
    prompts = prompts_of("unique", 4, size="1b", prompt_tokens=300, response_tokens=100)
    at = {k: cost.step_gigabytes(k, prompts, "1b", bfloat16=True) for k in cost.KINDS}
    assert at["score"] < at["lora"] < at["full"]
    twice = cost.step_gigabytes("full", prompts * 2, "1b", bfloat16=True)
    kept = at["full"] - cost.TRAINED * cost.parameters("1b") / 1e9
    assert at["full"] < twice < at["full"] + kept
    less = cost.step_gigabytes("lora", prompts, "1b", bfloat16=True, nf4=True, checkpointing=True)
    assert less < cost.step_gigabytes("lora", prompts, "1b", bfloat16=True, checkpointing=True) < at["lora"]


def test_the_tables_are_those_of_the_measured_points():
    found = json.loads((ROOT / "benchmarks" / "scaling.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "scaling-tables.md").read_text(encoding="utf-8") == scaling.tables(found)
    rows = scaling.checked(found)
    assert {r["size"] for r in rows if r["calibrated"]} == {scaling.CALIBRATED}
    for row in rows:
        if row["calibrated"]:
            assert row["told_seconds"] == pytest.approx(row["seconds"])
