"""Load and save weights as float16 safetensors: half the size of float32, and a format that cannot contain code."""

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def load_weights(model: Model, file: Path) -> Model:
    """Load float16 safetensors into `model` (float32), and return it in evaluation mode."""
    state = {name: t.float() if t.is_floating_point() else t for name, t in load_file(file).items()}
    model.load_state_dict(state)
    return model.eval()


def save_weights(model: nn.Module, file: Path) -> None:
    """Write the weights of `model` as float16; see `round_weights`."""
    state = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    save_file({name: t.contiguous() for name, t in state.items()}, file)
    file.chmod(0o644)  # safetensors makes the file readable for its owner only


def round_weights(model: Model) -> Model:
    """Round every floating-point weight to a value of float16.

    Call this before a model is measured, so that the figures are those of the stored weights.
    """
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
    return model
