"""A module that takes as much memory as its inputs say."""

import torch
from torch import Tensor, nn


class Gigabytes(nn.Module):
    def forward(self, sizes: Tensor) -> Tensor:
        """Allocate memory for the sum of the sizes, int64 [N, 1] in MiB, and return the sizes, float32 [N, 1]."""
        memory = torch.empty([int(sizes.sum()), 1048576], dtype=torch.uint8, device=sizes.device)
        return sizes.float() * (memory.numel() > 0)


def build() -> nn.Module:
    return Gigabytes().eval()


def example_inputs(batch: int) -> tuple[Tensor, ...]:
    return (torch.ones(batch, 1, dtype=torch.int64),)
