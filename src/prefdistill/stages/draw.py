"""Stages `evaluate:METHOD`: samples of a policy on held-out prompts, and where they lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefdistill import ranks
from prefdistill.atomic import write_json
from prefdistill.data.table import PromptGroup
from prefdistill.evaluation.sampling import Sample, SamplingOptions
from prefdistill.scoring import Column, model_fingerprint
from prefdistill.seals import sealed_file, sealed_files
from prefdistill.stages.run import Run
from prefdistill.stages.sampler import Sampler, draw_from, sampler

SAMPLE_BUDGET = 6  # times the scoring budget: sampling keeps keys and values, not logits of every position


def policy_of(run: Run, method: str) -> str:
    return run.reference if method == "reference" else str(run.policy_path(method))


def policy_column(run: Run, method: str) -> Column:
    """Log-probs under a trained policy."""
    return run.column(f"policy-{method}", model_fingerprint(policy_of(run, method), run.precision))


def samples_path(run: Run, method: str) -> Path:
    return run.evaluation_path / "samples" / f"{method}.json"


def held_out_groups(run: Run) -> list[PromptGroup]:
    """The prompts of evaluate.split: no policy and no member was trained on them."""
    return list(run.groups.of(run.config.evaluate.split))


def as_json(drawn: Iterable[Sample]) -> list[dict[str, Any]]:
    return [{"ids": s.ids, "finished": s.finished} for s in drawn]


def from_json(written: Iterable[Mapping[str, Any]]) -> list[Sample]:
    return [Sample(tuple(s["ids"]), s["finished"]) for s in written]


def sample_in_parts(
    run: Run,
    model: Sampler,
    groups: Sequence[PromptGroup],
    folder: Path,
    *,
    n: int,
    options: SamplingOptions,
    budget: int = SAMPLE_BUDGET,
    progress: Callable[[int], None],
) -> list[list[Sample]]:
    """`sampling.sample` or vLLM's, whose batches are kept in a folder as they are drawn: a stopped stage goes on after.

    Several processes draw the batches in turn; every one returns all.

    Args:
        budget: tokens held at a time, in scoring budgets.
    """

    def kept() -> dict[int, list[Sample]]:
        known: dict[int, list[Sample]] = {}
        for part in sealed_files(folder, "part-*", ".json"):
            written = json.loads(part.read_text(encoding="utf-8"))
            known |= {int(i): from_json(drawn) for i, drawn in written.items()}
        return known

    def keep(drawn: dict[int, list[Sample]]) -> None:
        with sealed_file(folder / f"part-{min(drawn):06d}.json") as part:
            part.write_text(json.dumps({i: as_json(d) for i, d in drawn.items()}), encoding="utf-8")

    drawn = draw_from(
        model,
        [g.ids for g in groups],
        n=n,
        end_ids=run.encoder.end_ids,
        options=options,
        precision=run.precision,
        token_budget=budget * run.config.score.token_budget,
        known=kept(),
        keep=keep,
        progress=progress,
        share=(ranks.rank(), ranks.count()),
    )
    if ranks.count() == 1:
        return drawn
    ranks.wait()
    of_all = kept()
    return [of_all[i] for i in range(len(groups))]


def draw(run: Run, method: str, fingerprint: str) -> tuple[list[Path], str]:
    """Samples of a policy on the held-out prompts.

    The reference draws twice as many: every method is compared with all of them, and their second half with the first
    as if it were a method, which shows how much of a difference is chance.
    """
    options, groups = run.config.evaluate, held_out_groups(run)
    n = options.samples * (2 if method == "reference" else 1)
    honest = options.temperature == 1 and options.top_p == 1
    work = run.work_path(f"evaluate-{method}", fingerprint)
    streams: dict[str, list[list[Sample]]] = {}
    wanted = [("samples", n, options.temperature, options.top_p, run.config.seed)]
    if not honest:
        # KL is that of the policy itself, not of its sharpened self: it gets samples of its own.
        # Of the reference two, so that what a reward asks of it can be told.
        wanted.append(("kl_samples", 2 if method == "reference" else 1, 1.0, 1.0, run.config.seed + 1))
    with sampler(run, policy_of(run, method)) as model, run.progress(len(groups) * len(wanted), "prompts") as tick:
        for name, count, temperature, top_p, seed in wanted:
            streams[name] = sample_in_parts(
                run,
                model,
                groups,
                work / name,
                n=count,
                # Methods share their random numbers: the same luck for both sides of a comparison.
                options=SamplingOptions(options.max_new_tokens, temperature, top_p, seed),
                progress=tick,
            )

    found = {name: [as_json(d) for d in drawn] for name, drawn in streams.items()}
    ranks.from_main(write_json, samples_path(run, method), found)
    lengths = [len(s.ids) for d in streams["samples"] for s in d]
    return [samples_path(run, method)], (
        f"{method}: {n} samples for each of {len(groups)} prompts, {np.mean(lengths):.1f} tokens on average"
    )


def read_samples(run: Run, method: str, name: str = "samples") -> list[list[Sample]]:
    written = json.loads(samples_path(run, method).read_text(encoding="utf-8"))
    drawn = written.get(name, written["samples"])
    return [from_json(d) for d in drawn]
