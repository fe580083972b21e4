"""What mkdocs.yml hooks in: pages that lie outside docs/, parts of the README, and what the code itself can tell.

A comment that is a line of its own is replaced:

    <!-- include README.md -->               what stands above the README's first section, without its title
    <!-- include README.md#Two commands -->  the section of that heading, without the heading
    <!-- options -->                         every option of `prefdistill run`, from the dataclasses
    <!-- options of methods -->              which methods read which option
    <!-- help bias -->                       what `prefdistill bias --help` prints

Links are those of the repository: a link to a file that the site lacks becomes plain text.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import docstring_parser
import yaml
from mkdocs.structure.files import File

from prefdistill.config import RunConfig
from prefdistill.options import DistillOptions
from prefdistill.training.methods import METHODS, reads

ROOT = Path(__file__).parent.parent
# Files beside docs/ that the site shows, under the path that they have in the repository.
OUTSIDE = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *(f"benchmarks/{folder}{name}" for folder in ("", "avx512/", "avx2/") for name in ("RESULTS.md", "results.svg")),
)
# Files that the site shows under another name, or as a page made of them.
SHOWN_AS = {
    "README.md": "index.md",
    "src/prefdistill/options.py": "options.md",
    "src/prefdistill/config.py": "options.md",
}
MARKER = re.compile(r"^<!-- (include|options of methods|options|help)(?: (.+?))? -->$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = page.file.src_uri
    source = here if here in OUTSIDE else f"docs/{here}"
    out, end = [], 0
    for marker in MARKER.finditer(markdown):
        out += [_for_site(markdown[end : marker.start()], source, here), _made(*marker.groups(), here)]
        end = marker.end()
    return "".join([*out, _for_site(markdown[end:], source, here)])


def _made(kind: str, argument: str | None, here: str) -> str:
    if kind == "include":
        path, _, heading = str(argument).partition("#")
        return _for_site(_section(ROOT / path, heading), path, here)
    if kind == "help":
        return _help(str(argument))
    return _options() if kind == "options" else _options_of_methods()


def _section(path: Path, heading: str) -> str:
    """The text below a heading of level 2, or above the first of them."""
    parts = re.split(r"^## (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if not heading:
        return re.sub(r"\A# .+\n", "", parts[0]).strip()
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    if heading not in sections:
        raise KeyError(f"{path.name} has no section {heading!r}; it has {', '.join(sections)}")
    return sections[heading].strip()


# -- links -------------------------------------------------------------------------------------------------------------


def _for_site(text: str, source: str, here: str) -> str:
    """Markdown of the repository's file `source` as the site's page `here` must have it; fences stay as they are."""
    out, end = [], 0
    for fence in FENCE.finditer(text):
        out += [_prose(text[end : fence.start()], source, here), fence.group()]
        end = fence.end()
    return "".join([*out, _prose(text[end:], source, here)])


def _prose(text: str, source: str, here: str) -> str:
    # In a table GitHub wants bars escaped inside code too; Python-Markdown would show the backslash.
    text = re.sub(r"`[^`\n]*`", lambda code: code.group().replace("\\|", "|"), text)
    return LINK.sub(lambda link: _link(*link.groups(), source, here), text)


def _link(image: str, text: str, target: str, source: str, here: str) -> str:
    path, mark, anchor = target.partition("#")
    if not path or ":" in path:
        return f"{image}[{text}]({target})"
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    shown = SHOWN_AS.get(file) or (file if file in OUTSIDE else file.removeprefix("docs/"))
    if shown == file and file not in OUTSIDE and (ROOT / file).exists():
        return text
    return f"{image}[{text}]({posixpath.relpath(shown, posixpath.dirname(here) or '.')}{mark}{anchor})"


# -- what the code tells -----------------------------------------------------------------------------------------------


def _options() -> str:
    """A table a section, in the order of the dataclasses."""
    words = {name: allowed for name, _, allowed in RunConfig().one_of()}
    out = ["## of the run", _table(RunConfig, "", words)]
    for name, kind in _sections(RunConfig).items():
        out += [f"## {name}", docstring_parser.parse(kind.__doc__ or "").short_description or ""]
        out.append(_table(kind, f"{name}.", words))
    return "\n\n".join(out)


def _sections(kind: Any) -> dict[str, Any]:
    return {name: t for name, t in typing.get_type_hints(kind).items() if dataclasses.is_dataclass(t)}


def _table(kind: Any, prefix: str, words: dict[str, tuple[str, ...]]) -> str:
    said = {p.arg_name: p.description or "" for p in docstring_parser.parse(kind.__doc__ or "").params}
    usual = kind()
    rows = ["| option | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        if field.name in _sections(kind):
            continue
        name = prefix + field.name
        meaning = " ".join(said[field.name].split()).replace("|", "\\|")
        if name in words:
            meaning += " One of " + ", ".join(f"`{word}`" for word in words[name]) + "."
        rows.append(f"| `{name}` | {_type(str(field.type))} | {_default(getattr(usual, field.name))} | {meaning} |")
    return '<div class="options" markdown>\n\n' + "\n".join(rows) + "\n\n</div>"


def _type(annotation: str) -> str:
    return " or ".join("null" if part == "None" else f"`{part}`" for part in annotation.split(" | "))


def _default(value: Any) -> str:
    """As the YAML has it."""
    return f"`{yaml.safe_dump([value], default_flow_style=True, width=1000).strip()[1:-1]}`"


def _options_of_methods() -> str:
    """Options that every method reads are left out."""
    rows = ["| option | read by |", "|---|---|"]
    for field in dataclasses.fields(DistillOptions):
        readers = [m for m in METHODS if reads(m, field.name)]
        if len(readers) < len(METHODS):
            rows.append(f"| `distill.{field.name}` | " + ", ".join(f"`{m}`" for m in readers) + " |")
    return "\n".join(rows)


def _help(command: str) -> str:
    told = subprocess.run(
        [sys.executable, "-m", "prefdistill", command, "--help"],
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return f"```text\n{told.stdout.rstrip()}\n```"
