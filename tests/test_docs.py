"""The documentation holds: the site builds, and what the pages show runs (commands, Python, rows of data, YAML)."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import huggingface_hub
import pytest

from judge_server import Server
from prefdistill import RunConfig
from prefdistill.cli import COMMANDS, OTHERS, SHORT, main, parse
from prefdistill.commands.completion import options_of
from prefdistill.data.formats import to_pair
from prefdistill.experiments import comparison, sweep
from prefdistill.theory import lab
from tiny_models import tiny
from tiny_runs import WORDS, write_rows

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")

# What the pages call by names of the hub is a tiny model here, and the judge's address a server of this process.
MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-0.6B-Base")
ENDPOINT = "http://localhost:8000/v1"
MAIN = "prefdistill run --data pairs.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --output-dir runs/mine"
SMALL = {
    "precision": "float32",
    "evaluate.max_new_tokens": 6,
    "sample.max_new_tokens": 6,
    "evaluate.chosen_prompts": 4,
    "distill.lora_rank": 2,
    "reward.lora_rank": 2,
    "reward.members": 2,
}

NOT_RUN = {
    "make quickstart": "runs for minutes; tests/test_embedded.py loads its model, `make test-slow` runs it",
    "make test": "runs this test",
    "make setup": "makes an environment from the network; CI has done so before it comes here",
    "source .venv/bin/activate": "of the shell alone",
}
# How launchers are started here, in two processes on a processor, and on a port that is free.
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
    "accelerate launch": [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0"],
}
OF_LAUNCHERS = ("--nnodes", "--rdzv-endpoint", "--num_processes")
# Parsed to their end, and stopped where the work would begin.
STOPPED = {
    "prefdistill experiment length-bias --quick": "runs for half an hour, on the real embedded model",
    "prefdistill experiment helpfulness --data hh.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct": "runs for hours",
    "prefdistill sweep CONFIG.yaml --methods dpo,e-dpo --grid beta=0.05,0.1,0.2 --grid kl_alpha=0,0.01 "
    "--distill.checkpoints 3": "nine trainings; the other sweeps are run",
    "prefdistill theory": "takes half a minute; tests/test_theory.py has the numbers",
    "prefdistill theory --output-dir runs/theory": "the same",
}


def fences(kind: str) -> list[typing.Any]:
    """Every fence of this kind, as a parameter named after its page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for fence in FENCE.finditer(text):
            if fence.group(1) == kind:
                where = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, fence.start()) + 1}"
                found.append(pytest.param(fence.group(2), id=where))
    return found


def commands_of(fence: str) -> list[str]:
    """The commands of a fence, each in one line, without comments."""
    lines = re.sub(r"\s*\\\n\s*", " ", fence).splitlines()
    return [command for line in lines if (command := re.sub(r"\s+#\s.*|^#.*", "", line).strip())]


ALL_COMMANDS = [command for fence in fences("bash") for command in commands_of(fence.values[0])]


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_folder):
    """A folder as a reader has it: pairs, configurations, and the run of the first page."""
    folder = tmp_path_factory.mktemp("docs")
    draw = random.Random(0)
    text = lambda k: " " + " ".join(draw.choices(WORDS, k=k))  # noqa: E731
    # Half of the chosen responses are the longer ones.
    rows = [
        {"prompt": f"Describe{text(4)}:", "chosen": text(3 + 3 * (i % 2)), "rejected": text(6 - 3 * (i % 2))}
        for i in range(30)
    ]
    write_rows(folder / "pairs.jsonl", rows)
    (folder / "hh.jsonl").write_text((folder / "pairs.jsonl").read_text())
    (folder / "examples").mkdir()
    here = {"data: embedded": "data: pairs.jsonl", "model: embedded": f"model: {MODELS[0]}"}
    here |= {"prefdistill.embedded.oracle:score_rows": "heldout"} | dict.fromkeys(MODELS, str(model_folder))
    for example in (ROOT / "examples").glob("*.yaml"):
        content = example.read_text(encoding="utf-8")
        for there, instead in here.items():
            content = content.replace(there, instead)
        (folder / "examples" / example.name).write_text(content, encoding="utf-8")
    shutil.copytree(ROOT / "examples" / "accelerate", folder / "examples" / "accelerate")
    (folder / "CONFIG.yaml").write_text((folder / "examples" / "pairs.yaml").read_text())
    with pytest.MonkeyPatch.context() as patch, Server() as server:
        patch.chdir(folder)
        patch.setenv("OPENAI_API_KEY", "none")
        names = {**dict.fromkeys(MODELS, str(model_folder)), ENDPOINT: server.url}
        carry_out(MAIN, names)
        yield names


