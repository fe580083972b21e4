"""Stages `reference`, `reward`, `judge` and `score`: the columns of the reference, the members, their rewards."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from prefdistill import ranks
from prefdistill.atomic import read_json, write_json
from prefdistill.data.bias import biased_groups, longer_chosen, resample
from prefdistill.data.table import PromptGroup, in_split, write_scored
from prefdistill.data.text_pairs import PairEncoder
from prefdistill.data.tokenise import Encoder
from prefdistill.data.tree import Tree
from prefdistill.errors import ConfigError
from prefdistill.models.adapters import Classifiers
from prefdistill.models.loading import (
    new_classifier,
    save_adapter,
    save_head,
    save_model,
)
from prefdistill.models.merging import on_written_out
from prefdistill.scoring import (
    Column,
    fill_columns,
    logps_and_features_forward,
    logps_forward,
    model_fingerprint,
    rewards_forward,
)
from prefdistill.seals import is_whole, seal
from prefdistill.stages.bases import fill_rounded_reference, new_member, rounded_base, rounded_reference_column
from prefdistill.stages.encoders import encoder_of, member_trees, training_facts
from prefdistill.stages.run import Run
from prefdistill.training.checkpoints import train_to_end
from prefdistill.training.reward import (
    RewardExample,
    RewardTrainer,
    calibrate,
    distinct_pad_id,
    fit_head,
    scale_head,
)

JUDGE = 10_000  # its place among the members, for its seed
FEW_PAIRS = 20


# -- the reference's columns ---------------------------------------------------------------------------------------


def uses_features(run: Run) -> bool:
    """Whether a head stands on the reference's frozen features: a member's, the judge's, or one from another run."""
    options = run.config.reward
    trained = options.hold == "head" and (
        run.config.evaluate.judge == "heldout" or (run.config.needs_rewards and options.members > 0)
    )
    return trained or (run.config.needs_rewards and any(_features_of(f) is not None for f in options.pretrained))


def _features_of(folder: str) -> str | None:
    """The fingerprint of the features that a head was trained on; None for any other reward model."""
    found = training_facts(folder).get("features")
    return None if found is None else str(found)


def classifier_pad(run: Run) -> int | None:
    """Pad token of the classifiers made here; EOS, as transformers would fall back to, where no other exists."""
    pad = distinct_pad_id(run.tokenizer, run.encoder.end_ids)
    return int(run.tokenizer.eos_token_id) if pad is None else pad


def reference_columns(run: Run) -> dict[str, Column]:
    """Log-probs under the reference and, where heads stand on them, its features."""
    print_of_model = model_fingerprint(run.reference, run.precision)
    columns = {"logps": run.column("reference-logps", print_of_model)}
    if uses_features(run):
        print_of_pool = model_fingerprint(run.reference, run.precision, classifier_pad(run))
        columns["features"] = run.column("reference-features", print_of_pool)
    return columns


def fill_reference(run: Run, trees: Sequence[Tree]) -> tuple[dict[str, Column], int]:
    """The reference's columns with what they lacked of these trees, and how many responses were computed."""
    columns = reference_columns(run)
    computed = fill_columns(
        columns,
        trees,
        run.load_reference,
        logps_and_features_forward if "features" in columns else logps_forward,
        token_budget=run.config.score.token_budget,
        precision=run.precision,
        pool_pad_id=classifier_pad(run),
        progress=run.progress,
    )
    return columns, computed


def make_reference(run: Run) -> tuple[list[Path], str]:
    trees = [g.tree for g in run.groups]
    columns, computed = fill_reference(run, trees)
    total = sum(len(t.responses) for t in trees)
    what = "log-probs and features" if "features" in columns else "log-probs"
    said = f"reference {what} of {total} responses, {total - computed} found from before"
    outputs = _files(columns.values())
    if run.config.policies_in_4bit:
        trained = [g.tree for g in in_split(run.groups, "train")]
        said += "; " + fill_rounded_reference(run, trained, columns["logps"])
        outputs += _files([rounded_reference_column(run)])
    return outputs, said


def _files(columns: Any) -> list[Path]:
    """Folders of columns."""
    return [c.folder for c in columns]


# -- members -------------------------------------------------------------------------------------------------------


def make_members(run: Run, fingerprint: str) -> tuple[list[Path], str]:
    options = run.config.reward
    facts: list[dict[str, Any]] = []
    for k in range(options.members):
        rho = options.rho[k % len(options.rho)] if options.resample == "length-bias" else None
        how = options.resample + (f", rho {rho}" if rho is not None else "")
        folder, done = run.member_path(k), run.member_path(k) / "training.json"
        # A member that an earlier, stopped try finished is not trained again.
        if not ranks.from_main(_is_finished, folder, fingerprint):
            run.say(f"member {k + 1} of {options.members}: {options.hold}, {how}")
            record = train_member(
                run,
                in_split(run.groups, "train"),
                folder,
                work=run.work_path(f"reward-{k}", fingerprint),
                base=options.models[k % len(options.models)] if options.models else run.reference,
                how=options.resample,
                rho=rho,
                seed=seed_of(run.config.seed, k),
                # Cross-validation is done once: its choice hardly hangs on the resample, and it is most of the work.
                l2=facts[0].get("l2") if facts else None,
            )
            ranks.from_main(_finish, folder, {**record, "resample": how, "fingerprint": fingerprint})
        facts.append(read_json(done))
    scales = ", ".join(f"{f['scale']:.2f}" for f in facts)
    return [*(run.member_path(k) for k in range(options.members)), *_own_bases(run, facts)], (
        f"{options.members} members; margins times {scales} are log-odds on held-out pairs"
    )


