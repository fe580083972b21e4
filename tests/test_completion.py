"""Completion scripts, run by the shells themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from prefdistill.cli import COMMANDS, OTHERS, main
from prefdistill.commands.completion import bash, fish, known_values, run_options, zsh
from prefdistill.training.methods import METHODS

DRIVER = """
COMP_WORDS=({words})
COMP_CWORD={place}
_prefdistill
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


# As zsh calls the functions of bash that it is given (`_bash_complete` of bashcompinit).
ZSH = "autoload -U +X compinit && compinit -u -D\n{script}\ncalled() {{ emulate -L ksh\n{driver}\n}}\ncalled"


def completed(words: str, shell: str = "bash") -> list[str]:
    """What bash offers for the last of these words, or zsh."""
    listed = words.split(" ")
    quoted = " ".join(f"'{w}'" for w in listed)
    driver = DRIVER.format(words=quoted, place=len(listed) - 1)
    if shell == "zsh":
        call = ["zsh", "--no-rcs", "-c", ZSH.format(script=zsh(), driver=driver)]
    else:
        call = ["bash", "--norc", "-c", bash() + driver]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


def completed_by_fish(line: str) -> list[str]:
    """What fish offers at the end of a line."""
    script = fish() + f"\ncomplete -C {line!r}"
    done = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True, check=True)
    return [offer.split("\t")[0] for offer in done.stdout.splitlines()]


def flags_in_help(command: str) -> set[str]:
    """What the command itself says that it takes."""
    shown = subprocess.run(
        [sys.executable, "-m", "prefdistill", command, "--help"], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r"(?<![\w`-])--[a-z][\w.-]*", shown.partition("options:")[2]))


zsh_only = pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh on this machine")
bash_only = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
fish_only = pytest.mark.skipif(shutil.which("fish") is None, reason="no fish on this machine")


@bash_only
def test_bash_completes_commands_options_and_values():
    assert set(completed("prefdistill ")) == {*COMMANDS, *OTHERS}
    assert completed("prefdistill dis") == ["distill"]
    assert completed("prefdistill run --distill.be") == ["--distill.beta"]
    assert set(completed("prefdistill run --precision ")) == {"auto", "float32", "bfloat16"}
    assert set(completed("prefdistill distill --methods ")) == set(METHODS)
    assert completed("prefdistill run --distill.pessimism hull-") == ["hull-per-prompt"]
    assert completed("prefdistill run --config pyproj") == ["pyproject.toml"]


@bash_only
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("run --output-d", ["--output-dir"]),
        ("run --output_d", ["--output_dir"]),
        ("run --on-b", ["--on-bad-row"]),
        ("run --on-bad-row d", ["drop"]),
        ("run --dataset.on-bad-row s", ["stop"]),
        ("run --dataset.on_bad_row s", ["stop"]),
        ("run --precision = fl", ["float32"]),
        ("run --precision =", ["auto", "float32", "bfloat16"]),
        ("sweep --gri", ["--grid"]),
        ("sweep --distill.kl-a", ["--distill.kl-alpha"]),
        ("experiment len", ["length-bias"]),
        ("experiment --dataset.test-f", ["--dataset.test-fraction"]),
        ("completion f", ["fish"]),
        ("judge --pri", ["--price"]),
        ("judge --distill", []),
    ],
)
def test_bash_completes_both_forms_and_every_command(words, offered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no file of these names
    assert completed(f"prefdistill {words}") == offered


@bash_only
@pytest.mark.parametrize("command", ["run", *OTHERS])
def test_what_a_command_takes_is_offered(command):
    taken = {flag.replace("_", "-") for flag in flags_in_help(command)}
    sections = {flag.partition(".")[0] for flag in taken if "." in flag}  # each may be given as a YAML of its own
    assert taken - sections <= set(completed(f"prefdistill {command} --"))


@zsh_only
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("dis", ["distill"]),
        ("run --output-d", ["--output-dir"]),
        ("run --on-bad-row d", ["drop"]),
        ("experiment len", ["length-bias"]),
        ("judge --pri", ["--price"]),
    ],
)
def test_zsh_completes(words, offered):
    last = words.rpartition(" ")[2]
    assert [w for w in completed(f"prefdistill {words}", "zsh") if w.startswith(last)] == offered  # as zsh filters them


@fish_only
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("prefdistill dis", ["distill"]),
        ("prefdistill run --output-d", ["--output-dir"]),
        ("prefdistill run --output_d", ["--output_dir"]),
        ("prefdistill run --on-bad-row d", ["drop"]),
        ("prefdistill judge --pri", ["--price"]),
        ("prefdistill experiment len", ["length-bias"]),
        ("prefdistill sweep --distill.pessimism hull-", ["hull-per-prompt"]),
    ],
)
def test_fish_completes(line, offered):
    assert completed_by_fish(line) == offered


def test_every_option_is_one_that_the_command_line_takes(capsys):
    options = [o for o in run_options() if o not in ("--config", "--print_config", "--on_bad_row")]
    assert len(set(options)) == len(options) > 60
    assert main(["config"]) == 0
    written = capsys.readouterr().out
    for option in options:
        assert f"{option.rpartition('.')[2].lstrip('-')}:" in written, option
    assert set(known_values()) <= set(run_options())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "distill.beta" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
