"""The run directory as the stages see it: where files lie, what is asked for, how to say what happens."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from prefdistill import ranks
from prefdistill.atomic import write_json
from prefdistill.config import RunConfig
from prefdistill.data.group_files import read_groups
from prefdistill.data.table import Groups, shorten
from prefdistill.data.tokenise import Encoder
from prefdistill.data.tree import Tree
from prefdistill.errors import DataError
from prefdistill.manifest import Manifest
from prefdistill.models.adapters import Classifiers
from prefdistill.models.loading import (
    EMBEDDED_MODEL,
    EMBEDDED_POLICY,
    generation_ends,
    load_config,
    load_policy,
    load_tokenizer,
)
from prefdistill.models.memory import needs_checkpointing
from prefdistill.models.precision import choose_precision
from prefdistill.models.quantise import load_policy_4bit
from prefdistill.progress import Progress, on_terminal
from prefdistill.scoring import Column
from prefdistill.training.trackers import track_in

PRECISIONS = ("float32", "bfloat16")
_SHARED = re.compile(r"-[0-9a-f]{12}$")  # ends the names of columns that runs share


def words_of(tokenizer: Any, tree: Tree) -> str:
    """A prompt's first and last words, in quotes."""
    return shorten(tokenizer.decode(tree.prompt_ids, skip_special_tokens=True))  # else all would end in a template's


