"""Reward models that are adapters on one base: the base lies in memory once, and a member is switched to."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from prefdistill.errors import ConfigError
from prefdistill.models.adapter_folders import WEIGHTS, adapter_base, check_weights, is_adapter
from prefdistill.models.loading import UNREADABLE, load_classifier, load_tokenizer, not_loaded

PREFIX = "base_model.model."  # of PEFT before a model's own names


class Classifiers:
    """Loads reward models by folder or hub id, one after the other, and keeps what the next one can use.

    K members that are PEFT adapters on one base cost one base and K adapters in memory, and the base is read from disk
    once. Any other classifier is loaded as `load_classifier` does.
    """

    def __init__(self, device: torch.device | str = "cpu", *, trust_remote_code: bool = False) -> None:
        self.device = device
        self.trust_remote_code = trust_remote_code
        self._base: str | None = None
        self._whole = _Whole({}, set())
        self._names: dict[str, str] = {}  # what PEFT calls an adapter, by its folder
        self._model: Any = None
        self._pad: int | None = None  # the base's own pad token

    def load(self, name: str) -> nn.Module:
        """The reward model of this name, on the device, in eval mode; what was given before it changes with it.

        Raises:
            ConfigError: as `load_classifier`; weights that neither the adapter nor its base has are missing.
        """
        if not is_adapter(name):
            return load_classifier(name, trust_remote_code=self.trust_remote_code).to(self.device).eval()
        base = adapter_base(name)
        check_weights(name)
        adapter = self._names.setdefault(str(Path(name).resolve()), f"member-{len(self._names)}")
        try:
            if base != self._base:
                from peft import AutoPeftModelForSequenceClassification

                self._whole = _Whole.of(base, trust_remote_code=self.trust_remote_code)
                self._whole.check(name)
                self._model = None  # not two bases in memory at a time
                self._model = AutoPeftModelForSequenceClassification.from_pretrained(
                    name,
                    adapter_name=adapter,
                    num_labels=1,
                    dtype=torch.float32,
                    use_safetensors=True,
                    trust_remote_code=self.trust_remote_code,
                ).to(self.device)
                self._base, self._pad = base, self._model.get_base_model().config.pad_token_id
            elif adapter not in self._model.peft_config:
                self._whole.check(name)
                self._model.load_adapter(name, adapter_name=adapter, torch_device=str(self.device))
        except (*UNREADABLE, KeyError) as error:  # PEFT looks for a head even where the base has one
            raise ConfigError(not_loaded("reward model", name, error)) from error
        self._model.set_adapter(adapter)
        # An adapter folder keeps no model configuration; where rewards are read hangs on the pad token.
        pad = load_tokenizer(name, trust_remote_code=self.trust_remote_code).pad_token_id
        self._model.get_base_model().config.pad_token_id = self._pad if pad is None else pad
        merge_on_the_way(self._model)
        found: nn.Module = self._model.eval()
        return found


@dataclass(frozen=True)
class _Whole:
    """What a base makes of a reward model: the shapes of all weights, and which of them it does not have itself."""

    shapes: Mapping[str, tuple[int, ...]]
    missing: set[str]

    @classmethod
    def of(cls, base: str, *, trust_remote_code: bool) -> _Whole:
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            base,
            num_labels=1,
            device_map="meta",  # no weights are read
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
        return cls({k: tuple(v.shape) for k, v in model.state_dict().items()}, set(info["missing_keys"]))

    def check(self, name: str) -> None:
        """Raises ConfigError for an adapter beside which a weight would stay random, or has another shape.

        PEFT leaves what is missing as it was drawn, and says nothing.
        """
        with safe_open(Path(name) / WEIGHTS, framework="pt") as file:
            found = {k.removeprefix(PREFIX): tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
        lacking = sorted(self.missing - found.keys())
        if lacking:
            raise ConfigError(
                f"the reward model {name!r} lacks {len(lacking)} weights, such as {lacking[0]}, and its base has none; "
                "save the adapter again, its head included (modules_to_save)"
            )
        other = [k for k in sorted(found.keys() & self.shapes.keys()) if found[k] != self.shapes[k]]
        if other:
            raise ConfigError(
                f"the reward model {name!r} has {other[0]} of shape {found[other[0]]}, where one label on its base "
                f"makes {self.shapes[other[0]]}; a reward model must have exactly 1 label"
            )


def merge_on_the_way(model: nn.Module) -> None:
    """Lets LoRA layers multiply by W + BA, put together for every batch, instead of twice.

    For inference. Over a batch of thousands of tokens the sum costs next to nothing, the base stays as it is, and no
    merged copy is kept. What is no plain LoRA (DoRA, a bias, quantised weights) is left to PEFT.
    """
    from peft.tuners.lora.layer import Linear

    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            layer: Any = module
            layer.forward = types.MethodType(_merged_forward, module)


def _merged_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
    if any(name in self.lora_variant or self.lora_bias[name] for name in active):
        found: Tensor = type(self).forward(self, x, *args, **kwargs)
        return found
    weight = self.base_layer.weight
    with torch.autocast(x.device.type, enabled=False):
        for name in active:
            weight = weight + self.get_delta_weight(name)
    return nn.functional.linear(x, weight, self.base_layer.bias)