def _is_finished(folder: Path, fingerprint: str) -> bool:
    facts = folder / "training.json"
    return facts.exists() and is_whole(folder) and read_json(facts)["fingerprint"] == fingerprint


def _finish(folder: Path, facts: dict[str, Any]) -> None:
    write_json(folder / "training.json", facts)
    seal(folder)


def _own_bases(run: Run, facts: Sequence[dict[str, Any]]) -> list[Path]:
    """Folders that members stand on and that were written for them; one that is damaged is written again."""
    return [rounded_base(run, base) for base in dict.fromkeys(f["base"] for f in facts if "stands_on" in f)]


def seed_of(seed: int, k: int) -> int:
    """A seed for member k that no member of a run with another seed has."""
    return int(np.random.SeedSequence([seed, k]).generate_state(1)[0])


def make_judge(run: Run, fingerprint: str) -> tuple[list[Path], str]:
    """judge/: a reward model from pairs that no member has seen."""
    groups = in_split(run.groups, "judge")
    record = train_member(
        run,
        groups,
        run.judge_path,
        work=run.work_path("judge", fingerprint),
        base=run.reference,
        how="all",
        rho=None,
        seed=seed_of(run.config.seed, JUDGE),
    )
    ranks.from_main(write_json, run.judge_path / "training.json", record)
    outputs = [run.judge_path, *_own_bases(run, [record])]
    return outputs, f"held-out judge from {record['pairs']} pairs over {len(groups)} prompts"


def train_member(
    run: Run,
    groups: Sequence[PromptGroup],
    folder: Path,
    *,
    work: Path,
    base: str,
    how: str,
    rho: float | None,
    seed: int,
    l2: float | None = None,
) -> dict[str, Any]:
    """Trains one member, calibrates it on the validation pairs, saves it, and returns the facts of its training."""
    options = run.config.reward
    labelled = [g for g in groups if g.pairs]
    weights = resample(how, longer_chosen(labelled), seed=seed, fraction=options.fraction, rho=rho)
    validation = [g for g in in_split(run.groups, "validation") if g.pairs]
    if rho is not None:
        # Who has biased pairs only has biased ones to calibrate on.
        validation = biased_groups(validation, rho, seed=seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    encoder = encoder_of(run, base)
    if isinstance(encoder, PairEncoder):
        raise ConfigError(f"{base!r} is an encoder, on which no member can be trained here; give a causal model")
    tokenizer = copy.deepcopy(encoder.tokenizer)
    facts: dict[str, Any] = {"base": base, "hold": options.hold, "seed": seed, "pairs": int(weights.sum())}
    facts |= {"tokenizer": run.tokenizer_fingerprint} if encoder is run.encoder else {"end_ids": encoder.end_ids}
    if options.hold == "head":
        facts |= ranks.from_main(
            _train_head, run, labelled, validation, weights, tokenizer, base, folder, l2=l2, seed=seed
        )
        return facts
    model, margins = _train_model(run, labelled, validation, weights, encoder, base, work, seed)
    scale = _scale(run, margins)
    scale_head(model, scale)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)

    def finish() -> dict[str, Any]:
        stands_on = rounded_base(run, base) if options.adapters and options.load_in_4bit else None
        if stands_on is not None:
            save_adapter(on_written_out(model), tokenizer, folder, str(stands_on))
        elif options.adapters:
            save_adapter(model, tokenizer, folder, base)
        else:
            save_model(model, tokenizer, folder)
        shutil.rmtree(work, ignore_errors=True)
        return {} if stands_on is None else {"stands_on": stands_on.name}

    facts |= ranks.from_main(finish)
    return {**facts, "scale": scale}


def _train_head(
    run: Run,
    groups: Sequence[PromptGroup],
    validation: Sequence[PromptGroup],
    weights: np.ndarray,
    tokenizer: Any,
    base: str,
    folder: Path,
    *,
    l2: float | None,
    seed: int,
) -> dict[str, Any]:
    """Fits a head on the reference's features and saves it; returns what it stands on and how it was fitted."""
    pad = classifier_pad(run)
    features = reference_columns(run)["features"]
    x = np.concatenate([_pair_features(features, g) for g in groups])
    prompts = np.array([i for i, g in enumerate(groups) for _ in g.pairs])
    head, l2 = fit_head(x, weights, prompts, l2=run.config.reward.l2 or l2, seed=seed)
    margins = np.concatenate([_pair_features(features, g) for g in validation]) @ head
    scale = _scale(run, margins)
    model: Any = new_classifier(base, pad, trust_remote_code=run.config.trust_remote_code)
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor(scale * head, dtype=torch.float32)[None])
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    backbone = run.root / "reward" / f"backbone-{model_fingerprint(base)[:12]}.safetensors"
    save_head(model, tokenizer, folder, backbone)
    return {"features": features.fingerprint, "l2": l2, "scale": scale}


