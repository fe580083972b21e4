"""TRL's rows that are no pairs, or hold what a policy is not given: refused with what to do; and saved folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import data_utils

import tiny_tokenizers as make
from prefdistill.data.formats import load_pairs, to_pair
from prefdistill.data.grouping import group_pairs
from prefdistill.data.table import prompt_key, text_key
from prefdistill.data.tokenise import Encoder
from prefdistill.errors import DataError
from test_formats import HI, assistant, pair_row
from test_trl_data import FORMATS, SKY, WHERE, parts, trl_ids, write

# --- columns that go into the prompt ----------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
# As real templates do: the tools stand in a system turn, and an argument changes the turn that is opened.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + make.CHATML
    + "{% if add_generation_prompt and no_thought %}<think></think>{% endif %}"
)  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "word"),
    [
        ({"tools": TOOLS}, "tools"),
        ({"tools": json.dumps(TOOLS)}, "tools"),
        ({"chat_template_kwargs": {"no_thought": True}}, "chat_template_kwargs"),
    ],
)
def test_what_a_template_is_given_besides_is_refused_and_the_remedy_works(columns: Any, word: str) -> None:
    """Left out, the prompt would be another than TRL's; rendered by TRL, it is read to the token."""
    row = pair_row(prompt=SKY, chosen=[assistant("Blue.")], rejected=[assistant("Red.")])
    with pytest.raises(DataError, match=rf"column '{word}'.*trl\.apply_chat_template"):
        to_pair(row | columns, WHERE)
    encoder = Encoder(make.chatml(TOOL_TEMPLATE))
    tools = columns.get("tools")
    rendered = data_utils.apply_chat_template(
        row | columns, encoder.tokenizer, json.loads(tools) if isinstance(tools, str) else tools
    )
    if word == "tools":
        assert "Adds." in rendered["prompt"]
        (theirs,) = trl_ids([row | columns], encoder.tokenizer)
        assert list(encoder.prompt_ids(rendered["prompt"]).ids) == theirs["prompt_ids"]
    pair = to_pair(rendered, WHERE)
    (group,), _ = group_pairs([pair], encoder, splits={prompt_key(pair.prompt): "train"})
    assert encoder.tokenizer.decode(group.ids) == rendered["prompt"]
    assert [encoder.tokenizer.decode(r.ids) for r in group.responses] == ["Blue.<|im_end|>", "Red.<|im_end|>"]


@pytest.mark.parametrize("nothing", [None, [], "", "[]", {"no_thought": None}])
def test_nothing_for_the_template_is_no_fault(nothing: Any) -> None:
    row = pair_row(prompt=SKY, chosen=[assistant("Blue.")], rejected=[assistant("Red.")])
    assert to_pair(row | {"tools": nothing, "chat_template_kwargs": nothing}, WHERE).prompt == SKY
    # A plain text has no template: TRL leaves them out too.
    assert to_pair(pair_row(tools=TOOLS), WHERE).prompt == "p"


def test_calls_of_tools_are_refused() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    row = pair_row(prompt=SKY, chosen=[assistant("") | {"tool_calls": [call]}], rejected=[assistant("Red.")])
    with pytest.raises(DataError, match=r"chosen\[0\].*'tool_calls'.*trl\.apply_chat_template"):
        to_pair(row, WHERE)


def test_one_text_part_is_its_text(tmp_path: Path) -> None:
    """As vision models are given texts: TRL makes parts of texts, and here parts become texts again."""
    row = pair_row(prompt=HI, chosen=[assistant("a")], rejected=[assistant("b")])
    theirs = {side: data_utils.prepare_multimodal_messages(messages) for side, messages in row.items()}
    assert theirs["prompt"][1]["content"] == [{"type": "text", "text": "Hi"}]
    for kind in ("parquet", "jsonl"):
        assert [parts(p) for p in load_pairs(write(kind, [theirs], tmp_path))] == [row]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image"}, {"type": "text", "text": "What is it?"}],
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        [{"type": "image", "text": "a"}],
        [{"type": "text", "text": 3}],
        ["a"],
        [],
    ],
)
def test_other_parts_are_refused(content: Any) -> None:
    with pytest.raises(DataError, match=r"'prompt\[0\]'.*not one text part.*Join the texts"):
        to_pair(pair_row(prompt=[{"role": "user", "content": content}]), WHERE)


