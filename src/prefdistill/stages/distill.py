"""Stage `distill:METHOD`: trains a policy from the columns and keeps its history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from prefdistill import ranks
from prefdistill.atomic import write_json
from prefdistill.data.table import PromptGroup
from prefdistill.errors import ConfigError
from prefdistill.models.merging import merged
from prefdistill.stages.bases import new_policy, rounded_reference_column, save_policy
from prefdistill.stages.reference import reference_columns
from prefdistill.stages.rewards import member_rewards
from prefdistill.stages.run import Run
from prefdistill.stages.select import KeepWeights, best_checkpoint, kept_file, kept_steps, put_weights
from prefdistill.training.checkpoints import train_to_end
from prefdistill.training.distill import DistillConfig, DistillExample, DistillTrainer
from prefdistill.training.pessimism import promises


def examples_of(
    run: Run, *splits: str, rewards: bool, members: Sequence[int] | None = None, in_4bit: bool = False
) -> list[DistillExample]:
    """Trees of these splits with their reference and reward columns, of all members or of these.

    Args:
        in_4bit: the policy will be an adapter on the rounded reference, against which it is measured then (of the split
            train only).
    """
    groups = run.groups
    logps = rounded_reference_column(run) if in_4bit else reference_columns(run)["logps"]
    scores = member_rewards(run, groups) if rewards else []
    if members is not None:
        if max(members) >= len(scores):
            raise ConfigError(f"distill.members names {max(members)}; the data has rewards of {len(scores)} members")
        scores = [scores[k] for k in members]
    out = []
    for i, g in enumerate(groups):
        if g.split in splits:
            out.append(
                DistillExample(
                    g.tree,
                    tuple(logps.of(g.tree).tolist()),
                    tuple(tuple(None if np.isnan(r) else float(r) for r in member[i]) for member in scores),
                    tuple(g.pairs),
                    tuple(_from_reference(run, g)),
                    g.name,
                )
            )
    return out


def training_examples(run: Run, method: str) -> list[DistillExample]:
    """What a method is trained on, as its options say."""
    options, needs = run.config.distill.of(method), run.config.row(method).needs_rewards
    own = options.members if needs else None
    return examples_of(run, "train", rewards=needs, members=own, in_4bit=options.load_in_4bit)


def _from_reference(run: Run, group: PromptGroup) -> list[int]:
    """Responses over which forward KL is estimated: the sampled ones, or the data's own where they were drawn so.

    Never both: the sampled ones are used where there are any, each as often as it was drawn.
    """
    sampled = [i for i, r in enumerate(group.responses) for _ in range(r.drawn)]
    if sampled or not run.config.dataset.drawn_from_reference:
        return sampled
    return list(range(len(group.responses)))


def arguments_of(run: Run, method: str, work: Path, policy: Any, examples: Sequence[DistillExample]) -> DistillConfig:
    """How a method's policy is trained, with checkpoints in `work`."""
    options = run.config.distill.of(method)
    arguments = DistillConfig(
        **run.training_arguments(
            work,
            policy,
            [e.tree for e in examples],
            method=run.config.distill.method_of(method),
            beta=options.beta,
            tau=options.tau,
            label_smoothing=options.label_smoothing,
            reward_scale=options.reward_scale,
            kl_alpha=options.kl_alpha,
            kl_estimator=options.kl_estimator,
            pessimism=options.pessimism,
            pairs=options.pairs,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_prompts,
            learning_rate=options.learning_rate or (1e-4 if options.lora_rank > 0 else 1e-5),
            logging_steps=options.logging_steps,
            save_steps=options.save_steps,
        )
        | options.training_arguments
    )
    if "warmup_steps" not in options.training_arguments:
        a_step = options.batch_prompts * arguments.gradient_accumulation_steps
        steps = arguments.max_steps
        if steps <= 0:
            steps = max(1, round(arguments.num_train_epochs * len(examples) / a_step))
        arguments.warmup_steps = round(options.warmup_fraction * steps)
    return arguments


def _select(run: Run, method: str, work: Path, steps: int) -> dict[str, Any]:
    options = run.config.distill.of(method)

    def policy_at(file: Path) -> Any:
        policy = new_policy(run, options)
        put_weights(policy, file)
        return merged(policy)

    return best_checkpoint(run, method, work, kept_steps(steps, options.checkpoints), policy_at)


def train_policy(run: Run, method: str, fingerprint: str) -> tuple[list[Path], str]:
    options = run.config.distill.of(method)
    folder = run.policy_path(method)
    work = run.work_path(f"distill-{method}", fingerprint)
    examples = training_examples(run, method)
    transformers.set_seed(run.config.seed)
    policy = new_policy(run, options)
    arguments = arguments_of(run, method, work, policy, examples)
    callbacks = [KeepWeights(work, options.checkpoints)] if options.checkpoints > 1 else []
    trainer = DistillTrainer(policy, arguments, examples=examples, callbacks=callbacks)
    train_to_end(trainer, work, run.progress)
    # In order of name, as those of a resumed training are.
    history = [dict(sorted(h.items())) for h in trainer.state.log_history if "loss" in h]
    folder.parent.mkdir(parents=True, exist_ok=True)
    selected = _select(run, method, work, trainer.state.max_steps) if options.checkpoints > 1 else None
    if selected is not None:
        put_weights(policy, kept_file(work, selected["chosen"]))

    def finish() -> list[Path]:
        outputs = save_policy(run, policy, options, folder)
        write_json(folder / "history.json", history)
        if selected is not None:
            write_json(folder / "checkpoints.json", selected)
        if trainer.mixture is not None:
            write_json(folder / "mixture.json", promises(examples, trainer.mixture, beta=options.beta))
        return outputs

    outputs = ranks.from_main(finish)
    said = f"{method}: {trainer.state.global_step} steps"
    said += f", that of step {selected['chosen']} kept" if selected is not None else ""
    if history and "logps/chosen_change" in history[-1]:
        last = history[-1]
        said += (
            f"; margins {last['rewards/margins']:+.3f}, accuracy {last['rewards/accuracies']:.2f}, chosen log-prob "
            f"{last['logps/chosen_change']:+.2f} nats since the start"
        )
    return outputs, said
