"""The rows of the table: what is measured, against what, and what must come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import members, policy, reward, sampling, scoring
from benchmarks.shapes import SIZES, Prompt, prompts_of
from benchmarks.steps import Step

TRIAL_SHARE = 4  # a trial step is this part of the work: it only has to tell which is faster


@dataclass(frozen=True)
class Sizes:
    """How large the work of every row is."""

    model: str = "135m"
    prompt_tokens: int = 360
    response_tokens: int = 42
    batch_prompts: int = 4


Side = Callable[[list[Prompt], Sizes, str], Step]


@dataclass(frozen=True)
class Row:
    """A comparison of two steps over the same work.

    Attributes:
        name: as in results.json.
        work: said in the table.
        peer: said in the table.
        target: least ratio of the peer's time to ours (of ours to the peer's where `at_most`).
        sides: "ours" and the peer's variants, of which the fastest counts; given sizes and a precision.
        memory_target: least ratio of the peer's peak memory to ours; where there is none, nothing is asked.
        memory_of: the peer's variants of which the faster one's memory counts for that, whichever is fastest of all.
        training: whether a step is forward and backward.
        head: whether logits over the vocabulary are needed.
        whole: whether a step is all prompts, not a batch of them.
        fixed_prompts: how many prompts there are, where it is not two batches.
        passes: how often a step computes all tokens.
        steps: so many steps without a warm-up are compared by their sum, where it is not the medians.
        drawn: whether a step returns how many tokens it drew, so that these are what it had to compute.
        equal: whether both sides' steps return the same number: the loss, or a sum of log-probs or rewards.
    """

    name: str
    work: str
    peer: str
    target: float
    shape: str
    sides: Mapping[str, Side]
    at_most: bool = False
    memory_target: float | None = None
    memory_of: tuple[str, ...] = ()
    training: bool = True
    head: bool = True
    whole: bool = False
    fixed_prompts: int | None = None
    passes: int = 1
    steps: int | None = None
    drawn: bool = False
    equal: bool = True

    def prompts(self, sizes: Sizes, *, trial: bool = False) -> list[Prompt]:
        """The prompts of a side's steps: two batches, or those of a step that is a whole; a quarter of them to try."""
        asked = self.fixed_prompts or 2 * sizes.batch_prompts
        return prompts_of(
            self.shape,
            max(1, asked // TRIAL_SHARE) if trial and self.whole else asked,
            size=sizes.model,
            prompt_tokens=sizes.prompt_tokens,
            response_tokens=sizes.response_tokens,
        )


def _of_batches(make: Callable[..., Step], **fixed: Any) -> Side:
    """A side whose step is a batch of prompts."""
    return lambda prompts, sizes, precision: make(
        prompts, size=sizes.model, precision=precision, batch_prompts=sizes.batch_prompts, **fixed
    )


def _scoring(make: Callable[..., Step], **fixed: Any) -> Side:
    return lambda prompts, sizes, precision: make(prompts, size=sizes.model, precision=precision, **fixed)


def _sampling(make: Callable[..., Step], **fixed: Any) -> Side:
    return lambda prompts, sizes, precision: make(
        prompts, size=sizes.model, precision=precision, samples=2, max_new_tokens=sizes.response_tokens, **fixed
    )


def _settings(make: Callable[..., Step]) -> dict[str, Side]:
    """TRL without and with gradient checkpointing, a step at once and by accumulation: its fastest setting counts."""
    return {
        ", ".join(["trl", *["checkpointing"] * checkpointing, *["a prompt at a time"] * accumulating]): _of_batches(
            make, checkpointing=checkpointing, accumulating=accumulating
        )
        for accumulating in (False, True)
        for checkpointing in (False, True)
    }


AT_ONCE = ("trl", "trl, checkpointing")  # TRL's settings that the target names: all pairs of a step at once

# TRL's batch size for this pass is its user's to choose: the best of three counts.
_TRL_SCORING = {f"trl, {n} pairs": _scoring(scoring.trl, batch_pairs=n) for n in (1, 4, 8)}
_SEPARATE = {f"transformers, {n} rows": _scoring(members.separate, batch_rows=n) for n in (2, 8, 16)}
_GENERATE = {f"generate, {n} rows": _sampling(sampling.generate, batch_rows=n) for n in (16, 64, 200)}
_EAGER = _of_batches(policy.ours, native="none")

ROWS = (
    Row(
        "policy step, unique prompts",
        "DPO, a pair a prompt, reference precomputed",
        "TRL DPOTrainer",
        4.0,
        "unique",
        {"ours": _of_batches(policy.ours), **_settings(policy.trl)},
        memory_target=2.0,
        memory_of=AT_ONCE,
    ),
    Row(
        "policy step, four pairs a prompt",
        "DPO, four pairs over four responses, reference precomputed",
        "TRL DPOTrainer",
        8.0,
        "shared",
        {"ours": _of_batches(policy.ours), **_settings(policy.trl)},
        memory_target=2.0,
        memory_of=AT_ONCE,
    ),
    Row(
        "reward-model step, unique prompts",
        "Bradley-Terry, a pair a prompt",
        "TRL RewardTrainer",
        3.0,
        "unique",
        {"ours": _of_batches(reward.ours), **_settings(reward.trl)},
        head=False,
    ),
    Row(
        "reward-model step, four pairs a prompt",
        "Bradley-Terry, four pairs over four responses",
        "TRL RewardTrainer",
        6.0,
        "shared",
        {"ours": _of_batches(reward.ours), **_settings(reward.trl)},
        head=False,
    ),
    Row(
        "reference log-probs of a data set",
        "log-probs of all responses, four pairs a prompt",
        "TRL's precompute_ref_log_probs",
        3.0,
        "shared",
        {"ours": _scoring(scoring.ours), **_TRL_SCORING},
        training=False,
        whole=True,
        fixed_prompts=4,
    ),
    Row(
        "rewards of five LoRA members",
        "five adapters on one base, four pairs a prompt, loading included",
        "five passes of transformers and PEFT, merged",
        2.5,
        "shared",
        {"ours": _scoring(members.ours), **_SEPARATE},
        training=False,
        head=False,
        whole=True,
        passes=members.MEMBERS,
        fixed_prompts=3,
    ),
    Row(
        "sampling 200 responses",
        "two samples for each of 100 prompts",
        "transformers.generate",
        2.0,
        "unique",
        {"ours": _sampling(sampling.ours), **_GENERATE},
        training=False,
        whole=True,
        fixed_prompts=100,
        drawn=True,
        equal=False,
    ),
    Row(
        "300 policy steps, torch.compile",
        "DPO, a pair a prompt, the time of compiling included",
        "own steps in PyTorch's operations",
        1.3,
        "unique",
        {"ours": _of_batches(policy.ours, compiled=True, native="anew"), "own": _EAGER},
        steps=300,
    ),
    Row(
        "300 policy steps, compiled for the CPU",
        "DPO, a pair a prompt, the time of compiling included",
        "own steps in PyTorch's operations",
        1.3,
        "unique",
        {"ours": _of_batches(policy.ours, native="anew"), "own": _EAGER},
        steps=300,
    ),
    Row(
        "e-DPO step, K = 5",
        "e-DPO with five reward columns, without the KL term",
        "own DPO step",
        1.02,
        "shared",
        {"ours": _of_batches(policy.ours, method="e-dpo", members=5), "own DPO": _of_batches(policy.ours)},
        at_most=True,
        equal=False,
    ),
)


def flops_once(prompts: list[Prompt], model: str, *, training: bool, head: bool = True) -> float:
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
        if head:
            total += 2 * hidden * s["vocab_size"] * sum(answers)
    return total * (3 if training else 1)
