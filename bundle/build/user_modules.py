"""Wrap a user's TorchScript module so that it takes what its handler makes."""

from typing import Any

import torch
from torch import Tensor, nn

from bundle.build.torchvision_source import ListedImages


class IdsAlone(nn.Module):
    """A text classifier that takes token ids, and no mask."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, ids: Tensor, mask: Tensor):
        """Classify texts: ids and mask, int64 [N, T]."""
        return self.classifier(ids)


class WithTypes(IdsAlone):
    """A text classifier that also takes the types of the tokens, as BERT does."""

    def forward(self, ids: Tensor, mask: Tensor):
        """Classify texts: ids and mask, int64 [N, T]. All tokens have the type 0, that of a first sentence."""
        return self.classifier(ids, mask, torch.zeros_like(ids))


def adapt(module: torch.jit.ScriptModule, handler: str) -> nn.Module:
    """Return the module in the form that the handler of this name calls: itself, or wrapped."""
    if handler == "detection" and takes_list(module):
        return ListedImages(module, has_losses=returns_tuple(module)).eval()
    wrappers: dict[int, type[nn.Module]] = {1: IdsAlone, 3: WithTypes}
    if handler == "text" and (wrapper := wrappers.get(count_arguments(module))):
        return wrapper(module).eval()
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
    arguments = schema(module).arguments[1:]
    required = sum(not each.has_default_value() for each in arguments)
    return max(required, min(len(arguments), 2))


def schema(module: torch.jit.ScriptModule) -> Any:
    """Return the types of the arguments, the module itself first, and of the results of a module's `forward`."""
    return module.forward.schema  # type: ignore[attr-defined]  # a ScriptMethod, typed as any function
