"""Stage `reference`: the columns of the starting policy, log-probs and the features that heads stand on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefdistill.data.tree import Tree
from prefdistill.scoring import (
    Column,
    fill_columns,
    logps_and_features_forward,
    logps_forward,
    model_fingerprint,
)
from prefdistill.stages.bases import fill_rounded_reference, rounded_reference_column
from prefdistill.stages.encoders import training_facts
from prefdistill.stages.run import Run
from prefdistill.training.reward import (
    distinct_pad_id,
)


def uses_features(run: Run) -> bool:
    """Whether a head stands on the reference's frozen features: a member's, the judge's, or one from another run."""
    options = run.config.reward
    trained = options.hold == "head" and (
        run.config.evaluate.judge == "heldout" or (run.config.needs_rewards and options.members > 0)
    )
    return trained or (run.config.needs_rewards and any(features_of(f) is not None for f in options.pretrained))


def features_of(folder: str) -> str | None:
    """The fingerprint of the features that a head was trained on; None for any other reward model."""
    found = training_facts(folder).get("features")
    return None if found is None else str(found)


def classifier_pad(run: Run) -> int | None:
    """Pad token of the classifiers made here; EOS, as transformers would fall back to, where no other exists."""
    pad = distinct_pad_id(run.tokenizer, run.encoder.end_ids, run.vocabulary(run.config.model))
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
        name_of=run.words_of,
    )
    return columns, computed


def make_reference(run: Run) -> tuple[list[Path], str]:
    trees = run.groups.trees
    columns, computed = fill_reference(run, trees)
    total = sum(len(t.responses) for t in trees)
    what = "log-probs and features" if "features" in columns else "log-probs"
    said = f"reference {what} of {total} responses, {total - computed} found from before"
    outputs = [c.folder for c in columns.values()]
    if run.config.policies_in_4bit:
        said += "; " + fill_rounded_reference(run, run.groups.of("train").trees, columns["logps"])
        outputs.append(rounded_reference_column(run).folder)
    return outputs, said
