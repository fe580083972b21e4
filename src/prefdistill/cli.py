"""The command line: parsing and help. Every option of the YAML is a flag of the same name."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from prefdistill.stopping import Terminated, terminable

COMMANDS = {
    "run": "all stages: pairs to policy to report",
    "sft": "up to the supervised start",
    "reward": "up to the trained reward models",
    "score": "up to the columns of reference log-probs and rewards",
    "distill": "up to the trained policies",
    "evaluate": "up to the comparison with the starting policy",
    "report": "up to the report",
    "config": "print a YAML with every option at its value",
}

STAGE_OF = {"sft": "start"}

# Commands that are no stage of a run: what they do, and the module whose `main` takes their flags.
OTHERS = {
    "bias": ("D_rho of any data: a fraction rho of the pairs prefers the longer response", "prefdistill.commands.bias"),
    "completion": ("a script for bash, zsh or fish to complete by", "prefdistill.commands.completion"),
    "diagnose": ("what ails a run, with numbers, thresholds and remedies", "prefdistill.commands.diagnose"),
    "experiment": ("the paper's: length-bias, helpfulness", "prefdistill.commands.experiment"),
    "judge": ("an LLM's win rates for a run's samples, each pair in both orders", "prefdistill.commands.judge"),
    "push": ("a policy's model card, and the policy to the hub", "prefdistill.commands.push"),
    "sweep": ("beta, alpha, checkpoints chosen on validation prompts, then tested", "prefdistill.commands.sweep"),
    "theory": ("the paper's claims in a small exact world, as a page", "prefdistill.commands.theory"),
}

USAGE = """usage: prefdistill COMMAND [CONFIG.yaml] [--option value ...]

Robust preference optimisation by reward model distillation.

{commands}

  prefdistill run --data pairs.jsonl --model MODEL --output-dir runs/mine
  prefdistill run config.yaml --distill.beta 0.2
  prefdistill COMMAND --help     every option

A stage that is done is not done again: the same command twice does nothing the second time, and a run that was
stopped goes on where it was.
"""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 ill (`diagnose`), 2 what a user can mend, 130 interrupted, 143 terminated."""
    argv = list(sys.argv[1:] if argv is None else argv)
    all_commands = {**COMMANDS, **{name: does for name, (does, _) in OTHERS.items()}}
    commands = "\n".join(f"  {name:<10} {does}" for name, does in all_commands.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(commands=commands))
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("prefdistill"))
        return 0
    if argv[0] not in all_commands:
        print(f"prefdistill: unknown command {argv[0]!r}; use one of {', '.join(all_commands)}", file=sys.stderr)
        return 2
    with terminable():
        return _command(argv[0], argv[1:])


