"""TRL 1.16's preference data sets feed this package: the same prompts, responses and tokens as TRL makes of them.

Every format is written as a `datasets.Dataset` in the ways that people keep them, read here, and compared with TRL's
own functions on the same rows. Where the two differ on purpose, a test says where and why.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trl import DPOConfig, DPOTrainer, data_utils

import tiny_tokenizers as make
from prefdistill import pipeline
from prefdistill.data.formats import Pair, load_pairs, to_pair
from prefdistill.data.grouping import group_pairs
from prefdistill.data.table import prompt_key, text_key
from prefdistill.data.tokenise import Encoder
from prefdistill.errors import DataError
from test_formats import HI, assistant, implicit, pair_row, system, user
from test_pipeline import data, model_folder, small  # noqa: F401
from test_pipeline import rows as plain_rows
from tiny_models import tiny

WHERE = "pairs, row 1"
CHATS = {
    "chatml": make.chatml,
    "llama3": make.llama3,
    "gemma": make.gemma,
    "phi3": lambda: make.gpt2(make.PHI3, marks=("<|end|>",)),
    "endless": lambda: make.gpt2(make.ENDLESS),
}
TURNS = [user("What is 2 + 2?"), assistant("4."), user("And 3?\n")]
SKY = [user("What colour is the sky?")]

# TRL's documentation, "Dataset formats and types": preference, standard and conversational, explicit and implicit.
FORMATS: dict[str, list[dict[str, Any]]] = {
    "standard, explicit": [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"prompt": "Größe:\n", "chosen": "1,90 m", "rejected": "fünf 🙂 "},
    ],
    "standard, implicit": [
        implicit("The sky is blue.", "The sky is green."),
        implicit("One, two: three", "One, two: four"),
    ],
    "conversational, explicit": [
        pair_row(prompt=SKY, chosen=[assistant("It is blue.")], rejected=[assistant("It is green.")]),
        pair_row(prompt=TURNS, chosen=[assistant("5. ")], rejected=[assistant("6.")]),
    ],
    "conversational, implicit": [
        implicit([*SKY, assistant("It is blue.")], [*SKY, assistant("It is green.")]),
        implicit([*TURNS, assistant("5.")], [*TURNS, assistant("6.")]),
    ],
    "with a system message": [
        pair_row(prompt=HI, chosen=[assistant("Hello!")], rejected=[assistant("Go away.")]),
        pair_row(prompt=[system("Count."), *TURNS], chosen=[assistant("5.")], rejected=[assistant("6.")]),
    ],
    "with a system message, implicit": [
        implicit([*HI, assistant("Hello!")], [*HI, assistant("Go away.")]),
        implicit([system("Count."), *TURNS, assistant("5.")], [system("Count."), *TURNS, assistant("6.")]),
    ],
    "prompt as text, repeated in the conversations": [
        {"prompt": "Hi", "chosen": [user("Hi"), assistant("Hello!")], "rejected": [user("Hi"), assistant("No.")]},
    ],
    "further columns": [
        pair_row(prompt=SKY, chosen=[assistant("Blue.")], rejected=[assistant("Red.")])
        | {"score_chosen": 9.5, "source": "a", "tools": None, "images": []},
        pair_row(prompt=SKY, chosen=[assistant("Azure.")], rejected=[assistant("Pink.")])
        | {"score_chosen": 9.0, "source": None, "tools": None, "images": []},
    ],
}


def write(kind: str, rows: list[dict[str, Any]], folder: Path) -> str:
    """The rows as a data set, kept in one of the ways that `datasets` has."""
    dataset = Dataset.from_list(rows)
    if kind == "parquet":
        dataset.to_parquet(folder / "pairs.parquet")
    elif kind == "jsonl":
        dataset.to_json(folder / "pairs.jsonl")
    elif kind == "json":
        dataset.to_json(folder / "pairs.json", lines=False)
    elif kind == "save_to_disk":
        dataset.save_to_disk(folder / "saved")
        return str(folder / "saved")
    else:
        DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(folder / "saved")
        return str(folder / "saved")
    return str(folder / f"pairs.{kind}")


def trl_split(row: dict[str, Any]) -> dict[str, Any]:
    return data_utils.maybe_extract_prompt({k: row[k] for k in ("prompt", "chosen", "rejected") if k in row})


def trl_ids(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """DPOTrainer's own preprocessing."""
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    options = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    return list(DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, options, "train"))


