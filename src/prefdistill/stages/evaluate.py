"""Stages `evaluate:METHOD` and `evaluate`: samples, their scores and log-probs, and what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefdistill.atomic import write_json
from prefdistill.data.table import PromptGroup, in_split, plain_text, response_lengths
from prefdistill.data.tree import Tree
from prefdistill.evaluation.compare import Drawn, compare, verdict, wald_tests
from prefdistill.evaluation.diagnosis import disagreement, member_figures, warnings_of
from prefdistill.evaluation.judges import describe, is_oracle, load_oracle
from prefdistill.evaluation.sampling import Sample, SamplingOptions, sample
from prefdistill.models.loading import load_policy
from prefdistill.scoring import Column, fill_columns, logps_forward, model_fingerprint
from prefdistill.stages.members import encoder_of, fill_rewards, member_folders, member_rewards
from prefdistill.stages.run import Run

VERSION = 1
SAMPLE_BUDGET = 6  # times the scoring budget: sampling keeps keys and values, not logits of every position


def policy_of(run: Run, method: str) -> str:
    return run.reference if method == "reference" else str(run.policy_path(method))


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
        wanted.append(("kl_samples", 1, 1.0, 1.0, run.config.seed + 1))
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


# -- scores --------------------------------------------------------------------------------------------------------


def score_samples(run: Run, groups: list[PromptGroup], drawn: list[list[Sample]], who: str) -> np.ndarray:
    """The judge's scores [P, S] of samples."""
    texts = [[run.encoder.decode_response(s.ids) for s in d] for d in drawn]
    return _judge(run, groups, texts, [[s.finished for s in d] for d in drawn], who)


def _judge(
    run: Run, groups: list[PromptGroup], texts: list[list[Any]], finished: list[list[bool]], who: str
) -> np.ndarray:
    name = run.config.evaluate.judge
    if is_oracle(name):
        rows = [g.extra for g, t in zip(groups, texts, strict=True) for _ in t]
        scores = load_oracle(name)(rows, [plain_text(t) for ts in texts for t in ts])
        return np.asarray(scores, dtype=np.float64).reshape(len(groups), -1)
    folder = str(run.judge_path) if name == "heldout" else name
    encoder = encoder_of(run, folder)
    trees, index = [], []
    for g, ts, fs in zip(groups, texts, finished, strict=True):
        prompt = encoder.prompt_ids(g.prompt).ids
        # A sample cut off before its first letter has no token to stand on; it is judged as one that ended at once.
        known = [
            encoder.response_ids(g.prompt, t, finished=f) or encoder.response_ids(g.prompt, t) or ()
            for t, f in zip(ts, fs, strict=True)
        ]
        distinct = tuple(dict.fromkeys(known))
        trees.append(Tree(prompt, distinct))
        index.append([distinct.index(i) for i in known])
    column = run.column(f"judge-{who}", model_fingerprint(folder, run.precision))
    fill_rewards(run, column, folder, trees)
    return np.stack([column.of(t)[i] for t, i in zip(trees, index, strict=True)])


def judge_facts(run: Run, groups: list[PromptGroup]) -> dict[str, Any]:
    """Who judges, and how often the judge agrees with the held-out labels."""
    name = run.config.evaluate.judge
    correct = []
    if is_oracle(name):
        description = describe(load_oracle(name))
    else:
        description = "a reward model trained on pairs that no member has seen" if name == "heldout" else name
    for side in (0, 1):
        rows = [g for g in groups for _ in g.pairs]
        texts = [[g.responses[p[side]].text] for g in groups for p in g.pairs]
        correct.append(_judge(run, rows, texts, [[True]] * len(rows), f"labels-{side}")[:, 0] if rows else np.zeros(0))
    margins = correct[0] - correct[1]
    accuracy = float(((margins > 0) + 0.5 * (margins == 0)).mean()) if len(margins) else None
    return {"name": name, "description": description, "heldout_accuracy": accuracy, "n_heldout": len(margins)}


# -- log-probs -----------------------------------------------------------------------------------------------------


def logps_of(run: Run, method: str, trees: list[Tree]) -> Column:
    """A policy's log-probs of these responses, kept as a column."""
    folder = policy_of(run, method)
    name = "reference-logps" if method == "reference" else f"policy-{method}"
    column = run.column(name, model_fingerprint(folder, run.precision))

    def load() -> torch.nn.Module:
        return load_policy(folder, trust_remote_code=run.config.trust_remote_code).to(run.device)

    fill_columns(
        {"logps": column},
        trees,
        load,
        logps_forward,
        token_budget=run.config.score.token_budget,
        precision=run.precision,
        progress=run.progress,
    )
    return column


