"""Files and rows that an audit read wrongly or left out without a name: each is refused, or named with its content."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from prefdistill import pipeline
from prefdistill.data.formats import load_pairs, to_pair
from prefdistill.data.sources import read_rows
from prefdistill.errors import DataError
from test_pipeline import model_folder, rows, small  # noqa: F401

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


def test_a_demonstration_that_shows_nothing_is_none(tmp_path: Path, model_folder: Path) -> None:  # noqa: F811
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({**row, "demo": "\u200b"}) + "\n" for row in rows()), encoding="utf-8")
    options = {"sft.enabled": True, "sft.on": "demo"}
    with pytest.raises(DataError, match="no text in the column 'demo'"):
        pipeline.run(small(path, model_folder, tmp_path / "out", methods="[dpo]", **options), until="start")


def test_a_column_may_be_nested_deeper_than_python_calls() -> None:
    """Newer Pythons parse such JSON; the search for lone surrogates in it went by calls."""
    deep: list[object] = ["\ud800"]
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(DataError, match=r"column 'meta': found the lone surrogate U\+D800"):
        to_pair(ROW | {"meta": deep}, "row 1")
