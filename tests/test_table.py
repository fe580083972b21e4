"""The tables against a plain reading of the pairs: nothing lost, nothing twice, nothing in two splits."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import random
import struct
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messages import assistant, system, user
from prefdistill.data.formats import Pair, to_pair
from prefdistill.data.group_files import read_groups, write_groups, write_scored
from prefdistill.data.grouping import assign_splits, group_pairs
from prefdistill.data.left_out import LeftOut
from prefdistill.data.table import (
    SPLITS,
    PromptGroup,
    Response,
    add_drawn,
    conversation_text,
    plain_text,
    prompt_key,
    response_key,
    response_lengths,
)
from prefdistill.data.tokenise import Encoder
from prefdistill.errors import DataError
from tiny_models import letters_tokenizer

TOKENIZER = letters_tokenizer()
EOS = 2
FRACTIONS = {"test": 0.2, "validation": 0.1}


def ids(text: str) -> tuple[int, ...]:
    """Independent of Encoder: the tokenizer has one token a character."""
    return tuple(TOKENIZER.convert_tokens_to_ids(list(text)))


def pair(prompt="p", chosen="c", rejected="r", where="row 1", **extra) -> Pair:
    return Pair(prompt, chosen, rejected, where, extra)


def grouped(pairs, left_out=None, drop_bad=False, **encoder):
    splits = {prompt_key(p.prompt): "train" for p in pairs}
    return group_pairs(pairs, Encoder(TOKENIZER, **encoder), splits=splits, left_out=left_out, drop_bad=drop_bad)


# -- grouping --------------------------------------------------------------------------------------------------------


def test_shared_prompts_and_responses_stand_once():
    groups, dropped = grouped(
        [pair("p", "a", "b"), pair("q", "a", "b"), pair("p", "c", "a", n=2), pair("p", "b", "c"), pair("p", "a", "b")]
    )
    assert [g.prompt for g in groups] == ["p", "q"]
    p, q = groups
    assert p.ids == ids("p")
    assert [r.text for r in p.responses] == ["a", "b", "c"]
    assert [r.ids for r in p.responses] == [(*ids(t), EOS) for t in "abc"]
    assert p.pairs == [(0, 1), (2, 0), (1, 2), (0, 1)]  # a comparison made twice counts twice
    assert q.pairs == [(0, 1)]
    assert (dropped.pairs_too_long, dropped.prompts_cut, dropped.same_tokens) == (0, 0, 0)
    assert p.tree.tokens == 1 + 3 * 2
    assert list(response_lengths(p)) == [2, 2, 2]


texts = st.text("abc", min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["p", "q", "pq"]), texts, texts).filter(lambda t: t[1] != t[2]), max_size=25))
def test_grouping_keeps_every_pair_and_repeats_no_response(rows):
    groups, dropped = grouped([pair(*row) for row in rows], max_response_tokens=4)
    fits = [row for row in rows if len(row[1]) <= 3 and len(row[2]) <= 3]
    found = [(g.prompt, g.responses[a].text, g.responses[b].text) for g in groups for a, b in g.pairs]
    assert Counter(found) == Counter(fits)
    assert dropped.pairs_too_long == len(rows) - len(fits)
    order = list(dict.fromkeys(row[0] for row in rows))
    assert [g.prompt for g in groups] == [p for p in order if any(row[0] == p for row in fits)]
    for g in groups:
        assert len({r.ids for r in g.responses}) == len(g.responses)
        assert {i for p in g.pairs for i in p} == set(range(len(g.responses)))


def test_what_is_left_out_or_cut_is_counted():
    pairs = [
        pair("p", "abcdef", "b"),
        pair("p", "b", "abcdef"),
        pair("gone", "abcdef", "b"),
        pair("p", "aéb", "aèb"),  # both unknown to the tokenizer: the same tokens
        pair("p", "abcd", "b"),
        pair("longer prompt", "a", "b"),
    ]
    pairs = [replace(p, where=f"row {n}", extra={"id": n}) for n, p in enumerate(pairs, 1)]
    left_out = LeftOut()
    groups, dropped = grouped(pairs, max_response_tokens=5, max_prompt_tokens=6, left_out=left_out)
    assert (dropped.pairs_too_long, dropped.same_tokens, dropped.prompts_cut) == (3, 1, 1)
    assert [g.prompt for g in groups] == ["p", "longer prompt"]
    assert groups[1].ids == ids("prompt")
    assert groups[1].cut == len("longer ")
    told = [json.loads(line) for line in left_out.lines()]
    kinds = ["too long"] * 3 + ["same tokens"]
    assert [(t["where"], t["kind"], t["row"]) for t in told] == [
        (p.where, kind, p.row()) for p, kind in zip(pairs[:4], kinds, strict=True)
    ]
    assert [t["reason"][:40] for t in told[:2]] == [
        f"column '{side}': more than 5 tokens with the"[:40] for side in ("chosen", "rejected")
    ]


def test_bad_rows_are_told_beside_the_others():
    bad = [pair("p", user("x"), "b", where="row 1"), pair("p", "abcdef", "b", where="row 2")]
    left_out = LeftOut()
    grouped([*bad, pair("p", "a", "b")], max_response_tokens=5, left_out=left_out, drop_bad=True)
    told = [json.loads(line) for line in left_out.lines()]
    assert [(t["where"], t["kind"]) for t in told] == [("row 1", "bad"), ("row 2", "too long")]
    assert left_out.counts == {"bad": 1, "too long": 1}
    assert str(left_out.first) == told[0]["reason"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"a": "\ud83d \u2028 é"}, {"a": "\ud83d \u2028 é"}),
        ({"a": math.nan, "b": [math.inf, 1.5]}, {"a": None, "b": [None, 1.5]}),
        ({"day": datetime.date(2026, 1, 2), "raw": b"x"}, {"day": "2026-01-02", "raw": "b'x'"}),
        ("{broken", "{broken"),
        ({"a": 10**5000}, None),
    ],
    ids=["half a character", "no number", "no JSON", "a line", "too many digits"],
)
def test_any_row_can_be_told(row, told):
    """One line of JSON, whatever stands in the row: JSON's own reader is asked, with NaN refused."""
    left_out = LeftOut()
    left_out.bad("row 1", DataError("why"), row)
    (line,) = left_out.lines()
    assert line.splitlines() == [line]
    assert json.loads(line, parse_constant=pytest.fail) == {
        "where": "row 1",
        "kind": "bad",
        "reason": "why",
        "row": told,
    }


