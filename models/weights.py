"""Weights on disk: float16 safetensors, half the bytes in git and never code. All that serving needs of training."""

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def load_weights(model: Model, file: Path) -> Model:
    """Loads float16 safetensors into `model` (float32), which is returned in evaluation mode."""
    state = {name: t.float() if t.is_floating_point() else t for name, t in load_file(file).items()}
    model.load_state_dict(state)
    return model.eval()


def save_weights(model: nn.Module, file: Path) -> None:
    """Writes `model`'s weights as float16; see `round_weights`."""
    state = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    save_file({name: t.contiguous() for name, t in state.items()}, file)
    file.chmod(0o644)  # safetensors writes for the owner alone


def round_weights(model: Model) -> Model:
    """Rounds every floating-point weight to what float16 holds: done before a model is measured, so that the figures
    are those of the weights that are stored.
    """
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
    return model
