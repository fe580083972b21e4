"""Stage `evaluate`: scores and log-probs of the samples, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from prefdistill.atomic import write_json
from prefdistill.data.table import PromptGroup, conversation_text, response_lengths
from prefdistill.data.tree import Tree
from prefdistill.evaluation.compare import Drawn, compare, verdict, wald_tests
from prefdistill.evaluation.diagnosis import warnings_of
from prefdistill.evaluation.judges import is_oracle
from prefdistill.evaluation.rewards import disagreement, member_figures
from prefdistill.evaluation.sampling import Sample
from prefdistill.models.loading import load_policy
from prefdistill.scoring import Column, fill_columns, logps_forward
from prefdistill.stages.diagnose import diagnose, fill_sample_rewards
from prefdistill.stages.draw import held_out_groups, policy_column, policy_of, read_samples
from prefdistill.stages.encoders import training_facts
from prefdistill.stages.judge import judge_facts, score_samples
from prefdistill.stages.reference import fill_reference
from prefdistill.stages.rewards import member_folders, member_rewards
from prefdistill.stages.run import Run
from prefdistill.training.reward import cross_calibrated

VERSION = 1


# -- log-probs -----------------------------------------------------------------------------------------------------


def fill_policy(run: Run, method: str, trees: list[Tree]) -> Column:
    """A policy's log-probs, kept as a column, with what it lacked of these responses."""
    column = policy_column(run, method)
    fill_columns(
        {"logps": column},
        trees,
        lambda: load_policy(policy_of(run, method), trust_remote_code=run.config.trust_remote_code).to(run.device),
        logps_forward,
        token_budget=run.config.score.token_budget,
        precision=run.precision,
        progress=run.progress,
        name_of=run.words_of,
    )
    return column


def _tree_of(group: PromptGroup, *drawn: list[Sample]) -> Tree:
    """The chosen responses and these samples: all that a policy must read to be compared."""
    chosen = [group.responses[w].ids for w, _ in group.pairs]
    return Tree(group.ids, tuple(dict.fromkeys([*chosen, *(s.ids for d in drawn for s in d)])))


def compare_all(run: Run) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """The figures of `reference` and of every method, and the scores [P, S] of their samples, the reference's 2n."""
    groups, names = held_out_groups(run), ["reference", *run.config.methods]
    training = list(islice((g for g in run.groups.of("train") if g.pairs), run.config.evaluate.chosen_prompts))
    drawn = {m: read_samples(run, m) for m in names}
    kl_drawn = {m: read_samples(run, m, "kl_samples") for m in names}
    trees = {
        m: [_tree_of(g, own, ref) for g, own, ref in zip(groups, kl_drawn[m], kl_drawn["reference"], strict=True)]
        + [_tree_of(g) for g in training]
        for m in names
    }
    start = fill_reference(run, [t for m in names for t in trees[m]])[0]["logps"]
    scores = {m: score_samples(run, groups, drawn[m], m) for m in names}
    facts = {m: _drawn(drawn[m], scores[m]) for m in names}
    n = run.config.evaluate.samples
    figures = {}
    for m in names:
        policy = start if m == "reference" else fill_policy(run, m, trees[m])
        change = [dict(zip(t.responses, policy.of(t) - start.of(t), strict=True)) for t in trees[m]]
        held_out, seen = change[: len(groups)], change[len(groups) :]
        # The reference's own row is chance: the second half of its samples against the first.
        own, base = (facts[m], facts["reference"])
        if m == "reference":
            own, base = (_drawn([d[h] for d in drawn[m]], scores[m][:, h]) for h in (slice(n, None), slice(n)))
        figures[m] = compare(
            own,
            base,
            kl_policy_ref=np.array([[c[s.ids] for s in d] for c, d in zip(held_out, kl_drawn[m], strict=True)]),
            kl_ref_policy=np.array(
                [[-c[s.ids] for s in d] for c, d in zip(held_out, kl_drawn["reference"], strict=True)]
            ),
            chosen_logp_change=_chosen(training, seen),
            heldout_chosen_logp_change=_chosen(groups, held_out),
            tie_margin=run.config.evaluate.tie_margin,
            seed=run.config.seed,
        )
    return figures, scores


def _drawn(samples: list[list[Sample]], scores: np.ndarray) -> Drawn:
    return Drawn(
        scores,
        np.array([[len(s.ids) for s in d] for d in samples]),
        float(np.mean([not s.finished for d in samples for s in d])),
    )


