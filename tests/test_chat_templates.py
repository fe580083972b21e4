"""Chats tokenised as their templates write them, for every make of template, and templates that are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

import tiny_tokenizers as tiny
from messages import assistant, system, user
from prefdistill.data.formats import Pair
from prefdistill.data.grouping import group_pairs
from prefdistill.data.table import prompt_key
from prefdistill.data.tokenise import Encoder
from prefdistill.errors import ConfigError, DataError
from prefdistill.models.loading import generation_ends
from tiny_models import save_some_adapter
from tiny_models import tiny as tiny_model
from tokenizer_makes import (
    decoded,
    encoder,
    every_chat,
    many,
    trimmed,
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


def test_a_template_that_writes_the_date_writes_one():
    """The same rows have the same ids tomorrow; columns are found by them."""
    dated = "\n{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %A %B %H:%M') }}{% endif %}" + tiny.CHATML
    encoder = Encoder(tiny.chatml(dated))
    assert encoder.prompt_text(user("Hi")).startswith("\n26 Jul 2024, Friday July 00:00<|im_start|>user")
    assert encoder.response_text(user("Hi"), assistant("Yes")).startswith("Yes")


@pytest.mark.parametrize("as_text", [False, True])
def test_thoughts_that_a_template_leaves_out_are_no_response(as_text):
    """A policy would learn to answer inside the thought that the prompt has opened."""
    e = encoder("r1")
    thought = "<think>\nRivers...</think>The Nile."
    said = thought if as_text else assistant(thought)
    assert e.response_text(user("Q"), said).startswith("The Nile.")  # to judge it, that will do
    assert e.response_ids(user("Q"), said) is not None
    with pytest.raises(DataError, match="leaves out a part of the response that begins with '<think>"):
        e.response_ids(user("Q"), said, whole=True)
    for whole in ("The Nile.", " The\n Nile. "):
        assert e.response_ids(user("Q"), whole, whole=True) == e.response_ids(user("Q"), whole)
    pairs = [Pair(user("Q"), assistant(thought), assistant("None."), where="row 1", extra={})]
    with pytest.raises(DataError, match=r"row 1: the chat template .* leaves out"):
        group_pairs(pairs, e, splits={prompt_key(user("Q")): "train"})


def test_an_adapters_ends_are_those_of_its_base(tmp_path):
    base = tiny_model("llama")
    base.generation_config.eos_token_id = [2, 7]
    base.save_pretrained(tmp_path / "base")
    save_some_adapter(tmp_path / "base", tmp_path / "adapter")
    assert generation_ends(str(tmp_path / "base")) == generation_ends(str(tmp_path / "adapter")) == (2, 7)


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
        e.prompt_ids(system("s") + user("q"))
    strict = tiny.CHATML.replace(
        "{% for", "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}{% for", 1
    )
    e = Encoder(tiny.chatml(strict))
    assert e.response_ids("q", "Hello")[-1] == e.tokenizer.eos_token_id
    assert decoded(e.tokenizer, e.response_ids(system("s") + user("q"), "a")) == "a<|im_end|>"


def test_messages_without_a_chat_template_and_mixed_forms_are_refused():
    with pytest.raises(ConfigError, match="has no chat template"):
        encoder("gpt2").prompt_ids(user("q"))
    with pytest.raises(DataError, match="one form for both"):
        encoder("smollm2").response_ids("q", assistant("a"))