def _scale(run: Run, margins: np.ndarray) -> float:
    if len(margins) < FEW_PAIRS:
        run.say(f"only {len(margins)} validation pairs: the scale of the rewards is rough")
    return calibrate(margins)


def _pair_features(features: Column, group: PromptGroup) -> np.ndarray:
    values = features.of(group.tree)
    return np.stack([values[c] - values[r] for c, r in group.pairs])


def _train_model(
    run: Run,
    groups: Sequence[PromptGroup],
    validation: Sequence[PromptGroup],
    weights: np.ndarray,
    encoder: Encoder,
    base: str,
    work: Path,
    seed: int,
) -> tuple[Any, np.ndarray]:
    options = run.config.reward
    pad = distinct_pad_id(encoder.tokenizer, encoder.end_ids)
    pad = int(encoder.tokenizer.eos_token_id) if pad is None else pad
    transformers.set_seed(seed)
    model = new_member(run, base, pad)
    counts = iter(weights.tolist())
    examples = [
        RewardExample(tree, tuple(g.pairs), tuple(itertools.islice(counts, len(g.pairs))), g.name)
        for g, tree in zip(groups, member_trees(run, groups, encoder), strict=True)
    ]
    arguments = transformers.TrainingArguments(
        **run.training_arguments(
            work,
            model,
            [e.tree for e in examples],
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_prompts,
            learning_rate=options.learning_rate or (2e-4 if options.hold == "lora" else 1e-5),
            warmup_steps=5,
            logging_steps=5,
            save_steps=50,
        )
        | {"seed": seed}
    )
    train_to_end(RewardTrainer(model, arguments, examples=examples), work, run.progress)
    trees = member_trees(run, validation, encoder)
    scratch = Column(work / "validation", "scratch")
    fill_columns(
        {"rewards": scratch},
        trees,
        lambda: model,
        rewards_forward,
        token_budget=run.config.score.token_budget,
        precision=run.precision,
        pool=True,
    )
    margins = [scratch.of(t)[c] - scratch.of(t)[r] for t, g in zip(trees, validation, strict=True) for c, r in g.pairs]
    return model, np.array(margins)


# -- rewards -------------------------------------------------------------------------------------------------------


def member_folders(run: Run) -> list[str]:
    return [*(str(run.member_path(k)) for k in range(run.config.reward.members)), *run.config.reward.pretrained]


def reward_column(run: Run, k: int, folder: str) -> Column:
    return run.column(f"rewards-{k}", model_fingerprint(folder, run.precision))


def member_rewards(run: Run, groups: Sequence[PromptGroup], *, centred: bool = True) -> list[list[np.ndarray]]:
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
    train = [i for i, g in enumerate(groups) if g.split == "train"]
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
    ranks.from_main(
        lambda: write_scored(scored, groups, [logps.of(g.tree) for g in groups], member_rewards(run, groups))
    )
    said = f"{len(folders)} reward columns, {computed} values computed, {total - computed} found"
    if run.config.reward.given is not None:
        said = f"rewards of {max(len(r.given) for g in groups for r in g.responses)} members, given with the data"
    return [*_files(columns), scored], said


def fill_rewards_of(run: Run, column: Column, folder: str, trees: Sequence[Tree], classifiers: Classifiers) -> int:
    """A member's rewards for what its column lacks, from the reference's features where it is a head on them."""
    features = reference_columns(run).get("features")
    if features is not None and _features_of(folder) == features.fingerprint:
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
    )


def _rewards_from_features(features: Column, column: Column, folder: str, trees: Sequence[Tree]) -> int:
    """A head's rewards are one matrix product with features that the reference pass left: no forward."""
    from safetensors.numpy import load_file

    from prefdistill.data.table import response_key

    head = load_file(str(Path(folder) / "model-00002-of-00002.safetensors"))["score.weight"][0].astype(np.float64)
    keys = [response_key(t.prompt_ids, r) for t in trees for r in t.responses]
    missing = list(dict.fromkeys(k for k in keys if k not in column.values))
    unknown = [k for k in missing if k not in features.values]
    if unknown:
        raise ConfigError(f"{len(unknown)} responses have no features; run the stage 'reference' again")

    def add() -> None:
        if missing:
            column.add(missing, np.stack([features.values[k] for k in missing]) @ head)

    ranks.from_main(add)
    column.refresh()
    return len(missing)
