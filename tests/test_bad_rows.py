"""Files and rows that an audit read wrongly or left out without a name: each is refused, or named with its content."""

from __future__ import annotations

import datetime
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from prefdistill import pipeline
from prefdistill.data.formats import Pair, load_pairs, to_pair
from prefdistill.data.sources import read_rows
from prefdistill.errors import DataError
from tiny_runs import rows, small, write_rows

ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}
TWICE = pa.Table.from_arrays([pa.array([t]) for t in "pabc"], names=["prompt", "chosen", "rejected", "chosen"])


def objects(kind: str) -> pa.Table:
    """A column whose objects have a field twice, at once or as messages."""
    inner = pa.StructArray.from_arrays([pa.array(["user"]), pa.array(["system"])], names=["role", "role"])
    return pa.table({"prompt": inner if kind == "object" else pa.ListArray.from_arrays([0, 1], inner)})


def arrow_file(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


# --- two columns of one name ------------------------------------------------------------------------------------------


def test_two_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    """The last one was read, the other lost."""
    pq.write_table(TWICE, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: 2 columns have the name 'chosen' .*Rename"):
        next(read_rows(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("kind", ["object", "messages"])
def test_two_fields_of_one_name_in_parquet(kind: str, tmp_path: Path) -> None:
    pq.write_table(objects(kind), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, column 'prompt': .*two fields with the name 'role'"):
        next(read_rows(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("split", ["", "train"])
def test_two_columns_of_one_name_in_a_saved_folder(split: str, tmp_path: Path) -> None:
    dataset = Dataset.from_list([ROW])
    (DatasetDict({split: dataset}) if split else dataset).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved" / split).glob("*.arrow")
    arrow_file(file, TWICE)
    with pytest.raises(DataError, match=rf"{file.name}: 2 columns have the name 'chosen' .*Rename"):
        next(read_rows(str(tmp_path / "saved")))


@pytest.mark.parametrize("damage", ["date", "depth"])
def test_what_python_cannot_hold_in_a_saved_folder(damage: str, tmp_path: Path) -> None:
    """They ended in a traceback."""
    day = pa.array([10**9 if damage == "date" else 1], pa.int32()).view(pa.date32())
    Dataset(pa.table({**{name: [text] for name, text in ROW.items()}, "day": day})).save_to_disk(tmp_path / "saved")
    if damage == "depth":
        (tmp_path / "saved" / "state.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"saved: cannot be read .*Save it again"):
        load_pairs(str(tmp_path / "saved"))


# --- rows that are told alone ----------------------------------------------------------------------------------------

Told = list[tuple[str, str, Any]]


def dropping(path: Path) -> tuple[list[Pair], Told]:
    told: Told = []
    kept = load_pairs(str(path), on_bad_row=lambda where, error, row: told.append((where, str(error), row)))
    return kept, told


LIST = """[{"prompt": "p", "chosen": "a", "rejected": "b"},
 {"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"},
 {"prompt": "p", "chosen": "a", "rejected": "b", "id": NINES},
 {"prompt": "p", "chosen": "a", "rejected": "b", "meta": [{"x": {"k": 1, "l": 2, "k": 3}}]},
 ["no", "object"],
 {"prompt": "p", "chosen": "x", "rejected": "y"}]"""


@pytest.mark.parametrize("form", ["{}", '{{"data": {}}}', "lines"])
def test_entries_of_a_json_list_are_told_alone(form: str, tmp_path: Path) -> None:
    """An object with a key twice, or a number that Python does not read, stopped the whole list."""
    text = LIST.replace("NINES", "9" * 5000)
    path = tmp_path / ("pairs.jsonl" if form == "lines" else "pairs.json")
    path.write_text(text[1:-1].replace("},\n", "}\n").replace("],\n", "]\n") if form == "lines" else form.format(text))
    kept, told = dropping(path)
    assert [pair.chosen for pair in kept] == ["a", "x"]
    assert [where for where, _, _ in told] == [f"{path}, row {n}" for n in (2, 3, 4, 5)]
    reasons = ["has the key 'chosen' twice", "a number of 5000 characters", "has the key 'k' twice", "a list where"]
    assert all(expected in reason for (_, reason, _), expected in zip(told, reasons, strict=True))
    rows = json.loads(json.dumps([row for _, _, row in told]))
    assert rows == [
        [["prompt", "p"], ["chosen", "a"], ["rejected", "b"], ["chosen", "c"]],
        ROW | {"id": "9" * 5000},
        ROW | {"meta": [{"x": [["k", 1], ["l", 2], ["k", 3]]}]},
        ["no", "object"],
    ]
    with pytest.raises(DataError, match=r"(row|line) 2: an object has the key 'chosen' twice"):
        load_pairs(str(path))


def test_a_value_of_parquet_that_python_cannot_hold_costs_its_row(tmp_path: Path) -> None:
    """A date beyond the year 9999 ended in a traceback, a text that is not UTF-8 stopped the reading."""
    columns = {name: [text] * 4 for name, text in ROW.items()}
    columns["tag"] = pa.array([b"a", b"caf\xe9", b"c", b"d"], pa.binary()).view(pa.string())
    columns["day"] = pa.array([0, 0, 10**9, 1], pa.int32()).view(pa.date32())
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    kept, told = dropping(tmp_path / "a.parquet")
    assert [pair.extra["tag"] for pair in kept] == ["a", "d"]
    days = [datetime.date(1970, 1, 1), None]
    assert [row for _, _, row in told] == [ROW | {"tag": t, "day": d} for t, d in zip([None, "c"], days, strict=True)]
    for (where, reason, _), n, column in zip(told, (2, 3), ("tag", "day"), strict=True):
        assert where == f"{tmp_path / 'a.parquet'}, row {n}"
        assert reason.startswith(f"{where}, column {column!r}: a value that cannot be read")


def test_a_flipped_bit_takes_no_row_of_parquet_away(tmp_path: Path) -> None:
    """Arrow reads a column with a damaged page as one without rows, and the others' rows go with it in silence."""
    path, said = tmp_path / "pairs.parquet", []
    pq.write_table(pa.Table.from_pylist([ROW | {"prompt": p} for p in "pqr"]), path)
    whole = path.read_bytes()
    draw = random.Random(0)
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(broken))
        try:
            kept, told = dropping(path)
        except DataError as error:
            said.append(str(error))
        else:
            assert len(kept) + len(told) == 3
    assert all(str(path) in text for text in said)
    assert any("of its 3 rows 0 could be read" in text for text in said)


def test_a_flipped_bit_in_a_page_with_a_checksum_is_found(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    table = pa.Table.from_pylist([ROW | {"prompt": "a prompt of some length"}])
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"of some", b"of sone"))
    with pytest.raises(DataError, match=r"pairs\.parquet: cannot be read .*CRC checksum.*fetch it again whole"):
        load_pairs(str(path))


def test_what_is_told_of_other_rows(tmp_path: Path) -> None:
    """A row that was read as a pair is told as one; else what was read, and the line for what is no JSON."""
    path = tmp_path / "pairs.jsonl"
    say = lambda text: [{"role": "user", "content": "p"}, {"role": "assistant", "content": text}]  # noqa: E731
    blank, first, other = ROW | {"chosen": " "}, *({"chosen": say(a), "rejected": say(b)} for a, b in ("ab", "ba"))
    path.write_text("\n".join([*map(json.dumps, [blank, first, other | {"id": 7}]), "{", "3"]))
    kept, told = dropping(path)
    assert len(kept) == 1
    canonical = {"prompt": say("")[:1], "chosen": say("b")[1:], "rejected": say("a")[1:], "id": 7}
    assert [row for _, _, row in told] == [blank, canonical, "{", 3]
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\np,a,b\np,a\n")
    assert [row for _, _, row in dropping(tmp_path / "pairs.csv")[1]] == [["p", "a"]]


def test_a_run_writes_down_every_row_that_it_leaves_out(tmp_path: Path, model_folder: Path) -> None:
    made = rows()
    blank, long = made[0] | {"chosen": " "}, made[1] | {"rejected": " red" * 60, "id": 7}
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [blank, long, *made[2:]])) + '\n{"prompt": "bro', encoding="utf-8")
    options = {"dataset.max_response_tokens": 50, "dataset.on_bad_row": "drop"}
    pipeline.run(small(path, model_folder, tmp_path / "run", methods="[dpo]", **options), until="data")
    rejected = tmp_path / "run" / "data" / "rejected.jsonl"
    told = [json.loads(line) for line in rejected.read_text(encoding="utf-8").splitlines()]
    assert [(t["where"], t["kind"], t["row"]) for t in told] == [
        (f"{path}, row 1", "bad", blank),
        (f"{path}, row 31", "bad", '{"prompt": "bro'),
        (f"{path}, row 2", "too long", long),
    ]
    path.write_text("\n".join(map(json.dumps, made[2:])), encoding="utf-8")
    pipeline.run(small(path, model_folder, tmp_path / "run", methods="[dpo]", **options), until="data")
    assert not rejected.exists()


@pytest.mark.slow
def test_a_response_of_10_mb_is_left_out_by_name_and_whole(tmp_path: Path, model_folder: Path) -> None:
    made = rows()
    path, long = tmp_path / "pairs.jsonl", made[1] | {"chosen": " red" * 2_500_000}
    path.write_text("\n".join(map(json.dumps, [long, *made[2:]])), encoding="utf-8")
    config = small(path, model_folder, tmp_path / "run", methods="[dpo]")
    pipeline.run(config, until="data")
    told = [json.loads(line) for line in (tmp_path / "run" / "data" / "rejected.jsonl").open(encoding="utf-8")]
    assert [(t["where"], t["kind"], t["row"] == long) for t in told] == [(f"{path}, row 1", "too long", True)]
    assert "2500001 tokens" in told[0]["reason"] or str(config.dataset.max_response_tokens) in told[0]["reason"]


HUGE = "red " * 2_500_000


@pytest.mark.parametrize(
    "row",
    [
        ROW | {"chosen": HUGE + "\ud800"},
        ROW | {"chosen": " " * 10_000_000},
        ROW | {"chosen": [{"role": HUGE, "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]},
        {"prompt": "p", HUGE: "a"},
        {"prompt": "p", "chosen": [{HUGE: "a"}], "rejected": "b"},
        '{"prompt": "p", "HUGE": 1, "HUGE": 2}',
        '{"prompt": "p", ' + ", ".join(f'"k{i}": 1' for i in range(300_000)) + ', "z": 1, "z": 2}',
        '{"prompt": "' + HUGE,
    ],
    ids=lambda row: None,
)
def test_an_error_is_short_however_long_the_row(row: Any, tmp_path: Path) -> None:
    line = row.replace("HUGE", HUGE) if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"pairs\.jsonl, (row|line) 2") as raised:
        load_pairs(str(path))
    assert len(str(raised.value)) < 1500


# --- names that lead out of a saved folder ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "ABSOLUTE", "..", "a\\b.arrow", ""])
def test_data_files_outside_a_saved_folder_are_not_followed(name: str, tmp_path: Path) -> None:
    for folder in ("saved", "other"):
        Dataset.from_list([ROW]).save_to_disk(tmp_path / folder)
    name = name.replace("ABSOLUTE", str(tmp_path / "other" / "data-00000-of-00001.arrow"))
    state = tmp_path / "saved" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match=r"saved.state\.json: names the data file .*no bare name.*Save the data set"):
        load_pairs(str(tmp_path / "saved"))


@pytest.mark.parametrize("name", ["../other/train", "ABSOLUTE", "."])
def test_splits_outside_a_saved_folder_are_not_followed(name: str, tmp_path: Path) -> None:
    for folder in ("saved", "other"):
        DatasetDict({"train": Dataset.from_list([ROW])}).save_to_disk(tmp_path / folder)
    name = name.replace("ABSOLUTE", str(tmp_path / "other" / "train"))
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", name]}))
    with pytest.raises(DataError, match=r"saved.dataset_dict\.json: names the split .*no bare name"):
        load_pairs(str(tmp_path / "saved"))


# --- texts that show nothing ------------------------------------------------------------------------------------------

UNSEEN = ["\u200b", "\ufeff", "\u2060", "\u00ad", "\x00\x1b", " \u200b\n\ufeff\u3000", "\u202e\u2028", "\u200d"]


@pytest.mark.parametrize("text", UNSEEN)
def test_a_text_that_shows_nothing_is_blank(text: str) -> None:
    say = lambda role, content: [{"role": role, "content": content}]  # noqa: E731
    for column, kind in (("prompt", "prompt"), ("chosen", "response"), ("rejected", "response")):
        with pytest.raises(DataError, match=rf"row 1, column '{column}': found a blank {kind}"):
            to_pair(ROW | {column: text}, "row 1")
    with pytest.raises(DataError, match="column 'prompt': found a blank prompt"):
        to_pair(ROW | {"prompt": say("user", text)}, "row 1")
    with pytest.raises(DataError, match="column 'chosen': found a blank message"):
        to_pair(ROW | {"prompt": say("user", "p"), "chosen": say("assistant", text)}, "row 1")
    with pytest.raises(DataError, match="no words at the beginning that both texts share"):
        to_pair({"chosen": f"{text} Yes", "rejected": f"{text} No"}, "row 1")
    info = {"subreddit": "r", "title": "t", "post": "p"}
    with pytest.raises(DataError, match=r"column 'summaries\[1\]': found a blank response"):
        to_pair({"info": info, "summaries": [{"text": "a"}, {"text": text}], "choice": 0}, "row 1")


@pytest.mark.parametrize("text", ["\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u200bx", "\u0644\u200c", "0"])
def test_a_text_with_one_character_that_shows_is_kept(text: str) -> None:
    pair = to_pair({"prompt": text, "chosen": text, "rejected": "no"}, "row 1")
    assert (pair.prompt, pair.chosen) == (text, text)


def test_a_demonstration_that_shows_nothing_is_none(tmp_path: Path, model_folder: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_rows(path, [{**row, "demo": "\u200b"} for row in rows()])
    options = {"sft.enabled": True, "sft.on": "demo"}
    with pytest.raises(DataError, match=r"row \d+\) has no text in the column 'demo'"):
        pipeline.run(small(path, model_folder, tmp_path / "out", methods="[dpo]", **options), until="start")


def test_a_demonstration_with_an_end_in_its_middle_is_none(tmp_path: Path, model_folder: Path) -> None:
    """The start would learn to go on behind it."""
    path = tmp_path / "pairs.jsonl"
    write_rows(path, [{**row, "demo": " one<|endoftext|> two"} for row in rows()])
    options = {"sft.enabled": True, "sft.on": "demo"}
    with pytest.raises(DataError, match=r"row \d+\): column 'demo': the text holds the end token '<\|endoftext\|>'"):
        pipeline.run(small(path, model_folder, tmp_path / "out", methods="[dpo]", **options), until="start")


def test_a_column_may_be_nested_deeper_than_python_calls() -> None:
    """Newer Pythons parse such JSON; the search for lone surrogates in it went by calls."""
    deep: list[object] = ["\ud800"]
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(DataError, match=r"column 'meta': found the lone surrogate U\+D800"):
        to_pair(ROW | {"meta": deep}, "row 1")
