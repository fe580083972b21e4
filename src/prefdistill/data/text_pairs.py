"""Prompt and response as the two texts of an encoder's input, e.g. `[CLS] prompt [SEP] response [SEP]`.

Encoders such as BERT or DeBERTa read both at once, so nothing of a prompt can be shared; what comes before the response
still stands in a tree's prompt, so that columns, keys and batches are the same for all reward models.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from prefdistill.data.formats import Text
from prefdistill.data.table import plain_text, prompt_text
from prefdistill.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairPrompt:
    """What stands before the response, special tokens included."""

    ids: tuple[int, ...]


class PairEncoder:
    """Encodes text pairs with an encoder's own tokenizer.

    Args:
        tokenizer: a fast one, which knows which token came from which text.
        max_tokens: what the model can read in all.
        max_prompt_tokens: longer prompts are cut from their left.
        max_response_tokens: what a response may need; the prompt is cut further to leave so much room, but never below
            half of `max_tokens`. Responses longer than what is left are cut at their right, and the first is warned of.

    Raises:
        ConfigError: the tokenizer is a slow one.
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int, max_prompt_tokens: int, max_response_tokens: int) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"the reward model's {type(tokenizer).__name__} has no fast version, which an encoder needs here"
            )
        self.tokenizer = tokenizer
        self._cut = False
        lead, first, seam, _, tail = self._parts("a", "a")
        if not first:
            raise ConfigError(f"the reward model's {type(tokenizer).__name__} reads no text pairs")
        self._lead, self._seam, self._tail = lead, seam, tail
        self.room = max_tokens - len(lead) - len(seam) - len(tail)
        self.prompt_room = min(max_prompt_tokens, max(self.room // 2, self.room - max_response_tokens))

    def _parts(self, first: str, second: str) -> tuple[tuple[int, ...], ...]:
        """Leading specials, first text, specials between, second text, closing specials."""
        read = self.tokenizer(first, second, add_special_tokens=True, truncation=False, verbose=False)
        ids, of = read["input_ids"], read.sequence_ids()
        places = {text: [i for i, s in enumerate(of) if s == text] for text in (0, 1)}
        if not places[1]:
            return (), tuple(ids[i] for i in places[0]), (), (), ()
        begin, end = (places[0][0], places[0][-1] + 1) if places[0] else (places[1][0], places[1][0])
        start, stop = places[1][0], places[1][-1] + 1
        return tuple(map(tuple, (ids[:begin], ids[begin:end], ids[end:start], ids[start:stop], ids[stop:])))

    def prompt_ids(self, prompt: Text) -> PairPrompt:
        return PairPrompt((*self._lead, *self._own(prompt), *self._seam))

    def _own(self, prompt: Text) -> tuple[int, ...]:
        return self._parts(prompt_text(prompt), "a")[1][-self.prompt_room :]

    def response_ids(self, prompt: Any, response: Any, *, finished: bool = True) -> tuple[int, ...]:
        """The response and what closes the pair; whether it was finished is nothing that an encoder is told."""
        del finished
        own = self._parts("a", plain_text(response))[3]
        # Few responses come near the bound, and only for them the prompt is read again.
        room = self.room - self.prompt_room
        if len(own) > room:
            room = self.room - len(self._own(prompt))
        if len(own) > room and not self._cut:
            self._cut = True
            logger.warning(
                "a response of %d tokens is longer than the %d that the reward model can read beside the prompt; it "
                "and others like it are judged by their beginning",
                len(own),
                room,
            )
        return (*own[:room], *self._tail)

    def without_response_bound(self) -> PairEncoder:
        """Itself: its bound is that of the model."""
        return self
