"""A transparent oracle: how good is a one-line summary, given the line that a person wrote?

It stands in for a human judge in the embedded task, so it is short, deterministic and can be worked out by hand::

    score = L * K * (6 C + 3 W + F)        from 0 to 10; 0 for a blank response; 10 for the human line

All five parts lie between 0 and 1.  Let r and h be the response and the human line in lower case, with each run of
white space made one space and none at the ends, and let a *bag* keep how often each thing occurs.

C, characters
    The mean of F1_n over n = 1, 2, 3, 4, where F1_n = 2 m / (a + b) compares the bags of the character n-grams of
    r (a of them) and of h (b of them), m being the size of their intersection: precision and recall weigh the same.
    An n for which both bags are empty is left out of the mean.
W, content words
    The same F1 over the bags of words (runs of letters and digits) that are not in `STOP_WORDS`; a word of more
    than three letters loses a final "s" that follows no "s" ("returns" is "return").  1 where both bags are empty.
F, form
    A third for each of: it is one line; it ends with a full stop; it starts with a capital letter.  What the human
    line itself lacks is not asked for.
L, length
    exp(-|ln(len(r) / len(h))|) = min(len(r), len(h)) / max(len(r), len(h)): twice as long costs what half as long
    does.
K, no chatter
    1 / (1 + e), e being the non-blank lines that the response has over and above those of the human line; halved
    if the response opens with a preamble (`PREAMBLE`: "Sure", "Here is", "Summary:" ...) and the human line does not.

The best length is the human line's own.  Below it, C, W and L all want more.  Beyond it, as long as the share m / a
of the response that is found in the human line does not grow with its length, F1 * L is proportional to
(m / a) / (a + b) and falls: no padding pays, unlike with a measure that favours recall (chrF's beta is 2).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefdistill.errors import DataError

MAX_SCORE = 10.0
"""The score of the human line itself."""
MAX_N = 4
"""Longest character n-gram compared."""
CHARACTER_WEIGHT, WORD_WEIGHT, FORM_WEIGHT = 6.0, 3.0, 1.0
"""What C, W and F add to the score at most; together MAX_SCORE."""

_STOP_WORDS = (
    "a an and any are as at be been by can do does for from has have if in into is it its may no not of on or so "
    "such that the their them then there these they this to was were when where which will with you your"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Words that say little about the subject and are left out of W."""

PREAMBLE = re.compile(
    r"\W*(?:(?:sure|certainly|absolutely|of course|okay|ok|yes|great|i|i'm|i'd|let me)\b"
    r"|here(?:'s|’s| is| are)\b"
    r"|(?:(?:a|the|one|my) )?(?:(?:short|brief|concise|one)[ -])*(?:line |sentence )?(?:summary|answer|tl;?dr)\b"
    r"|(?:the|this) (?:\w+ )?(?:documentation|docstring|text|passage|paragraph)\b)",
    re.IGNORECASE,
)
"""Openings that speak about the answer instead of giving it; matched at the start of the response."""

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Parts:
    """The five parts of a score, each between 0 and 1; the module docstring defines them."""

    characters: float
    """C: F1 of the character n-grams, n = 1 to 4."""
    words: float
    """W: F1 of the content words."""
    form: float
    """F: one line, full stop, capital letter."""
    length: float
    """L: the shorter length divided by the longer."""
    plain: float
    """K: 1 without extra lines and preamble."""

    @property
    def score(self) -> float:
        """L * K * (6 C + 3 W + F)."""
        weighted = CHARACTER_WEIGHT * self.characters + WORD_WEIGHT * self.words + FORM_WEIGHT * self.form
        return self.length * self.plain * weighted


def score(response: str, human: str) -> float:
    """Return L * K * (6 C + 3 W + F), from 0 to 10, for a response compared with the human line.

    C is the mean F1 of lower-cased character n-grams (n = 1 to 4), W the F1 of content words, F the mean of one
    line / full stop / capital letter, L the shorter length divided by the longer, and K is 1 / (1 + extra lines),
    halved for a preamble.  The module docstring gives each exactly.  A blank response scores 0 and the human line
    itself 10.  Raises DataError where the human line is blank.
    """
    return parts(response, human).score


def parts(response: str, human: str) -> Parts:
    """Return the five parts of the score, all 0 for a blank response; raises DataError for a blank human line."""
    r, h = _normal(response), _normal(human)
    if not h:
        raise DataError("the human line is blank, so there is nothing to compare with; give every row a summary")
    if not r:
        return Parts(characters=0.0, words=0.0, form=0.0, length=0.0, plain=0.0)
    return Parts(
        characters=_characters(r, h),
        words=_f1(_content_words(r), _content_words(h)),
        form=_form(response.strip(), human.strip()),
        length=min(len(r), len(h)) / max(len(r), len(h)),
        plain=_plain(response, human),
    )


def score_rows(rows: Sequence[Mapping[str, object]], responses: Sequence[str]) -> list[float]:
    """An oracle, likeness to the line that a person wrote, from 0 to 10.

    The line is row["human"] in the row of the same position.

    Raises DataError where the numbers of rows and responses differ or a row has no human line.
    """
    if len(rows) != len(responses):
        raise DataError(f"{len(rows)} rows but {len(responses)} responses; give one response for each row")
    scores = []
    for index, (row, response) in enumerate(zip(rows, responses, strict=True)):
        human = row.get("human")
        if not isinstance(human, str) or not human.strip():
            raise DataError(f'row {index} has no human line; the oracle needs a non-blank string in column "human"')
        scores.append(score(response, human))
    return scores


def _normal(text: str) -> str:
    """Return the text in lower case with each run of white space made one space and none at the ends."""
    return " ".join(text.lower().split())


def _f1(left: Counter[str], right: Counter[str]) -> float:
    """Return twice the size of the bags' intersection over the sum of their sizes; 1 where both are empty."""
    total = left.total() + right.total()
    return 2.0 * (left & right).total() / total if total else 1.0


def _characters(r: str, h: str) -> float:
    """Return C, the mean F1 of the n-grams over those n for which at least one text has any."""
    orders = range(1, min(MAX_N, max(len(r), len(h))) + 1)
    return sum(_f1(_ngrams(r, n), _ngrams(h, n)) for n in orders) / len(orders)


def _ngrams(text: str, n: int) -> Counter[str]:
    """Return the bag of the text's character n-grams."""
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))


def _content_words(text: str) -> Counter[str]:
    """Return the bag of words that are no stop words, each without a plural or third-person "s"."""
    return Counter(_stem(word) for word in _WORD.findall(text) if word not in STOP_WORDS)


def _stem(word: str) -> str:
    """Drop the final "s" of a word of more than three letters, unless another "s" comes before it."""
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _form(response: str, human: str) -> float:
    """Return F, the share of the three marks of form that the response has or the human line lacks."""
    marks = (
        (_lines(response) == 1, _lines(human) == 1),
        (response.endswith("."), human.endswith(".")),
        (response[0].isupper(), human[0].isupper()),
    )
    return sum(has or not asked for has, asked in marks) / len(marks)


def _plain(response: str, human: str) -> float:
    """Return K: 1 over one more than the extra lines, halved if only the response opens with a preamble."""
    extra = max(0, _lines(response) - _lines(human))
    chatter = PREAMBLE.match(response) is not None and PREAMBLE.match(human) is None
    return (0.5 if chatter else 1.0) / (1 + extra)


def _lines(text: str) -> int:
    """Return the number of non-blank lines."""
    return sum(1 for line in text.splitlines() if line.strip())
