"""From text or chat messages to token ids: the seam between prompt and response is one and the same everywhere.

Training, scoring and sampling all start from `Encoder.prompt_ids`; a response's ids are those that a policy which
was given these prompt ids would have to generate, its end token included. Prompt and response are therefore encoded
apart: no token ever straddles the seam (trl 1073, unsloth-zoo 1110).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prefdistill.data.formats import Text
from prefdistill.data.transcripts import common_length
from prefdistill.errors import ConfigError, DataError


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
            before every text (BOS) are kept. None: no bound.
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
        """Tokens that end a response: EOS, the ones given, and the chat template's own end of an assistant turn."""
        found = dict.fromkeys(self._given_end_ids)
        if self.tokenizer.eos_token_id is not None:
            found[int(self.tokenizer.eos_token_id)] = None
        if getattr(self.tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": "a"}]
            tail = self._drop_tail(self._plain(self._chat_response_text(turn, [{"role": "assistant", "content": "a"}])))
            if tail and tail[-1] in self._special:
                found[tail[-1]] = None
        return tuple(found)

    @cached_property
    def _special(self) -> frozenset[int]:
        special = set(self.tokenizer.all_special_ids)
        special.update(i for i, t in getattr(self.tokenizer, "added_tokens_decoder", {}).items() if t.special)
        return frozenset(special)

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
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _chat_response_text(self, prompt: Sequence[dict[str, str]], response: Sequence[dict[str, str]]) -> str:
        start = self._template(prompt, add_generation_prompt=True)
        whole = self._template([*prompt, *response], add_generation_prompt=False)
        if whole.startswith(start):
            return whole[len(start) :]
        # The template opens a turn with text that it leaves out of finished turns (e.g. "<think>"): what the two
        # renderings share whatever the content is the turn's header, and the response is what follows it.
        probes = [
            self._template([*prompt, {"role": "assistant", "content": c}], add_generation_prompt=False) for c in "AB"
        ]
        return whole[min(common_length(start, probe) for probe in probes) :]

    def response_text(self, prompt: Text, response: Text) -> str:
        """The text that follows `prompt_text(prompt)`, with whatever the chat template puts after it."""
        if isinstance(response, str):
            if isinstance(prompt, str):
                return response
            response = [{"role": "assistant", "content": response}]
        if isinstance(prompt, str):
            raise DataError("a prompt given as plain text has a response given as chat messages; use one form for both")
        return self._chat_response_text(prompt, response)

    # -- ids -------------------------------------------------------------------------------------------------------

    def prompt_ids(self, prompt: Text) -> EncodedPrompt:
        """Ids that the policy is given: at most one BOS, at the start, no end token; cut from the left if too long.

        Raises:
            DataError: the prompt has no tokens at all, so that a response's first token has no predecessor.
        """
        ids = self._plain(self.prompt_text(prompt))
        prefix = list(self.prefix_ids) if isinstance(prompt, str) else []
        if ids[: len(prefix)] == prefix:
            prefix, ids = ids[: len(prefix)], ids[len(prefix) :]
        elif not prefix and ids[: len(self.prefix_ids)] == list(self.prefix_ids):
            prefix, ids = ids[: len(self.prefix_ids)], ids[len(self.prefix_ids) :]
        if not prefix and not ids:
            raise DataError("the prompt is empty and the tokenizer has no BOS token, so the response has no first step")
        cut = 0
        if self.max_prompt_tokens is not None:
            cut = max(0, len(prefix) + len(ids) - self.max_prompt_tokens)
            cut = min(cut, len(ids) if prefix else len(ids) - 1)
        return EncodedPrompt(tuple(prefix + ids[cut:]), cut)

    def response_ids(self, prompt: Text, response: Text, *, finished: bool = True) -> tuple[int, ...] | None:
        """Ids that the policy would generate after `prompt_ids(prompt)`; None if more than `max_response_tokens`.

        A finished response ends in exactly one end token: the one that the template (or the text) put there, else
        EOS. What a template writes after its end token is never generated and is left out.
        """
        ids = self._drop_tail(self._continue(self.response_text(prompt, response)))
        ended = bool(ids) and (ids[-1] in self.end_ids or ids[-1] in self._special)
        if finished and not ended:
            if self.tokenizer.eos_token_id is None:
                raise ConfigError(
                    f"the tokenizer {self.tokenizer.name_or_path!r} has no EOS token, so a response has no end; "
                    "set tokenizer.eos_token"
                )
            ids = [*ids, int(self.tokenizer.eos_token_id)]
        if not finished and ended:
            ids = ids[:-1]
        while len(ids) > 1 and ids[-1] in self.end_ids and ids[-2] == ids[-1]:
            ids = ids[:-1]
        if self.max_response_tokens is not None and len(ids) > self.max_response_tokens:
            return None
        return tuple(ids)

    def _drop_tail(self, ids: list[int]) -> list[int]:
        """Cuts white space that stands after a final special token: ChatML's newline behind <|im_end|>."""
        end = len(ids)
        while end and ids[end - 1] not in self._special:
            end -= 1
            if self._decode(ids[end:]).strip():
                return ids
        return ids[:end] if end else ids

    def _continue(self, text: str) -> list[int]:
        """Ids of a text that stands after another one: no space of the tokenizer's own before it."""
        if not self._adds_space:
            return self._plain(text)
        anchor = "a" if text[:1].isspace() else "\n"
        before, both = self._plain(anchor), self._plain(anchor + text)
        if both[: len(before)] != before:
            raise DataError(
                f"the tokenizer {self.tokenizer.name_or_path!r} merges the start of the response "
                f"{text[:40]!r} with the text before it, so the response has no tokens of its own"
            )
        return both[len(before) :]

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of generated ids, its end token left out; the inverse of `response_ids` for plain text."""
        ids = list(ids)
        while ids and ids[-1] in self.end_ids:
            ids.pop()
        if not self._adds_space:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        anchor = self._plain("\n")
        text = self.tokenizer.decode([*anchor, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)[len(self._decode(anchor)) :]
