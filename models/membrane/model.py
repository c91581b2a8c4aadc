"""A small U-Net that finds the membranes of cells in electron microscopy."""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.weights import load_weights

FOLDER = Path(__file__).parent
SIDE = 512  # pixels of a tile
LABELS = ["membrane", "cell"]
WIDTHS = (16, 32, 48, 64)


class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015) on blocks of 2x2 pixels: a quarter of the work at full resolution.

    The model normalises the images itself, so that they are copied to the device as bytes.
    """

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(double(i, o) for i, o in zip((4, *WIDTHS), WIDTHS, strict=False))
        self.up = nn.ModuleList(double(i + o, o) for i, o in zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True))
        self.classify = nn.Conv2d(WIDTHS[0], 4 * len(LABELS), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Segment images, uint8 [N, 1, H, W], sides divisible by 16 -> logits float32 [N, 2, H, W]."""
        x = nn.functional.pixel_unshuffle(images.float() / 127.5 - 1, 2)
        skips: list[Tensor] = []
        for block in self.down:
            if len(skips):
                x = nn.functional.max_pool2d(x, 2)
            x = block(x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat((x, skips.pop()), dim=1))
        return nn.functional.pixel_shuffle(self.classify(x), 2)


def double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def build() -> nn.Module:
    """Return the trained model, on the CPU, in evaluation mode."""
    return load_weights(UNet(), FOLDER / "weights.safetensors")


def example_inputs(batch_size: int) -> tuple[Tensor, ...]:
    """Return inputs of the served shape, to compare an export with the eager model."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, 256, (batch_size, 1, SIDE, SIDE), dtype=torch.uint8, generator=generator),)
