"""What a step costs, from a model's shape: floating point operations over a rate, and bytes.

Two figures are measured on one shape, for every kind of step: the share of the machine's matrix product that it
reaches, and what a process holds beside models. All else is counted, so that other shapes can be told before they are
tried.
"""

from __future__ import annotations

from benchmarks.rows import flops_once
from benchmarks.shapes import SIZES, UNTIED, Prompt, config_of
from prefdistill.models.head import LOGITS_AT_ONCE
from prefdistill.models.memory import LOGIT_COPIES, activation_bytes

KINDS = {
    "full": "policy step, all weights trained",
    "lora": "policy step, LoRA",
    "score": "log-probs of responses",
}
LORA_RANK = 16
# float32 weights, their gradients and AdamW's two moments.
TRAINED, FROZEN = 16, 4
CAST = 2  # the bfloat16 copy that autocast keeps of a matrix during a step
NF4 = 0.5 + 1 / 64  # bytes a weight: four bits, and for every 64 a scale in eight


def matrices(size: str) -> int:
    """Weights that matrix products read: the decoder's and the head's."""
    return _body(size) + SIZES[size]["vocab_size"] * SIZES[size]["hidden_size"]


def parameters(size: str) -> int:
    """All weights but the norms', which are too few to count."""
    return matrices(size) + (SIZES[size]["vocab_size"] * SIZES[size]["hidden_size"] if size in UNTIED else 0)


def _body(size: str) -> int:
    s = SIZES[size]
    keys = s["hidden_size"] // s["num_attention_heads"] * s["num_key_value_heads"]
    a_layer = 2 * s["hidden_size"] ** 2 + 2 * s["hidden_size"] * keys + 3 * s["hidden_size"] * s["intermediate_size"]
    return int(s["num_hidden_layers"] * a_layer)


def flops(kind: str, prompts: list[Prompt], size: str) -> float:
    """Of the tokens that must be computed once; a LoRA step's backward pass has no gradients of the base's weights."""
    forward = flops_once(prompts, size, training=False)
    return forward * {"full": 3, "lora": 2, "score": 1}[kind]


def step_gigabytes(
    kind: str, prompts: list[Prompt], size: str, *, bfloat16: bool, nf4: bool = False, checkpointing: bool = False
) -> float:
    """Of a step over these prompts at once, beside what the process holds without a model.

    A scoring pass keeps nothing: its states are a layer's. Copies of the weights that it casts are kept only where
    memory has room, and not counted.

    Args:
        nf4: the base lies in four bits and is cast a matrix at a time.
        checkpointing: of the activations only what enters each layer is kept, and one layer's.
    """
    s = SIZES[size]
    tokens = sum(len(p.ids) + sum(map(len, p.responses)) for p in prompts)
    answers = sum(len(r) for p in prompts for r in p.responses)
    logits = 4 * LOGIT_COPIES * min(LOGITS_AT_ONCE, answers * s["vocab_size"])
    weights = parameters(size) * (TRAINED if kind == "full" else NF4 if nf4 else FROZEN)
    if kind == "score":
        return (weights + logits) / 1e9
    cast = CAST * matrices(size) if bfloat16 and not nf4 else 0
    kept = activation_bytes(config_of(size), tokens, bfloat16=bfloat16)
    if kind == "lora":
        # An adapter keeps a copy of its own of what each of a layer's seven matrices reads.
        read = 6 * s["hidden_size"] + s["intermediate_size"]
        kept += (2 if bfloat16 else 4) * tokens * s["num_hidden_layers"] * read
    if checkpointing:
        kept = kept // s["num_hidden_layers"] + 4 * tokens * s["num_hidden_layers"] * s["hidden_size"]
    return (weights + cast + kept + logits) / 1e9
