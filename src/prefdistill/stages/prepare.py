"""Stages `data`, `start` and `sample`: the pairs, the policy that training starts from, and its samples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import transformers

from prefdistill import ranks
from prefdistill.atomic import fresh_file, write_json
from prefdistill.config import EMBEDDED_DATA
from prefdistill.data.bias import biased_groups
from prefdistill.data.checks import is_blank
from prefdistill.data.formats import Pair, iter_pairs
from prefdistill.data.group_files import read_groups, write_groups
from prefdistill.data.grouping import Dropped, assign_splits, check_ends, group_pairs
from prefdistill.data.left_out import LeftOut
from prefdistill.data.on_disk import Spool, View
from prefdistill.data.plain_prompts import PlainPrompts
from prefdistill.data.table import SPLITS, Groups, PromptGroup, Response, add_drawn, in_memory
from prefdistill.data.tree import Tree
from prefdistill.errors import DataError
from prefdistill.evaluation.sampling import SamplingOptions
from prefdistill.models.loading import add_lora, load_policy, save_model
from prefdistill.models.quantise import load_policy_4bit
from prefdistill.stages.draw import sample_in_parts
from prefdistill.stages.encoders import check_readers
from prefdistill.stages.run import Run
from prefdistill.stages.sampler import sampler
from prefdistill.training.checkpoints import train_to_end
from prefdistill.training.sft import SFTTrainer

EMBEDDED_PAIRS = Path(__file__).parent.parent / "embedded" / "docstring_pairs.parquet"


Encoded = tuple[Groups, Dropped, LeftOut]
_PAIR = pa.schema([("prompt, chosen, rejected, where, extra", pa.string())])


def read_pairs(run: Run) -> tuple[Sequence[Pair], LeftOut]:
    """The run's pairs, which need not fit into memory, and the rows left out under on_bad_row: drop.

    Nothing is written into the run directory.

    Raises:
        DataError: the source cannot be read, a row of it cannot be used under on_bad_row: stop, or none can be.
    """
    options = run.config.dataset
    source = str(EMBEDDED_PAIRS) if run.config.data == EMBEDDED_DATA else run.config.data
    left_out = LeftOut()
    spool = Spool(_PAIR)
    for pair in iter_pairs(
        source,
        split=options.split,
        config_name=options.config_name,
        data_dir=options.data_dir,
        limit=options.limit,
        both_orders=options.both_orders,
        on_bad_row=None if options.on_bad_row == "stop" else left_out.bad,
    ):
        parts = [pair.prompt, pair.chosen, pair.rejected, pair.where, pair.extra]
        spool.add({_PAIR.names[0]: json.dumps(parts, default=str)})
    rows = spool.rows()
    if not rows:
        raise DataError(
            f"{source}: every row was dropped ({left_out.counts.total()}), the first because: {left_out.first}"
        )
    return View(rows, lambda row: Pair(*json.loads(row[_PAIR.names[0]]))), left_out


def encode_pairs(run: Run, pairs: Sequence[Pair], left_out: LeftOut | None = None) -> tuple[Groups, Dropped]:
    """The pairs encoded, split and grouped by prompt. Nothing is written.

    Args:
        left_out: gets the rows that are too long or of equal tokens, and, under on_bad_row: drop, those that cannot be
            encoded.

    Raises:
        DataError: a row cannot be encoded, or a split that the run needs has no prompt.
    """
    options = run.config.dataset
    fractions = {"test": options.test_fraction, "validation": options.validation_fraction}
    if run.config.evaluate.judge == "heldout":
        fractions["judge"] = options.judge_fraction
    seed = run.config.seed if options.split_seed is None else options.split_seed
    splits = assign_splits(pairs, fractions, seed)
    given = run.config.reward.given if run.config.needs_rewards else None
    drop_bad = options.on_bad_row == "drop"
    groups, dropped = group_pairs(pairs, run.encoder, splits=splits, left_out=left_out, drop_bad=drop_bad, given=given)
    groups = _at_most(groups, {s: getattr(options, f"max_{s}_prompts", None) for s in SPLITS})
    if options.rho is not None:
        groups = _biased(groups, options.rho, options.rho_pairs, run.config.seed)
    counts = _counts(groups)
    for name in ("train", *fractions):
        if not counts[name]:
            raise DataError(
                f"{run.config.data}: no prompt is left in the split {name!r} (prompts: {counts}; pairs left out as too "
                f"long: {dropped.pairs_too_long}); give more data, a larger dataset.{name}_fraction or "
                "dataset.max_response_tokens"
            )
    return groups, dropped


def _biased(groups: Groups, rho: float, pairs: int | None, seed: int) -> Groups:
    """D_rho in the splits that training sees, the others as they are; in the groups' order, and in memory."""
    out = [g for g in groups if g.split not in ("train", "validation")]
    out += biased_groups(groups.of("train"), rho, seed=seed, pairs=pairs)
    out += biased_groups(groups.of("validation"), rho, seed=seed)
    place = {g.ids: i for i, g in enumerate(groups)}
    return in_memory(sorted(out, key=lambda g: place[g.ids]))


