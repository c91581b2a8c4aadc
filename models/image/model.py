"""A small convolutional network, without residual connections, for 32x32 photographs."""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.weights import load_weights

FOLDER = Path(__file__).parent
SIZE = 32
CLASSES = 10
WIDTHS = (64, 160, 224)


class ImageNet32(nn.Module):
    """Convolutional classifier after Jordan, "94% on CIFAR-10 in 3.29 Seconds" (arXiv 2404.00498), made narrower.

    It has a fixed whitening convolution, three blocks that halve the resolution, a global maximum, and a linear layer.
    The model normalises the images itself, so that they are copied to the device as bytes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self):
        super().__init__()
        # per-channel statistics of CIFAR-10's training images
        self.register_buffer("mean", torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1))
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad = False
        widths = (24, *WIDTHS)
        self.blocks = nn.Sequential(nn.GELU(), *(block(i, o) for i, o in zip(widths, widths[1:], strict=False)))
        self.classify = nn.Linear(WIDTHS[-1], CLASSES, bias=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Scale uint8 [N, 3, H, W] to float32, with zero mean and unit variance over the training set."""
        return (images.float() / 255 - self.mean) / self.std

    def features(self, pixels: Tensor) -> Tensor:
        """Compute features of normalised images, float32 [N, 3, 32, 32] -> float32 [N, C, 3, 3]."""
        return self.blocks(self.whiten(pixels))

    def logits(self, features: Tensor) -> Tensor:
        return self.classify(features.amax(dim=(2, 3))) / 8

    def forward(self, images: Tensor) -> Tensor:
        """Classify images, uint8 [N, 3, 32, 32] (RGB) -> logits float32 [N, 10]."""
        pixels = self.normalise(images)
        if self.training:
            return self.logits(self.features(pixels))
        # averaged over an image and its mirror image, as in the paper's section 3.5: 1 % more accurate, twice the work
        return (self.logits(self.features(pixels)) + self.logits(self.features(pixels.flip(3)))) / 2

    @torch.jit.export
    def with_activations(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify as `forward` in evaluation mode does; also return the features, [N, 2 C, 3, 3], for Grad-CAM.

        The second half of the channels is that of the mirror image, turned back.
        """
        pixels = self.normalise(images)
        both = torch.cat((self.features(pixels), self.features(pixels.flip(3)).flip(3)), dim=1)
        of_image, of_mirror = both.chunk(2, dim=1)
        return (self.logits(of_image) + self.logits(of_mirror)) / 2, both


def block(inputs: int, outputs: int) -> nn.Sequential:
    def conv(channels: int) -> nn.Conv2d:
        layer = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
        nn.init.dirac_(layer.weight[:channels])  # identity initialisation, as in the paper
        return layer

    return nn.Sequential(
        conv(inputs),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(outputs),
        nn.GELU(),
        conv(outputs),
        nn.BatchNorm2d(outputs),
        nn.GELU(),
    )


def build() -> nn.Module:
    """Return the trained model, on the CPU, in evaluation mode."""
    return load_weights(ImageNet32(), FOLDER / "weights.safetensors")


def example_inputs(batch_size: int) -> tuple[Tensor, ...]:
    """Return inputs of the served shape, to compare an export with the eager model."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, 256, (batch_size, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator),)
