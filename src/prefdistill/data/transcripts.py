"""Where the prompt ends in two texts or conversations that are not split into prompt and response.

Each function compares the chosen side with the rejected side and returns one index: what stands before it is the shared
prompt, what follows on either side is that side's response. Nothing is stripped or rewritten, so prompt + response is
always the text that came in. 0 means that no prompt is shared.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

HUMAN = "Human:"
ASSISTANT = "\n\nAssistant:"


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """The length of the longest common prefix of two strings or two lists."""
    low, high = 0, min(len(first), len(second))
    # Bisection compares slices at C speed; a loop over characters takes most of the time of loading HH.
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def is_hh_transcript(text: str) -> bool:
    """Whether a text is an Anthropic HH transcript: "\\n\\nHuman: ...\\n\\nAssistant: ...", or that text stripped."""
    return text.lstrip().startswith(HUMAN)


def hh_seam(chosen: str, rejected: str) -> int:
    """The index after the last "\\n\\nAssistant:" that two HH transcripts share; the responses keep their space."""
    shared = common_length(chosen, rejected)
    marker = chosen.rfind(ASSISTANT, 0, shared)
    return 0 if marker < 0 else marker + len(ASSISTANT)


def word_seam(chosen: str, rejected: str) -> int:
    """The index after the last whole word that two texts share; a space there goes to the responses, as in TRL.

    TRL's `extract_prompt` cuts where the texts part, even inside a word ("b|lue" and "b|rown"); here that word belongs
    to the responses, because half a word is no prompt that a model would ever be given.
    """
    seam = common_length(chosen, rejected)
    while seam and _in_word(chosen[seam - 1]) and (_word_goes_on(chosen, seam) or _word_goes_on(rejected, seam)):
        seam -= 1
    return seam - 1 if seam and chosen[seam - 1] == " " else seam


def turn_seam(chosen: Sequence[dict[str, str]], rejected: Sequence[dict[str, str]]) -> int:
    """The index after the last shared turn that an assistant answers: the prompt never ends with an assistant turn."""
    seam = common_length(chosen, rejected)
    while seam and chosen[seam - 1]["role"] == "assistant":
        seam -= 1
    return seam


def _word_goes_on(text: str, index: int) -> bool:
    return index < len(text) and _in_word(text[index])


def _in_word(character: str) -> bool:
    # Category M: accents and vowel signs that belong to the letter before them.
    return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")