def carry_out(command: str, names: dict[str, str]) -> None:
    """A command as the shell would run it, in this process, made small."""
    words = [names.get(word, word) for word in shlex.split(command)]
    for launcher, started in LAUNCHERS.items():
        if command.startswith(launcher):
            launch([*started, *words[len(launcher.split()) :]])
            return
    assert words[0] == "prefdistill", f"{command!r} is no command that this test can run: see NOT_RUN"
    argv, written = words[1:], io.StringIO()
    into = None
    if ">" in argv:
        argv, into = argv[: argv.index(">")], argv[argv.index(">") + 1]
    if argv[0] in COMMANDS or argv[0] == "sweep":
        argv += [f"--{option}={value}" for option, value in SMALL.items() if f"--{option}" not in argv]
    with contextlib.redirect_stdout(written):
        status = main(argv)
    assert status in ((0, 1) if argv[0] == "diagnose" else (0,)), command
    if into is not None:
        assert written.getvalue(), command
        Path(into).write_text(written.getvalue(), encoding="utf-8")


def launch(command: list[str]) -> None:
    """A command of a launcher, made small, in two processes whatever it says, into a run directory of its own."""
    place = command.index("-m", 3)
    if "accelerate.commands.launch" in command:
        command = [*command[:place], "--num_processes=2", *command[place:]]
    flags = [f"--{option}={value}" for option, value in SMALL.items()] + ["--output_dir=runs/launched"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([*command, *flags], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left in all" in done.stderr, "something was done"
    for name in ("report.html", "policy"):
        assert (Path("runs/launched") / name).exists()
    shutil.rmtree("runs/launched")


class Reached(Exception):
    """The work of a command that was to be parsed only."""


def reached(*arguments: object) -> None:
    raise Reached


class Hub:
    """Takes what it is given."""

    def create_repo(self, repo, **options):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo}")

    def upload_folder(self, *, folder_path, **options):
        assert (Path(folder_path) / "README.md").is_file()


@pytest.mark.parametrize("fence", fences("bash"))
def test_commands_run(fence, place, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    for command in commands_of(fence):
        if command in NOT_RUN:
            continue
        if command not in STOPPED:
            carry_out(command, place)
            continue
        with monkeypatch.context() as patch:
            for module, name in ((comparison, "run_comparison"), (sweep, "run_sweep"), (lab, "numbers")):
                patch.setattr(module, name, reached)
            with pytest.raises(Reached):
                carry_out(command, place)


def test_what_is_not_run_still_stands_in_the_pages():
    for command, reason in {**NOT_RUN, **STOPPED}.items():
        assert command in ALL_COMMANDS, f"{command!r} stands in no page any more"
        assert reason
    assert MAIN in ALL_COMMANDS
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {target for page in PAGES for target in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))}
    named |= {command.split()[1] for command in ALL_COMMANDS if command.startswith("make ")}
    assert named <= targets


def test_no_command_hides_in_a_fence_of_no_kind():
    for fence in fences(""):
        first = [line.split(" ")[0] for line in fence.values[0].splitlines()]
        assert not {"prefdistill", "make", "pip", "python"} & set(first), fence.id


