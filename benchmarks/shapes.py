"""Random pairs of given lengths, as trees for us and as text for TRL, and random models of known shapes.

Speed hangs on shapes alone, so weights and words are random; the same for both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from prefdistill.data.tree import Tree

SPECIALS = ("<pad>", "<eos>", "<unk>")
EOS = 1

# SmolLM2-135M's shape and others of the Llama family, and one for tests of the benchmark itself.
SIZES: dict[str, dict[str, int]] = {
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "30m": {
        "vocab_size": 32000,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 10,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    # SmolLM2-360M's, Llama 3.2 1B's, Llama 3.1 8B's and 70B's.
    "360m": {
        "vocab_size": 49152,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70b": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNTIED = ("8b", "70b")  # embeddings and head are two matrices


def config_of(size: str, **fields: Any) -> LlamaConfig:
    return LlamaConfig(
        **SIZES[size],
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=EOS,
        bos_token_id=None,
        attn_implementation="sdpa",
        **fields,
    )


def device() -> torch.device:
    """Where all sides compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def policy_of(size: str, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config_of(size, tie_word_embeddings=size not in UNTIED))
    return model.to(device())  # type: ignore[arg-type]


def classifier_of(size: str, seed: int = 0) -> LlamaForSequenceClassification:
    """A reward model of the same shape."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config_of(size, num_labels=1)).to(device())  # type: ignore[arg-type]


def tokenizer_of(size: str) -> PreTrainedTokenizerFast:
    """A word a token, so that text and ids are one to the other."""
    words = [*SPECIALS, *(f"w{i}" for i in range(SIZES[size]["vocab_size"] - len(SPECIALS)))]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids, its responses' ids (each ends with EOS), and its pairs as (chosen, rejected) indices."""

    ids: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def tree(self) -> Tree:
        return Tree(self.ids, self.responses)


PAIRS_OF = {
    "unique": ((0, 1),),
    # Four comparisons over four responses, each in two of them: the shape of TL;DR.
    "shared": ((0, 1), (0, 2), (1, 3), (2, 3)),
}


def prompts_of(
    shape: str, n: int, *, size: str, prompt_tokens: int, response_tokens: int, seed: int = 0
) -> list[Prompt]:
    """`n` prompts with the pairs of a shape; every text of the same length, so that no side pads."""
    rng = np.random.default_rng(seed)
    pairs = PAIRS_OF[shape]
    responses = 1 + max(max(pair) for pair in pairs)
    vocabulary = SIZES[size]["vocab_size"]

    def draw(length: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(len(SPECIALS), vocabulary, length))

    return [
        Prompt(draw(prompt_tokens), tuple((*draw(response_tokens - 1), EOS) for _ in range(responses)), pairs)
        for _ in range(n)
    ]


def rows_of(prompts: list[Prompt]) -> list[dict[str, str]]:
    """The pairs as TRL's text rows; it adds the EOS itself."""

    def text(ids: tuple[int, ...]) -> str:
        return " ".join(f"w{i - len(SPECIALS)}" for i in ids)

    return [
        {"prompt": text(p.ids), "chosen": " " + text(p.responses[c][:-1]), "rejected": " " + text(p.responses[r][:-1])}
        for p in prompts
        for c, r in p.pairs
    ]