def test_a_row_nested_too_deep_is_told_without_its_content():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    left_out = LeftOut()
    left_out.bad("row 1", DataError("why"), {"a": deep})
    assert json.loads(next(left_out.lines()))["row"] is None


def test_prompts_that_are_one_to_the_model_stand_in_one_split():
    pairs = [pair("early prompt", "a", "b"), pair("other prompt", "b", "c"), pair("x", "a", "b")]
    splits = {prompt_key("early prompt"): "test", prompt_key("other prompt"): "train", prompt_key("x"): "train"}
    groups, _ = group_pairs(pairs, Encoder(TOKENIZER, max_prompt_tokens=6), splits=splits)
    assert [(g.prompt, g.split, len(g.pairs)) for g in groups] == [("early prompt", "test", 2), ("x", "train", 1)]
    whole, _ = group_pairs(pairs, Encoder(TOKENIZER, max_prompt_tokens=60), splits=splits)
    assert [g.split for g in whole] == ["test", "train", "train"]


def test_prompts_that_are_one_to_the_model_and_stand_in_two_named_splits_are_refused():
    """Rows of the one would be trained on in silence, or be tested on."""

    def rows(first, second):
        return [
            pair("early prompt", "a", "b", split=first),
            pair("other prompt", "b", "c", where="row 7", split=second),
        ]

    for both in (("test", "train"), ("train", "test")):
        pairs = rows(*both)
        splits = assign_splits(pairs, {}, seed=0)
        with pytest.raises(DataError, match=rf"row 7: .*'{both[1]}', and in '{both[0]}' .*max_prompt_tokens"):
            group_pairs(pairs, Encoder(TOKENIZER, max_prompt_tokens=6), splits=splits)
        kept, _ = group_pairs(pairs, Encoder(TOKENIZER, max_prompt_tokens=6), splits=splits, drop_bad=True)
        assert [(g.split, len(g.pairs)) for g in kept] == [(both[0], 1)]
        whole, _ = group_pairs(pairs, Encoder(TOKENIZER, max_prompt_tokens=60), splits=splits)
        assert [g.split for g in whole] == list(both)
    pairs = rows("train", "train")
    # Drawn for validation of what rows call "train": nothing is asked of these.
    splits = {**assign_splits(pairs, {}, seed=0), prompt_key("other prompt"): "validation"}
    (one,), _ = group_pairs(pairs, Encoder(TOKENIZER, max_prompt_tokens=6), splits=splits)
    assert (one.split, len(one.pairs)) == ("train", 2)


