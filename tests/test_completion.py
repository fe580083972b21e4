"""Completion scripts, run by the shells themselves."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from prefdistill.cli import COMMANDS, OTHERS, main
from prefdistill.commands.completion import bash, known_values, options_of
from prefdistill.config import RunConfig
from prefdistill.training.methods import METHODS

DRIVER = """
COMP_WORDS=({words})
COMP_CWORD={place}
_prefdistill
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(words: str) -> list[str]:
    """What bash offers for the last of these words."""
    listed = words.split(" ")
    quoted = " ".join(f"'{w}'" for w in listed)
    script = bash() + DRIVER.format(words=quoted, place=len(listed) - 1)
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_completes_commands_options_and_values():
    assert set(completed("prefdistill ")) == {*COMMANDS, *OTHERS}
    assert completed("prefdistill dis") == ["distill"]
    assert completed("prefdistill run --distill.be") == ["--distill.beta"]
    assert set(completed("prefdistill run --precision ")) == {"auto", "float32", "bfloat16"}
    assert set(completed("prefdistill distill --methods ")) == set(METHODS)
    assert completed("prefdistill run --distill.pessimism hull-") == ["hull-per-prompt"]


def test_every_option_is_one_that_the_command_line_takes(capsys):
    options = options_of(RunConfig)
    assert len(set(options)) == len(options) > 60
    assert main(["config"]) == 0
    written = capsys.readouterr().out
    for option in options:
        assert f"{option.rpartition('.')[2].lstrip('-')}:" in written, option
    assert set(known_values()) <= set(options)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "distill.beta" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
