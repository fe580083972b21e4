"""What policies and members are trained on: all weights, or an adapter on a base, which may be rounded to 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefdistill.data.tree import Tree
from prefdistill.models.loading import add_lora, new_classifier, save_adapter, save_model
from prefdistill.models.merging import on_written_out, written_out
from prefdistill.models.quantise import load_policy_4bit, new_classifier_4bit
from prefdistill.options import DistillOptions
from prefdistill.scoring import Column, fill_columns, logps_forward, model_fingerprint
from prefdistill.seals import is_whole, seal
from prefdistill.stages.encoders import encoder_of
from prefdistill.stages.run import Run


def new_policy(run: Run, options: DistillOptions, *, on_host: bool = False) -> Any:
    """The reference as training starts from it; on the host, where a launcher's sharding is to place it."""
    policy = run.load_reference(in_4bit=options.load_in_4bit, on_host=on_host)
    if options.lora_rank == 0:
        return policy
    return add_lora(policy, rank=options.lora_rank, use_dora=options.use_dora, task="CAUSAL_LM")


def save_policy(run: Run, policy: Any, options: DistillOptions, folder: Path) -> list[Path]:
    """Writes a trained policy, whole or as an adapter; returns the folders that make it, its base's among them.

    An adapter that was trained on 4-bit weights stands on these, written out.
    """
    if not options.adapters:
        save_model(policy, run.tokenizer, folder)
        return [folder]
    base = rounded_base(run, run.reference) if options.load_in_4bit else None
    save_adapter(on_written_out(policy), run.tokenizer, folder, run.reference if base is None else str(base))
    return [folder] if base is None else [folder, base]


def new_member(run: Run, base: str, pad_id: int) -> Any:
    """A reward model on a base as training starts from it: reward.hold lora or full."""
    options, trust = run.config.reward, run.config.trust_remote_code
    if options.load_in_4bit:
        model = new_classifier_4bit(base, pad_id, precision=run.precision, device=run.device, trust_remote_code=trust)
    else:
        model = new_classifier(base, pad_id, trust_remote_code=trust).to(run.device)
    if options.hold == "full":
        return model
    return add_lora(model, rank=options.lora_rank, use_dora=options.use_dora, task="SEQ_CLS")


def rounded_reference_column(run: Run) -> Column:
    """Log-probs under the reference in 4 bits, which is what the adapter of such a policy starts from."""
    return run.column("reference-nf4-logps", model_fingerprint(run.reference, run.precision, "nf4"))


def fill_rounded_reference(run: Run, trees: Sequence[Tree], true: Column) -> str:
    """Computes what that column lacks of these trees; returns how far it is from the true reference's column."""
    column = rounded_reference_column(run)
    fill_columns(
        {"logps": column},
        trees,
        lambda: run.load_reference(in_4bit=True),
        logps_forward,
        token_budget=run.config.score.token_budget,
        precision=run.precision,
        progress=run.progress,
        name_of=run.words_of,
    )
    gaps = np.concatenate([column.of(t) - true.of(t) for t in trees])
    tokens = sum(len(r) for t in trees for r in t.responses)
    return (
        f"rounded to NF4 the reference gives responses {gaps.sum() / tokens:+.3f} nats a token, "
        f"{np.abs(gaps).mean():.2f} nats a response off on average"
    )


def rounded_base(run: Run, base: str) -> Path:
    """The folder of a base's weights rounded to NF4 and written out in float32, on which saved adapters stand.

    Rewards of a member are those of its training on these weights only, and any PEFT loads an adapter on them.
    """
    folder = run.root / "reward" / f"base-nf4-{model_fingerprint(base)[:12]}"
    if not is_whole(folder):
        trust = run.config.trust_remote_code
        model = load_policy_4bit(base, precision=run.precision, device=run.device, trust_remote_code=trust)
        save_model(written_out(model), encoder_of(run, base).tokenizer, folder)
        seal(folder)
    return folder
