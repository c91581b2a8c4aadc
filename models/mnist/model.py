"""A small convolutional network for 28x28 handwritten digits."""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.weights import load_weights

FOLDER = Path(__file__).parent
SIZE = 28
CLASSES = 10
WIDTHS = (24, 48, 96)


class DigitNet(nn.Module):
    """Three blocks that halve the resolution, from 28 to 3, and a linear layer: 7 million multiplications per image.

    The model normalises the images itself, so that they are copied to the device as bytes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self):
        super().__init__()
        # statistics of MNIST's training images
        self.register_buffer("mean", torch.tensor(0.1307))
        self.register_buffer("std", torch.tensor(0.3081))
        widths = (1, *WIDTHS)
        self.blocks = nn.Sequential(*(block(i, o) for i, o in zip(widths, widths[1:], strict=False)))
        self.classify = nn.Linear(WIDTHS[-1] * 3 * 3, CLASSES)

    def normalise(self, images: Tensor) -> Tensor:
        """Scale uint8 [N, 1, H, W] to float32, with zero mean and unit variance over the training set."""
        return (images.float() / 255 - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Classify images, uint8 [N, 1, 28, 28] (bright ink on black) -> logits float32 [N, 10]."""
        return self.classify(self.blocks(self.normalise(images)).flatten(1))


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def build() -> nn.Module:
    """Return the trained model, on the CPU, in evaluation mode."""
    return load_weights(DigitNet(), FOLDER / "weights.safetensors")


def example_inputs(batch_size: int) -> tuple[Tensor, ...]:
    """Return inputs of the served shape, to compare an export with the eager model."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, 256, (batch_size, 1, SIZE, SIZE), dtype=torch.uint8, generator=generator),)
