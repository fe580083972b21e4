"""What ails a run, from its columns: evaluation's figures put beside what members make of the samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from prefdistill.data.table import PromptGroup
from prefdistill.data.tree import Tree
from prefdistill.evaluation import rewards as of_rewards
from prefdistill.evaluation.diagnosis import Check, check_run
from prefdistill.evaluation.sampling import Sample
from prefdistill.stages.draw import held_out_groups, policy_column, read_samples
from prefdistill.stages.encoders import encoder_of, response_trees
from prefdistill.stages.reference import reference_columns
from prefdistill.stages.rewards import fill_rewards_of, member_folders, member_rewards, reward_column
from prefdistill.stages.run import Run


def diagnose(
    run: Run, methods: Mapping[str, Mapping[str, Any]], ensemble: Mapping[str, Any], judge: Mapping[str, Any]
) -> list[Check]:
    """The checks of an evaluated run; what else they need is read from its columns, no model is loaded.

    Args:
        methods, judge: as in summary.json.
        ensemble: as in ensemble.json; empty where no method needs rewards.

    Raises:
        DataError: a column lacks responses.
    """
    facts: dict[str, dict[str, Any]] = {m: dict(f) for m, f in methods.items()}
    for m in run.config.methods:
        facts[m]["history"] = history_of(run, m)
    if ensemble and member_folders(run):  # given rewards say nothing of samples
        _add_ensemble(run, facts)
    return check_run(facts, ensemble.get("members", []), ensemble.get("ensemble_mean"), judge)


def history_of(run: Run, method: str) -> list[tuple[float, float]]:
    """(chosen log-prob change, margin) of every log line that has both."""
    lines = json.loads((run.policy_path(method) / "history.json").read_text(encoding="utf-8"))
    names = ("logps/chosen_change", "rewards/margins")
    return [(h[names[0]], h[names[1]]) for h in lines if all(h.get(n) is not None for n in names)]


def _add_ensemble(run: Run, facts: dict[str, dict[str, Any]]) -> None:
    """Puts in, for the methods that distil rewards, where the ensemble agrees and how far samples leave the data."""
    everything, groups = run.groups, held_out_groups(run)
    # As the members give them: what is compared below must have one and the same level.
    by_member, sampled = member_rewards(run, everything, centred=False), sample_rewards(run)
    pairs = [g.pairs for g in everything]
    training = [i for i in everything.places("train") if pairs[i]]
    held_out = everything.places(run.config.evaluate.split)
    agree = of_rewards.agreeing_prompts(
        [np.array([[r[i][c] - r[i][w] for c, w in pairs[i]] for r in by_member]) for i in held_out]
    )
    start = reference_columns(run)["logps"]

    def of_labelled(k: int, which: list[int]) -> list[np.ndarray]:
        return [by_member[k][i][sorted({j for pair in pairs[i] for j in pair})] for i in which]

    shares = {
        m: [
            of_rewards.beyond_training(r, of_labelled(k, held_out), of_labelled(k, training))
            for k, r in enumerate(rewards)
        ]
        for m, rewards in sampled.items()
    }
    for m in sampled.keys() - {"reference"}:
        options = run.config.distill.of(m)
        used = range(len(by_member)) if options.members is None else options.members
        mean = np.mean([sampled["reference"][k] for k in used], axis=0)
        policy = policy_column(run, m)
        trees = [
            Tree(g.ids, tuple(s.ids for s in d))
            for g, d, agreed in zip(groups, read_samples(run, m, "kl_samples"), agree, strict=True)
            if agreed
        ]
        if trees:
            facts[m]["agreed"] = {
                "kl": float(np.mean([policy.of(t) - start.of(t) for t in trees])),
                "asked": float(of_rewards.asked_kl(mean[agree], options.beta).mean()),
                "prompts": len(trees),
            }
        share, worst = max((shares[m][k] or 0.0, k) for k in used)
        facts[m]["beyond"] = {
            "share": share if shares[m][worst] is not None else None,
            "reference_share": shares["reference"][worst],
            "member": f"member {worst}",
        }


# -- what members make of samples --------------------------------------------------------------------------------------


def fill_sample_rewards(run: Run) -> None:
    """Every member's rewards of the reference's samples and of those of the methods that distil rewards."""
    groups, drawn = held_out_groups(run), _drawn(run)
    classifiers = run.classifiers()
    for k, folder in enumerate(member_folders(run)):
        trees = [t for d in drawn.values() for t in _trees(run, folder, groups, d)]
        fill_rewards_of(run, reward_column(run, k, folder), folder, trees, classifiers)


def sample_rewards(run: Run) -> dict[str, list[np.ndarray]]:
    """What `fill_sample_rewards` left in the columns: a policy's name -> a member's rewards [P, S] each."""
    groups, drawn = held_out_groups(run), _drawn(run)
    out: dict[str, list[np.ndarray]] = {m: [] for m in drawn}
    for k, folder in enumerate(member_folders(run)):
        column = reward_column(run, k, folder)
        for m, by_member in out.items():
            by_member.append(np.stack([column.of(t) for t in _trees(run, folder, groups, drawn[m])]))
    return out


def _drawn(run: Run) -> dict[str, list[list[Sample]]]:
    """Samples at temperature 1 of the reference and of the methods that distil rewards."""
    names = ["reference", *(m for m in run.config.methods if run.config.row(m).needs_rewards)]
    return {m: read_samples(run, m, "kl_samples") for m in names}


def _trees(run: Run, folder: str, groups: list[PromptGroup], drawn: list[list[Sample]]) -> list[Tree]:
    """The samples as a reward model reads them: their own ids, or their texts in the model's tokens."""
    encoder = encoder_of(run, folder)
    if encoder is run.encoder:
        return [Tree(g.ids, tuple(s.ids for s in d)) for g, d in zip(groups, drawn, strict=True)]
    texts = [[run.encoder.decode_response(s.ids) for s in d] for d in drawn]
    return response_trees(encoder, groups, texts, [[s.finished for s in d] for d in drawn])
