"""Plain prompts that a chat model or a missing space makes doubtful are told of, and no others."""

from __future__ import annotations

import json

import pytest

from prefdistill import pipeline
from prefdistill.data.plain_prompts import PlainPrompts
from prefdistill.data.table import PromptGroup, Response
from tiny_models import tiny
from tiny_runs import small
from tokenizer_makes import CHATS, TOKENIZERS, encoder

ASKED = "Name a river in Egypt."
MARKS = {
    "smollm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama2": "[/INST]",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "r1": "<|Assistant|>",
}


def warned(make: str, rows) -> list[str]:
    """The warnings on prompts, each with the first response's beginning."""
    checked = PlainPrompts(encoder(make))
    for prompt, response in rows:
        group = PromptGroup(prompt, (5,), "train", {}, 0)
        group.responses.append(Response(response, (3,)))
        checked.see(group)
    return checked.warnings()


@pytest.mark.parametrize("make", CHATS)
def test_conversations_and_prompts_that_a_template_laid_out_pass(make):
    talk = [{"role": "user", "content": ASKED}]
    laid_out = encoder(make).prompt_text(talk)
    assert warned(make, [(talk, [{"role": "assistant", "content": "The Nile."}])]) == []
    assert warned(make, [(laid_out, "The Nile.")]) == []
    assert warned(make, [(laid_out.removesuffix("<think>\n"), "The Nile.")]) == []


@pytest.mark.parametrize("make", MARKS)
def test_plain_prompts_of_a_chat_model(make):
    assert encoder(make).user_turn_end == MARKS[make]
    (said,) = warned(make, [(ASKED, " The Nile."), (ASKED + "\n", "The Nile.")])
    assert said.startswith("2 of 2 prompts are plain text and get no chat template")


def test_a_model_without_a_template_is_given_plain_text():
    assert encoder("gpt2").user_turn_end == ""
    fine = [(ASKED, " The Nile."), ("", "The Nile."), ("1 + 1 =", ""), ("print(", "x")]
    assert warned("gpt2", [*fine, ("埃及有什么河？", "尼罗河")]) == []


def test_prompts_that_run_into_their_responses():
    (said,) = warned("gpt2", [(ASKED, "The Nile."), (ASKED, " The Nile."), ("a b", "c")])
    assert said.startswith("2 of 3 prompts run into their responses, as in 'me a river in Egypt.The Nile.'")
    assert warned("gpt2", [(ASKED, "The Nile."), *[(ASKED, " The Nile.")] * 2]) == [], "a third of them may be meant"


def test_a_run_says_it(data, model_folder, tmp_path, capsys):
    pairs = tmp_path / "joined.jsonl"
    pairs.write_text(data.read_text(encoding="utf-8").replace('"chosen": " ', '"chosen": "'), encoding="utf-8")
    pipeline.run(small(pairs, model_folder, tmp_path / "run", methods="[dpo]"), until="data")
    assert "prompts run into their responses" in capsys.readouterr().err
    pipeline.run(small(data, model_folder, tmp_path / "spaced", methods="[dpo]"), until="data")
    assert "run into" not in capsys.readouterr().err
    counts = [json.loads((tmp_path / name / "data" / "data.json").read_text()) for name in ("run", "spaced")]
    assert [c["plain_prompts"]["run_into_response"] for c in counts] == [30, 0]


def test_a_run_of_a_chat_model_says_it(data, tmp_path, capsys):
    tokenizer = TOKENIZERS["smollm2"]()
    for saved in (tiny("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id), tokenizer):
        saved.save_pretrained(tmp_path / "model")
    pipeline.run(small(data, tmp_path / "model", tmp_path / "run", methods="[dpo]"), until="data")
    assert "warning: 30 of 30 prompts are plain text and get no chat template" in capsys.readouterr().err