@pytest.mark.parametrize("columns", [{"images": ["a.png"]}, {"image": {"path": "a.png", "bytes": None}}])
def test_pictures_are_refused(columns: Any) -> None:
    with pytest.raises(DataError, match=r"found a picture\. The policy reads text alone"):
        to_pair(pair_row() | columns, WHERE)


# --- rows of TRL's other trainers -------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "unpaired": ({"prompt": "p", "completion": "c", "label": True}, "unpaired preference.*labelled true"),
    "unpaired, chat": ({"prompt": SKY, "completion": [assistant("c")], "label": False}, "unpaired preference"),
    "unpaired, implicit": ({"completion": "c", "label": True}, "unpaired preference"),
    "steps": ({"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}, "steps of an answer"),
    "prompt-only": ({"prompt": "p"}, "prompts without responses.*Draw two responses"),
    "prompt-only, chat": ({"prompt": SKY}, "prompts without responses"),
    "prompt-completion": ({"prompt": "p", "completion": "c"}, "demonstrations"),
    "language modelling": ({"messages": [*SKY, assistant("Blue.")]}, "demonstrations"),
}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "save_to_disk"])
@pytest.mark.parametrize(("row", "said"), OTHERS.values(), ids=OTHERS)
def test_rows_of_other_trainers_say_how_they_become_pairs(row: Any, said: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"row 1: no column 'chosen' and 'rejected'.*{said}"):
        load_pairs(write(kind, [row], tmp_path))


def test_unpaired_rows_become_the_pairs_they_were(tmp_path: Path) -> None:
    """What the error says to do, on a data set that TRL unpaired."""
    rows = FORMATS["conversational, explicit"]
    loose = data_utils.unpair_preference_dataset(Dataset.from_list(rows)).to_list()
    with pytest.raises(DataError, match="unpaired"):
        to_pair(loose[0], WHERE)
    sides: dict[str, dict[str, Any]] = {}
    for row in loose:
        side = "chosen" if row["label"] else "rejected"
        sides.setdefault(text_key(row["prompt"]), {"prompt": row["prompt"]})[side] = row["completion"]
    assert [parts(p) for p in load_pairs(write("parquet", list(sides.values()), tmp_path))] == rows


# --- saved folders ----------------------------------------------------------------------------------------------------


def test_a_split_of_a_saved_folder(tmp_path: Path) -> None:
    source = write("splits", FORMATS["standard, explicit"], tmp_path)
    assert [len(load_pairs(source, split=s)) for s in ("train", "test")] == [2, 1]
    with pytest.raises(DataError, match=r"no split 'valid'.*'train', 'test'"):
        load_pairs(source, split="valid")


def test_a_saved_folder_in_another_format_of_values_and_empty(tmp_path: Path) -> None:
    rows = [row | {"score": [1.5, 2.0]} for row in FORMATS["standard, explicit"]]
    Dataset.from_list(rows).with_format("numpy").save_to_disk(tmp_path / "numpy")
    assert [p.extra for p in load_pairs(str(tmp_path / "numpy"))] == [{"score": [1.5, 2.0]}] * 2
    Dataset.from_dict({"prompt": []}).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match=r"empty: cannot be read.*an empty data set cannot"):
        load_pairs(str(tmp_path / "empty"))


@pytest.mark.parametrize("damage", ["cut", "gone", "words", "offset"])
def test_a_damaged_saved_folder(damage: str, tmp_path: Path) -> None:
    """An offset that points outside the file is found before the text behind it is read."""
    source = Path(write("save_to_disk", FORMATS["standard, explicit"], tmp_path))
    arrow = next(source.glob("*.arrow"))
    if damage == "cut":
        arrow.write_bytes(arrow.read_bytes()[:200])
    elif damage == "gone":
        arrow.unlink()
    elif damage == "words":
        (source / "state.json").write_text('{"_data_files": 3}')
    else:
        content = arrow.read_bytes()
        offsets = b"".join(n.to_bytes(4, "little") for n in (0, 10, 19))
        assert content.count(offsets) == 1, "the prompts' offsets"
        arrow.write_bytes(content.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f"))
    with pytest.raises(DataError, match="saved: cannot be read as what datasets' save_to_disk writes"):
        load_pairs(str(source))