def _counts(groups: Groups) -> dict[str, int]:
    return {s: groups.splits.count(s) for s in SPLITS}


def encoded(run: Run) -> Encoded:
    """The run's pairs, read and encoded; what was left out of them. Nothing is written; raises as its two steps do."""
    pairs, left_out = read_pairs(run)
    groups, dropped = encode_pairs(run, pairs, left_out)
    check_readers(run, groups)
    return groups, dropped, left_out


def make_data(run: Run, groups: Groups, dropped: Dropped, left_out: LeftOut) -> tuple[list[Path], str]:
    """data/prompts.parquet and what was left out."""
    bad = left_out.counts["bad"]
    counts = _counts(groups)
    pairs = 0
    plain = PlainPrompts(run.encoder)

    def counted() -> Iterator[PromptGroup]:
        nonlocal pairs
        for group in groups:
            pairs += len(group.pairs)
            plain.see(group)
            yield group

    write_groups(run.groups_path, counted())
    for warning in plain.warnings():
        run.say(f"warning: {warning}")
    said = (
        f"{pairs} pairs over {len(groups)} prompts ("
        + ", ".join(f"{n} {s}" for s, n in counts.items() if n)
        + f"); left out: {dropped.pairs_too_long} too long, {dropped.same_tokens} with equal tokens, {bad} bad "
        f"rows; prompts cut: {dropped.prompts_cut}"
    )
    facts = {"prompts": counts, "pairs": pairs, "bad_rows": bad, "plain_prompts": plain.counts()}
    write_json(run.root / "data" / "data.json", {**facts, **dataclasses.asdict(dropped)})
    outputs = [run.groups_path, run.root / "data" / "data.json"]
    rejected = run.root / "data" / "rejected.jsonl"
    rejected.unlink(missing_ok=True)  # of other data or options
    if left_out.counts:
        with fresh_file(rejected) as part, part.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in left_out.lines())
        outputs.append(rejected)
    return outputs, said


def _at_most(groups: Groups, bounds: dict[str, int | None]) -> Groups:
    kept: list[int] = []
    seen: dict[str, int] = {}
    for i, split in enumerate(groups.splits):
        seen[split] = seen.get(split, 0) + 1
        bound = bounds.get(split)
        if bound is None or seen[split] <= bound:
            kept.append(i)
    return groups.at(kept)


