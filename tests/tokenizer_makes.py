"""A tokenizer of every make, with the chat template that it comes with, and texts to try them on."""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import settings
from hypothesis import strategies as st

import tiny_tokenizers as tiny
from prefdistill.data.tokenise import Encoder

# Chat templates stand beside the make that they come with.
TOKENIZERS = {
    "gpt2": tiny.gpt2,
    "qwen3": lambda: tiny.gpt2(
        tiny.QWEN3, marks=("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>", bos_token=None
    ),
    "smollm2": tiny.chatml,
    "llama3": tiny.llama3,
    "llama3 adding EOS": lambda: tiny.llama3(adds_eos=True),
    "phi3": lambda: tiny.gpt2(tiny.PHI3, marks=("<|user|>", "<|assistant|>", "<|end|>")),
    "llama2": tiny.llama2,
    "llama2 adding EOS": lambda: tiny.llama2(add_eos_token=True),
    "llama2 legacy": lambda: tiny.llama2(legacy=True),
    "gemma": tiny.gemma,
    "gemma adding nothing": lambda: tiny.gemma(add_bos_token=False),
    "endless": lambda: tiny.gpt2(tiny.ENDLESS),
    "endless llama2": lambda: tiny.llama2(tiny.ENDLESS),
    "r1": lambda: tiny.gpt2(tiny.R1, marks=("<s>", "<|User|>", "<|Assistant|>"), bos_token="<s>"),
}
CHATS = [name for name in TOKENIZERS if name != "gpt2"]
DUMMY_PREFIX = [name for name in TOKENIZERS if "llama2" in name]
ADDS_BOS = ["llama3", "llama3 adding EOS", "llama2", "llama2 adding EOS", "llama2 legacy", "gemma", "endless llama2"]

# "▁" is SentencePiece's own sign for a space and comes back as one. Texts with a special token's name in them stand in
# tests of their own: hypothesis finds the names in this file.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
pieces = st.sampled_from(
    ["Hello", " world", "the", " ", "  ", "\n", "\n\n", "\t", ".", "é", "e\u0301", "🙂", "👩‍👩‍👧", "你好", "12"]
)
texts = st.lists(pieces | st.text(characters, max_size=6)).map("".join).filter(lambda t: not re.search(r"<[|/]?\w", t))
trimmed = texts.map(str.strip).filter(bool)
every_make = pytest.mark.parametrize("name", TOKENIZERS)
every_chat = pytest.mark.parametrize("name", CHATS)
many = settings(max_examples=60, deadline=None)


@cache
def encoder(name: str) -> Encoder:
    tokenizer = TOKENIZERS[name]()
    # As Phi-3's generation configuration does.
    return Encoder(tokenizer, end_ids=[tokenizer.convert_tokens_to_ids("<|end|>")] if name == "phi3" else ())


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
