"""Stages `reward` and `judge`: trains the members of the ensemble, and the judge that no member's pairs have seen."""

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
from prefdistill.data.table import PromptGroup
from prefdistill.data.text_pairs import PairEncoder
from prefdistill.data.tokenise import Encoder
from prefdistill.errors import ConfigError
from prefdistill.models.allocator import give_back_memory
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
    model_fingerprint,
    rewards_forward,
)
from prefdistill.seals import is_whole, seal
from prefdistill.stages.bases import new_member, rounded_base
from prefdistill.stages.encoders import encoder_of, member_trees
from prefdistill.stages.reference import classifier_pad, reference_columns
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


def make_members(run: Run, fingerprint: str) -> tuple[list[Path], str]:
    options = run.config.reward
    facts: list[dict[str, Any]] = []
    for k in range(options.members):
        rho = options.rho[k % len(options.rho)] if options.resample == "length-bias" else None
        how = options.resample + (f", rho {rho}" if rho is not None else "")
        folder, done = run.member_path(k), run.member_path(k) / "training.json"
        work = run.work_path(f"reward-{k}", fingerprint)
        # A member that an earlier, stopped try finished is not trained again.
        if not ranks.from_main(_is_finished, folder, fingerprint):
            run.say(f"member {k + 1} of {options.members}: {options.hold}, {how}")
            record = train_member(
                run,
                run.groups.of("train"),
                folder,
                work=work,
                base=options.models[k % len(options.models)] if options.models else run.reference,
                how=options.resample,
                rho=rho,
                seed=seed_of(run.config.seed, k),
                # Cross-validation is done once: its choice hardly hangs on the resample, and it is most of the work.
                l2=facts[0].get("l2") if facts else None,
            )
            ranks.from_main(_finish, folder, {**record, "resample": how, "fingerprint": fingerprint}, work)
            if options.hold != "head":
                give_back_memory()  # its Trainer hangs in cycles, and the next member may not fit beside it
        facts.append(read_json(done))
    scales = ", ".join(f"{f['scale']:.2f}" for f in facts)
    return [*(run.member_path(k) for k in range(options.members)), *_own_bases(run, facts)], (
        f"{options.members} members; margins times {scales} are log-odds on held-out pairs"
    )


def _is_finished(folder: Path, fingerprint: str) -> bool:
    facts = folder / "training.json"
    return facts.exists() and is_whole(folder) and read_json(facts)["fingerprint"] == fingerprint


def _finish(folder: Path, facts: dict[str, Any], work: Path) -> None:
    write_json(folder / "training.json", facts)
    seal(folder)
    shutil.rmtree(work, ignore_errors=True)  # checkpoints of K members would be K times as many


def _own_bases(run: Run, facts: Sequence[dict[str, Any]]) -> list[Path]:
    """Folders that members stand on and that were written for them; one that is damaged is written again."""
    return [rounded_base(run, base) for base in dict.fromkeys(f["base"] for f in facts if "stands_on" in f)]


def seed_of(seed: int, k: int) -> int:
    """A seed for member k that no member of a run with another seed has."""
    return int(np.random.SeedSequence([seed, k]).generate_state(1)[0])


def make_judge(run: Run, fingerprint: str) -> tuple[list[Path], str]:
    """judge/: a reward model from pairs that no member has seen."""
    groups = run.groups.of("judge")
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
    validation = [g for g in run.groups.of("validation") if g.pairs]
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
    pad = distinct_pad_id(encoder.tokenizer, encoder.end_ids, run.vocabulary(base))
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
