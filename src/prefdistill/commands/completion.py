"""`prefdistill completion bash|zsh|fish`: a script that lets the shell complete commands, options and their values."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

BASH = """_prefdistill() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$current"))
        return
    fi
    case "$before" in
{values}
    esac
    case " {stages} " in
        *" $command "*)
            if [[ "$current" == -* ]]; then
                COMPREPLY=($(compgen -W "{options}" -- "$current"))
                return
            fi
            ;;
    esac
    COMPREPLY=($(compgen -f -- "$current"))
}}
complete -o filenames -F _prefdistill prefdistill
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prefdistill completion",
        description='Prints a completion script. bash: eval "$(prefdistill completion bash)" in ~/.bashrc; zsh: the '
        "same in ~/.zshrc; fish: prefdistill completion fish > ~/.config/fish/completions/prefdistill.fish",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    print({"bash": bash, "zsh": zsh, "fish": fish}[parser.parse_args(argv).shell](), end="")
    return 0


def options_of(kind: Any, prefix: str = "--") -> list[str]:
    """Every flag of a run, nested options with their dots."""
    import typing

    found = []
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        found += options_of(types[field.name], name + ".") if dataclasses.is_dataclass(types[field.name]) else [name]
    return found


def known_values() -> dict[str, list[str]]:
    """Flags whose values are words of a list."""
    from prefdistill.config import RunConfig
    from prefdistill.training.methods import METHODS

    choices = {f"--{name}": list(allowed) for name, _, allowed in RunConfig().one_of()}
    return {"--methods": list(METHODS), **choices}


def _commands() -> tuple[list[str], list[str]]:
    from prefdistill.cli import COMMANDS, OTHERS

    return list(COMMANDS), [*COMMANDS, *OTHERS]


def bash() -> str:
    from prefdistill.config import RunConfig

    stages, commands = _commands()
    case = '        {})\n            COMPREPLY=($(compgen -W "{}" -- "$current"))\n            return\n            ;;'
    values = "\n".join(case.format(name, " ".join(words)) for name, words in known_values().items())
    return BASH.format(
        commands=" ".join(commands), stages=" ".join(stages), values=values, options=" ".join(options_of(RunConfig))
    )


def zsh() -> str:
    return "autoload -U +X bashcompinit && bashcompinit\n" + bash()


def fish() -> str:
    from prefdistill.config import RunConfig

    stages, commands = _commands()
    lines = [f"complete -c prefdistill -n __fish_use_subcommand -f -a '{' '.join(commands)}'"]
    values, under_way = known_values(), f"__fish_seen_subcommand_from {' '.join(stages)}"
    for option in options_of(RunConfig):
        words = f" -x -a '{' '.join(values[option])}'" if option in values else " -r"
        lines.append(f"complete -c prefdistill -n '{under_way}' -l {option[2:]}{words}")
    return "\n".join(lines) + "\n"
