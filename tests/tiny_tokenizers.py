"""Tiny tokenizers of the makes that models have, and chat templates of theirs; for tests only, nothing is fetched."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import sentencepiece
import transformers as tf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import generate_merges

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "A response follows a prompt; no token straddles the seam between the two of them.",
    "Hello world! How are you today? I am fine, thank you, and how are you?",
    "    def add(a, b):\n        return a + b\n\n\nprint(add(1, 2))  # 3\n",
    "Größe, naïve, façade, 你好 世界, привет мир, it's 12:30 and they've gone.",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3: the last turn is written with an empty thought that the generation prompt leaves to the model.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Phi-3: an end of turn and behind it, at the very end, EOS as well.
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
# DeepSeek-R1: the generation prompt opens a thought, and finished turns are written without any.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% else %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


def gpt2(template: str | None = None, *, marks: tuple[str, ...] = (), **names: Any) -> Any:
    """Byte-level BPE that adds nothing: GPT-2's and Qwen's make; EOS <|endoftext|>, no BOS unless named."""
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **names}
    return _wrapped(_byte_level(Regex(_GPT2_WORDS)), ("<|endoftext|>", *marks), template, **names)


def chatml(template: str = CHATML) -> Any:
    """SmolLM2's make: EOS and padding are <|im_end|>, and BOS, which is never added, is <|im_start|>."""
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return gpt2(template, marks=("<|im_start|>", "<|im_end|>"), **names)


def llama3(template: str | None = LLAMA3, *, adds_eos: bool = False) -> Any:
    """Byte-level BPE whose post-processor puts BOS before every text, and EOS behind it if asked."""
    marks = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    backend = _byte_level(Regex(_LLAMA3_WORDS))
    backend.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>" if adds_eos else "<|begin_of_text|> $A",
        special_tokens=[(m, backend.token_to_id(m)) for m in marks[:2]],
    )
    return _wrapped(backend, marks, template, bos_token=marks[0], eos_token=marks[1])


def llama2(template: str | None = LLAMA2, *, legacy: bool = False, **options: Any) -> Any:
    """SentencePiece with byte fallback and a dummy prefix "▁"; BOS is added.

    Args:
        legacy: as in tokenizer.json files of Llama-2's time, "▁" comes behind every special token too.
    """
    vocab, merges = _pieces(dummy_prefix=True)
    if not legacy:
        tokenizer = tf.LlamaTokenizer(vocab=vocab, merges=merges, **{"add_bos_token": True, **options})
    else:
        backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        backend.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in ("<unk>", "<s>", "</s>")])
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
        tokenizer = tf.PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
    tokenizer.chat_template = template
    return tokenizer


def gemma(template: str | None = GEMMA, **options: Any) -> Any:
    """SentencePiece without a dummy prefix; BOS is added, and turns end with <end_of_turn>, which is not EOS."""
    vocab, merges = _pieces(dummy_prefix=False)
    options = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", **options}
    tokenizer = tf.GemmaTokenizer(vocab=vocab, merges=merges, **options)
    tokenizer.add_tokens([AddedToken(m, special=True, normalized=False) for m in ("<start_of_turn>", "<end_of_turn>")])
    tokenizer.chat_template = template
    return tokenizer


@cache
def sentencepiece_processor(*, dummy_prefix: bool) -> Any:
    """SentencePiece's own encoder, which the wrapped tokenizers must agree with."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXT for line in text.splitlines() if line]),
        model_writer=model,
        model_type="bpe",
        vocab_size=460,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@cache
def _pieces(*, dummy_prefix: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    # transformers reads a .model file with protobuf, which the project does not need otherwise.
    processor = sentencepiece_processor(dummy_prefix=dummy_prefix)
    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    scores = {piece: processor.get_score(i) for piece, i in vocab.items()}
    return vocab, generate_merges(vocab, scores)


_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(words: Regex) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def _wrapped(backend: Tokenizer, marks: tuple[str, ...], template: str | None, **names: Any) -> Any:
    backend.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = template
    return tokenizer
