"""Models with 4-bit weights to put adapters on (QLoRA): NF4 with double quantisation, by bitsandbytes."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import is_bitsandbytes_available
from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION

from prefdistill.errors import ConfigError
from prefdistill.models.loading import load_policy, new_classifier, plain_folder

BLOCK = 64  # weights that share a scale


@functools.cache
def reads_back(width: int, device: torch.device) -> bool:
    """Whether rows of this many weights come back from NF4 on a device: bitsandbytes has several codes for CPUs.

    Blocks of one number each are kept by NF4 exactly, unless a block is given the scale of another.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.arange(1.0, width + 1, device=device).repeat_interleave(BLOCK).view(BLOCK, width)
    return torch.equal(dequantize_4bit(*quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")), weight)


def check_4bit(option: str, device: torch.device) -> None:
    """Whether 4-bit weights can be used here.

    Raises:
        ConfigError: bitsandbytes is not installed, is too old, or cannot work on this device.
    """
    if not is_bitsandbytes_available():
        raise ConfigError(
            f"{option} needs the package bitsandbytes, {BITSANDBYTES_MIN_VERSION} or newer; run 'pip install "
            f"prefdistill[qlora]', or leave {option} off"
        )
    import bitsandbytes

    if device.type not in bitsandbytes.supported_torch_devices:
        raise ConfigError(
            f"{option}: bitsandbytes {bitsandbytes.__version__} cannot work on this machine's device, {device.type} "
            f"(it can on {', '.join(sorted(bitsandbytes.supported_torch_devices))}); leave {option} off"
        )


def in_4bit(precision: str, device: torch.device) -> dict[str, Any]:
    """Arguments of from_pretrained that load the linear layers in NF4 on a device; the head stays as it is.

    Args:
        precision: of the products, float32 or bfloat16.
    """
    return {
        "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32,
        ),
        "device_map": {"": torch.cuda.current_device() if device.type == "cuda" else device.type},
    }


def load_policy_4bit(name: str, *, precision: str, device: torch.device, trust_remote_code: bool = False) -> nn.Module:
    """As `load_policy` on a device with its linear layers rounded to NF4, to put an adapter on.

    Args:
        precision: of the products, float32 or bfloat16.

    Raises:
        ConfigError: as `load_policy`; or a width that bitsandbytes cannot round.
    """
    with plain_folder(name, trust_remote_code=trust_remote_code) as folder:
        return _usable(
            load_policy(folder, trust_remote_code=trust_remote_code, **in_4bit(precision, device)), name, device
        )


def new_classifier_4bit(
    base: str, pad_id: int | None, *, precision: str, device: torch.device, trust_remote_code: bool = False
) -> nn.Module:
    """As `new_classifier` on a device with its linear layers, but not its head, rounded to NF4.

    Args:
        precision: of the products, float32 or bfloat16.

    Raises:
        ConfigError: as `new_classifier`; or a width that bitsandbytes cannot round.
    """
    with plain_folder(base, trust_remote_code=trust_remote_code) as folder:
        return _usable(
            new_classifier(folder, pad_id, trust_remote_code=trust_remote_code, **in_4bit(precision, device)),
            base,
            device,
        )


def _usable(model: nn.Module, name: str, device: torch.device) -> nn.Module:
    """The model, whose 4-bit layers will stay as they are.

    On CPUs with AVX-512 BF16 bitsandbytes would pack them anew at the first forward in evaluation: rounded once more,
    with no gradient for what comes before, and in a form that cannot be written out.

    Raises:
        ConfigError: rows that are not whole blocks, which bitsandbytes (0.50, its own code for CPUs) reads back as
            something else.
    """
    from bitsandbytes.nn import Linear4bit

    for layer, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        if not reads_back(module.in_features, device):
            raise ConfigError(
                f"the model {name!r} cannot be used in 4 bits on this machine: its layer {layer} reads "
                f"{module.in_features} numbers, which is no multiple of {BLOCK}, and bitsandbytes garbles such rows on "
                f"its {device.type}; leave load_in_4bit off, or use a GPU"
            )
        module.support_avx512bf16_for_cpu = False
    return model