@dataclass
class Run:
    """A run directory and its configuration; nothing here is written without a stage asking for it."""

    config: RunConfig
    progress: Progress = field(default=on_terminal)
    encoders: dict[str, Any] = field(default_factory=dict, repr=False)  # by reward model, see stages.encoders
    vocabularies: dict[str, int] = field(default_factory=dict, repr=False)  # by model, see `vocabulary`

    @property
    def root(self) -> Path:
        return Path(self.config.output_dir)

    def say(self, text: str) -> None:
        if ranks.is_main():
            print(f"    {text}", file=sys.stderr, flush=True)

    # -- places ----------------------------------------------------------------------------------------------------

    @property
    def groups_path(self) -> Path:
        return self.root / "data" / "prompts.parquet"

    @property
    def sampled_path(self) -> Path:
        return self.root / "data" / "sampled.parquet"

    @property
    def start_path(self) -> Path:
        return self.root / "start"

    def column(self, name: str, fingerprint: str) -> Column:
        """A column of this run; in a folder that runs share, each model's values have a place of their own."""
        shared = self.config.score.columns
        folder = Path(shared) / f"{name}-{fingerprint[:12]}" if shared else self.root / "columns" / name
        return Column(folder, fingerprint)

    def is_shared(self, path: Path) -> bool:
        """Whether a path lies where runs whose score.columns is this run's folder of columns may be writing."""
        columns = self.root / "columns"
        return columns in path.parents and _SHARED.search(path.relative_to(columns).parts[0]) is not None

    def member_path(self, k: int) -> Path:
        return self.root / "reward" / f"member-{k}"

    @property
    def judge_path(self) -> Path:
        return self.root / "judge"

    @property
    def evaluates(self) -> str:
        """Name of the stages that compare on evaluate.split; what was chosen on validation and the test stand apart."""
        return "evaluate" if self.config.evaluate.split == "test" else "validate"

    @property
    def evaluation_path(self) -> Path:
        return self.root / ("evaluation" if self.config.evaluate.split == "test" else "validation")

    @property
    def report_path(self) -> Path:
        return self.root / ("report.html" if self.config.evaluate.split == "test" else "report-validation.html")

    def check_evaluated(self) -> None:
        """Raises DataError where the evaluation is not that of the policies and options of this run."""
        summary = self.evaluation_path / "summary.json"
        if not summary.exists():
            raise DataError(f"{summary} does not exist; evaluate the run first: prefdistill evaluate CONFIG.yaml")
        if Manifest(self.root).is_stale(self.evaluates):
            raise DataError(
                f"{summary} is of before options, rows or models changed, and the run was not evaluated since: "
                f"prefdistill evaluate {self.root / 'config.yaml'}"
            )

    def policy_path(self, method: str) -> Path:
        return self.root / "policy" / method

    def work_path(self, stage: str, fingerprint: str) -> Path:
        """Checkpoints of a stage that is under way; another fingerprint finds none of them."""
        return self.root / ".work" / f"{stage.replace(':', '-')}-{fingerprint[:12]}"

    def remove_work(self, fingerprint: str) -> None:
        """Removes the checkpoints of a stage that is done and written down: a stop before that goes on from them."""
        for folder in (self.root / ".work").glob(f"*-{fingerprint[:12]}"):
            shutil.rmtree(folder)

    # -- what several stages read ----------------------------------------------------------------------------------

    @property
    def makes_start(self) -> bool:
        """Whether the reference is made in this run: by a supervised start, or from the embedded package."""
        return self.config.sft.enabled or self.config.model in (EMBEDDED_MODEL, EMBEDDED_POLICY)

    @property
    def reference(self) -> str:
        """Folder or id of pi_ref, from which training starts."""
        return str(self.start_path) if self.makes_start else self.config.model

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.config.model, trust_remote_code=self.config.trust_remote_code)

    def vocabulary(self, model: str) -> int:
        """How many tokens a model knows; a tokenizer may have more. Read once a run: a hub id asks the network."""
        if model not in self.vocabularies:
            config = load_config(model, trust_remote_code=self.config.trust_remote_code)
            self.vocabularies[model] = int(config.get_text_config().vocab_size)
        return self.vocabularies[model]

    @cached_property
    def generation_end_ids(self) -> tuple[int, ...]:
        """End tokens that the model's generation configuration names besides the tokenizer's."""
        return generation_ends(self.config.model)

    @cached_property
    def encoder(self) -> Encoder:
        options = self.config.dataset
        return Encoder(
            self.tokenizer,
            max_prompt_tokens=options.max_prompt_tokens,
            max_response_tokens=options.max_response_tokens,
            end_ids=self.generation_end_ids,
        )

    def words_of(self, tree: Tree) -> str:
        """What a message calls the prompt of a tree in the policy's tokens."""
        named = (group.name for group in read_groups(self.groups_path) if group.ids == tree.prompt_ids)
        return next(named, None) or words_of(self.tokenizer, tree)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            made_of = tokenizer.backend_tokenizer.to_str()
        else:
            made_of = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        text = made_of + str(tokenizer.chat_template) + str(tokenizer.special_tokens_map)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def groups(self) -> Groups:
        """All prompts with their responses, the sampled ones included, read when they are asked for."""
        return read_groups(self.sampled_path if self.config.reference_samples else self.groups_path)

    @cached_property
    def precision(self) -> str:
        """The arithmetic of this run: what is asked for, or the faster one for a model of this shape.

        Once measured it stays, or a busy minute would make every column stale.
        """
        asked, kept = self.config.precision, self.root / "precision.json"
        if asked == "auto" and kept.exists():
            try:
                precision = json.loads(kept.read_text(encoding="utf-8"))["precision"]
            except (ValueError, LookupError, TypeError):
                precision = None
            if precision in PRECISIONS:
                return str(precision)
            self.say(f"warning: {kept} is damaged; the precision is measured again")
        shape = load_config(self.config.model, trust_remote_code=self.config.trust_remote_code)
        chosen = choose_precision(asked, shape, self.device)
        if asked == "auto":
            write_json(kept, {"precision": chosen})
            self.say(f"precision: {chosen} (the faster matrix product on this machine)")
        return chosen

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load_reference(self, *, in_4bit: bool = False, on_host: bool = False) -> torch.nn.Module:
        """pi_ref on the run's device, in float32 or, to put an adapter on, with its linear layers in 4 bits.

        Args:
            on_host: leave float32 weights in the host's memory, for a trainer that gives each device its share.
        """
        trust = self.config.trust_remote_code
        if in_4bit:
            return load_policy_4bit(
                self.reference, precision=self.precision, device=self.device, trust_remote_code=trust
            )
        policy = load_policy(self.reference, trust_remote_code=trust)
        return policy if on_host else policy.to(self.device)

    def classifiers(self) -> Classifiers:
        """A loader of reward models on the run's device; adapters that it loads share their base."""
        return Classifiers(self.device, trust_remote_code=self.config.trust_remote_code)

    def training_arguments(
        self, folder: Path, model: torch.nn.Module, trees: Sequence[Tree], **options: Any
    ) -> dict[str, Any]:
        """Arguments that every training of a run shares; `trees` are those that `model` will be trained on.

        Checkpoints are put off to the next log line, since what is recorded between lines is in no checkpoint.
        """
        batch = "per_device_train_batch_size"
        options[batch] = ranks.share_of(f"the batch of {folder.name}", options[batch])  # it is that of all processes
        # accelerate's launcher sets it, and transformers would follow it before the option `precision`.
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        every = options.get("logging_steps", 1)
        if "save_steps" in options:
            options["save_steps"] = -(-options["save_steps"] // every) * every
        name = folder.name.rpartition("-")[0] or folder.name  # without the fingerprint
        track_in(self.root / "logs", name, self.config.report_to)
        checkpointing = needs_checkpointing(
            self.config.gradient_checkpointing,
            model,
            trees,
            options["per_device_train_batch_size"],
            bfloat16=self.precision == "bfloat16",
            device=self.device,
        )
        # Of several processes one may have less memory, and all must send the same gradients.
        checkpointing = bool(ranks.largest(int(checkpointing)))
        if checkpointing:
            self.say("gradient checkpointing: layers run again in the backward pass, to spare memory")
        return {
            "output_dir": str(folder),
            "seed": self.config.seed,
            "report_to": self.config.report_to,
            "run_name": f"{self.root.name}-{name}",
            "disable_tqdm": True,
            "use_cpu": self.device.type == "cpu",
            "bf16": self.precision == "bfloat16",
            "torch_compile": self.config.compile,
            "gradient_checkpointing": checkpointing,
            "save_total_limit": 2,  # the older one stands in until the newer one is sealed
            "logging_nan_inf_filter": False,
            **options,
        }