def test_chat_and_text_of_the_same_words_are_two_prompts():
    groups, _ = grouped([pair("p", "a", "b"), pair(user("p"), assistant("a"), assistant("b"))])
    assert len(groups) == 2
    assert groups[1].responses[0].text == assistant("a")
    assert groups[1].ids != groups[0].ids


def test_errors_name_the_row():
    with pytest.raises(DataError, match="row 7"):
        grouped([pair("p", assistant("a"), assistant("b"), where="row 7")])


def test_unlabelled_responses_join_without_pairs():
    (group,), _ = grouped([pair("p", "a", "b")])
    add_drawn(
        group,
        [Response("x", (*ids("x"), EOS), source="reference"), Response("a", (*ids("a"), EOS), source="reference")],
    )
    add_drawn(group, [Response("x", (*ids("x"), EOS), source="reference")])
    assert [(r.text, r.source) for r in group.responses] == [("a", "data"), ("b", "data"), ("x", "reference")]
    assert [r.drawn for r in group.responses] == [1, 0, 2]
    assert group.pairs == [(0, 1)]


def test_a_conversation_is_shown_with_who_speaks():
    asked = system("Be brief.") + user("Hi") + assistant("Hello.") + user("Who are\n\nyou?")
    assert conversation_text(asked) == "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello.\n\nUser: Who are\n\nyou?"
    assert conversation_text(user("Hi")) == conversation_text("Hi") == "Hi"
    assert conversation_text(asked[:1]) == "System: Be brief."


def test_plain_text():
    assert plain_text("a") == "a"
    assert plain_text(assistant("a") + assistant("b")) == "a\nb"


# -- keys ------------------------------------------------------------------------------------------------------------


def test_key_is_pinned():
    """Columns on disk are found by it: a change of the key computes everybody's columns again."""
    digest = hashlib.blake2b(struct.pack("<qqqqq", 2, 1, 2, 3, 4), digest_size=16)
    assert response_key((1, 2), (3, 4)) == digest.hexdigest() == "66daa2f2ce73697394033aa0850d0ba9"


@given(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=8), st.integers(0, 8), st.integers(0, 8))
def test_key_sees_where_the_prompt_ends(tokens, a, b):
    a, b = min(a, len(tokens)), min(b, len(tokens))
    same = response_key(tokens[:a], tokens[a:]) == response_key(tokens[:b], tokens[b:])
    assert same == (a == b)


def test_group_keys_are_those_of_its_responses():
    (group,), _ = grouped([pair("p", "a", "b")])
    assert group.keys == [response_key(ids("p"), (*ids("a"), EOS)), response_key(ids("p"), (*ids("b"), EOS))]


