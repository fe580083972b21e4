"""The trainer that supervised start, reward models and policy share: transformers.Trainer on tree batches."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from prefdistill.data.tree import Tree, TreeBatch, shape_of
from prefdistill.errors import DataError, TrainingError
from prefdistill.models.compiled import check_compiler, compile_layers
from prefdistill.models.forward import TreeModel
from prefdistill.training.checkpoints import not_finite, what_is_kept
from prefdistill.training.processes import route_tree_calls, together

Item = Mapping[str, Any]
NAMES_SHOWN = 4


def check_places(tree: Tree, places: Iterable[tuple[int, ...]], name: str) -> None:
    """Raises DataError unless these are places of a tree's responses, from 0 on, different ones in a pair.

    In a batch another number would be a response of another prompt.
    """
    r = len(tree.responses)
    for found in places:
        if not all(0 <= i < r for i in found) or len(set(found)) < len(found):
            said = found[0] if len(found) == 1 else f"the pair {found}"
            raise DataError(f"{name or 'a tree'} has {r} responses, counted from 0, and {said} is asked for of them")


def without_dropout(model: nn.Module) -> None:
    """Turns off every dropout of a model, in place: log-probs are compared with columns that were computed without.

    Layers are set to 0, and so are the rates that modules keep to hand to functions.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class TreeTrainer(transformers.Trainer):
    """A Trainer whose batches are trees and whose loss is a pure function of what the one forward returns.

    An item is a mapping with `tree` (a Tree), `name` (what errors call it; optional) and whatever the loss reads;
    `join` puts a batch's items together. Subclasses write `values_of` and `loss_of`; metrics that the latter stores
    with `record` are averaged and logged with the loss.

    Several processes (torchrun, accelerate launch) take the step that one would take on all their trees: the loss is
    that of the trees of all of them, whatever its denominators are.

    `args.torch_compile` compiles the model's layers, one for all.

    Raises:
        TrainingError: in training: the loss or the gradient is not finite.
        ConfigError: torch.compile lacks a compiler or layers to take.
    """

    dropout = False  # whether the model's own dropout is kept
    pool = False  # whether the hidden state is read where transformers pools for a classifier

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments,
        *,
        train_items: Sequence[Item],
        eval_items: Sequence[Item] | None = None,
        join: Callable[[Sequence[Item]], dict[str, Any]],
        **kwargs: Any,
    ) -> None:
        # Trees are not columns; no label tensor is there for Trainer to look for, none at all to be pinned.
        args.remove_unused_columns = False
        args.label_names = []
        args.dataloader_pin_memory = False
        if args.n_gpu > 1:
            args._n_gpu = 1  # a process uses one GPU, and transformers would multiply the batch by all that it sees
        if not self.dropout:
            without_dropout(model)
        self.tree_model = TreeModel(model)
        if args.world_size > 1:
            route_tree_calls(self.tree_model.core)
        if args.torch_compile:
            check_compiler(args.device)
            compile_layers(self.tree_model.backbone)
            # Layers are compiled one by one: accelerate need compile nothing, here or in a later trainer.
            args.torch_compile = False
            for name in [n for n in os.environ if n.startswith("ACCELERATE_DYNAMO_")]:
                del os.environ[name]

        self.join = join
        self._last: Sequence[Item] = ()  # of the step under way
        self._recorded: dict[str, dict[str, list[Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(train_items),  # type: ignore[arg-type]
            eval_dataset=list(eval_items) if eval_items is not None else None,  # type: ignore[arg-type]
            data_collator=lambda items: {"items": list(items)},
            **kwargs,
        )

    def values_of(self, batch: TreeBatch) -> Tensor:
        """What the loss reads of the model, one number a response (or a token), in order of the trees."""
        raise NotImplementedError

    def loss_of(self, values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The batch's mean loss, a scalar, from what `values_of` and `join` gave for the trees of all processes."""
        raise NotImplementedError

    def name_of(self, item: Item) -> str:
        """What errors call a prompt."""
        return item.get("name") or shape_of(item["tree"])

    def record(self, **values: Tensor | float) -> None:
        """Keeps a metric of this batch for the next log line; its mean over the batches is logged."""
        kept = self._recorded["train" if self.model.training else "eval"]
        for name, value in values.items():
            kept[name].append(torch.as_tensor(value, dtype=torch.float64).detach().cpu())

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        items: list[Item] = self._without_repeated(inputs["items"])
        pad = self.tree_model.config.pad_token_id if self.pool else None
        computed = items or inputs["items"][:1]  # who has nothing left still takes part in the others' sums
        batch = self.tree_model.collate([item["tree"] for item in computed], pool_pad_id=pad)

        def call() -> Tensor:
            with self.accelerator.autocast():
                return self.values_of(batch)

        if self.args.world_size > 1:
            own = model(tree_call=call)
            values, items = together(own, items)
        else:
            values = call()
        loss = self.loss_of(values, {name: x.to(values.device) for name, x in self.join(items).items()})
        if self.model.training:
            self._last = items
            self._check_finite("loss", loss.detach())
        # Processes average their gradients, and every one has the whole loss but its own share of the gradient.
        loss = loss + (self.args.world_size - 1) * (loss - loss.detach())
        return (loss, None) if return_outputs else loss

    def _without_repeated(self, items: list[Item]) -> list[Item]:
        """A batch without the items that fill up an epoch's last batch, so that every process gets as many."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not (state.end_of_dataloader and state.sync_gradients) or state.remainder <= 0:
            return items
        return items[: max(0, state.remainder - self.accelerator.process_index * len(items))]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Trainer's own place between backward pass and optimiser: a step on such gradients would ruin the weights.
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # float16's scaler leaves such a step out and scales less
            self._check_finite("gradient", torch.as_tensor(norm))
        return norm

    def _check_finite(self, what: str, value: Tensor) -> None:
        """Stops a training whose numbers are none any more.

        Raises:
            TrainingError: the value is not finite; the message names the step, the prompts, the likely cause, and what
                is left of the training.
        """
        if bool(value.isfinite().all()):
            return
        broken = not_finite(self.model)
        if broken and self.state.global_step:
            cause = "the weights are not finite since an earlier step, which was too large: lower learning_rate"
        elif broken:
            cause = f"the weights were not finite at the start, such as {broken[0]}: they are broken"
        elif what == "loss":
            cause = "the model's outputs overflow on these prompts: look at them, try float32"
            if self.state.global_step:
                cause += "; or an earlier step was too large: lower learning_rate"
        else:
            cause = "the loss is finite and too steep: lower learning_rate, or try float32"
        names = [self.name_of(item) for item in self._last]
        shown = "; ".join(names[:NAMES_SHOWN]) + ("; ..." if len(names) > NAMES_SHOWN else "")
        raise TrainingError(
            f"the {what} is {float(value.flatten()[0])} in step {self.state.global_step + 1}, on {len(names)} "
            f"prompts ({shown}): {cause}; {what_is_kept(self.args.output_dir)}"
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        evaluating = any(k.startswith("eval_") for k in logs)
        kept = self._recorded["eval" if evaluating else "train"]
        if "train_runtime" not in logs:
            prefix = "eval_" if evaluating else ""
            for name, values in kept.items():
                logs[prefix + name] = float(torch.stack(values).nanmean())
            kept.clear()
        super().log(logs, start_time)
