"""Data sets larger than memory: sequences on disk against lists, and what the stages up to scoring hold at a time."""

from __future__ import annotations

import random
import tempfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefdistill.data import keyed, on_disk
from prefdistill.data.formats import Pair
from prefdistill.data.group_files import read_groups, write_groups
from prefdistill.data.grouping import assign_splits, group_pairs
from prefdistill.data.keyed import Keyed
from prefdistill.data.on_disk import Rows, Spool, View, write_rows
from prefdistill.data.table import PromptGroup, Response, in_memory, response_key
from prefdistill.data.tokenise import Encoder
from prefdistill.scoring import Column, fill_columns
from tiny_models import letters_tokenizer, tiny

SCHEMA = pa.schema([("n", pa.int64()), ("ids", pa.list_(pa.int32())), ("text", pa.string())])
rows_strategy = st.lists(
    st.fixed_dictionaries({"n": st.integers(-9, 9), "ids": st.lists(st.integers(0, 9), max_size=3), "text": st.text()}),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(rows_strategy, st.integers(1, 9), st.integers(1, 3), st.sampled_from(["spool", "file"]), st.data())
def test_rows_on_disk_are_the_list_of_them(rows, size, kept, where, data):
    with pytest.MonkeyPatch.context() as patch, tempfile.NamedTemporaryFile() as file:
        patch.setattr(on_disk, "ROWS", size)
        patch.setattr(on_disk, "GROUPS_KEPT", kept)
        patch.setattr(on_disk, "IN_MEMORY", data.draw(st.sampled_from([1, 2**20])))
        if where == "spool":
            spool = Spool(SCHEMA)
            assert [spool.add(row) for row in rows] == list(range(len(rows)))
            read = spool.rows()
        else:
            write_rows(file.name, iter(rows), SCHEMA)
            read = Rows(file.name)
            meta = pq.read_metadata(file.name)
            assert all(meta.row_group(i).num_rows <= size for i in range(meta.num_row_groups))
        assert len(read) == len(rows)
        assert list(read) == rows
        assert read.column("ids") == [row["ids"] for row in rows]
        for i in data.draw(st.lists(st.integers(-len(rows), len(rows) - 1), max_size=20) if rows else st.just([])):
            assert read[i] == rows[i]
        a, b, step = data.draw(st.tuples(*[st.none() | st.integers(-30, 30)] * 2, st.sampled_from([None, 1, 2, -1])))
        assert list(read[a:b:step]) == rows[a:b:step]
        for i in (len(rows), -len(rows) - 1):
            with pytest.raises(IndexError):
                read[i]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(), max_size=12), st.data())
def test_a_view_is_the_list_of_what_it_makes(items, data):
    places = data.draw(st.none() | st.lists(st.integers(0, len(items) - 1), max_size=12)) if items else None
    truth = [2 * items[i] for i in (range(len(items)) if places is None else places)]
    view = View(items, lambda x: 2 * x, places)
    assert list(view) == truth
    assert [view[i] for i in range(len(view))] == truth
    a, b = data.draw(st.tuples(*[st.none() | st.integers(-15, 15)] * 2))
    assert list(view[a:b]) == truth[a:b]


def test_groups_know_their_splits():
    groups = in_memory(
        [PromptGroup(f"p{i}", (i + 1,), s, {}) for i, s in enumerate(["train", "test", "train", "judge"])]
    )
    assert [g.prompt for g in groups.of("train", "judge")] == ["p0", "p2", "p3"]
    assert groups.of("train", "judge").splits == ["train", "train", "judge"]
    assert groups.of("train", "judge").of("judge")[0].prompt == "p3"
    assert groups.places("test") == [1]
    assert [g.prompt for g in groups[1:3]] == ["p1", "p2"]


@pytest.mark.parametrize("width", [None, 3])
@pytest.mark.parametrize("memory", [1, 2**20])
def test_keyed_values_are_those_that_were_put(width, memory, monkeypatch):
    monkeypatch.setattr(keyed, "IN_MEMORY", memory)
    draw, truth, found = np.random.default_rng(0), {}, Keyed()
    assert len(found) == 0
    for n in (4, 1, 6):
        keys = [str(k) for k in draw.choice(9, n, replace=False)]  # some again, with another value
        values = draw.normal(size=(n,) if width is None else (n, width))
        if width is not None:
            values = values.astype(np.float32)
        found.put(keys, values)
        truth.update(zip(keys, values.astype(np.float64), strict=True))
    assert set(found) == set(truth)
    assert all(np.array_equal(found[k], v) and found[k].dtype == np.float64 for k, v in truth.items())
    assert "9" not in found
    with pytest.raises(KeyError):
        found["9"]


# -- what is held --------------------------------------------------------------------------------------------------

TOKENS = 600


def peak(work) -> int:
    """The most bytes of Python's objects, NumPy's and buffers of files included, that a call held beyond the start."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def groups_of(n: int):
    draw = random.Random(n)
    for i in range(n):
        ids = tuple(draw.randrange(300, 1000) for _ in range(TOKENS))
        own = [tuple(draw.randrange(300, 1000) for _ in range(4)) for _ in range(2)]
        yield PromptGroup(f"p{i}", ids, "train", {}, 0, [Response(f"r{j}", r) for j, r in enumerate(own)], [(0, 1)])


def test_scoring_holds_a_few_trees_whatever_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "ROWS", 16)
    model = tiny("llama", vocab_size=1000).eval()

    def sums(model, batch):
        by_response = torch.zeros(batch.responses, dtype=torch.long)
        return {"sums": by_response.index_add(0, batch.response_of, batch.target)}

    def score(n):
        path, column = tmp_path / f"{n}.parquet", Column(tmp_path / str(n), "m")
        write_groups(path, groups_of(n))
        held = peak(
            lambda: fill_columns(
                {"sums": column}, read_groups(path).trees, lambda: model, sums, token_budget=2000, precision="float32"
            )
        )
        truth = {response_key(g.ids, r.ids): float(sum(r.ids)) for g in groups_of(n) for r in g.responses}
        assert dict(column.values) == dict(Column(tmp_path / str(n), "m").values) == truth
        return held

    few, many = score(200), score(1000)
    # Held as tuples, a tree is TOKENS pointers and as many numbers: 36 bytes a token. What is kept of it is its keys.
    assert (many - few) / 800 < 36 * TOKENS / 10


def test_grouping_holds_digests_and_no_texts(monkeypatch):
    monkeypatch.setattr(on_disk, "IN_MEMORY", 2**12)
    monkeypatch.setattr(on_disk, "ROWS", 16)
    encoder = Encoder(letters_tokenizer(), max_prompt_tokens=10_000)

    def pairs(n):
        draw = random.Random(n)
        for i in range(n):
            prompt = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=4000))
            yield Pair(prompt, f"a{i}", f"b{i}", f"row {i}", {"tag": i})

    def group(n):
        def work():
            splits = assign_splits(pairs(n), {"test": 0.2}, seed=0)
            groups, dropped = group_pairs(pairs(n), encoder, splits=splits)
            assert (len(groups), dropped.pairs_too_long, dropped.prompts_cut) == (n, 0, 0)
            for g, p in zip(groups, pairs(n), strict=True):
                assert (g.prompt, g.responses[0].text, g.extra) == (p.prompt, p.chosen, p.extra)

        return peak(work)

    group(20)  # what is imported and cached at the first call counts for neither
    few, many = group(100), group(400)
    assert (many - few) / 300 < 2000  # of a prompt with 4,000 letters, each a token
