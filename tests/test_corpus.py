"""The docstring corpus: what is kept, what is dropped, how a body is clipped and how the prompt reads."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefdistill.embedded import corpus
from prefdistill.embedded.corpus import Docstring, clip_body, collect_docstrings, is_summary, prompt_messages
from prefdistill.errors import DataError

BODY = "The words that follow explain at some length what the line above has summed up. " * 3
SUMMARY = "Explain one thing at some length."


@pytest.fixture(scope="module")
def library() -> list[Docstring]:
    return collect_docstrings()


def _source(summary: str, body: str = BODY, name: str = "thing") -> str:
    indented = body.strip().replace("\n", "\n    ")
    return f'def {name}():\n    """{summary}\n\n    {indented}\n    """\n\n\n'


def _write(root: Path, relative: str, text: str) -> None:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_library_has_the_expected_size(library: list[Docstring]) -> None:
    # Some distributions ship idlelib, with about a tenth of the docstrings, apart from Python.
    whole = (Path(sysconfig.get_path("stdlib")) / "idlelib").is_dir()
    assert (1200 if whole else 1000) <= len(library) <= 1800


def test_library_keeps_every_rule(library: list[Docstring]) -> None:
    for d in library:
        assert 20 <= len(d.summary) <= 100
        assert d.summary == d.summary.strip()
        assert len(d.summary.splitlines()) == 1
        assert any(character.isalpha() for character in d.summary)
        assert not d.summary.endswith(":")
        assert " " in d.summary
        assert 150 <= len(d.body) <= 1500
        assert d.body == d.body.rstrip()
        assert d.body.splitlines()[0].strip()
        assert corpus.doctest_share(d.body) <= 0.5
        assert all(part.isidentifier() or "-" in part for part in d.name.split(".")), d.name


def test_library_has_no_duplicates(library: list[Docstring]) -> None:
    assert len({" ".join(d.summary.casefold().split()) for d in library}) == len(library)
    assert len({" ".join(d.body.casefold().split()) for d in library}) == len(library)


def test_library_leaves_out_tests_and_packages(library: list[Docstring]) -> None:
    for d in library:
        assert not {"test", "tests", "idle_test", "site-packages"}.intersection(d.name.split(".")[:-1]), d.name


def test_collecting_twice_gives_the_same(library: list[Docstring]) -> None:
    assert collect_docstrings() == library


def test_a_known_docstring_is_there(library: list[Docstring]) -> None:
    (found,) = [d for d in library if d.name == "json.decoder.JSONDecoder"]
    assert found.summary == "Simple JSON <https://json.org> decoder"
    assert found.body.startswith("Performs the following translations in decoding by default:")


def test_nothing_is_imported(tmp_path: Path) -> None:
    _write(tmp_path, "prefdistill_never_imported.py", "raise SystemExit\n" + _source(SUMMARY))
    assert [d.name for d in collect_docstrings(tmp_path)] == ["prefdistill_never_imported.thing"]
    assert "prefdistill_never_imported" not in sys.modules


def test_names_order_and_deduplication(tmp_path: Path) -> None:
    nested = (
        f'"""Say what the module is about.\n\n{BODY}module\n"""\n\n'
        f'class Box:\n    """Hold one thing and no other.\n\n    {BODY}class\n    """\n\n'
        f'    async def lid(self):\n        """Lift the lid of the box.\n\n        {BODY}method\n        """\n\n'
        f'if True:\n    try:\n        def late():\n            """Come last in the file.\n\n            {BODY}late\n'
        '            """\n    finally:\n        pass\n'
    )
    _write(tmp_path, "pkg/__init__.py", nested)
    _write(tmp_path, "pkg/sub.py", _source("Come LAST in  the file.", BODY + "other") + _source("Be new in this file."))
    _write(tmp_path, "zeta.py", _source("Repeat the body of another.", BODY.upper()))
    _write(tmp_path, "alpha.py", _source(SUMMARY, BODY + "alpha"))
    found = collect_docstrings(tmp_path)
    assert [d.name for d in found] == ["alpha.thing", "pkg", "pkg.Box", "pkg.Box.lid", "pkg.late", "pkg.sub.thing"]
    assert found[0] == Docstring("alpha.thing", SUMMARY, BODY + "alpha")
    assert found[-1].summary == "Be new in this file."


@pytest.mark.parametrize(
    "relative",
    ["test/a.py", "unittest/test/a.py", "lib2to3/tests/a.py", "idlelib/idle_test/a.py", "site-packages/x/a.py"],
)
def test_folders_passed_over(tmp_path: Path, relative: str) -> None:
    _write(tmp_path, "kept.py", _source(SUMMARY))
    _write(tmp_path, relative, _source("Explain one more thing.", BODY + "more"))
    assert [d.name for d in collect_docstrings(tmp_path)] == ["kept.thing"]


def test_a_root_inside_a_test_folder_is_read(tmp_path: Path) -> None:
    _write(tmp_path / "test", "kept.py", _source(SUMMARY))
    assert len(collect_docstrings(tmp_path / "test")) == 1


def test_files_that_do_not_parse_are_passed_over(tmp_path: Path) -> None:
    _write(tmp_path, "kept.py", _source(SUMMARY))
    _write(tmp_path, "broken.py", "def (:\n")
    (tmp_path / "nul.py").write_bytes(b"\0")
    (tmp_path / "latin.py").write_bytes(b'"""\xe9"""\n')
    (tmp_path / "declared.py").write_bytes(
        b"# -*- coding: latin-1 -*-\n" + _source("Déclare un encodage.", BODY + "é").encode("latin-1")
    )
    assert [d.summary for d in collect_docstrings(tmp_path)] == ["Déclare un encodage.", SUMMARY]


