"""What the judge of a run makes of responses: an oracle's scores, or a reward model's as a column."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefdistill.data.table import PromptGroup, plain_text
from prefdistill.evaluation.judges import describe, is_oracle, load_oracle, oracle_scores
from prefdistill.evaluation.sampling import Sample
from prefdistill.scoring import model_fingerprint
from prefdistill.stages.encoders import encoder_of, response_trees
from prefdistill.stages.rewards import fill_rewards
from prefdistill.stages.run import Run


def score_samples(run: Run, groups: list[PromptGroup], drawn: list[list[Sample]], who: str) -> np.ndarray:
    """The judge's scores [P, S] of samples."""
    texts = [[run.encoder.decode_response(s.ids) for s in d] for d in drawn]
    return _judge(run, groups, texts, [[s.finished for s in d] for d in drawn], who)


def _judge(
    run: Run, groups: list[PromptGroup], texts: list[list[Any]], finished: list[list[bool]], who: str
) -> np.ndarray:
    name = run.config.evaluate.judge
    if is_oracle(name):
        rows = [{**g.extra, "prompt": g.prompt} for g, t in zip(groups, texts, strict=True) for _ in t]
        found = oracle_scores(name, rows, [plain_text(t) for ts in texts for t in ts])
        return found.reshape(len(groups), -1)
    folder = str(run.judge_path) if name == "heldout" else name
    trees = response_trees(encoder_of(run, folder), groups, texts, finished)
    column = run.column(f"judge-{who}", model_fingerprint(folder, run.precision))
    fill_rewards(run, column, folder, trees, run.classifiers())
    return np.stack([column.of(t) for t in trees])


def judge_facts(run: Run, groups: list[PromptGroup]) -> dict[str, Any]:
    """Who judges, and how often the judge agrees with the held-out labels."""
    name = run.config.evaluate.judge
    correct = []
    description = _heldout(run) if name == "heldout" else name
    if is_oracle(name):
        description = describe(load_oracle(name))
    for side in (0, 1):
        rows = [g for g in groups for _ in g.pairs]
        texts = [[g.responses[p[side]].text] for g in groups for p in g.pairs]
        correct.append(_judge(run, rows, texts, [[True]] * len(rows), f"labels-{side}")[:, 0] if rows else np.zeros(0))
    margins = correct[0] - correct[1]
    accuracy = float(((margins > 0) + 0.5 * (margins == 0)).mean()) if len(margins) else None
    return {"name": name, "description": description, "heldout_accuracy": accuracy, "n_heldout": len(margins)}


def _heldout(run: Run) -> str:
    said = "a reward model trained on pairs that no member has seen"
    if run.config.reward.hold == "head" and run.config.needs_rewards and run.config.reward.members:
        said += ", a head on the same frozen features as the members: what these features miss, both miss"
    return said
