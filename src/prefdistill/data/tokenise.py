"""From text or chat messages to token ids: the seam between prompt and response is one and the same everywhere.

Training, scoring and sampling all start from `Encoder.prompt_ids`; a response's ids are those that a policy which
was given these prompt ids would have to generate, its end token included. Prompt and response are therefore encoded
apart: no token ever straddles the seam (trl 1073, unsloth-zoo 1110).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from prefdistill.data.formats import Message, Text
from prefdistill.data.transcripts import common_length
from prefdistill.errors import ConfigError, DataError

DATE = datetime(2024, 7, 26)  # as Llama's templates have it where they know no date
# A macro in place of transformers' function, which is in no argument's power.
ON_ONE_DATE = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f"|replace('%{c}', '{DATE.strftime('%' + c)}')" for c in "aAbBcdHIjmMpSUwWxXyYZ")
    + " }}{% endmacro %}{{ '' }}"
)
# Short conversations that show what a chat template writes around an assistant's text; some ask for a system turn.
_PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "a"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}],
)


@dataclass(frozen=True)
class EncodedPrompt:
    """Prompt ids and how many tokens were cut from its left to fit."""

    ids: tuple[int, ...]
    cut: int


class Encoder:
    """Encodes prompts and responses with one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        max_prompt_tokens: longer prompts are cut from their left at a token boundary; tokens that the tokenizer puts
            before every text (BOS), and a BOS that the chat template writes, are kept. None: no bound.
        max_response_tokens: `response_ids` returns None for a longer response. None: no bound.
        end_ids: tokens that end a response besides the tokenizer's own, e.g. a generation configuration's.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_prompt_tokens: int | None = None,
        max_response_tokens: int | None = None,
        end_ids: Sequence[int] = (),
    ) -> None:
        for name, value in (("max_prompt_tokens", max_prompt_tokens), ("max_response_tokens", max_response_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1, or null for no bound")
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self._given_end_ids = tuple(end_ids)

    def without_response_bound(self) -> Encoder:
        """The same encoder for responses of any length."""
        return Encoder(self.tokenizer, max_prompt_tokens=self.max_prompt_tokens, end_ids=self._given_end_ids)

    # -- what the tokenizer does by itself -------------------------------------------------------------------------

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """Tokens that the tokenizer puts before a text (usually BOS or nothing)."""
        bare = self._plain("a")
        full = list(self.tokenizer("a", add_special_tokens=True)["input_ids"])
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return tuple(full[:start])
        return ()

    @cached_property
    def _adds_space(self) -> bool:
        """Whether a text encoded by itself decodes with a space before it (SentencePiece's dummy prefix)."""
        return bool(self._decode([*self._plain("a"), *self._plain("a")]) != "aa")

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: the ones given, EOS, and the chat template's own end of an assistant turn."""
        found = dict.fromkeys(self._known_ends)
        if self._turn_end_id is not None:
            found[self._turn_end_id] = None
        return tuple(found)

    @cached_property
    def _known_ends(self) -> tuple[int, ...]:
        eos = self.tokenizer.eos_token_id
        return self._given_end_ids if eos is None else (*self._given_end_ids, int(eos))

    @cached_property
    def _turn_end(self) -> str:
        """What the chat template writes after an assistant's text, whatever that text is: "<|im_end|>\n"."""

        def behind(probe: list[Message]) -> str:
            first, second = (self._chat_response_text(probe, [_turn(text)]) for text in "AB")
            return first[len(first) - common_length(first[::-1], second[::-1]) :]

        return self._of_a_probe(behind)

    @cached_property
    def user_turn_end(self) -> str:
        """The first mark that a chat template writes behind a user's text ("<|im_end|>", "[/INST]"); "" without one."""
        said = "What a user says."

        def behind(probe: list[Message]) -> str:
            text = self.prompt_text([{**message, "content": said} for message in probe])
            return text.rpartition(said)[2] if said in text else ""

        text = self._of_a_probe(behind).strip()
        mark = next((i for i in self._plain(text) if self._is_mark(i)), None)
        return text.split("\n")[0].strip() if mark is None else self._decode([mark]).strip()

    def _of_a_probe(self, read: Callable[[list[Message]], str]) -> str:
        """What is read of the first probe that the chat template takes; "" without a template."""
        if not getattr(self.tokenizer, "chat_template", None):
            return ""
        for probe in _PROBES:
            try:
                return read(probe)
            except DataError:
                continue
        return ""

    @cached_property
    def _turn_end_id(self) -> int | None:
        """The token that ends the chat template's assistant turn; None where the template writes none."""
        ids = self._plain(self._turn_end)
        for token in ids:
            if token in self._known_ends:
                return token
        marks = [i for i in ids if self._is_mark(i)]
        return marks[-1] if marks else None

    @cached_property
    def _marks(self) -> frozenset[int]:
        """Special and added tokens: a template's "<end_of_turn>" may be either."""
        return frozenset([*self.tokenizer.all_special_ids, *getattr(self.tokenizer, "added_tokens_decoder", ())])

    def _is_mark(self, token: int) -> bool:
        # An unknown character is none, although its token is a special one.
        return token in self._marks and token != self.tokenizer.unk_token_id and not self._is_blank(token)

    def _is_blank(self, token: int) -> bool:
        return not self._decode([token]).strip()

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # -- text ------------------------------------------------------------------------------------------------------

    def prompt_text(self, prompt: Text) -> str:
        """The text whose ids the policy is given: the prompt as it is, or the chat template up to its turn."""
        if isinstance(prompt, str):
            return prompt
        return self._template(prompt, add_generation_prompt=True)

    def _template(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                f"the data are chat messages, but the tokenizer {self.tokenizer.name_or_path!r} has no chat template; "
                "use an instruction-tuned model, give the tokenizer a chat template, or give prompts as plain text"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **self._dated
            )
        except TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise DataError(
                f"the chat template of the tokenizer {self.tokenizer.name_or_path!r} refuses the messages (roles: "
                f"{roles}): {error}; change the roles or their order, or use another chat template"
            ) from error
        return str(text)

    @cached_property
    def _dated(self) -> dict[str, str]:
        """A template that writes today's date, with one date: the same rows have the same ids tomorrow."""
        template = str(self.tokenizer.get_chat_template())
        return {"chat_template": ON_ONE_DATE + template} if "strftime_now" in template else {}

    def _chat_response_text(self, prompt: Sequence[dict[str, str]], response: Sequence[dict[str, str]]) -> str:
        start = self._template(prompt, add_generation_prompt=True)
        whole = self._template([*prompt, *response], add_generation_prompt=False)
        if whole.startswith(start):
            return whole[len(start) :]
        # The template opens a turn with text that it leaves out of finished turns (e.g. "<think>"): what it writes
        # before every content is the turn's header, and the response is what follows it.
        bare = self._template(prompt, add_generation_prompt=False)
        probes = [self._template([*prompt, _turn(text)], add_generation_prompt=False) for text in "AB"]
        header = probes[0][: common_length(*probes)]
        if not whole.startswith(header) or common_length(start, header) < common_length(start, bare):
            raise DataError(
                f"the chat template of the tokenizer {self.tokenizer.name_or_path!r} writes the prompt in another way "
                f"once a response follows it (from {start[common_length(start, whole) :][:40]!r} on), so the response "
                "cannot be told from the prompt; use another chat template, or give plain text"
            )
        return whole[len(header) :]

    def response_text(self, prompt: Text, response: Text) -> str:
        """The text that follows `prompt_text(prompt)`, with whatever the chat template puts after it."""
        if isinstance(response, str):
            if isinstance(prompt, str):
                return response
            response = [_turn(response)]
        if isinstance(prompt, str):
            raise DataError("a prompt given as plain text has a response given as chat messages; use one form for both")
        return self._chat_response_text(prompt, response)

    # -- ids -------------------------------------------------------------------------------------------------------

    def prompt_ids(self, prompt: Text) -> EncodedPrompt:
        """Ids that the policy is given: at most one BOS, at the start, no end token; cut from the left if too long.

        Special tokens that a chat template writes between turns, as Llama-2's does BOS and EOS, are left as they are.

        Raises:
            DataError: the prompt has no tokens at all, so that a response's first token has no predecessor.
        """
        ids = self._plain(self.prompt_text(prompt))
        if isinstance(prompt, str) and tuple(ids[: len(self.prefix_ids)]) != self.prefix_ids:
            ids = [*self.prefix_ids, *ids]
        if not ids:
            raise DataError("the prompt is empty and the tokenizer has no BOS token, so the response has no first step")
        cut, start = 0, self._start(ids)
        if self.max_prompt_tokens is not None:
            cut = min(max(0, len(ids) - self.max_prompt_tokens), len(ids) - max(start, 1))
        return EncodedPrompt(tuple(ids[:start] + ids[start + cut :]), cut)

    def _start(self, ids: list[int]) -> int:
        """How many tokens at the start of a prompt stand for its beginning and not for its text."""
        if self.prefix_ids and tuple(ids[: len(self.prefix_ids)]) == self.prefix_ids:
            return len(self.prefix_ids)
        # A template's own BOS; ChatML's <|im_start|>, which some tokenizers name as BOS, begins other turns as well.
        bos = self.tokenizer.bos_token_id
        return int(bos is not None and ids[0] == bos and ids.count(bos) == 1)

    def _check_whole(self, text: str, response: Text) -> None:
        """Raises DataError where a template left words out; white space it may write as it likes."""
        said = response if isinstance(response, str) else response[-1]["content"]
        if "".join(said.split()) not in "".join(text.split()):
            raise DataError(
                f"the chat template of the tokenizer {self.tokenizer.name_or_path!r} leaves out a part of the response "
                f"that begins with {said[:40]!r}, thoughts perhaps; give what it writes, use another template, or "
                "render the row before and give plain text"
            )

    def response_ids(
        self, prompt: Text, response: Text, *, finished: bool = True, whole: bool = False
    ) -> tuple[int, ...] | None:
        """Ids that the policy would generate after `prompt_ids(prompt)`; None if more than `max_response_tokens`.

        A finished response ends in exactly one end token: the first that the text or the template put at its end,
        else EOS; an unfinished one in none. What a template writes after its end token is never generated and is left
        out, and so is white space that a template without an end token writes after a turn.

        Args:
            whole: the template must write all of the response: one of the data that is to be learnt.

        Raises:
            DataError: prompt and response are of different forms, or the chat template refuses them or leaves some out.
            ConfigError: the response has no end token of its own and the tokenizer no EOS token.
        """
        text = self.response_text(prompt, response)
        if whole:
            self._check_whole(text, response)
        if not isinstance(prompt, str) and (not finished or (self._turn_end_id is None and self._turn_end.isspace())):
            text = text.removesuffix(self._turn_end)
        ids, end = self._split_end(self._continue(text))
        if finished:
            end = self.tokenizer.eos_token_id if end is None else end
            if end is None:
                raise ConfigError(
                    f"the tokenizer {self.tokenizer.name_or_path!r} has no EOS token, so a response has no end; "
                    "set tokenizer.eos_token"
                )
            ids = [*ids, int(end)]
        if self.max_response_tokens is not None and len(ids) > self.max_response_tokens:
            return None
        return tuple(ids)

    def _split_end(self, ids: list[int]) -> tuple[list[int], int | None]:
        """Ids before the end tokens at the very end, and the first of these; white space among them is left out."""
        end = None
        while True:
            stop = len(ids)
            while stop and ids[stop - 1] not in self.end_ids and self._is_blank(ids[stop - 1]):
                stop -= 1
            if not stop or ids[stop - 1] not in self.end_ids:
                return ids, end
            ids, end = ids[: stop - 1], ids[stop - 1]

    def _continue(self, text: str) -> list[int]:
        """Ids of a text that stands after another one: no space of the tokenizer's own before it."""
        if not self._adds_space:
            return self._plain(text)
        # Behind a letter or a line break; the one that the text is less likely to merge with comes first.
        for anchor in ("a", "\n", ".") if text[:1].isspace() else ("\n", "a", "."):
            before, both = self._plain(anchor), self._plain(anchor + text)
            if before and both[: len(before)] == before:
                return both[len(before) :]
        raise DataError(
            f"the tokenizer {self.tokenizer.name_or_path!r} merges the start of the response "
            f"{text[:40]!r} with the text before it, so the response has no tokens of its own"
        )

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of generated ids, its end token left out; the inverse of `response_ids` for plain text.

        Other special tokens that were generated are part of the text: left out, it would be another response.
        """
        ids = list(ids)
        while ids and ids[-1] in self.end_ids:
            ids.pop()
        # Behind a letter, because some decoders cut the space at the very start of a text.
        anchor = self._plain("a")
        return self._decode([*anchor, *ids])[len(self._decode(anchor)) :]


def _turn(text: str) -> Message:
    return {"role": "assistant", "content": text}