# -- files -----------------------------------------------------------------------------------------------------------

messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=5)}),
    min_size=1,
    max_size=2,
)
any_text = st.text(st.characters(codec="utf-8"), max_size=8) | messages
token_ids = st.lists(st.integers(0, 200_000), min_size=1, max_size=5).map(tuple)
responses = st.builds(Response, any_text, token_ids, st.booleans(), st.sampled_from(["data", "reference", "policy"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
group_strategy = st.builds(
    PromptGroup,
    any_text,
    token_ids,
    st.sampled_from(SPLITS),
    st.dictionaries(st.text(max_size=3), json_values, max_size=2),
    st.integers(0, 9),
    st.lists(responses, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=3),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(group_strategy, max_size=3))
def test_files_give_back_what_was_written(tmp_path_factory, groups):
    path = tmp_path_factory.mktemp("table") / "new folder" / "prompts.parquet"
    write_groups(path, groups, {"note": "kept"})
    assert list(read_groups(path)) == list(groups)
    assert pq.read_schema(path).metadata[b"note"] == b"kept"
    assert [p.name for p in path.parent.iterdir()] == ["prompts.parquet"]


def test_encoded_groups_survive_the_file(tmp_path):
    groups, _ = grouped(
        [pair("pé\n", "a\u2028", "日本"), pair(user("x"), assistant("a"), assistant("b"), id=3, tags=["u", None])]
    )
    write_groups(tmp_path / "g.parquet", groups)
    back = read_groups(tmp_path / "g.parquet")
    assert list(back) == list(groups)
    assert [g.keys for g in back] == [g.keys for g in groups]


@pytest.mark.parametrize("forms", ["texts", "chats", "both"])
def test_scored_pairs_are_rows_of_their_own(forms, tmp_path):
    pairs = [pair("p", "a", "b", split="train"), pair("p", "c", "a", split="train")]
    chats = [pair(user("q"), assistant("a"), assistant("b"), split="train")]
    groups, _ = grouped({"texts": pairs, "chats": chats, "both": pairs + chats}[forms])
    numbers = [np.arange(len(g.responses), dtype=float) for g in groups]
    logps = {g.ids: -x for g, x in zip(groups, numbers, strict=True)}
    write_scored(tmp_path / "s.parquet", groups, lambda g: logps[g.ids], [numbers, [10 * x for x in numbers]])
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert len(rows) == sum(len(g.pairs) for g in groups)
    read = json.loads if forms == "both" else lambda text: text
    if forms != "chats":
        assert [(read(r["prompt"]), read(r["chosen"]), read(r["rejected"])) for r in rows[:2]] == [
            ("p", "a", "b"),
            ("p", "c", "a"),
        ]
        assert [(r["ref_chosen_logps"], r["ref_rejected_logps"]) for r in rows[:2]] == [(0.0, -1.0), (-2.0, 0.0)]
        assert rows[1]["rewards_chosen"] == [2.0, 20.0]
        assert rows[1]["rewards_rejected"] == [0.0, 0.0]
    if forms != "texts":
        assert [read(rows[-1][c]) for c in ("prompt", "chosen", "rejected")] == [
            user("q"),
            assistant("a"),
            assistant("b"),
        ]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "g.parquet"
    groups, _ = grouped([pair()])
    write_groups(path, groups)
    broken = PromptGroup("p", ("no id",), "train", {})
    with pytest.raises(Exception, match="no id"):
        write_groups(path, [broken])
    assert list(read_groups(path)) == list(groups)
    assert [p.name for p in tmp_path.iterdir()] == ["g.parquet"]


# -- splits ----------------------------------------------------------------------------------------------------------


def many(n: int, **extra) -> list[Pair]:
    return [pair(f"prompt {i % (n // 2)}", f"a{i}", f"b{i}", where=f"row {i}", **extra) for i in range(n)]


@pytest.mark.parametrize("fractions", [FRACTIONS, {**FRACTIONS, "judge": 0.25}, {"test": 0.001}, {}])
def test_splits_have_their_sizes_and_share_no_prompt(fractions):
    splits = assign_splits(many(200), fractions, seed=0)
    counts = Counter(splits.values())
    expected = {name: max(1, round(share * 100)) for name, share in fractions.items()}
    assert counts == {**expected, "train": 100 - sum(expected.values())}
    groups, _ = group_pairs(many(200), Encoder(TOKENIZER), splits=splits)
    by_split = [{g.prompt for g in groups.of(s)} for s in SPLITS]
    assert sum(map(len, by_split)) == len(set.union(*by_split)) == 100
    assert all(splits[prompt_key(g.prompt)] == g.split for g in groups)
    assert list(groups.of("train", "test")) == [g for g in groups if g.split in ("train", "test")]


def test_splits_hang_on_the_seed_and_not_on_the_order_of_rows():
    pairs = many(200)
    first = assign_splits(pairs, FRACTIONS, seed=1)
    shuffled = random.Random(0).sample(pairs, len(pairs))
    assert assign_splits(shuffled, FRACTIONS, seed=1) == first
    assert assign_splits(pairs, FRACTIONS, seed=2) != first


def test_the_rows_own_split_is_respected():
    own = {f"prompt {i}": SPLITS[i % 4] for i in range(100)}
    pairs = [pair(p, "a", "b", split=s) for p, s in own.items()]
    assert assign_splits(pairs, {**FRACTIONS, "judge": 0.2}, seed=0) == {prompt_key(p): s for p, s in own.items()}


def test_a_split_that_the_rows_do_not_name_is_drawn_from_their_training_prompts():
    """TL;DR's rows all say `split: train`; a file of train and test rows still needs validation prompts."""
    tldr = {
        "info": {"id": "t3", "post": "I slept.", "title": "Late", "subreddit": "jobs", "article": None},
        "summaries": [{"text": " one"}, {"text": " two"}],
        "choice": 1,
        "split": "train",
    }
    pairs = [to_pair(tldr | {"info": tldr["info"] | {"post": f"post {i}"}}, f"row {i}") for i in range(50)]
    assert Counter(assign_splits(pairs, FRACTIONS, seed=0).values()) == {"train": 35, "validation": 5, "test": 10}

    pairs = [pair(f"prompt {i}", split="test" if i < 30 else "train") for i in range(80)]
    splits = assign_splits(pairs, FRACTIONS, seed=0)
    assert Counter(splits.values()) == {"train": 45, "validation": 5, "test": 30}
    assert all(splits[prompt_key(f"prompt {i}")] == "test" for i in range(30))


@pytest.mark.parametrize(
    ("given_splits", "match"),
    [
        (["train", "test"], "row 1.*'train'.*'test'"),  # one prompt, two splits
        (["train", None], "row 1.*None"),
        ([None, "train"], "row 0.*None"),
        (["train", "valid1"], "row 1.*valid1"),
        (["valid1", "train"], "row 0.*valid1"),
    ],
)
def test_split_columns_that_cannot_be_used(given_splits, match):
    two = given_splits == ["train", "test"]
    pairs = [pair("p" if two else f"p{i}", where=f"row {i}", split=s) for i, s in enumerate(given_splits)]
    with pytest.raises(DataError, match=match):
        assign_splits(pairs, {}, seed=0)


def test_a_split_column_of_other_words_is_no_split():
    pairs = [pair(f"p{i}", split="valid1") for i in range(20)]
    assert Counter(assign_splits(pairs, FRACTIONS, seed=0).values()) == {"train": 14, "validation": 2, "test": 4}


@pytest.mark.parametrize("pairs", [many(4), [pair(f"p{i}", split="test") for i in range(9)], []])
def test_too_few_prompts_to_train_on(pairs):
    with pytest.raises(DataError, match="none is left to train on"):
        assign_splits(pairs, FRACTIONS, seed=0)