def _chosen(groups: list[PromptGroup], change: list[dict[tuple[int, ...], float]]) -> float:
    values = [c[g.responses[w].ids] for g, c in zip(groups, change, strict=True) for w, _ in g.pairs]
    return float(np.mean(values)) if values else float("nan")


# -- the ensemble --------------------------------------------------------------------------------------------------


def ensemble_facts(run: Run) -> dict[str, Any]:
    """Held-out figures of every member and of their mean, on the pairs of evaluate.split; from columns alone."""
    groups = run.groups
    rewards = member_rewards(run, groups)
    test = groups.places(run.config.evaluate.split)
    held_out_prompts = held_out_groups(run)
    lengths = [response_lengths(g) for g in held_out_prompts]

    def margins(values: Sequence[np.ndarray]) -> np.ndarray:
        """Chosen less rejected over the held-out pairs, from a prompt -> [R]."""
        return np.array([x[c] - x[r] for x, g in zip(values, held_out_prompts, strict=True) for c, r in g.pairs])

    prompt_of = np.array([i for i, g in zip(test, held_out_prompts, strict=True) for _ in g.pairs])

    def figures_of(member: list[np.ndarray]) -> dict[str, Any]:
        held_out = [member[i] for i in test]
        found = margins(held_out)
        if run.config.evaluate.split == "validation":
            # Members were calibrated on these very pairs: each half gets the scale that the other half asks for.
            found = cross_calibrated(found, prompt_of)
        return member_figures(found, margins(lengths), held_out, lengths)

    facts = []
    given = run.config.reward.given
    folders = member_folders(run) if given is None else [None] * len(rewards)
    for k, (folder, member) in enumerate(zip(folders, rewards, strict=True)):
        training: dict[str, Any] = {"resample": "pretrained" if folder else f"given: {given}"}
        training |= training_facts(folder) if folder else {}
        facts.append(
            {
                "name": f"member {k}",
                "folder": folder,
                "resample": training["resample"],
                "temperature": 1 / training["scale"] if training.get("scale") else None,
                **figures_of(member),
            }
        )
    mean = [np.mean([member[i] for member in rewards], axis=0) for i in range(len(groups))]
    return {
        "members": facts,
        "ensemble_mean": {
            "name": "mean of members",
            "resample": "",
            **figures_of(mean),
        },
        "disagreement": disagreement(np.stack([margins([m[i] for i in test]) for m in rewards])),
    }


# -- the summary ---------------------------------------------------------------------------------------------------


def summarise(run: Run) -> tuple[list[Path], str]:
    """evaluation/summary.json, ensemble.json, scores.json, side_by_side.json and diagnosis.json."""
    groups = held_out_groups(run)
    methods, scores = compare_all(run)
    judge = judge_facts(run, groups)
    tests = wald_tests({m: scores[m] for m in run.config.methods}, run.config.seed)
    ensemble = ensemble_facts(run) if run.config.needs_rewards else {}
    if ensemble:
        fill_sample_rewards(run)
    checks = diagnose(run, methods, ensemble, judge)
    said = verdict(
        run.config.primary,
        run.config.baseline,
        methods,
        tests,
        "the oracle" if is_oracle(judge["name"]) else "the judge",
    )
    written = {
        "summary": {
            "version": VERSION,
            "verdict": said,
            "prompts": len(groups),
            "split": run.config.evaluate.split,
            "samples_per_prompt": run.config.evaluate.samples,
            "judge": judge,
            "methods": methods,
            "tests": tests,
            "warnings": warnings_of(checks),
        },
        "ensemble": ensemble,
        "scores": {m: s.tolist() for m, s in scores.items()},
        "side_by_side": side_by_side(run, groups, scores),
        "diagnosis": {"version": VERSION, "checks": [c.as_dict() for c in checks]},
    }
    folder = run.evaluation_path
    for name, value in written.items():
        write_json(folder / f"{name}.json", value)
    return [folder / f"{name}.json" for name in written], said


def side_by_side(run: Run, groups: list[PromptGroup], scores: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The first sample of every policy on some held-out prompts, in the data's order: not the best, not chosen."""
    drawn = {m: read_samples(run, m) for m in scores}
    out = []
    for i, g in enumerate(groups[: run.config.evaluate.shown]):
        text = {m: run.encoder.decode_response(d[i][0].ids) for m, d in drawn.items()}
        out.append(
            {
                "prompt": conversation_text(g.prompt),
                "reference": text["reference"],
                "responses": {m: text[m] for m in run.config.methods},
                "scores": {m: float(scores[m][i, 0]) for m in scores},
            }
        )
    return out
