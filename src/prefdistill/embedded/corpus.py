"""A TL;DR task that every machine already has: the docstrings of the running Python's standard library.

Python's style guide asks for a docstring whose first line sums up the rest, so the library holds well over a
thousand pairs of a text and a one-line summary written by a person.  The source files are parsed with `ast`;
no module is imported and nothing is downloaded.

A docstring of a module, a class or a function is kept when all of these hold:

* its first line, the *summary*, has 20 to 100 characters and at least two words, and is followed by a blank line;
* the rest after the blank line, the *body*, has 150 to 1500 characters;
* the summary is one sentence: no second sentence starts in it, and it does not break off at a comma, a colon,
  a semicolon, a dash or an opening bracket;
* the summary is prose: not a signature (`name(args) -> value`) nor a grammar rule (`name = ...`), and at
  least four fifths of its characters are letters, digits, underscores or white space, some of them letters;
* at most half of the non-blank lines of the body belong to doctest examples;
* neither its summary nor its body was seen before, comparing without letter case and runs of white space.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefdistill.errors import DataError

SUMMARY_CHARS = (20, 100)
"""Fewest and most characters of a summary."""
BODY_CHARS = (150, 1500)
"""Fewest and most characters of a body."""
MIN_SUMMARY_WORDS = 2
"""Fewest words of a summary; `distutils.command.build_ext` is a name, not a summary."""
MIN_PROSE_SHARE = 0.8
"""Smallest share of a summary's characters that are letters, digits, underscores or white space."""
MAX_DOCTEST_SHARE = 0.5
"""Largest share of a body's non-blank lines that doctest examples may take."""
CLIP_CHARS = 380
"""Most characters of a body in a prompt: with the instruction this is about 100 tokens."""
INSTRUCTION = "Summarise this Python documentation in one short sentence."
"""What the prompt asks for; the body follows after a blank line."""

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

