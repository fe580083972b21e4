"""`prefdistill completion bash|zsh|fish`: a script that lets the shell complete commands, options and their values."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from importlib import import_module
from typing import Any

# An option may be written with hyphens or underscores; bash makes words of --option=value at the equals sign.
BASH = """_prefdistill() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}"
    local flags choices
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$current"))
        return
    fi
    if [ "$current" = "=" ]; then
        current=""
    elif [ "$before" = "=" ]; then
        before="${{COMP_WORDS[COMP_CWORD-2]}}"
    fi
    before="${{before#--}}"
    case "${{before//-/_}}" in
{values}
    esac
    case "$command" in
{own}
    esac
    if [[ "$current" != -* ]]; then
        COMPREPLY=($(compgen -W "$choices" -- "$current") $(compgen -f -- "$current"))
        return
    fi
    case " {of_a_run} " in
        *" $command "*)
            case "$current" in
                *_*) flags="$flags {underscored}" ;;
                *) flags="$flags {hyphened}" ;;
            esac
            ;;
    esac
    COMPREPLY=($(compgen -W "--help $flags" -- "$current"))
}}
complete -o filenames -F _prefdistill prefdistill
"""
WITH_OPTIONS_OF_A_RUN = ("sweep", "experiment")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="prefdistill completion",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Prints a completion script, to be written once where the shell looks for it:\n\n"
        "  bash: prefdistill completion bash > ~/.local/share/bash-completion/completions/prefdistill\n"
        "  zsh:  prefdistill completion zsh > ~/.prefdistill.zsh, and `source ~/.prefdistill.zsh` in ~/.zshrc\n"
        "  fish: prefdistill completion fish > ~/.config/fish/completions/prefdistill.fish",
    )
    made.add_argument("shell", choices=("bash", "zsh", "fish"))
    return made


def main(argv: list[str]) -> int:
    print({"bash": bash, "zsh": zsh, "fish": fish}[parser().parse_args(argv).shell](), end="")
    return 0


def options_of(kind: Any, prefix: str = "--") -> list[str]:
    """Every flag of a dataclass of options, nested ones with their dots."""
    found = []
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        found += options_of(types[field.name], name + ".") if dataclasses.is_dataclass(types[field.name]) else [name]
    return found


def run_options() -> list[str]:
    """Every flag of a run, with underscores."""
    from prefdistill.cli import SHORT
    from prefdistill.config import RunConfig

    return ["--config", "--print_config", *SHORT, *options_of(RunConfig)]


def known_values() -> dict[str, list[str]]:
    """Flags of a run whose values are words of a list."""
    from prefdistill.cli import SHORT
    from prefdistill.config import RunConfig
    from prefdistill.training.methods import METHODS

    values = {"--methods": list(METHODS)}
    values |= {f"--{name}": list(allowed) for name, _, allowed in RunConfig().one_of()}
    return values | {short: values[name] for short, name in SHORT.items() if name in values}


def own_options(command: str) -> tuple[list[str], list[str]]:
    """The flags of a command that is no stage of a run, and the words that may stand in it without one."""
    from prefdistill.cli import OTHERS

    actions = import_module(OTHERS[command][1]).parser()._actions
    flags = [flag for action in actions for flag in action.option_strings if flag not in ("-h", "--help")]
    return flags, [str(c) for action in actions if not action.option_strings for c in action.choices or ()]


def _stages() -> list[str]:
    from prefdistill.cli import COMMANDS

    return [*COMMANDS, *WITH_OPTIONS_OF_A_RUN]


def bash() -> str:
    from prefdistill.cli import COMMANDS, OTHERS

    value = '        {})\n            COMPREPLY=($(compgen -W "{}" -- "$current"))\n            return\n            ;;'
    own = '        {}) flags="{}" choices="{}" ;;'
    options = run_options()
    return BASH.format(
        commands=" ".join([*COMMANDS, *OTHERS]),
        values="\n".join(value.format(name[2:], " ".join(words)) for name, words in known_values().items()),
        own="\n".join(own.format(name, *map(" ".join, own_options(name))) for name in OTHERS),
        of_a_run=" ".join(_stages()),
        underscored=" ".join(options),
        hyphened=" ".join(option.replace("_", "-") for option in options),
    )


def zsh() -> str:
    return "autoload -U +X bashcompinit && bashcompinit\n" + bash()


def fish() -> str:
    from prefdistill.cli import COMMANDS, OTHERS

    start, under_way = "complete -c prefdistill -n", "'__fish_seen_subcommand_from {}'"
    told = {**COMMANDS, **{name: does for name, (does, _) in OTHERS.items()}}
    lines = [f"{start} __fish_use_subcommand -f -a {name} -d {_quoted(does)}" for name, does in told.items()]
    values, of_a_run = known_values(), under_way.format(" ".join(_stages()))
    for option in run_options():
        words = f" -x -a '{' '.join(values[option])}'" if option in values else " -r"
        for form in dict.fromkeys((option.replace("_", "-"), option)):
            lines.append(f"{start} {of_a_run} -l {form[2:]}{words}")
    for name in OTHERS:
        flags, choices = own_options(name)
        lines += [f"{start} {under_way.format(name)} -l {flag[2:]}" for flag in flags]
        lines += [f"{start} {under_way.format(name)} -f -a '{' '.join(choices)}'"] if choices else []
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
