"""Stage `score`: every member's rewards of every response, as columns; or those that the data gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prefdistill import ranks
from prefdistill.data.group_files import write_scored
from prefdistill.data.table import Groups, PromptGroup, response_key
from prefdistill.data.tree import Tree
from prefdistill.errors import ConfigError
from prefdistill.models.adapters import Classifiers
from prefdistill.scoring import (
    Column,
    fill_columns,
    model_fingerprint,
    rewards_forward,
)
from prefdistill.stages.encoders import encoder_of, member_trees
from prefdistill.stages.reference import features_of, reference_columns
from prefdistill.stages.run import Run, words_of

FEATURES_AT_ONCE = 50_000  # responses


def member_folders(run: Run) -> list[str]:
    return [*(str(run.member_path(k)) for k in range(run.config.reward.members)), *run.config.reward.pretrained]


def reward_column(run: Run, k: int, folder: str) -> Column:
    return run.column(f"rewards-{k}", model_fingerprint(folder, run.precision))


def member_rewards(run: Run, groups: Groups, *, centred: bool = True) -> list[list[np.ndarray]]:
    """Rewards [K][group] -> [R], from columns only; centred, their mean over the training responses is 0.

    Where the data gives the rewards, those of responses that are not the data's are not known: nan.
    """
    if run.config.reward.given is not None:
        by_member = _given_rewards(groups)
    else:
        by_member = []
        for k, folder in enumerate(member_folders(run)):
            column, trees = reward_column(run, k, folder), member_trees(run, groups, encoder_of(run, folder))
            by_member.append([column.of(t) for t in trees])
    if not centred:
        return by_member
    train = groups.places("train")
    centres = [float(np.nanmean(np.concatenate([values[i] for i in train] or values))) for values in by_member]
    return [[v - centre for v in values] for values, centre in zip(by_member, centres, strict=True)]


def _given_rewards(groups: Sequence[PromptGroup]) -> list[list[np.ndarray]]:
    members = max(len(r.given) for g in groups for r in g.responses)
    return [
        [np.array([r.given[k] if r.given else np.nan for r in g.responses]) for g in groups] for k in range(members)
    ]


def make_rewards(run: Run) -> tuple[list[Path], str]:
    """Columns rewards-0..K-1 of every response."""
    groups = run.groups
    folders = member_folders(run)
    references = reference_columns(run)
    computed = total = 0
    columns = []
    classifiers = run.classifiers()
    for k, folder in enumerate(folders):
        column = reward_column(run, k, folder)
        trees = member_trees(run, groups, encoder_of(run, folder))
        total += sum(len(t.responses) for t in trees)
        columns.append(column)
        computed += fill_rewards_of(run, column, folder, trees, classifiers)
    scored = run.root / "data" / "scored.parquet"
    logps = references["logps"]
    ranks.from_main(lambda: write_scored(scored, groups, lambda g: logps.of(g.tree), member_rewards(run, groups)))
    said = f"{len(folders)} reward columns, {computed} values computed, {total - computed} found"
    if run.config.reward.given is not None:
        said = f"rewards of {max(len(r.given) for g in groups for r in g.responses)} members, given with the data"
    return [*(c.folder for c in columns), scored], said


def fill_rewards_of(run: Run, column: Column, folder: str, trees: Sequence[Tree], classifiers: Classifiers) -> int:
    """A member's rewards for what its column lacks, from the reference's features where it is a head on them."""
    features = reference_columns(run).get("features")
    if features is not None and features_of(folder) == features.fingerprint:
        return _rewards_from_features(features, column, folder, trees)
    return fill_rewards(run, column, folder, trees, classifiers)


def fill_rewards(run: Run, column: Column, folder: str, trees: Sequence[Tree], classifiers: Classifiers) -> int:
    """Rewards of a classifier, a member or a judge, for what the column lacks; returns how many were computed."""
    return fill_columns(
        {"rewards": column},
        trees,
        lambda: classifiers.load(folder),
        rewards_forward,
        token_budget=run.config.score.token_budget,
        precision=run.precision,
        pool=True,
        progress=run.progress,
        name_of=lambda tree: _name_of(run, folder, tree),
    )


def _name_of(run: Run, folder: str, tree: Tree) -> str:
    """What a message calls a prompt in a reward model's tokens."""
    encoder = encoder_of(run, folder)
    return run.words_of(tree) if encoder is run.encoder else words_of(encoder.tokenizer, tree)


def _rewards_from_features(features: Column, column: Column, folder: str, trees: Sequence[Tree]) -> int:
    """A head's rewards are one matrix product with features that the reference pass left: no forward."""
    from safetensors.numpy import load_file

    head = load_file(str(Path(folder) / "model-00002-of-00002.safetensors"))["score.weight"][0].astype(np.float64)
    keys = (response_key(t.prompt_ids, r) for t in trees for r in t.responses)
    missing = list(dict.fromkeys(k for k in keys if k not in column.values))
    unknown = sum(k not in features.values for k in missing)
    if unknown:
        raise ConfigError(f"{unknown} responses have no features; run the stage 'reference' again")

    def add() -> None:
        # One product where memory allows, in parts of a fixed size where it may not.
        for start in range(0, len(missing), FEATURES_AT_ONCE):
            part = missing[start : start + FEATURES_AT_ONCE]
            column.add(part, np.stack([features.values[k] for k in part]) @ head)

    ranks.from_main(add)
    column.refresh()
    return len(missing)
