"""Plain prompts that a chat model or a missing space makes doubtful are told of, and no others."""

from __future__ import annotations

import pytest

from prefdistill.data.plain_prompts import PlainPrompts
from prefdistill.data.table import PromptGroup, Response
from test_pipeline import data, model_folder, small  # noqa: F401
from tokenizer_makes import TOKENIZERS, encoder

ASKED = "Name a river in Egypt."
MARKS = {
    "smollm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama2": "[/INST]",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
}


def warned(make: str, rows) -> list[str]:
    """The warnings on prompts, each with the first response's beginning."""
    checked = PlainPrompts(encoder(make))
    for prompt, response in rows:
        group = PromptGroup(prompt, (5,), "train", {}, 0)
        group.responses.append(Response(response, (3,)))
        checked.see(group)
    return checked.warnings()


@pytest.mark.parametrize("make", TOKENIZERS)
def test_conversations_and_prompts_that_a_template_laid_out_pass(make):
    if not encoder(make).tokenizer.chat_template:
        return
    talk = [{"role": "user", "content": ASKED}]
    laid_out = encoder(make).prompt_text(talk)
    assert warned(make, [(talk, [{"role": "assistant", "content": "The Nile."}])]) == []
    assert warned(make, [(laid_out + "\n", "The Nile.")]) == []


@pytest.mark.parametrize("make", MARKS)
def test_plain_prompts_of_a_chat_model(make):
    assert encoder(make).user_turn_end.startswith(MARKS[make])
    (said,) = warned(make, [(ASKED, " The Nile."), (ASKED + "\n", "The Nile.")])
    assert said.startswith("2 of 2 prompts are plain text and get no chat template")


def test_a_model_without_a_template_is_given_plain_text():
    assert encoder("gpt2").user_turn_end == ""
    assert (
        warned("gpt2", [(ASKED, " The Nile."), ("", "The Nile."), ("埃及有什么河？", "尼罗河"), ("1 + 1 =", "")]) == []
    )


def test_prompts_that_run_into_their_responses():
    (said,) = warned("gpt2", [(ASKED, "The Nile."), (ASKED, " The Nile."), ("a b", "c")])
    assert said.startswith("2 of 3 prompts run into their responses, as in 'me a river in Egypt.The Nile.'")
    assert warned("gpt2", [(ASKED, "The Nile."), *[(ASKED, " The Nile.")] * 2]) == [], "a third of them may be meant"


def test_a_run_says_it(data, model_folder, tmp_path, capsys):  # noqa: F811
    from prefdistill import pipeline

    pairs = tmp_path / "joined.jsonl"
    pairs.write_text(data.read_text(encoding="utf-8").replace('"chosen": " ', '"chosen": "'), encoding="utf-8")
    pipeline.run(small(pairs, model_folder, tmp_path / "run", methods="[dpo]"), until="data")
    assert "prompts run into their responses" in capsys.readouterr().err
    pipeline.run(small(data, model_folder, tmp_path / "spaced", methods="[dpo]"), until="data")
    assert "run into" not in capsys.readouterr().err