def _tree_of(group: PromptGroup, *drawn: list[Sample]) -> Tree:
    """The chosen responses and these samples: all that a policy must read to be compared."""
    chosen = [group.responses[w].ids for w, _ in group.pairs]
    return Tree(group.ids, tuple(dict.fromkeys([*chosen, *(s.ids for d in drawn for s in d)])))


def compare_all(run: Run) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """The figures of `reference` and of every method, and the scores [P, S] of their samples, the reference's 2n."""
    groups, names = held_out_groups(run), ["reference", *run.config.methods]
    training = [g for g in in_split(run.groups, "train") if g.pairs][: run.config.evaluate.chosen_prompts]
    drawn = {m: read_samples(run, m) for m in names}
    kl_drawn = {m: read_samples(run, m, "kl_samples") for m in names}
    trees = {
        m: [_tree_of(g, own, ref) for g, own, ref in zip(groups, kl_drawn[m], kl_drawn["reference"], strict=True)]
        + [_tree_of(g) for g in training]
        for m in names
    }
    start = logps_of(run, "reference", [t for m in names for t in trees[m]])
    scores = {m: score_samples(run, groups, drawn[m], m) for m in names}
    facts = {m: _drawn(drawn[m], scores[m]) for m in names}
    n = run.config.evaluate.samples
    figures = {}
    for m in names:
        policy = start if m == "reference" else logps_of(run, m, trees[m])
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
    test = [i for i, g in enumerate(groups) if g.split == run.config.evaluate.split]
    lengths = [response_lengths(groups[i]) for i in test]

    def margins(member: list[np.ndarray]) -> np.ndarray:
        return np.array([member[i][c] - member[i][r] for i in test for c, r in groups[i].pairs])

    facts = []
    for k, (folder, member) in enumerate(zip(member_folders(run), rewards, strict=True)):
        training: dict[str, Any] = {"resample": "pretrained"}
        if (Path(folder) / "training.json").exists():
            training |= json.loads((Path(folder) / "training.json").read_text(encoding="utf-8"))
        facts.append(
            {
                "name": f"member {k}",
                "folder": folder,
                "resample": training["resample"],
                "temperature": 1 / training["scale"] if training.get("scale") else None,
                **member_figures(margins(member), [member[i] for i in test], lengths),
            }
        )
    mean = [np.mean([member[i] for member in rewards], axis=0) for i in range(len(groups))]
    return {
        "members": facts,
        "ensemble_mean": {
            "name": "mean of the members",
            "resample": "",
            **member_figures(margins(mean), [mean[i] for i in test], lengths),
        },
        "disagreement": disagreement(np.stack([margins(m) for m in rewards])),
    }


# -- the summary ---------------------------------------------------------------------------------------------------


def summarise(run: Run) -> tuple[list[Path], str]:
    """evaluation/summary.json, ensemble.json, scores.json and side_by_side.json."""
    groups = held_out_groups(run)
    methods, scores = compare_all(run)
    judge = judge_facts(run, groups)
    tests = wald_tests({m: scores[m] for m in run.config.methods}, run.config.seed)
    ensemble = ensemble_facts(run) if run.config.needs_rewards else {}
    said = verdict(run.config.primary, methods, tests, "the oracle" if is_oracle(judge["name"]) else "the judge")
    folder = run.root / "evaluation"
    write_json(
        folder / "summary.json",
        {
            "version": VERSION,
            "verdict": said,
            "prompts": len(groups),
            "split": run.config.evaluate.split,
            "samples_per_prompt": run.config.evaluate.samples,
            "judge": judge,
            "methods": methods,
            "tests": tests,
            "warnings": warnings_of(methods, ensemble.get("members", []), ensemble.get("ensemble_mean"), judge),
        },
    )
    write_json(folder / "ensemble.json", ensemble)
    write_json(folder / "scores.json", {m: s.tolist() for m, s in scores.items()})
    write_json(folder / "side_by_side.json", side_by_side(run, groups, scores))
    return [folder / f"{n}.json" for n in ("summary", "ensemble", "scores", "side_by_side")], said


def side_by_side(run: Run, groups: list[PromptGroup], scores: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The first sample of every policy on some held-out prompts, in the data's order: not the best, not chosen."""
    drawn = {m: read_samples(run, m) for m in scores}
    out = []
    for i, g in enumerate(groups[: run.config.evaluate.shown]):
        text = {m: run.encoder.decode_response(d[i][0].ids) for m, d in drawn.items()}
        out.append(
            {
                "prompt": g.prompt if isinstance(g.prompt, str) else "\n\n".join(m["content"] for m in g.prompt),
                "reference": text["reference"],
                "responses": {m: text[m] for m in run.config.methods},
                "scores": {m: float(scores[m][i, 0]) for m in scores},
            }
        )
    return out