def _command(command: str, argv: list[str]) -> int:
    from prefdistill import ranks
    from prefdistill.errors import ConfigError, PrefdistillError, is_disk_full, is_out_of_memory

    # Libraries' bars go away; tqdm reads this when it is imported, which parsing may do.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        if command in OTHERS:
            if ranks.launched() > 1:
                raise ConfigError(f"{command} works in one process; start it without torchrun or accelerate launch")
            return int(import_module(OTHERS[command][1]).main(argv))
        config = parse(command, argv)
        if command == "config":
            config.check()
            print(config.as_yaml(), end="")
            return 0
        quiet()
        from prefdistill import pipeline

        pipeline.run(config, until=None if command == "run" else STAGE_OF.get(command, command))
    except PrefdistillError as error:
        who = "" if ranks.is_main() else f" (process {os.environ['RANK']} of the launch)"
        print(f"prefdistill{who}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if is_disk_full(error):
            what, remedy = "the disk is full", "make room (there, or where temporary files go, $TMPDIR)"
        elif is_out_of_memory(error):
            what = "there is no memory left"
            remedy = (
                "set gradient_checkpointing: always, fewer prompts a batch (batch_prompts), a smaller "
                "score.token_budget, an adapter (lora_rank; reward.hold: lora or head) or load_in_4bit"
            )
        else:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(
            f"prefdistill: {what} ({reason}); what was finished is kept: {remedy}, and the same command goes on",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stop:
        told = isinstance(stop, Terminated)
        print(f"prefdistill: {'terminated' if told else 'interrupted'}; the same command goes on", file=sys.stderr)
        return 143 if told else 130
    if command in ("run", "evaluate", "report") and ranks.is_main():
        _print_summary(config)
    return 0


def parse(command: str, argv: list[str]) -> Any:
    """A RunConfig from a YAML file (first, if there is one) and flags, which win."""
    from jsonargparse import ArgumentParser

    from prefdistill.config import RunConfig
    from prefdistill.errors import ConfigError

    # --output-dir and --output_dir are one, as users of other trainers write both.
    argv = _lists([_underscored(a) for a in argv])
    if argv and not argv[0].startswith("-"):
        if not os.path.isfile(argv[0]):
            raise ConfigError(f"the configuration file {argv[0]} does not exist; give a YAML file, or flags alone")
        argv = ["--config", *argv]
    # A section's option takes a file with its options too.
    sections = [f.name for f in fields(RunConfig) if is_dataclass(f.default_factory)]
    for option, value in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name, given, inline = option.removeprefix("--").partition("=")
        if name in ("config", *sections) and os.path.isfile(file := inline if given else value):
            _check_file(Path(file))
    parser = ArgumentParser(prog=f"prefdistill {command}", description=COMMANDS[command], exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    parser.add_class_arguments(RunConfig, as_group=False)
    try:
        parsed = parser.parse_args(argv)
    except Exception as error:
        # jsonargparse raises several kinds, argparse's own among them; all of them mean a wrong option.
        raise ConfigError(_short(error)) from error
    values = parser.instantiate_classes(parsed)
    names = RunConfig.__dataclass_fields__
    return RunConfig(**{name: getattr(values, name) for name in names})


def _check_file(file: Path) -> None:
    """Raises ConfigError for a file that is no mapping of options, or that would have the parser import something."""
    import yaml

    from prefdistill.errors import ConfigError

    try:
        text = file.read_text(encoding="utf-8")
        named = any("class_path" in str(getattr(event, "value", "")) for event in yaml.parse(text, yaml.SafeLoader))
        read = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} is no YAML that can be read: {_short(error)}") from error
    if named:
        # The parser would import the module that it names.
        raise ConfigError(f"{file} names a class_path, which no option takes; remove it")
    if not isinstance(read, dict):
        raise ConfigError(f"{file} holds no options; write lines such as `model: ORG/NAME` (prefdistill config)")
    if "config" in read:
        raise ConfigError(f"{file} has the key 'config', which is for the command line alone; remove it")
    blank = [name for name, value in read.items() if value is None]
    if blank:
        raise ConfigError(f"{file}: {blank[0]} has no value; give it one, or leave its line out for the usual one")


def opened(folder: Path) -> Any:
    """The Run of a run directory, with the options that it was run with.

    Raises:
        ConfigError: the folder is none.
    """
    from prefdistill.errors import ConfigError
    from prefdistill.stages.run import Run

    configuration = folder / "config.yaml"
    if not configuration.is_file():
        raise ConfigError(f"{folder} is no run directory: it has no config.yaml; give the output_dir of a run")
    return Run(parse("run", [str(configuration), "--output_dir", str(folder)]))


@contextlib.contextmanager
def opened_alone(folder: Path) -> Iterator[Any]:
    """As `opened`, and held until the block ends.

    Raises:
        ConfigError: the folder is no run directory, or another process holds it.
    """
    from prefdistill.lock import held

    opened(folder)  # holding it would make a folder that is none
    with held(folder):
        yield opened(folder)  # what a run beside had not yet written


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    name = "--" + name[2:].replace("-", "_")
    return SHORT.get(name, name) + equals + value


SHORT = {"--on_bad_row": "--dataset.on_bad_row"}
LISTS = ("--methods", "--report_to", "--reward.rho", "--reward.models", "--reward.pretrained", "--distill.members")


def _lists(argv: list[str]) -> list[str]:
    """Lets a list be written a,b as well as [a, b]."""
    out = []
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if equals and name in LISTS and not value.startswith("["):
            argument = f"{name}=[{value}]"
        elif i and argv[i - 1] in LISTS and not argument.startswith("["):
            argument = f"[{argument}]"
        out.append(argument)
    return out


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:4]) + " (see --help)"


def quiet() -> None:
    """Leaves the terminal to the stages: libraries' bars and advice go away, warnings of ours stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="    warning: %(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|transformers|peft|accelerate")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises as soon as peft finds it installed
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _print_summary(config: Any) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from prefdistill.atomic import read_json
    from prefdistill.stages.run import Run

    run = Run(config)
    summary = read_json(run.evaluation_path / "summary.json")
    table = Table(
        title=f"{summary['prompts']} {summary['split']} prompts, judge: {summary['judge']['name']}", box=SIMPLE
    )
    for column in ("method", "advantage\n[95%]", "win rate\n[95%]", "KL", "tokens", "chosen\nlogp"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for name, m in summary["methods"].items():
        table.add_row(
            name,
            _interval(m["advantage"], "{:+.2f}"),
            _interval(m["win_rate"], "{:.0%}"),
            _number(m["kl_policy_ref"]["mean"], "{:.2f}"),
            _number(m["length_mean"], "{:.1f}"),
            _number(m["chosen_logp_change"], "{:+.2f}"),
        )
    console = Console()
    console.print(table)
    console.print(summary["verdict"], markup=False)
    for warning in summary["warnings"]:
        word = "note" if warning.get("state") == "watch" else "warning"
        console.print(f"{word}: {warning['text']} {warning['what_to_do']}", markup=False)
    console.print(f"report: {run.report_path}", markup=False)


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else form.format(value)


def _interval(estimate: dict[str, Any] | None, form: str) -> str:
    if estimate is None:
        return "n/a"
    low, high = (_number(v, form) for v in estimate["ci95"])
    return f"{_number(estimate['mean'], form)} [{low}, {high}]"


if __name__ == "__main__":
    sys.exit(main())