def parts(pair: Pair) -> dict[str, Any]:
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "save_to_disk", "splits"])
@pytest.mark.parametrize("rows", FORMATS.values(), ids=FORMATS)
def test_every_format_in_every_file_is_split_as_trl_splits_it(rows: Any, kind: str, tmp_path: Path) -> None:
    pairs = load_pairs(write(kind, rows, tmp_path))
    assert [parts(p) for p in pairs] == [trl_split(row) for row in rows]
    for pair, row in zip(pairs, rows, strict=True):
        assert pair.extra == {k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize(
    "rows", [r for n, r in FORMATS.items() if "standard" not in n], ids=lambda rows: str(len(rows))
)
def test_a_chat_template_gives_the_same_texts(rows: Any, name: str) -> None:
    encoder = Encoder(CHATS[name]())
    for row in rows:
        pair = to_pair(row, WHERE)
        theirs = data_utils.maybe_apply_chat_template(trl_split(row), encoder.tokenizer)
        assert encoder.prompt_text(pair.prompt) == theirs["prompt"]
        assert encoder.response_text(pair.prompt, pair.chosen) == theirs["chosen"]
        assert encoder.response_text(pair.prompt, pair.rejected) == theirs["rejected"]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi3"])
@pytest.mark.parametrize("implied", [False, True])
def test_dpo_trainer_has_the_same_tokens_up_to_the_end_of_the_turn(name: str, implied: bool) -> None:
    """What a template writes behind its end token is never generated: TRL trains on it, here it is left out."""
    encoder = Encoder(CHATS[name]())
    kinds = ("conversational", "with a system message")
    rows = [r for n, rows in FORMATS.items() if n.startswith(kinds) and ("implicit" in n) == implied for r in rows]
    for row, theirs in zip(rows, trl_ids(rows, encoder.tokenizer), strict=True):
        pair = to_pair(row, WHERE)
        assert list(encoder.prompt_ids(pair.prompt).ids) == theirs["prompt_ids"]
        for side in ("chosen", "rejected"):
            ours = list(encoder.response_ids(pair.prompt, getattr(pair, side)))
            rest = theirs[f"{side}_ids"][len(ours) :]
            assert ours == theirs[f"{side}_ids"][: len(ours)]
            assert encoder.tokenizer.decode(rest, skip_special_tokens=True).strip() == ""
            assert bool(rest) == (name in ("chatml", "gemma"))


def test_plain_implicit_texts_have_dpo_trainers_tokens() -> None:
    encoder = Encoder(make.gpt2())
    rows = [row for name in ("standard, explicit", "standard, implicit") for row in FORMATS[name]]
    for row in rows:
        (theirs,) = trl_ids([row], encoder.tokenizer)
        pair = to_pair(row, WHERE)
        assert list(encoder.prompt_ids(pair.prompt).ids) == theirs["prompt_ids"]
        assert list(encoder.response_ids(pair.prompt, pair.chosen)) == theirs["chosen_ids"]
        assert list(encoder.response_ids(pair.prompt, pair.rejected)) == theirs["rejected_ids"]


# --- conversations of any kind ----------------------------------------------------------------------------------------

words = st.text(st.sampled_from("ab é日.,:\n 12🙂"), min_size=1, max_size=12).filter(str.strip)
conversations = st.tuples(
    st.none() | words, st.lists(st.tuples(words, words), max_size=3), words, st.tuples(words, words)
)
FORMS = ("explicit", "implicit", "repeated", "text prompt")


@settings(max_examples=150, deadline=None)
@given(told=conversations, form=st.sampled_from(FORMS), name=st.sampled_from(sorted(CHATS)))
def test_random_conversations(told: Any, form: str, name: str) -> None:
    """In each form that a data set may give them: TRL's prompt and responses, as messages, texts and tokens."""
    lead, history, question, (chosen, rejected) = told
    assume(chosen.strip() != rejected.strip())
    prompt = [system(lead)] if lead else []
    for asked, said in history:
        prompt += [user(asked), assistant(said)]
    prompt.append(user(question))
    ends = {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    whole = {side: [*prompt, *end] for side, end in ends.items()}
    row = {
        "explicit": {"prompt": prompt, **ends},
        "implicit": whole,
        "repeated": {"prompt": prompt, **whole},
        "text prompt": {"prompt": question, **whole},
    }[form]
    pair = to_pair(json.loads(json.dumps(row)), WHERE)
    assert parts(pair) == {"prompt": prompt, **ends}
    if form != "repeated":  # TRL would give the prompt twice
        assert parts(pair) == trl_split(row)
    encoder = _encoder(name)
    theirs = data_utils.maybe_apply_chat_template({"prompt": prompt, **ends}, encoder.tokenizer)
    assert encoder.prompt_text(pair.prompt) == theirs["prompt"]
    for side, end in ends.items():
        assert encoder.response_text(pair.prompt, end) == theirs[side]
        if name == "llama3":  # nothing behind its end token, so that all of TRL's tokens are compared
            ids = encoder.tokenizer.apply_chat_template(prompt + end, return_dict=False)
            assert [*encoder.prompt_ids(pair.prompt).ids, *encoder.response_ids(pair.prompt, end)] == ids


_ENCODERS: dict[str, Encoder] = {}


def _encoder(name: str) -> Encoder:
    return _ENCODERS.setdefault(name, Encoder(CHATS[name]()))


@settings(max_examples=300, deadline=None)
@given(shared=words, chosen=words, rejected=words)
def test_plain_texts_differ_from_trl_by_whole_words_alone(shared: str, chosen: str, rejected: str) -> None:
    """TRL cuts where the texts part, here no word is cut: what moves over is letters of one word and their space."""
    row = implicit(f"Say {shared} {chosen}", f"Say {shared} {rejected}")
    assume(not row["chosen"].startswith(row["rejected"]))
    assume(not row["rejected"].startswith(row["chosen"]))
    try:
        pair = to_pair(row, WHERE)
    except DataError:
        return
    theirs = trl_split(row)
    assert theirs["prompt"].startswith(pair.prompt)
    moved = theirs["prompt"][len(pair.prompt) :]
    assert pair.chosen == moved + theirs["chosen"]
    assert not moved.strip() or moved.removeprefix(" ").isalnum()


# --- where the two differ on purpose ----------------------------------------------------------------------------------


def test_half_a_word_is_no_prompt() -> None:
    """No model would ever be given "The sky is b"."""
    row = implicit("The sky is blue", "The sky is brown")
    assert trl_split(row) == {"prompt": "The sky is b", "chosen": "lue", "rejected": "rown"}
    assert parts(to_pair(row, WHERE)) == {"prompt": "The sky is", "chosen": " blue", "rejected": " brown"}


def test_a_text_that_goes_on_leaves_no_response() -> None:
    """TRL's loop ends at the shorter text's last letter and takes it for the response."""
    row = implicit("The sky", "The sky is blue")
    assert trl_split(row) == {"prompt": "The sk", "chosen": "y", "rejected": "y is blue"}
    with pytest.raises(DataError, match="'chosen': found a blank response"):
        to_pair(row, WHERE)


def test_texts_that_share_nothing_have_no_prompt() -> None:
    """TRL gives an empty prompt, or one that is cut from the end where that is a space."""
    assert trl_split(implicit("Yes", "No"))["prompt"] == ""
    assert trl_split(implicit("Yes ", "No"))["prompt"] == "Yes"
    for row in (implicit("Yes", "No"), implicit("Yes ", "No")):
        with pytest.raises(DataError, match="Give the prompt in a column 'prompt'"):
            to_pair(row, WHERE)


def test_a_transcript_is_cut_at_its_assistants_turn() -> None:
    """TRL cuts inside the answer where both begin alike, so that the prompt hangs on what was answered."""
    told = "\n\nHuman: Hi\n\nAssistant:"
    row = implicit(f"{told} I see.", f"{told} I know.")
    assert trl_split(row)["prompt"] == f"{told} I"
    assert to_pair(row, WHERE).prompt == told


def test_a_prompt_never_ends_with_an_assistants_turn() -> None:
    """Turns that the assistant writes are its responses; TRL makes a shared one part of the prompt."""
    row = implicit([*HI, assistant("So."), assistant("a")], [*HI, assistant("So."), assistant("b")])
    assert trl_split(row)["prompt"] == [*HI, assistant("So.")]
    assert to_pair(row, WHERE).prompt == HI
    begun = pair_row(prompt=[*HI, assistant("So,")], chosen=[assistant("a")], rejected=[assistant("b")])
    assert data_utils.maybe_apply_chat_template(trl_split(begun), make.chatml())["prompt"].endswith("So,")
    with pytest.raises(DataError, match="ends with an assistant turn"):
        to_pair(begun, WHERE)


def test_a_prompt_repeated_as_messages_is_taken_once() -> None:
    row = pair_row(prompt=HI, chosen=[*HI, assistant("a")], rejected=[*HI, assistant("b")])
    assert trl_split(row)["chosen"] == [*HI, assistant("a")], "TRL gives the prompt twice"
    assert to_pair(row, WHERE).chosen == [assistant("a")]


def test_a_thought_that_the_template_opens_stays_in_the_prompt() -> None:
    """DeepSeek-R1's generation prompt ends with "<think>": a policy is given it. TRL trains on a prompt without."""
    encoder = Encoder(make.gpt2(make.R1, marks=("<|User|>", "<|Assistant|>"), bos_token="<|endoftext|>"))
    row = pair_row(prompt=SKY, chosen=[assistant("Blue.")], rejected=[assistant("Red.")])
    theirs = data_utils.maybe_apply_chat_template(row, encoder.tokenizer)
    assert encoder.prompt_text(SKY) == theirs["prompt"] + "<think>\n"
    assert encoder.response_text(SKY, row["chosen"]) == theirs["chosen"]


def test_what_merges_over_the_seam_is_kept_apart() -> None:
    """TRL takes what merged from the prompt; a policy is given the whole prompt (test_tokenise.py, trl 1073)."""
    encoder = Encoder(make.gpt2())
    row = {"prompt": "Hello worl", "chosen": "d, how are you?", "rejected": "x"}
    (theirs,) = trl_ids([row], encoder.tokenizer)
    ours = list(encoder.prompt_ids("Hello worl").ids)
    assert theirs["prompt_ids"] == ours[: len(theirs["prompt_ids"])]
    assert len(theirs["prompt_ids"]) < len(ours), "the example is one that merges"


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


# --- and back ---------------------------------------------------------------------------------------------------------


class WithColumns(DPOTrainer):
    """As docs/files.md tells: TRL 1.16 by itself would compute ids and columns again (trl 3985)."""

    def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset


class TokensOfTRL(WithColumns):
    """Our columns beside the ids that TRL makes of the rows' text."""

    _prepare_dataset = DPOTrainer._prepare_dataset


def trainer_on(kind: Any, scored: Dataset, model: Path, folder: Path, **options: Any) -> Any:
    args = DPOConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_length=None, **options
    )
    return kind(model=str(model), args=args, train_dataset=scored)


def test_our_columns_and_our_policy_in_trls_trainer(data, model_folder, tmp_path):  # noqa: F811
    """scored.parquet as it is: TRL trains on its reference log-probs without a reference, and finds the same itself.

    The policy's folder is the model of such a trainer, its tokenizer too, and it trains there.
    """
    out = tmp_path / "run"
    pipeline.run(small(data, model_folder, out, methods="[d-dpo]"), until="distill")
    scored = Dataset.from_parquet(str(out / "data" / "scored.parquet"), cache_dir=str(tmp_path / "cache"))
    ours = trainer_on(WithColumns, scored, model_folder, tmp_path / "a", precompute_ref_log_probs=True)
    assert ours.ref_model is None
    batch = ours.data_collator([ours.train_dataset[i] for i in range(len(scored))])
    assert batch["ref_chosen_logps"].tolist() == pytest.approx(list(scored["ref_chosen_logps"]))
    found = ours.compute_ref_log_probs(ours.model.eval(), batch)
    for side, logps in zip(("chosen", "rejected"), found, strict=True):
        assert logps.tolist() == pytest.approx(list(scored[f"ref_{side}_logps"]), rel=1e-4)
    with torch.no_grad():  # the policy is the reference before its first step
        assert ours.compute_loss(ours.model, batch).item() == pytest.approx(math.log(2), abs=1e-5)
    trained = trainer_on(
        WithColumns,
        scored,
        out / "policy" / "d-dpo",
        tmp_path / "b",
        precompute_ref_log_probs=True,
        max_steps=2,
        learning_rate=1e-3,
    )
    before = [p.detach().clone() for p in trained.model.parameters()]
    trained.train()
    assert any(not old.equal(new) for old, new in zip(before, trained.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi3"])
def test_columns_of_chats_are_those_of_our_ids(name, tmp_path):
    """TRL's own columns hold what a template writes behind the end token as well; on our ids they are ours."""
    writes_on = name in ("chatml", "gemma")  # a line break
    tokenizer = CHATS[name]()
    model, out = tmp_path / "model", tmp_path / "run"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tiny("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = [
        pair_row(prompt=[user(r["prompt"])], chosen=[assistant(r["chosen"])], rejected=[assistant(r["rejected"])])
        for r in plain_rows()
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    config = small(tmp_path / "chats.jsonl", model, out, methods="[d-dpo]", **{"reward.members": 1})
    pipeline.run(config, until="score")
    scored = Dataset.from_parquet(str(out / "data" / "scored.parquet"), cache_dir=str(tmp_path / "cache"))

    ours = trainer_on(WithColumns, scored, model, tmp_path / "a", precompute_ref_log_probs=True)
    trls = trainer_on(TokensOfTRL, scored, model, tmp_path / "b", precompute_ref_log_probs=True)
    ours.model.eval(), trls.model.eval()
    batch, own = (t.data_collator([t.train_dataset[i] for i in range(len(scored))]) for t in (ours, trls))
    for side, found, of_trl in zip(
        ("chosen", "rejected"),
        ours.compute_ref_log_probs(ours.model, batch),
        trls.compute_ref_log_probs(trls.model, own),
        strict=True,
    ):
        column = torch.tensor(scored[f"ref_{side}_logps"][:])
        torch.testing.assert_close(found, column, rtol=1e-4, atol=1e-4, check_dtype=False)
        # What TRL's column holds besides is the log-prob of the tokens behind our end, and nothing else.
        behind = []
        for row, of_trls in zip(scored, trls.train_dataset, strict=True):
            prompt, ids = of_trls["prompt_ids"], of_trls[f"{side}_ids"]
            assert prompt == row["prompt_ids"]
            assert ids[: len(row[f"{side}_ids"])] == row[f"{side}_ids"]
            whole = torch.tensor([prompt + ids])
            with torch.no_grad():
                logps = trls.model(whole).logits[:, :-1].log_softmax(-1).gather(-1, whole[:, 1:, None])[0, :, 0]
            behind.append(float(logps[len(prompt) + len(row[f"{side}_ids"]) - 1 :].sum()))
        torch.testing.assert_close(of_trl, column + torch.tensor(behind), rtol=1e-4, atol=1e-4, check_dtype=False)
        assert (min(map(abs, behind)) > 0.1) == writes_on
    with torch.no_grad():  # a first loss of log 2: no margin before the first step
        assert ours.compute_loss(ours.model, batch).item() == pytest.approx(math.log(2), abs=1e-5)
        first = trls.compute_loss(trls.model, own).item()
    assert (first != pytest.approx(math.log(2), abs=1e-5)) == writes_on
