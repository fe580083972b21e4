"""torch.compile by layers: one layer is compiled and all run it, for every number of tokens."""

from __future__ import annotations

import os
import shutil
import sys

import torch
from torch import nn

from prefdistill.errors import ConfigError
from prefdistill.models import gates, linears, norms, rotary
from prefdistill.models.backbone import replacement_of
from prefdistill.native.library import compiler

REPLACEMENTS = (gates._forward, linears._forward, norms._forward, rotary._forward)


def check_compiler(device: torch.device) -> None:
    """Raises ConfigError if torch.compile would find no compiler for this device's code."""
    if sys.platform == "win32":
        return
    if device.type == "cuda" and not any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))):
        raise ConfigError(
            "torch.compile needs a C compiler for what starts its kernels, and neither $CC, cc, gcc nor clang is "
            "found; install one (Debian: apt-get install gcc), or leave compile off"
        )
    if device.type == "cpu" and compiler() is None:
        raise ConfigError(
            "torch.compile needs a C++ compiler, and neither $CXX, g++ nor clang++ is found; install one (Debian: "
            "apt-get install g++), or leave compile off"
        )


def compile_layers(backbone: nn.Module) -> int:
    """Compiles a model's decoder layers in place, shapes kept open; returns how many.

    Nothing is compiled before the first forward; the code of the first layer serves them all.

    Raises:
        ConfigError: the model has no list of layers.
    """
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"{type(backbone).__name__} has no list of layers that torch.compile could take one by one")
    for layer in layers:
        _give_back(layer)
        layer.compile(dynamic=True)
    return len(layers)


def has_compiled_layers(backbone: nn.Module) -> bool:
    """Whether torch.compile has a model's layers, which must keep the forwards that it found."""
    return any(layer._compiled_call_impl is not None for layer in getattr(backbone, "layers", None) or [])


def _give_back(layer: nn.Module) -> None:
    """Its parts' own forwards again: for one that was replaced torch.compile would compile every layer anew.

    It gives up after the eighth.
    """
    for part in layer.modules():
        if replacement_of(part) in REPLACEMENTS:
            del part.forward
