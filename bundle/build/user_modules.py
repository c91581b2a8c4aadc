"""Wrap a user's TorchScript module so that it takes what its handler makes."""

from typing import Any

import torch
from torch import nn

from bundle.build.torchvision_source import ListedImages


def adapt(module: torch.jit.ScriptModule, handler: str) -> nn.Module:
    """Return the module in the form that the handler of this name calls: itself, or wrapped."""
    if handler == "detection" and takes_list(module):
        return ListedImages(module, has_losses=returns_tuple(module)).eval()
    return module


def takes_list(module: torch.jit.ScriptModule) -> bool:
    """Return whether a module takes a list of images, as torchvision's detectors do."""
    arguments = schema(module).arguments[1:]
    return bool(arguments) and isinstance(arguments[0].type, torch.ListType)


def returns_tuple(module: torch.jit.ScriptModule) -> bool:
    """Return whether a detector returns its losses before its detections, as torchvision's do when scripted."""
    return isinstance(schema(module).returns[0].type, torch.TupleType)


def count_arguments(module: torch.jit.ScriptModule) -> int:
    """Return how many tensors a module takes: those without a default, and at most one more."""
    return len(argument_names(module))


def argument_names(module: torch.jit.ScriptModule) -> list[str]:
    """Return the names of the tensors that a module takes: of those without a default, and of at most one more."""
    arguments = schema(module).arguments[1:]
    required = sum(not each.has_default_value() for each in arguments)
    optional = [each for each in arguments[required:] if "Tensor" in str(each.type)]
    return [each.name for each in (*arguments[:required], *optional[: max(0, 2 - required)])]


def schema(module: torch.jit.ScriptModule) -> Any:
    """Return the types of the arguments, the module itself first, and of the results of a module's `forward`."""
    return module.forward.schema  # type: ignore[attr-defined]  # a ScriptMethod, typed as any function