_SIGNATURE = re.compile(
    r"""^[\w.]+(?:\(.*\))?\s*(?:->|=>|=|::=)     # name(args) -> value, name -> value, name = rule
       | ^[\w.]+\(.*\)[.:;]?$                   # name(args)
       | ^[\w-]+\s=\s                           # bare-quoted-string = DQUOTE
       | ^\w+(?:\(\w+\))?\s\[                  # l(ist) [first [,last]], a debugger command
       | ^[a-z_].*\s[-=]>\s                     # uri [,options] -> a connection
    """,
    re.VERBOSE,
)
_ABBREVIATION = re.compile(r"\b(?:e\.g|eg|i\.e|a\.k\.a|etc|vs|cf)\.$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"""[.!?]["'`)\]]*(?=\s)""")
_BROKEN_OFF = (":", ",", ";", "-", "–", "—", "(", "[", "{", "\\")
_BLANK_START = re.compile(r"\A(?:[ \t]*\n)+")
_PARAGRAPH_END = re.compile(r"(?=\n[ \t]*\n)")
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


@dataclass(frozen=True)
class Docstring:
    """One docstring, split into the line a person wrote to sum it up and the text summed up."""

    name: str
    """Dotted name of what it documents, e.g. `json.decoder.JSONDecoder.raw_decode`."""
    summary: str
    """The first line."""
    body: str
    """Everything after the blank line that follows the first line."""


def collect_docstrings(root: Path | None = None) -> list[Docstring]:
    """Collect the docstrings with a summary line from the Python source files below `root`.

    `root` is the running Python's standard library unless given.  Files that this Python cannot parse are passed
    over, as are test suites and installed packages.  The order is that of the files' paths and, within a file,
    of the source; of docstrings with the same summary or the same body the first is kept.

    Raises DataError where `root` holds no such docstring, as in a Python shipped without its source files.
    """
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    found: list[Docstring] = []
    summaries: set[str] = set()
    bodies: set[str] = set()
    for path in _source_files(folder):
        for name, text in _docstrings_of(path, _module_name(path.relative_to(folder))):
            parts = split_docstring(text)
            if parts is None:
                continue
            summary, body = parts
            summary_key, body_key = _key(summary), _key(body)
            if summary_key in summaries or body_key in bodies:
                continue
            summaries.add(summary_key)
            bodies.add(body_key)
            found.append(Docstring(name=name, summary=summary, body=body))
    if not found:
        raise DataError(
            f"{folder} holds no Python source file with a summarised docstring; "
            "run with a Python that ships its standard library as .py files"
        )
    return found


def split_docstring(text: str) -> tuple[str, str] | None:
    """Return summary and body of a docstring, or None where it breaks one of the rules in the module docstring."""
    first, _, rest = inspect.cleandoc(text).partition("\n")
    gap, _, after = rest.partition("\n")
    summary, body = first.strip(), _BLANK_START.sub("", after).rstrip()
    if gap.strip() or not is_summary(summary):
        return None
    if not BODY_CHARS[0] <= len(body) <= BODY_CHARS[1] or doctest_share(body) > MAX_DOCTEST_SHARE:
        return None
    return summary, body


def is_summary(line: str) -> bool:
    """Whether the line reads as one prose sentence of the right length (it need not end with a full stop)."""
    if not SUMMARY_CHARS[0] <= len(line) <= SUMMARY_CHARS[1] or len(line.split()) < MIN_SUMMARY_WORDS:
        return False
    if not any(character.isalpha() for character in line):
        return False
    prose = sum(character.isalnum() or character == "_" or character.isspace() for character in line)
    if prose < MIN_PROSE_SHARE * len(line):
        return False
    return not line.endswith(_BROKEN_OFF) and _SIGNATURE.search(line) is None and _is_one_sentence(line)


def doctest_share(body: str) -> float:
    """Share of the non-blank lines that belong to doctest examples: from a `>>>` line to the next blank line."""
    inside = False
    total = examples = 0
    for line in body.splitlines():
        stripped = line.strip()
        if not stripped:
            inside = False
            continue
        inside = inside or stripped.startswith(">>>")
        total += 1
        examples += inside
    return examples / total if total else 0.0


def clip_body(body: str, max_chars: int = CLIP_CHARS) -> str:
    """Shorten a body to at most `max_chars` characters, cutting where it hurts least.

    The cut is at the last end of a paragraph, else of a sentence, that keeps at least half of `max_chars`; else
    at the last end of a word; a single word longer than `max_chars` is cut within.  Nothing is added, so the
    result is always a beginning of `body`.
    """
    if max_chars < 1:
        raise ValueError(f"max_chars must be at least 1, not {max_chars}")
    body = body.rstrip()
    if len(body) <= max_chars:
        return body
    ends = (
        [match.start() for match in _PARAGRAPH_END.finditer(body)],
        [match.end() for match in _SENTENCE_END.finditer(body) if not _ABBREVIATION.search(body[: match.start() + 1])],
        [match.start() for match in _WORD_END.finditer(body)],
    )
    for positions, fewest in zip(ends, (max_chars / 2, max_chars / 2, 1), strict=True):
        fitting = [position for position in positions if fewest <= position <= max_chars]
        if fitting:
            return body[: fitting[-1]].rstrip()
    return body[:max_chars].rstrip()


def prompt_messages(d: Docstring, max_chars: int = CLIP_CHARS) -> list[dict[str, str]]:
    """Return the chat prompt: one user message that asks for the one-line summary of the clipped body."""
    return [{"role": "user", "content": f"{INSTRUCTION}\n\n{clip_body(d.body, max_chars)}"}]


def _source_files(folder: Path) -> list[Path]:
    """Return the .py files below the folder, tests and installed packages left out, in an order fit to repeat."""
    files = [
        path for path in folder.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts[:-1])
    ]
    return sorted(files, key=lambda path: path.relative_to(folder).parts)


def _module_name(relative: Path) -> str:
    """Return the dotted module name of a source file, given its path below the library's folder."""
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _docstrings_of(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the raw docstring of the module and all that it defines, in source order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's source
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return
    yield from _walk(tree, module)


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield the docstring of the node, if it has one, and then those of all definitions within it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _walk(child, name)


def _is_one_sentence(line: str) -> bool:
    """Whether no full stop, question mark or exclamation mark ends a sentence before the end of the line."""
    return all(_ABBREVIATION.search(line[: match.start() + 1]) for match in _SENTENCE_END.finditer(line))


def _key(text: str) -> str:
    """Return the text as compared for duplicates."""
    return " ".join(text.casefold().split())
