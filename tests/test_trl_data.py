"""TRL 1.16's preference data sets feed this package: the same prompts, responses and tokens as TRL makes of them.

Every format is written as a `datasets.Dataset` in the ways that people keep them, read here, and compared with TRL's
own functions on the same rows. Where the two differ on purpose, a test says where and why.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trl import DPOTrainer, data_utils

import tiny_tokenizers as make
from prefdistill.data.formats import Pair, load_pairs, to_pair
from prefdistill.data.tokenise import Encoder
from prefdistill.errors import DataError
from test_formats import HI, assistant, implicit, pair_row, system, user

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
