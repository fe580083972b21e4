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


def step_gigabytes(kind: str, tokens: int, size: str, *, bfloat16: bool) -> float:
    """Of a step over so many tokens at once, beside what the process holds without a model.

    A scoring pass keeps the states of one layer at a time, which is nothing beside the weights.
    """
    weights = parameters(size) * (TRAINED if kind == "full" else FROZEN)
    cast = CAST * matrices(size) if bfloat16 else 0
    kept = 0 if kind == "score" else activation_bytes(config_of(size), tokens, bfloat16=bfloat16)
    return (weights + cast + kept + 4 * LOGIT_COPIES * LOGITS_AT_ONCE) / 1e9
