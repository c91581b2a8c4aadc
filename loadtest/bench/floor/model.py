"""A module that is never run: TorchServe's archives need one."""

import torch
from torch import Tensor, nn


def build() -> nn.Module:
    return nn.Identity()


def example_inputs(batch: int) -> tuple[Tensor, ...]:
    return (torch.zeros(batch, 1),)
