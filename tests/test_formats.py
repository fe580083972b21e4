"""From rows to pairs: every accepted shape, every fault, and that no text changes on the way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prefdistill.data.checks import is_blank
from prefdistill.data.formats import Pair, to_pair
from prefdistill.data.transcripts import common_length
from prefdistill.errors import DataError

WHERE = "pairs.jsonl, row 12"


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def pair_row(**columns: Any) -> dict[str, Any]:
    return {"prompt": "p", "chosen": "c", "rejected": "r"} | columns


def implicit(chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected}


def tldr_row(**columns: Any) -> dict[str, Any]:
    info = {"id": "t3", "post": "I slept.\n", "title": "Late", "subreddit": "jobs", "article": None}
    return {"info": info, "summaries": [{"text": " one \n"}, {"text": "two"}], "choice": 1} | columns


HI = [system("Be kind."), user("Hi")]

SHAPES: dict[str, tuple[dict[str, Any], Any, Any, Any]] = {
    "texts": (pair_row(prompt=" p\n", chosen=" c ", rejected="\tr"), " p\n", " c ", "\tr"),
    "messages": (
        pair_row(prompt=HI, chosen=[assistant("c")], rejected=[assistant("r")]),
        HI,
        [assistant("c")],
        [assistant("r")],
    ),
    "messages answered by texts": (pair_row(prompt=HI), HI, [assistant("c")], [assistant("r")]),
    "messages answered by both": (pair_row(prompt=HI, chosen=[assistant("c")]), HI, [assistant("c")], [assistant("r")]),
    "two assistant messages": (
        pair_row(prompt=HI, chosen=[assistant("c"), assistant("d")]),
        HI,
        [assistant("c"), assistant("d")],
        [assistant("r")],
    ),
    "prompt messages repeated": (
        pair_row(prompt=HI, chosen=[*HI, assistant("c")], rejected=[*HI, assistant("r")]),
        HI,
        [assistant("c")],
        [assistant("r")],
    ),
    "prompt text repeated as a user message": (
        pair_row(prompt="Hi", chosen=[*HI, assistant("c")], rejected=[*HI, assistant("r")]),
        HI,
        [assistant("c")],
        [assistant("r")],
    ),
    "implicit messages": (
        implicit([*HI, assistant("a"), user("b"), assistant("c")], [*HI, assistant("a"), user("b"), assistant("r")]),
        [*HI, assistant("a"), user("b")],
        [assistant("c")],
        [assistant("r")],
    ),
    "implicit messages, one goes on": (
        implicit([*HI, assistant("c")], [*HI, assistant("c"), assistant("r")]),
        HI,
        [assistant("c")],
        [assistant("c"), assistant("r")],
    ),
    "messages with null fields, as Parquet fills them": (
        pair_row(prompt=[user("Hi") | {"name": None}]),
        [user("Hi")],
        [assistant("c")],
        [assistant("r")],
    ),
    "tool and developer turns": (
        pair_row(
            prompt=[{"role": "developer", "content": "d"}, user("u"), assistant(""), {"role": "tool", "content": "3"}]
        ),
        [{"role": "developer", "content": "d"}, user("u"), assistant(""), {"role": "tool", "content": "3"}],
        [assistant("c")],
        [assistant("r")],
    ),
    "HH": (
        implicit("\n\nHuman: Hi\n\nAssistant: Yes.", "\n\nHuman: Hi\n\nAssistant: Yes?"),
        "\n\nHuman: Hi\n\nAssistant:",
        " Yes.",
        " Yes?",
    ),
    "HH, several turns": (
        implicit(
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D",
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: E",
        ),
        "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:",
        " D",
        " E",
    ),
    "HH, the human turns differ": (
        implicit(
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D",
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: X\n\nAssistant: D",
        ),
        "\n\nHuman: A\n\nAssistant:",
        " B\n\nHuman: C\n\nAssistant: D",
        " B\n\nHuman: X\n\nAssistant: D",
    ),
    "HH, one response goes on": (
        implicit("\n\nHuman: A\n\nAssistant: B", "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D"),
        "\n\nHuman: A\n\nAssistant:",
        " B",
        " B\n\nHuman: C\n\nAssistant: D",
    ),
    "HH, stripped": (
        implicit("Human: Hi there\n\nAssistant: I do", "Human: Hi there\n\nAssistant: I don't"),
        "Human: Hi there\n\nAssistant:",
        " I do",
        " I don't",
    ),
    # The first is TRL's own example; TRL would cut the second to "The sky is b".
    "plain": (implicit("The sky is blue", "The sky is green"), "The sky is", " blue", " green"),
    "plain, inside a word": (implicit("The sky is blue", "The sky is brown"), "The sky is", " blue", " brown"),
    "plain, after a line": (implicit("Why?\n\nYes", "Why?\n\nNo"), "Why?\n\n", "Yes", "No"),
    "plain, at a full stop": (implicit("One. Two.", "One. Two, three"), "One. Two", ".", ", three"),
    "plain, a word ends": (implicit("a cat", "a catfish"), "a", " cat", " catfish"),
    "plain, an accent": (implicit("un e\u0301te\u0301", "un e\u0300te"), "un", " e\u0301te\u0301", " e\u0300te"),
    "TL;DR": (
        tldr_row(),
        "SUBREDDIT: r/jobs\n\nTITLE: Late\n\nPOST: I slept.\n\n\nTL;DR:",
        " two",
        " one",
    ),
    "TL;DR, the other choice": (
        tldr_row(choice=0),
        "SUBREDDIT: r/jobs\n\nTITLE: Late\n\nPOST: I slept.\n\n\nTL;DR:",
        " one",
        " two",
    ),
    "TL;DR, braces in the post": (
        tldr_row(info={"post": "{title}", "title": "%s", "subreddit": "x"}),
        "SUBREDDIT: r/x\n\nTITLE: %s\n\nPOST: {title}\n\nTL;DR:",
        " two",
        " one",
    ),
    "CNN/DM": (
        tldr_row(info={"article": "News.", "title": "T", "post": None, "subreddit": None}),
        "Article:\n\nNews.\n\nTL;DR:",
        " two",
        " one",
    ),
}


@pytest.mark.parametrize(("row", "prompt", "chosen", "rejected"), SHAPES.values(), ids=SHAPES)
def test_shapes(row: dict[str, Any], prompt: Any, chosen: Any, rejected: Any) -> None:
    before = json.dumps(row)
    assert to_pair(row | {"reference": "x", "score": 0.5}, WHERE) == Pair(
        prompt, chosen, rejected, WHERE, {"reference": "x", "score": 0.5}
    )
    assert json.dumps(row) == before


def test_pair_columns_come_before_tldr_columns() -> None:
    pair = to_pair(tldr_row() | pair_row(), WHERE)
    assert (pair.prompt, pair.extra) == ("p", tldr_row())


def test_published_validation_splits_of_tldr_are_validation() -> None:
    """valid1 and valid2, as published, in one folder with train."""
    splits = [to_pair(tldr_row(split=s), WHERE).extra["split"] for s in ("train", "valid1", "valid2")]
    assert splits == ["train", "validation", "validation"]


FAULTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no chosen": (
        {"prompt": "p", "rejected": "r", "id": 1},
        ["no column 'chosen' ", "'prompt', 'rejected', 'id'", "TL;DR comparisons"],
    ),
    "neither": ({"question": "q"}, ["no column 'chosen' and 'rejected'", "'question'", "Rename"]),
    "no columns": ({}, ["columns found: none"]),
    "no choice": ({"info": {}, "summaries": []}, ["no column 'choice' "]),
    "null": (pair_row(chosen=None), ["'chosen'", "null"]),
    "null prompt": (pair_row(prompt=None), ["'prompt'", "null", "drop the column"]),
    "number": (pair_row(rejected=3), ["'rejected'", "the number 3"]),
    "truth value": (pair_row(chosen=True), ["'chosen'", "the truth value True"]),
    "object": (pair_row(chosen=assistant("c")), ["'chosen'", "an object"]),
    "bytes": (pair_row(chosen=b"c"), ["'chosen'", "type bytes"]),
    "empty response": (pair_row(chosen=""), ["'chosen'", "blank response", "''"]),
    "whitespace response": (pair_row(rejected=" \n"), ["'rejected'", "blank response"]),
    "blank message": (pair_row(prompt=HI, chosen=[assistant("c"), assistant(" ")]), ["'chosen'", "blank message"]),
    "blank prompt": (pair_row(prompt=" "), ["'prompt'", "blank prompt"]),
    "blank prompt messages": (pair_row(prompt=[user("")]), ["'prompt'", "blank prompt"]),
    "equal": (pair_row(chosen="x ", rejected="\nx"), ["'rejected'", "equal to 'chosen'", "remove the row"]),
    "equal messages": (
        pair_row(prompt=HI, chosen="x ", rejected=[assistant("x")]),
        ["'rejected'", "equal to 'chosen'"],
    ),
    "equal conversations": (
        implicit([*HI, assistant("c")], [*HI, assistant("c")]),
        ["'rejected'", "equal to 'chosen'"],
    ),
    "equal HH": (implicit("\n\nHuman: A\n\nAssistant: B", "\n\nHuman: A\n\nAssistant: B"), ["equal to 'chosen'"]),
    "equal plain": (implicit("a b", "a b "), ["'rejected'", "equal to 'chosen'"]),
    "unknown role": (pair_row(prompt=[{"role": "human", "content": "x"}]), ["'prompt[0]'", "'human'", "developer"]),
    "no role": (pair_row(prompt=[user("a"), {"content": "x"}]), ["'prompt[1]'", "no 'role'", "'content'"]),
    "no content": (pair_row(prompt=HI, chosen=[{"role": "assistant"}]), ["'chosen[0]'", "no 'content'"]),
    "ShareGPT": (pair_row(prompt=[{"from": "human", "value": "x"}]), ["'prompt[0]'", "no 'role'", "'from', 'value'"]),
    "null content": (
        pair_row(prompt=HI, chosen=[{"role": "assistant", "content": None}]),
        ["'chosen[0]'", "null under 'content'"],
    ),
    "parts as content": (
        pair_row(prompt=[{"role": "user", "content": [{"type": "text"}]}]),
        ["'prompt[0]'", "a list under 'content'"],
    ),
    "message is a text": (pair_row(prompt=["Hi"]), ["'prompt[0]'", "a text"]),
    "further fields": (pair_row(prompt=[user("Hi") | {"name": "Ann"}]), ["'prompt[0]'", "'name'", "remove"]),
    "no messages": (pair_row(prompt=[]), ["'prompt'", "an empty list"]),
    "no response messages": (pair_row(prompt=HI, chosen=[]), ["'chosen'", "an empty list"]),
    "prompt ends with an assistant turn": (
        pair_row(prompt=[*HI, assistant("a")]),
        ["'prompt'", "ends with an assistant turn"],
    ),
    "no assistant response": (pair_row(prompt=HI, chosen=[user("c")]), ["'chosen'", "without an assistant response"]),
    "no assistant in the conversation": (
        implicit([*HI, assistant("c")], [*HI, user("r")]),
        ["'rejected'", "without an assistant response"],
    ),
    "conversation is the prompt alone": (
        implicit([*HI, assistant("a"), user("b")], [*HI, assistant("a"), user("b"), assistant("r")]),
        ["'chosen'", "without an assistant response"],
    ),
    "a user turn in the response": (
        implicit([*HI, assistant("c"), user("u"), assistant("d")], [*HI, assistant("r")]),
        ["'chosen'", "role 'user'", "cut off"],
    ),
    "no shared turn": (
        implicit([user("a"), assistant("c")], [user("b"), assistant("c")]),
        ["'rejected'", "shares no turn", "column 'prompt'"],
    ),
    "text and messages": (implicit("c", [user("a"), assistant("c")]), ["'rejected'", "a list", "a text"]),
    "text prompt, text and messages": (pair_row(rejected=[assistant("r")]), ["'chosen'", "in one form"]),
    "text prompt to other messages": (
        pair_row(prompt="Hello", chosen=[*HI, assistant("c")], rejected=[*HI, assistant("r")]),
        ["'prompt'", "a text, while"],
    ),
    "HH without a shared assistant": (
        implicit("\n\nHuman: A\n\nAssistant: B", "\n\nHuman: X\n\nAssistant: B"),
        ["'rejected'", "Assistant:", "no prompt"],
    ),
    "HH, blank response": (
        implicit("\n\nHuman: A\n\nAssistant: ", "\n\nHuman: A\n\nAssistant: B"),
        ["'chosen'", "blank response (' ')"],
    ),
    "plain, nothing shared": (implicit("Yes", "No"), ["'rejected'", "no words at the beginning", "column 'prompt'"]),
    "plain, part of a word shared": (implicit("blue", "brown"), ["'rejected'", "no words at the beginning"]),
    "plain, whitespace shared": (implicit(" Yes", " No"), ["'rejected'", "no words at the beginning"]),
    "plain, one goes on": (implicit("The sky", "The sky is"), ["'chosen'", "blank response"]),
    # Intel's and distilabel's Orca pairs, CodeUltraFeedback's; blank columns and transcripts ask nothing.
    "question beside": (
        implicit("Based on this", "Based on that") | {"system": "", "question": "Why?"},
        ["'question'", "would be left out", "Rename it to 'prompt'"],
    ),
    "system beside": (implicit("The sky", "The sea") | {"system": "Be brief."}, ["'system'", "Rename it to 'prompt'"]),
    "messages as JSON": (pair_row(prompt=json.dumps(HI)), ["'prompt'", "written as one text", "JSON Lines"]),
    "messages as Python": (implicit(str([*HI, assistant("c")]), "c"), ["'chosen'", "written as one text"]),
    "surrogate": (pair_row(chosen="ab\ud83d"), ["'chosen'", "U+D83D at character 3"]),
    "surrogate in a message": (pair_row(prompt=[user("\udc00")]), ["'prompt'", "U+DC00"]),
    "surrogate in another column": (pair_row(meta={"tags": ["\ud800"]}), ["'meta'", "U+D800"]),
    "choice out of range": (tldr_row(choice=2), ["'choice'", "the number 2", "0 or 1"]),
    "choice is a truth value": (tldr_row(choice=True), ["'choice'", "True"]),
    "choice is null": (tldr_row(choice=None), ["'choice'", "null"]),
    "choice is a float": (tldr_row(choice=1.0), ["'choice'", "1.0"]),
    "three summaries": (tldr_row(summaries=[{"text": "a"}] * 3), ["'summaries'", "3 entries"]),
    "summaries are no list": (tldr_row(summaries={"text": "a"}), ["'summaries'", "an object"]),
    "summary without text": (
        tldr_row(summaries=[{"text": "a"}, {"note": "b"}]),
        ["'summaries[1]'", "no 'text'", "'note'"],
    ),
    "blank summary": (tldr_row(summaries=[{"text": " "}, {"text": "b"}]), ["'summaries[0]'", "blank response"]),
    "equal summaries": (
        tldr_row(summaries=[{"text": " a"}, {"text": "a"}]),
        ["'summaries[0]'", "equal to 'summaries[1]'"],
    ),
    "info is null": (tldr_row(info=None), ["'info'", "null"]),
    "info without a post": (tldr_row(info={"title": "T", "subreddit": "s"}), ["'info'", "no 'post'"]),
    "info with a null title": (
        tldr_row(info={"title": None, "subreddit": "s", "post": "p"}),
        ["'info'", "null under 'title'"],
    ),
}


@pytest.mark.parametrize(
    "row",
    [
        implicit("The sky is", "The sea is") | {"question": " ", "input": None, "query": 3},
        implicit("\n\nHuman: A\n\nAssistant: B", "\n\nHuman: A\n\nAssistant: C") | {"system": "Be brief."},
        implicit([*HI, assistant("c")], [*HI, assistant("r")]) | {"question": "Why?"},
        pair_row(question="Why?", system="Be brief."),
        pair_row(prompt="[{1: 2}]", chosen='[{"role": "user"}]', rejected="[{]"),
    ],
)
def test_what_asks_nothing_is_no_fault(row: dict[str, Any]) -> None:
    pair = to_pair(row, WHERE)
    assert pair.extra == {k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize(("row", "parts"), FAULTS.values(), ids=FAULTS)
def test_faults(row: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        to_pair(row, WHERE)
    message = str(caught.value)
    assert message.startswith(WHERE)
    assert [part for part in parts if part not in message] == []


# --- properties -------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(lambda text: not is_blank(text))
# "n" and ":" build markers by chance often enough to matter; a turn that holds a whole marker is another transcript.
turns = st.text(st.sampled_from("ab \n:.é"), max_size=12)


def transcript(history: list[tuple[str, str]], question: str, answer: str) -> str:
    told = "".join(f"\n\nHuman:{asked}\n\nAssistant:{said}" for asked, said in history)
    return f"{told}\n\nHuman:{question}\n\nAssistant:{answer}"


@given(history=st.lists(st.tuples(turns, turns), max_size=3), question=turns, chosen=turns, rejected=turns)
def test_hh_transcripts_reassemble(history: Any, question: str, chosen: str, rejected: str) -> None:
    assume(chosen.strip() and rejected.strip() and chosen.strip() != rejected.strip())
    row = implicit(transcript(history, question, chosen), transcript(history, question, rejected))
    pair = to_pair(row, WHERE)
    assert pair.prompt == transcript(history, question, "")
    assert (pair.chosen, pair.rejected) == (chosen, rejected)


@given(
    shared=st.lists(st.tuples(turns, turns), max_size=2),
    ends=st.tuples(*[st.lists(st.tuples(turns, turns), min_size=1, max_size=2)] * 2),
)
def test_hh_transcripts_of_any_length_reassemble_or_are_refused(shared: Any, ends: Any) -> None:
    row = implicit(*(transcript(shared + end[:-1], *end[-1]) for end in ends))
    try:
        pair = to_pair(row, WHERE)
    except DataError:
        return
    assert pair.prompt.endswith("\n\nAssistant:")
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])


@given(words=st.lists(st.sampled_from(["a", "ab", "b", ".", "é", "\n"]), max_size=8), chosen=turns, rejected=turns)
def test_plain_texts_reassemble_and_no_word_is_cut(words: list[str], chosen: str, rejected: str) -> None:
    row = implicit("Say: " + " ".join(words) + chosen, "Say: " + " ".join(words) + rejected)
    try:
        pair = to_pair(row, WHERE)
    except DataError:
        return
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])
    assert not (pair.prompt[-1].isalnum() and (pair.chosen[0].isalnum() or pair.rejected[0].isalnum()))


@given(prompt=texts, chosen=texts, rejected=texts)
def test_texts_pass_exactly(prompt: str, chosen: str, rejected: str) -> None:
    assume(chosen.strip() != rejected.strip())
    pair = to_pair(pair_row(prompt=prompt, chosen=chosen, rejected=rejected), WHERE)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)
    spoken = to_pair(implicit([user(prompt), assistant(chosen)], [user(prompt), assistant(rejected)]), WHERE)
    assert (spoken.prompt, spoken.chosen, spoken.rejected) == (
        [user(prompt)],
        [assistant(chosen)],
        [assistant(rejected)],
    )


@given(shared=turns, first=turns, second=turns)
def test_common_length(shared: str, first: str, second: str) -> None:
    first, second = shared + first, shared + second
    length = common_length(first, second)
    assert first[:length] == second[:length]
    assert length == min(len(first), len(second)) or first[length] != second[length]
