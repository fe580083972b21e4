"""`prefdistill judge RUN --model NAME`: a language model's opinion of a run's policies, beside the run's own judge."""

from __future__ import annotations

import argparse
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefdistill.errors import ConfigError, DataError

VERSION = 1
UNREAD_LIMIT = 0.2


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="prefdistill judge",
        description="Asks a language model behind an OpenAI-compatible endpoint which sample helps more, the policy's "
        "or the reference's, for the samples that an evaluated run has drawn; each pair in both orders. The key comes "
        "from OPENAI_API_KEY, the address from --base-url or OPENAI_BASE_URL. Writes "
        "evaluation/llm-judge.json, and the report with a section on it.",
    )
    made.add_argument("run", type=Path, help="a run directory that was evaluated")
    made.add_argument("--model", required=True, help="the judge's name at the endpoint")
    made.add_argument("--base-url", help="the endpoint, e.g. http://localhost:8000/v1 for a vLLM server")
    made.add_argument("--methods", help="a,b: only these methods of the run")
    made.add_argument("--prompts", type=int, help="only so many held-out prompts")
    made.add_argument("--workers", type=int, default=8, help="questions under way at a time")
    made.add_argument("--retries", type=int, default=6, help="tries of a request that the server refuses")
    made.add_argument("--timeout", type=float, default=60.0, help="seconds that a request may take")
    made.add_argument(
        "--temperature", default="0", help="none leaves it to the server, for models that take no other than their own"
    )
    made.add_argument("--price", help="IN,OUT in dollars a million tokens: tells what it cost")
    return made


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    price = _price(options.price)
    options.temperature = _temperature(options.temperature)
    for name, least in (("prompts", 1), ("workers", 1), ("retries", 0)):
        given = getattr(options, name)
        if given is not None and given < least:
            raise ConfigError(f"--{name} is {given}; it must be at least {least}")

    from prefdistill.cli import opened_alone

    with opened_alone(options.run) as run:
        methods = run.config.methods if options.methods is None else options.methods.split(",")
        unknown = [m for m in methods if m not in run.config.methods]
        if unknown:
            raise ConfigError(f"{options.run} has no method {unknown[0]!r}; it has {', '.join(run.config.methods)}")
        found = judge(run, options, methods)
    _print(found, price)
    return 0


