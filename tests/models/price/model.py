"""A linear regression with weights that a test can check by hand."""

import torch
from torch import Tensor, nn


def build() -> nn.Module:
    model = nn.Linear(3, 1)
    model.load_state_dict({"weight": torch.tensor([[10.0, 2.0, -1.0]]), "bias": torch.tensor([5.0])})
    return model.eval()


def example_inputs(batch: int) -> tuple[Tensor, ...]:
    return (torch.rand(batch, 3, generator=torch.Generator().manual_seed(0)),)
