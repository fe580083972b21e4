"""The rows of the table: what is measured, against what, and what must come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks import policy
from benchmarks.shapes import SIZES, Prompt, prompts_of
from benchmarks.steps import Step


@dataclass(frozen=True)
class Sizes:
    """How large the work of every row is."""

    model: str = "135m"
    prompt_tokens: int = 360
    response_tokens: int = 42
    batch_prompts: int = 4


@dataclass(frozen=True)
class Row:
    """A comparison of two steps over the same work.

    Attributes:
        name: as in results.json.
        work: said in the table.
        peer: said in the table.
        target: least ratio of the peer's time to ours (of ours to the peer's where `at_most`).
        sides: "ours" and the peer's variants, of which the fastest counts; given sizes and a precision.
        units: what a step does, for the rate, e.g. pairs.
        training: whether a step is forward and backward.
    """

    name: str
    work: str
    peer: str
    target: float
    shape: str
    sides: Mapping[str, Callable[[list[Prompt], Sizes, str], Step]]
    at_most: bool = False
    memory_target: float | None = None
    training: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def prompts(self, sizes: Sizes, batches: int = 2) -> list[Prompt]:
        return prompts_of(
            self.shape,
            batches * sizes.batch_prompts,
            size=sizes.model,
            prompt_tokens=sizes.prompt_tokens,
            response_tokens=sizes.response_tokens,
        )


def _ours(method: str = "dpo", members: int = 0) -> Callable[[list[Prompt], Sizes, str], Step]:
    return lambda prompts, sizes, precision: policy.ours(
        prompts,
        size=sizes.model,
        precision=precision,
        batch_prompts=sizes.batch_prompts,
        method=method,
        members=members,
    )


def _trl(checkpointing: bool) -> Callable[[list[Prompt], Sizes, str], Step]:
    return lambda prompts, sizes, precision: policy.trl(
        prompts,
        size=sizes.model,
        precision=precision,
        batch_prompts=sizes.batch_prompts,
        checkpointing=checkpointing,
    )


_TRL_POLICY = {"trl": _trl(False), "trl, checkpointing": _trl(True)}

ROWS = (
    Row(
        "policy step, unique prompts",
        "DPO, a pair a prompt, reference precomputed",
        "TRL DPOTrainer",
        4.0,
        "unique",
        {"ours": _ours(), **_TRL_POLICY},
        memory_target=2.0,
    ),
    Row(
        "policy step, four pairs a prompt",
        "DPO, four pairs over four responses, reference precomputed",
        "TRL DPOTrainer",
        8.0,
        "shared",
        {"ours": _ours(), **_TRL_POLICY},
        memory_target=2.0,
    ),
    Row(
        "e-DPO step, K = 5",
        "e-DPO with five reward columns",
        "own DPO step",
        1.02,
        "shared",
        {"ours": _ours("e-dpo", members=5), "own DPO": _ours()},
        at_most=True,
    ),
)


def flops_once(prompts: list[Prompt], model: str, *, training: bool) -> float:
    """Model FLOPs of the tokens that must be computed once: two a weight and token, the head at response tokens only.

    Attention's own products are counted over the tokens that a token can see; a backward pass costs two forwards.
    """
    s = SIZES[model]
    hidden, layers, inner = s["hidden_size"], s["num_hidden_layers"], s["intermediate_size"]
    keys = hidden // s["num_attention_heads"] * s["num_key_value_heads"]
    weights = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
    total = 0.0
    for p in prompts:
        before, answers = len(p.ids), [len(r) for r in p.responses]
        seen = before * (before + 1) / 2 + sum(n * before + n * (n + 1) / 2 for n in answers)
        total += 2 * weights * (before + sum(answers)) + 4 * layers * hidden * seen
        total += 2 * hidden * s["vocab_size"] * sum(answers)
    return total * (3 if training else 1)