def _price(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        sent, received = (float(part) for part in text.split(","))
    except ValueError:
        sent = received = math.nan
    if not (0 <= sent < math.inf and 0 <= received < math.inf):
        raise ConfigError(f"--price is {text!r}; it must be two numbers, as in --price 0.15,0.60")
    return sent, received


def _temperature(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(f"--temperature is {text!r}; it must be none or a number from 0 on")
    return value


def client_of(options: Any) -> Any:
    """An `openai.OpenAI`; its key is read from the environment and goes nowhere else."""
    try:
        import openai
    except ImportError as error:
        raise ConfigError("an LLM judge needs the package openai; pip install 'prefdistill[judge]'") from error
    key = os.environ.get("OPENAI_API_KEY")
    address = options.base_url or os.environ.get("OPENAI_BASE_URL")
    if not key and not address:
        raise ConfigError(
            "an LLM judge needs a key in OPENAI_API_KEY, or the --base-url of a server that asks for none"
        )
    return openai.OpenAI(api_key=key or "none", base_url=address, max_retries=options.retries, timeout=options.timeout)


def judge(run: Any, options: Any, methods: list[str]) -> dict[str, Any]:
    """Asks, writes llm-judge.json into the run's evaluation and its report anew; returns what the file holds.

    The caller holds the run directory.
    """
    from prefdistill.data.table import conversation_text
    from prefdistill.evaluation.llm_judge import PROMPT_VERSION, Cache, Compared, Model, Question, ask_all, figures
    from prefdistill.seals import checksum
    from prefdistill.stages.draw import held_out_groups, read_samples, samples_path

    run.check_evaluated()
    for name in ("reference", *methods):
        if not samples_path(run, name).exists():
            raise DataError(f"{run.root} has no samples of {name}; evaluate it first: prefdistill evaluate CONFIG.yaml")
    groups = held_out_groups(run)[: options.prompts]
    texts = {
        name: [[run.encoder.decode_response(s.ids) for s in drawn] for drawn in read_samples(run, name)]
        for name in ("reference", *methods)
    }
    asked: list[tuple[str, int, Question, Question]] = []
    for name in methods:
        for i, group in enumerate(groups):
            prompt = conversation_text(group.prompt)
            for ours, theirs in zip(texts[name][i], texts["reference"][i], strict=False):
                asked.append((name, i, Question(prompt, ours, theirs), Question(prompt, theirs, ours)))
    questions = [q for _, _, first, second in asked for q in (first, second)]
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", options.model)
    cache = Cache(run.evaluation_path / "llm-judge" / f"{slug}.jsonl", Model(options.model, options.temperature))
    client = client_of(options)
    before = set(cache.answers)
    with run.progress(len(set(questions)), "questions") as tick:
        answers = ask_all(client, questions, cache, workers=options.workers, tick=tick)
    out: dict[str, Any] = {"version": VERSION, "model": options.model, "temperature": options.temperature}
    out |= {"prompt_version": PROMPT_VERSION, "prompts": len(groups), "methods": {}}
    for name in methods:
        places = [n for n, (of, *_) in enumerate(asked) if of == name]
        compared = [Compared(answers[2 * n].verdict, answers[2 * n + 1].verdict) for n in places]
        out["methods"][name] = figures(compared, [asked[n][1] for n in places], seed=run.config.seed)
    new = [a for key, a in cache.answers.items() if key not in before]
    out["usage"] = {
        "asked": len(new),
        "from_cache": len(set(questions)) - len(new),
        "prompt_tokens": sum(a.prompt_tokens for a in cache.answers.values()),
        "completion_tokens": sum(a.completion_tokens for a in cache.answers.values()),
    }
    out["samples"] = {name: checksum(samples_path(run, name)) for name in ("reference", *methods)}
    _write(run, out)
    return out


def _write(run: Any, found: dict[str, Any]) -> None:
    from prefdistill.atomic import write_json
    from prefdistill.manifest import Manifest
    from prefdistill.stages.report import llm_judge_path, make_report

    write_json(llm_judge_path(run), found)
    manifest, stage = Manifest(run.root), run.report_path.stem
    if stage in manifest.stages:
        outputs, _ = make_report(run, manifest)
        manifest.finish(stage, replace(manifest.stages[stage], outputs={}), outputs)


def _print(found: dict[str, Any], price: tuple[float, float] | None) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found['prompts']} prompts, judge: {found['model']}", box=SIMPLE)
    for column in ("method", "win rate [95%]", "pairs", "ties", "orders contradict", "first place preferred"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, f in found["methods"].items():
        rate = f["win_rate"]
        low, high = rate["ci95"] if rate else (None, None)
        known = rate is not None and low is not None and high is not None
        shown = f"{rate['mean']:.0%} [{low:.0%}, {high:.0%}]" if known else "n/a"
        shares = ("n/a" if f[k] is None else f"{f[k]:.0%}" for k in ("ties", "position_bias", "first_preferred"))
        table.add_row(name, shown, str(f["pairs"] - f["unread"]), *shares)
    console = Console()
    console.print(table)
    usage = found["usage"]
    cost = ""
    if price is not None:
        dollars = (usage["prompt_tokens"] * price[0] + usage["completion_tokens"] * price[1]) / 1e6
        cost = f", {dollars:,.2f} dollars" if dollars >= 0.1 else f", {dollars:.2g} dollars"
    console.print(
        f"{usage['asked']} questions asked, {usage['from_cache']} known from before; in all "
        f"{usage['prompt_tokens']:,} tokens sent, {usage['completion_tokens']:,} received{cost}",
        markup=False,
    )
    for name, f in found["methods"].items():
        if f["pairs"] and f["unread"] / f["pairs"] > UNREAD_LIMIT:
            console.print(
                f"warning: {f['unread']} of {f['pairs']} answers on {name} name no preference; ask a stronger judge",
                markup=False,
            )