def test_no_docstring_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=tmp_path.name):
        collect_docstrings(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "Return the sum of two numbers.",
        "Get a value, e.g. from a file.",
        'Standard "encodings" Package',
        "Special typing form to define literal types (a.k.a. value types).",
        "Return a dictionary of scheme -> proxy server URL mappings.",
        "Is this the end of the file?",
        "Triangular distribution.",
        "x" * 10 + " " + "y" * 89,
    ],
)
def test_is_summary(line: str) -> None:
    assert is_summary(line)


@pytest.mark.parametrize(
    "line",
    [
        "Too short a line.",
        "x" * 10 + " " + "y" * 90,
        "Do one thing here. Do another there.",
        "Do one thing here!  And another.",
        "Has the following attributes:",
        "Records the view in this window;",
        "Registers the name and then,",
        "distutils.command.build_ext",
        "registerDOMImplementation(name, factory)",
        "capwords(s [,sep]) -> string",
        "execvpe(file, args, env).",
        "data -> unmarshalled data, method name",
        "uri [,options] -> a logical connection",
        "bare-quoted-string = DQUOTE and more",
        "l(ist) [first [,last] | .]",
        "float(self) = self.numerator / self.denominator",
        'attribute [section] ["*"] [CFWS] "=" value',
        "1234 5678 9012 3456 7890",
        "--------------- ------------",
    ],
)
def test_is_not_summary(line: str) -> None:
    assert not is_summary(line)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"{SUMMARY}\n\n{BODY}", True),
        (f"\n    {SUMMARY}\n\n    {BODY}", True),
        (f"{SUMMARY}\n   \n\n\n{BODY}", True),
        (f"{SUMMARY}\n{BODY}", False),
        (f"{SUMMARY}\n\n" + "b" * 149, False),
        (f"{SUMMARY}\n\n" + "b" * 150, True),
        (f"{SUMMARY}\n\n" + "b" * 1500, True),
        (f"{SUMMARY}\n\n" + "b" * 1501, False),
        (SUMMARY, False),
        ("", False),
        (f"{SUMMARY}\n\nAn example.\n\n" + ">>> thing()\n'a value that is rather long'\n" * 8, False),
    ],
)
def test_split_docstring(text: str, kept: bool) -> None:
    assert (corpus.split_docstring(text) is not None) is kept


@pytest.mark.parametrize(
    ("body", "share"),
    [
        ("", 0.0),
        ("prose", 0.0),
        (">>> 1\n1", 1.0),
        ("prose\n\n    >>> 1\n    1\n\nprose", 0.5),
        (">>> 1\n\nprose", 0.5),
    ],
)
def test_doctest_share(body: str, share: float) -> None:
    assert corpus.doctest_share(body) == share


@pytest.mark.parametrize(
    ("body", "max_chars", "clipped"),
    [
        ("short enough", 12, "short enough"),
        ("One two.\n\nThree four five.", 20, "One two.\n\nThree four"),  # the paragraph keeps too little
        ("One two three.\n\nFour five. Six.", 27, "One two three."),  # a paragraph goes before a sentence
        ("One two. Three four five six.", 16, "One two."),
        ("Say it (now!) and then go on.", 18, "Say it (now!)"),
        ("Use it, e.g. with a long word.", 16, "Use it, e.g."),  # by words: e.g. ends no sentence
        ("Use many, e.g. thisisaverylongword.", 20, "Use many, e.g."),
        ("one two three", 12, "one two"),
        ("one two three", 7, "one two"),
        ("abcdefghij", 4, "abcd"),
    ],
)
def test_clip_body(body: str, max_chars: int, clipped: str) -> None:
    assert clip_body(body, max_chars) == clipped


@given(st.text(alphabet="ab .!?\n\t)'eg", max_size=120), st.integers(1, 150))
def test_clip_body_is_a_beginning_that_fits(body: str, max_chars: int) -> None:
    clipped = clip_body(body, max_chars)
    assert len(clipped) <= max_chars
    assert body.startswith(clipped)
    assert clipped == clipped.rstrip()
    if len(body.rstrip()) <= max_chars:
        assert clipped == body.rstrip()


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=8), min_size=1, max_size=40), st.integers(8, 100))
def test_clip_body_cuts_no_word_that_fits(words: list[str], max_chars: int) -> None:
    clipped = clip_body(" ".join(words), max_chars)
    assert clipped.split(" ") == words[: len(clipped.split(" "))]


def test_clip_body_needs_room() -> None:
    with pytest.raises(ValueError, match="max_chars"):
        clip_body("text", 0)


def test_prompt_is_one_short_user_message(library: list[Docstring]) -> None:
    for d in library:
        (message,) = prompt_messages(d)
        assert message["role"] == "user"
        assert message["content"] == f"{corpus.INSTRUCTION}\n\n{clip_body(d.body)}"
        assert len(clip_body(d.body)) <= corpus.CLIP_CHARS
        assert len(clip_body(d.body)) >= min(corpus.BODY_CHARS[0], corpus.CLIP_CHARS // 2)


def test_prompt_can_be_shorter() -> None:
    d = Docstring("a", SUMMARY, "One sentence. Another sentence.")
    assert prompt_messages(d, max_chars=20)[0]["content"] == f"{corpus.INSTRUCTION}\n\nOne sentence."