def make_start(run: Run, fingerprint: str) -> tuple[list[Path], str]:
    """start/: pi_ref as an ordinary folder, after the supervised start where one is asked for."""
    options, name, trust = run.config.sft, run.config.model, run.config.trust_remote_code
    if not options.enabled:
        ranks.from_main(lambda: save_model(load_policy(name, trust_remote_code=trust), run.tokenizer, run.start_path))
        return [run.start_path], "the starting policy, which is the reference"
    folder = run.work_path("start", fingerprint)
    trees, too_long = _demonstrations(run)
    lora = options.lora_rank > 0
    if options.load_in_4bit:
        policy = load_policy_4bit(name, precision=run.precision, device=run.device, trust_remote_code=trust)
    else:
        policy = load_policy(name, trust_remote_code=trust).to(run.device)
    transformers.set_seed(run.config.seed)
    if lora:
        policy = add_lora(policy, rank=options.lora_rank, use_dora=options.use_dora, task="CAUSAL_LM")
    arguments = transformers.TrainingArguments(
        **run.training_arguments(
            folder,
            policy,
            trees,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_prompts,
            learning_rate=options.learning_rate or (2e-4 if lora else 2e-5),
            logging_steps=10,
            warmup_steps=5,
            save_steps=50,
        )
    )
    trainer = SFTTrainer(policy, arguments, trees=trees, name_of=run.words_of)
    train_to_end(trainer, folder, run.progress)
    history = [h["token_nll"] for h in trainer.state.log_history if "token_nll" in h]

    ranks.from_main(save_model, policy, run.tokenizer, run.start_path)
    said = f"supervised start on {len(trees)} prompts"
    said += f", {too_long} demonstrations left out as too long" if too_long else ""
    return [run.start_path], (f"{said}: {history[0]:.3f} to {history[-1]:.3f} nats a token" if history else said)


def _demonstrations(run: Run) -> tuple[list[Tree], int]:
    """A tree a training prompt, and how many demonstrations do not fit into dataset.max_response_tokens."""
    trees, too_long = [], 0
    column = run.config.sft.on
    for g in read_groups(run.groups_path).of("train"):
        if column == "chosen":
            best = dict.fromkeys(c for c, _ in g.pairs)
            trees.append(Tree(g.ids, tuple(g.responses[c].ids for c in best)))
            continue
        if not isinstance(g.extra.get(column), str) or is_blank(g.extra[column]):
            raise DataError(
                f"{run.config.data}: {g.name} has no text in the column {column!r} that sft.on names; its columns "
                f"besides the pair are: {', '.join(g.extra) or 'none'}"
            )
        try:
            ids = run.encoder.response_ids(g.prompt, g.extra[column], whole=True)
            check_ends(column, ids or (), run.encoder)
        except DataError as error:
            raise DataError(f"{run.config.data}: {g.name}: {error}") from error
        if ids is None:
            too_long += 1
        else:
            trees.append(Tree(g.ids, (ids,)))
    if not trees:
        raise DataError(f"{run.config.data}: no demonstration fits into dataset.max_response_tokens")
    return trees, too_long


def make_samples(run: Run, fingerprint: str) -> tuple[list[Path], str]:
    """data/sampled.parquet: the prompts, those of training with responses drawn from the reference joined."""
    groups = read_groups(run.groups_path)
    n, train = run.config.reference_samples, groups.of("train")
    bound = min(run.config.sample.max_new_tokens, run.config.dataset.max_response_tokens)
    with sampler(run, run.reference) as model, run.progress(len(train), "prompts") as tick:
        drawn = sample_in_parts(
            run,
            model,
            train,
            run.work_path("sample", fingerprint),
            n=n,
            options=SamplingOptions(max_new_tokens=bound, seed=run.config.seed),
            budget=4,
            progress=tick,
        )

    def joined() -> Iterator[PromptGroup]:
        of_train = iter(drawn)
        for group in groups:
            if group.split == "train":
                add_drawn(
                    group,
                    [
                        Response(run.encoder.decode_response(s.ids), s.ids, s.finished, "reference")
                        for s in next(of_train)
                    ],
                )
            yield group

    ranks.from_main(lambda: write_groups(run.sampled_path, joined()))
    unfinished = sum(not s.finished for d in drawn for s in d)
    return [run.sampled_path], (
        f"{n} responses of the reference for each of {len(train)} training prompts, {unfinished} cut at {bound} tokens"
    )
