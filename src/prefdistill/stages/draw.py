"""Stages `evaluate:METHOD`: samples of a policy on held-out prompts, and where they lie."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from prefdistill.atomic import write_json
from prefdistill.data.table import PromptGroup, in_split
from prefdistill.evaluation.sampling import Sample, SamplingOptions, sample
from prefdistill.models.loading import load_policy
from prefdistill.scoring import Column, model_fingerprint
from prefdistill.stages.run import Run

SAMPLE_BUDGET = 6  # times the scoring budget: sampling keeps keys and values, not logits of every position


def policy_of(run: Run, method: str) -> str:
    return run.reference if method == "reference" else str(run.policy_path(method))


def policy_column(run: Run, method: str) -> Column:
    """Log-probs under a trained policy."""
    return run.column(f"policy-{method}", model_fingerprint(policy_of(run, method), run.precision))


def samples_path(run: Run, method: str) -> Path:
    return run.root / "evaluation" / "samples" / f"{method}.json"


def held_out_groups(run: Run) -> list[PromptGroup]:
    """The prompts of evaluate.split: no policy and no member was trained on them."""
    return in_split(run.groups, run.config.evaluate.split)


def draw(run: Run, method: str) -> tuple[list[Path], str]:
    """Samples of a policy on the held-out prompts.

    The reference draws twice as many: every method is compared with all of them, and their second half with the first
    as if it were a method, which shows how much of a difference is chance.
    """
    options, groups = run.config.evaluate, held_out_groups(run)
    n = options.samples * (2 if method == "reference" else 1)
    honest = options.temperature == 1 and options.top_p == 1
    model = load_policy(policy_of(run, method), trust_remote_code=run.config.trust_remote_code).to(run.device)
    streams: dict[str, list[list[Sample]]] = {}
    wanted = [("samples", n, options.temperature, options.top_p, run.config.seed)]
    if not honest:
        # KL is that of the policy itself, not of its sharpened self: it gets samples of its own.
        # Of the reference two, so that what a reward asks of it can be told.
        wanted.append(("kl_samples", 2 if method == "reference" else 1, 1.0, 1.0, run.config.seed + 1))
    with run.progress(len(groups) * len(wanted), "prompts") as tick:
        for name, count, temperature, top_p, seed in wanted:
            streams[name] = sample(
                model,
                [g.ids for g in groups],
                n=count,
                end_ids=run.encoder.end_ids,
                # Methods share their random numbers: the same luck for both sides of a comparison.
                options=SamplingOptions(options.max_new_tokens, temperature, top_p, seed),
                precision=run.precision,
                token_budget=SAMPLE_BUDGET * run.config.score.token_budget,
                progress=tick,
            )
    del model
    written = {
        name: [[{"ids": s.ids, "finished": s.finished} for s in d] for d in drawn] for name, drawn in streams.items()
    }
    write_json(samples_path(run, method), written)
    lengths = [len(s.ids) for d in streams["samples"] for s in d]
    return [samples_path(run, method)], (
        f"{method}: {n} samples for each of {len(groups)} prompts, {np.mean(lengths):.1f} tokens on average"
    )


def read_samples(run: Run, method: str, name: str = "samples") -> list[list[Sample]]:
    written = json.loads(samples_path(run, method).read_text(encoding="utf-8"))
    drawn = written.get(name, written["samples"])
    return [[Sample(tuple(s["ids"]), s["finished"]) for s in d] for d in drawn]
