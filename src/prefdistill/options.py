"""The sections of a run's options, as the YAML and the flags name them; what they may be is checked in `config`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass
class DatasetOptions:
    """How pairs are read, encoded and split.

    Attributes:
        split: the split of a hub data set, or of a saved folder that has several.
        config_name: the configuration of a hub data set.
        data_dir: the folder of a hub data set that keeps several in one repository, such as Anthropic's helpful-base.
        limit: use only the first rows (null: all).
        both_orders: stop: a pair that stood before with its responses in the other order is a row that cannot be used;
            keep: both count, since people may disagree.
        on_bad_row: stop at the first row that cannot be used, or drop such rows into data/rejected.jsonl.
        max_prompt_tokens: longer prompts are cut from their left, and counted.
        max_response_tokens: pairs with a longer response are dropped, and counted.
        test_fraction: share of the prompts for the evaluation (unless the rows have a column `split`).
        validation_fraction: share of the prompts on which rewards are calibrated.
        judge_fraction: share of the prompts whose pairs train the held-out judge; 0 unless evaluate.judge is heldout.
        split_seed: of the draw of the splits (null: seed), so that runs of several seeds have one test split.
        max_train_prompts: use at most so many prompts for training (null: all).
        max_validation_prompts: the same for validation.
        max_test_prompts: the same for the evaluation.
        drawn_from_reference: the data's responses were sampled from the starting policy, so forward KL can use them.
        rho: train and calibrate on D_rho only, a resample in which this fraction of the pairs prefers the longer
            response (null: all pairs); the test split stays as it is.
        rho_pairs: how many training pairs D_rho has (null: the most that rho allows without replacement).
    """

    split: str = "train"
    config_name: str | None = None
    data_dir: str | None = None
    limit: int | None = None
    on_bad_row: str = "stop"
    both_orders: str = "stop"
    max_prompt_tokens: int = 512
    max_response_tokens: int = 512
    test_fraction: float = 0.15
    validation_fraction: float = 0.1
    judge_fraction: float = 0.25
    split_seed: int | None = None
    max_train_prompts: int | None = None
    max_validation_prompts: int | None = None
    max_test_prompts: int | None = None
    drawn_from_reference: bool = False
    rho: float | None = None
    rho_pairs: int | None = None


@dataclass
class SFTOptions:
    """The supervised start, which makes the reference from a base model.

    Attributes:
        enabled: whether to run it.
        on: "chosen" for the chosen responses, or the name of a column that holds demonstrations.
        epochs: passes over the training prompts.
        learning_rate: null: 2e-4 with LoRA, 2e-5 without.
        batch_prompts: prompts a step.
        lora_rank: 0 trains all weights.
        use_dora: DoRA in place of LoRA: directions and magnitudes of the weights apart.
        load_in_4bit: the adapter on a base rounded to NF4 (QLoRA, by bitsandbytes); the start stands on these weights.
    """

    enabled: bool = False
    on: str = "chosen"
    epochs: float = 1.0
    learning_rate: float | None = None
    batch_prompts: int = 8
    lora_rank: int = 16
    use_dora: bool = False
    load_in_4bit: bool = False


@dataclass
class SampleOptions:
    """Responses sampled from the starting policy, which is the reference, for training prompts; what samples in a run.

    Attributes:
        reference_per_prompt: how many; they are scored, joined to the trees as unlabelled responses (all pairs of a
            prompt's responses are distilled), and are what forward KL is estimated on. null: 2 where a method has a
            forward-KL term (kl_alpha above 0) or a hull, and the data's own responses are not drawn from the reference;
            else 0.
        max_new_tokens: bound on their length (at most dataset.max_response_tokens).
        engine: what samples, here, in the evaluation and in the choice of a checkpoint: own, or vllm (for GPUs).
        engine_arguments: more arguments of vllm.LLM, by name, e.g. {tensor_parallel_size: 2}.
    """

    reference_per_prompt: int | None = None
    max_new_tokens: int = 128
    engine: str = "own"
    engine_arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class RewardOptions:
    """The ensemble of Bradley-Terry reward models.

    Attributes:
        members: K, how many to train.
        hold: head (linear, on the reference's frozen features), lora, or full.
        resample: each member's own draw of the training pairs: bootstrap, subsample, length-bias or all.
        fraction: of the pairs, for subsample.
        rho: for length-bias, each member's fraction of pairs that prefer the longer response, taken in turn.
        models: base models of the members, taken in turn (empty: the starting policy); not for hold: head.
        pretrained: folders or hub ids of reward models that stand in as further members.
        given: in place of members, rewards that the data has: with `score`, columns score_chosen and score_rejected,
            each a number or a list of one for each member (needs members: 0).
        epochs: passes over the training prompts (lora, full).
        learning_rate: null: 2e-4 with lora, 1e-5 with full.
        batch_prompts: prompts a step.
        lora_rank: rank of lora members.
        use_dora: DoRA in place of LoRA, for lora members.
        load_in_4bit: lora members on a base rounded to NF4 (QLoRA, by bitsandbytes); saved on these weights in float32.
        adapters: save lora members as PEFT adapters with their heads, a few megabytes each on one base, instead of
            whole models.
        l2: penalty of heads (null: by cross-validation over prompts).
    """

    members: int = 3
    hold: str = "head"
    resample: str = "bootstrap"
    fraction: float = 0.7
    rho: list[float] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    pretrained: list[str] = field(default_factory=list)
    given: str | None = None
    epochs: float = 1.0
    learning_rate: float | None = None
    batch_prompts: int = 8
    lora_rank: int = 16
    use_dora: bool = False
    load_in_4bit: bool = False
    adapters: bool = False
    l2: float | None = None


@dataclass
class ScoreOptions:
    """Reference log-probs and rewards of every response, computed once.

    Attributes:
        token_budget: tokens in a forward, padding included; it can be more than a training step of as much memory has,
            since nothing is kept for a backward pass.
        columns: folder that keeps the columns, to share them between runs (null: columns/ in the run directory).
    """

    token_budget: int = 4096
    columns: str | None = None


@dataclass
class DistillOptions:
    """Training of the policy.

    Attributes:
        beta: nats of reward a nat of log-ratio.
        tau: IPO's regularisation.
        label_smoothing: of cdpo and robust-dpo.
        reward_scale: of the rpo methods.
        kl_alpha: weight of KL(reference || policy) in p-dpo, dp-dpo, e-dpo and hull-dpo.
        kl_estimator: of that term: plain (as in the paper) or control-variate (no gradient noise near the reference).
        pessimism: over the members, in e-dpo: the min for each pair or for the whole batch, or the exact worst case
            over their hull, one mixture for all prompts (hull) or one each (hull-per-prompt); hull-dpo is e-dpo with
            hull.
        members: which reward models a method distils, by number: those trained, then reward.pretrained (null: all).
        pairs: labelled pairs, or all pairs of a prompt's responses that have rewards (methods that distil rewards).
        epochs: passes over the training prompts.
        learning_rate: null: 1e-4 with LoRA, 1e-5 without.
        batch_prompts: prompts a step, each with all its responses.
        lora_rank: 0 trains all weights.
        use_dora: DoRA in place of LoRA.
        load_in_4bit: the adapter on the reference rounded to NF4 (QLoRA, by bitsandbytes): an eighth of the memory of
            its weights. Training measures against the rounded reference, the report against the true one.
        adapters: save the policy as a PEFT adapter, a few megabytes on its base, instead of a whole model.
        warmup_fraction: share of the steps in which the learning rate rises.
        logging_steps: steps between lines of the history.
        save_steps: steps between checkpoints, from which a stopped run goes on.
        checkpoints: how many evenly spaced checkpoints are compared by the judge on the validation prompts; the best of
            them is the policy. 1: the last step is.
        training_arguments: anything else of transformers.TrainingArguments, by name; {gradient_accumulation_steps: 4}
            makes a step of four batches, the mean of their means, in the memory of one.
        per_method: options of this section that differ for a method, e.g. {dpo: {learning_rate: 2.0e-4}}: what suits
            one loss can ruin another. A name of your own with `method` is a further row, to be named in methods:
            {dpo-mild: {method: dpo, beta: 0.5}}.
    """

    beta: float = 0.1
    tau: float = 0.1
    label_smoothing: float = 0.1
    reward_scale: float = 1.0
    kl_alpha: float = 0.01
    kl_estimator: str = "plain"
    pessimism: str = "pair"
    members: list[int] | None = None
    pairs: str = "all"
    epochs: float = 1.0
    learning_rate: float | None = None
    batch_prompts: int = 4
    lora_rank: int = 16
    use_dora: bool = False
    load_in_4bit: bool = False
    adapters: bool = False
    warmup_fraction: float = 0.1
    logging_steps: int = 5
    save_steps: int = 50
    checkpoints: int = 1
    training_arguments: dict[str, Any] = field(default_factory=dict)
    per_method: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, name: str) -> DistillOptions:
        """The options of one method or variant, its own put in."""
        own = {key: value for key, value in self.per_method.get(name, {}).items() if key != "method"}
        return replace(self, per_method={}, **own)

    def method_of(self, name: str) -> str:
        """The row of the table of methods that a name stands for: itself, or what its variant says."""
        return str(self.per_method.get(name, {}).get("method", name))


@dataclass
class EvaluateOptions:
    """Comparison with the reference on held-out prompts.

    Attributes:
        split: test, or validation while options are still being chosen: what was tuned on test prompts says nothing.
        judge: heldout (a reward model trained on pairs of its own, see dataset.judge_fraction), a folder or hub id of
            a sequence classifier with one label, or module:function of an oracle (rows, responses) -> scores, a row
            being the prompt and the other columns.
        samples: responses a prompt from each policy.
        max_new_tokens: bound on their length.
        temperature: of sampling; KL is estimated on samples at temperature 1 and top_p 1 whatever is said here.
        top_p: of sampling.
        tie_margin: scores closer than this are a tie.
        chosen_prompts: training prompts on which the chosen log-prob is compared with the start's.
        shown: samples side by side in the report.
    """

    split: str = "test"
    judge: str = "heldout"
    samples: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    tie_margin: float = 0.0
    chosen_prompts: int = 48
    shown: int = 12
