"""The oracle: worked examples and the properties that make its best answer the human line at its own length."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prefdistill.embedded import oracle
from prefdistill.embedded.corpus import Docstring, collect_docstrings
from prefdistill.embedded.oracle import parts, score, score_rows
from prefdistill.errors import DataError

HUMAN = "Return the sum of a list of numbers."

anything = st.text(max_size=80)
lines = st.text(min_size=1, max_size=80).filter(lambda text: bool(text.strip()))
words = st.lists(st.text(alphabet="abcdefgst", min_size=1, max_size=7), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def sample() -> list[Docstring]:
    return collect_docstrings()[::4]


@given(anything, lines)
def test_range(response: str, human: str) -> None:
    assert 0.0 <= score(response, human) <= oracle.MAX_SCORE
    assert score(response, human) == score(response, human)


@given(lines)
def test_the_human_line_scores_ten(human: str) -> None:
    assert score(human, human) == 10.0
    assert score(f"  {human}\n", human) == 10.0


@given(lines, lines)
def test_another_text_scores_less(response: str, human: str) -> None:
    r, h = oracle._normal(response), oracle._normal(human)
    assume(any(oracle._ngrams(r, n) != oracle._ngrams(h, n) for n in range(1, oracle.MAX_N + 1)))
    assert score(response, human) < 10.0


@given(st.sampled_from(["", " ", "\n\t \n"]), lines)
def test_a_blank_response_scores_nothing(response: str, human: str) -> None:
    assert score(response, human) == 0.0


@given(words, words)
def test_each_word_appended_lowers_the_score(human: list[str], more: list[str]) -> None:
    line = " ".join(human)
    scores = [score(" ".join([line, *more[:count]]), line) for count in range(len(more) + 1)]
    assert all(after < before for before, after in pairwise(scores))


@given(words)
def test_each_word_cut_off_lowers_the_score(human: list[str]) -> None:
    line = " ".join(human)
    scores = [score(" ".join(human[:count]), line) for count in range(len(human), -1, -1)]
    assert all(after < before for before, after in pairwise(scores))


@given(lines, st.data())
def test_truncating_lowers_the_score(human: str, data: st.DataObject) -> None:
    cut = human.strip()[: data.draw(st.integers(0, len(human.strip()) - 1))]
    assert score(cut, human) < 10.0


@given(words, st.integers(2, 5))
def test_length_costs_the_same_both_ways(human: list[str], factor: int) -> None:
    unit = "".join(human)
    line, longer = unit * factor, unit * factor * factor
    assert parts(longer, line).length == pytest.approx(1 / factor)
    assert parts(unit, line).length == pytest.approx(1 / factor)


@given(words, words)
def test_content_and_length_are_symmetric(left: list[str], right: list[str]) -> None:
    one, other = parts(" ".join(left), " ".join(right)), parts(" ".join(right), " ".join(left))
    assert (one.characters, one.words, one.length) == (other.characters, other.words, other.length)


@pytest.mark.parametrize("factor", [2, 3])
def test_repeating_costs_about_what_truncating_costs(factor: int) -> None:
    # Twice the human line against half of it: F1 and L are the same by symmetry, but for the seams.
    unit = "read bytes from open files "
    line = (unit * factor).strip()
    longer, shorter = score((unit * factor * factor).strip(), line), score(unit.strip(), line)
    assert longer == pytest.approx(shorter, abs=0.5)


def test_worked_example_short() -> None:
    # r = "ab", h = "ab.".  F1_1 = 2*2/(2+3) = 4/5, F1_2 = 2*1/(1+2) = 2/3, F1_3 = 2*0/(0+1) = 0; no 4-gram in
    # either: C = (4/5 + 2/3 + 0) / 3 = 22/45.  W: {ab} and {ab}, 1.  F: one line yes, full stop no, capital not
    # asked for: 2/3.  L = 2/3.  K = 1.  Score = 2/3 * (6 * 22/45 + 3 + 2/3) = 2/3 * 6.6 = 4.4.
    assert score("ab", "ab.") == pytest.approx(4.4, abs=1e-12)


def test_worked_example_preamble() -> None:
    # r = "sure: ab." (9 characters), h = "ab." (3).  F1_1 = 2*3/(9+3) = 1/2, F1_2 = 2*2/(8+2) = 2/5,
    # F1_3 = 2*1/(7+1) = 1/4, F1_4 = 2*0/(6+0) = 0: C = 23/80.  W = 2*1/(2+1) = 2/3.  F: not one line, full stop,
    # capital: 2/3.  L = 3/9.  K: one extra line, 1/2, and a preamble, 1/4.
    # Score = 1/3 * 1/4 * (6 * 23/80 + 3 * 2/3 + 2/3) = 1/12 * 527/120 = 527/1440.
    assert score("Sure:\nAb.", "Ab.") == pytest.approx(527 / 1440, abs=1e-12)


def test_parts_of_the_worked_example() -> None:
    found = parts("Sure:\nAb.", "Ab.")
    assert found.characters == pytest.approx(23 / 80)
    assert found.words == pytest.approx(2 / 3)
    assert found.form == pytest.approx(2 / 3)
    assert found.length == pytest.approx(1 / 3)
    assert found.plain == 0.25


def test_order_of_typical_answers() -> None:
    near = score("Returns the sum of the numbers in a list.", HUMAN)
    far = score("Open a socket and wait for input ok.", HUMAN)
    padded = score(HUMAN[:-1] + ", which is useful whenever one needs to add up many values at once.", HUMAN)
    chatty = score(f"Sure, here is a one-line summary:\n\n{HUMAN}", HUMAN)
    clipped = score("Return the sum.", HUMAN)
    assert 10.0 > near > max(padded, clipped) > far
    assert near > 2 * chatty
    assert chatty < far


@pytest.mark.parametrize(
    "response",
    [
        "Sure, return the sum.",
        "Here is the sum.",
        "Here's a summary: x.",
        "**Summary:** x.",
        "The summary is x.",
        "A short one-line summary: x.",
        "TL;DR: x.",
        "This Python documentation describes x.",
        "I think x.",
    ],
)
def test_preambles_are_halved(response: str) -> None:
    assert parts(response, HUMAN).plain == 0.5


@pytest.mark.parametrize("response", ["Surely x.", "Ignore x.", "Iterate over x.", "Okapi.", "Thesis text.", HUMAN])
def test_no_preamble(response: str) -> None:
    assert parts(response, HUMAN).plain == 1.0


def test_a_preamble_of_the_human_line_is_excused() -> None:
    assert parts("The text to show.", "The text to print.").plain == 1.0


def test_extra_lines_divide() -> None:
    assert parts("One.\n\nTwo.\nThree.\n", "One.").plain == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("response", "human", "form"),
    [
        ("Add.", "Add.", 3),
        ("Add", "Add.", 2),
        ("add", "Add.", 1),
        ("add", "add", 3),
        ("Add", "Add", 3),
        ("add\nup", "Add.", 0),
        ("«add.", "Add.", 2),
    ],
)
def test_form(response: str, human: str, form: int) -> None:
    assert parts(response, human).form == pytest.approx(form / 3)


def test_words_ignore_case_plurals_and_stop_words() -> None:
    assert parts("Returns THE lists", "return a list").words == 1.0
    assert parts("pass gas", "pas ga").words == 0.0
    assert parts("raw_decode", "raw decode").words == 1.0
    assert parts("of the", "to a").words == 1.0


def test_the_parts_add_up() -> None:
    weights = oracle.CHARACTER_WEIGHT + oracle.WORD_WEIGHT + oracle.FORM_WEIGHT
    assert weights == oracle.MAX_SCORE
    assert oracle.Parts(0.5, 0.5, 0.5, 0.5, 0.5).score == 1.25


def test_on_the_library_the_human_length_is_best_on_average(sample: list[Docstring]) -> None:
    means = {}
    for factor in (0.5, 0.75, 0.9, 1.0, 1.1, 1.33, 2.0, 3.0):
        means[factor] = statistics.fmean(
            score(" ".join(d.body.split())[: round(factor * len(d.summary))], d.summary) for d in sample
        )
    assert max(means, key=means.__getitem__) == 1.0
    assert list(means.values())[:4] == sorted(list(means.values())[:4])
    assert list(means.values())[3:] == sorted(list(means.values())[3:], reverse=True)


def test_the_scores_of_related_text_are_spread_smoothly(sample: list[Docstring]) -> None:
    scores = [score(" ".join(d.body.split())[: len(d.summary)], d.summary) for d in sample]
    assert statistics.pstdev(scores) > 0.8
    assert len({round(value, 6) for value in scores}) > 0.95 * len(scores)


def test_score_rows() -> None:
    rows = [{"human": HUMAN, "prompt": "x"}, {"human": "Ab."}]
    assert score_rows(rows, [HUMAN, "Sure:\nAb."]) == [10.0, pytest.approx(527 / 1440)]
    assert score_rows([], []) == []


def test_score_rows_names_what_is_wrong() -> None:
    with pytest.raises(DataError, match="1 rows but 2 responses"):
        score_rows([{"human": HUMAN}], ["a", "b"])
    with pytest.raises(DataError, match="row 1"):
        score_rows([{"human": HUMAN}, {"text": HUMAN}], ["a", "b"])
    with pytest.raises(DataError, match="row 0"):
        score_rows([{"human": " "}], ["a"])


def test_a_blank_human_line_is_an_error() -> None:
    with pytest.raises(DataError, match="blank"):
        score("text", " \n")