@pytest.mark.parametrize("fence", fences("python"))
def test_python_runs(fence, place, capsys):
    for name in MODELS:
        fence = fence.replace(name, place[name])
    given = {
        "model": tiny("llama"),
        "classifier": tiny("llama", classifier=True),
        "prompt_ids": (5, 6, 7),
        "response_a": (8, 9, 2),
        "response_b": (10, 2),
    }
    exec(compile(fence, "fence", "exec"), given)


@pytest.mark.parametrize("fence", fences("jsonl"))
def test_rows_are_pairs(fence):
    for number, line in enumerate(fence.splitlines(), 1):
        pair = to_pair(json.loads(line), f"row {number}")
        assert pair.chosen != pair.rejected


@pytest.mark.parametrize("fence", fences("yaml"))
def test_yaml_is_a_configuration(fence, tmp_path):
    path = tmp_path / "page.yaml"
    path.write_text(fence, encoding="utf-8")
    config = parse("run", [str(path)])
    config.check()
    assert config != RunConfig()


def underscored(flag: str) -> str:
    return "--" + flag[2:].replace("-", "_")


def test_commands_and_options_in_the_text_exist(capsys):
    helped = {}
    for name in OTHERS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        helped[name] = capsys.readouterr().out
    flags = {*options_of(RunConfig), *SHORT, "--help", "--version"} | {underscored(flag) for flag in OF_LAUNCHERS}
    flags |= {underscored(flag) for text in helped.values() for flag in re.findall(r"--[\w-]+", text)}
    sections = [f.name for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(f.default_factory)]
    option = re.compile(rf"({'|'.join(sections)})\.[a-z0-9_]+")
    keys = {flag.rpartition(".")[2].lstrip("-") for flag in options_of(RunConfig)}
    for page in PAGES:
        # Fences are run; what stands in the text is held against the lists.
        for code in INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            words = code.split()
            if words[0] == "prefdistill" and len(words) > 1 and words[1].islower():
                assert words[1].lstrip("-") in {*COMMANDS, *OTHERS, "help", "version"}, f"{page.name}: {code}"
            if words[0].startswith("prefdistill") or words[0].startswith("--"):
                for word in words:
                    if word.startswith("--"):
                        assert underscored(word.partition("=")[0]) in flags, f"{page.name}: {code}"
            if found := option.match(code):
                assert f"--{found.group()}" in flags, f"{page.name}: {code}"
            elif found := re.fullmatch(r"([a-z0-9_]+): [\w.-]+", code):
                assert found.group(1) in keys, f"{page.name}: {code}"


def test_every_check_is_explained(place):
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    found = json.loads(Path("runs/mine/evaluation/diagnosis.json").read_text(encoding="utf-8"))["checks"]
    assert len(found) > 5
    for check in found:
        assert f"| {check['kind']} |" in page, check["kind"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_builds_with_every_page(site):
    for page in PAGES:
        name = page.relative_to(ROOT / "docs") if page.is_relative_to(ROOT / "docs") else page.relative_to(ROOT)
        html = site / name.with_suffix(".html") if page.name != "README.md" else site / "index.html"
        text = html.read_text(encoding="utf-8")
        assert "<article" in text
        assert not re.search(r"<!-- (include|options|help)", text), f"{html.name} has a marker that nothing replaced"


def test_the_site_loads_nothing_from_elsewhere(site):
    for html in site.rglob("*.html"):
        text = html.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?([^\"\s>]+)", text)
        loaded += re.findall(r"<link\b[^>]*\brel=\"?(?:stylesheet|preload|preconnect|icon)\"?[^>]*>", text)
        assert loaded
        assert not [source for source in loaded if "//" in source.partition("data:")[0]], html.name


def test_the_options_page_has_every_option(site):
    text = (site / "options.html").read_text(encoding="utf-8")
    for option in options_of(RunConfig):
        assert f"<code>{option.removeprefix('--')}</code>" in text
