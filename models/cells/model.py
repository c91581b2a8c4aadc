"""A detector of blood cells under the microscope: EfficientNet-Lite0 with one grid of predictions.

Cells are of similar sizes, so one grid of points is enough: no pyramid, no anchors. Each point predicts the classes and
the distances to the four sides of a box around it (Tian et al. 2019, FCOS).
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from models.weights import load_weights

FOLDER = Path(__file__).parent
HEIGHT, WIDTH = 288, 384  # pixels of the input
STRIDE = 8  # pixels between two points of the grid
LABELS = ["RBC", "WBC", "Platelets"]
CHANNELS = 64  # of the head
# of EfficientNet-Lite0 up to a sixteenth of the resolution: kernel, stride, expansion, channels, blocks
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3))
FINE = 3  # stages up to the resolution of the grid

BackboneLayer = partial(
    Conv2dNormActivation, norm_layer=partial(nn.BatchNorm2d, eps=1e-3), activation_layer=nn.ReLU6, inplace=True
)
HeadLayer = partial(Conv2dNormActivation, CHANNELS, CHANNELS, 3, activation_layer=nn.ReLU, inplace=True)


class MobileBlock(nn.Module):
    """Expand, filter each channel, project; added to its input if the shape is the same (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = inputs * expansion
        expand = [BackboneLayer(inputs, wide, 1)] if expansion > 1 else []
        self.layers = nn.Sequential(
            *expand,
            BackboneLayer(wide, wide, kernel, stride, groups=wide),
            BackboneLayer(wide, outputs, 1, activation_layer=None, inplace=None),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layers(features) if self.residual else self.layers(features)


class CellNet(nn.Module):
    """The backbone, a head on its features of two resolutions, and the boxes of the grid."""

    mean: Tensor
    std: Tensor
    points: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.498, 0.498, 0.498]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.502, 0.502, 0.502]).view(3, 1, 1))
        self.stride = STRIDE  # TorchScript sees no global variables
        self.register_buffer("points", grid(HEIGHT, WIDTH), persistent=False)
        channels, stages = 32, []
        for kernel, stride, expansion, width, blocks in STAGES:
            stage = [
                MobileBlock(width if i else channels, width, kernel, 1 if i else stride, expansion)
                for i in range(blocks)
            ]
            stages.append(nn.Sequential(*stage))
            channels = width
        self.fine = nn.Sequential(BackboneLayer(3, 32, 3, 2), *stages[:FINE])
        self.coarse = nn.Sequential(*stages[FINE:])
        self.from_fine = nn.Conv2d(STAGES[FINE - 1][3], CHANNELS, 1)
        self.from_coarse = nn.Conv2d(STAGES[-1][3], CHANNELS, 1)
        self.fuse = HeadLayer()
        self.classify = nn.Sequential(HeadLayer(), nn.Conv2d(CHANNELS, len(LABELS), 3, padding=1))
        self.locate = nn.Sequential(HeadLayer(), nn.Conv2d(CHANNELS, 4, 3, padding=1))
        nn.init.constant_(self.classify.get_parameter("1.bias"), -4.0)  # almost no point is a cell's
        nn.init.constant_(self.locate.get_parameter("1.bias"), 2.5)

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [N, classes, A], and the distances [N, 4, A] to the left, top, right and bottom, in pixels."""
        fine = self.fine((images.float() / 255 - self.mean) / self.std)
        coarse = self.from_coarse(self.coarse(fine))
        coarse = nn.functional.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)
        features = self.fuse(self.from_fine(fine) + coarse)
        # float: where the layers compute in bfloat16, a sum of two distances would be rounded to half a pixel
        distances = nn.functional.softplus(self.locate(features).float()) * self.stride
        return self.classify(features).float().flatten(2), distances.flatten(2)

    def forward(self, images: Tensor) -> Tensor:
        """Detect cells, uint8 [N, 3, 288, 384] (RGB) -> float32 [N, 4 + classes, 1728].

        The rows of the second dimension are the boxes' x and y of the centre, width, height, in pixels, and the
        probability of each class.
        """
        logits, distances = self.predict(images)
        before, after = distances[:, :2], distances[:, 2:]
        return torch.cat((self.points + (after - before) / 2, before + after, logits.sigmoid()), dim=1)


def grid(height: int, width: int) -> Tensor:
    """Return the points that predict boxes in an input of this size: x and y in pixels, float32 [2, A]."""
    x, y = ((torch.arange(side // STRIDE) + 0.5) * STRIDE for side in (width, height))
    return torch.stack(torch.meshgrid(x, y, indexing="xy")).flatten(1)


def build() -> nn.Module:
    """Return the trained model, on the CPU, in evaluation mode."""
    return load_weights(CellNet(), FOLDER / "weights.safetensors")


def example_inputs(batch_size: int) -> tuple[Tensor, ...]:
    """Return inputs of the served shape, to compare an export with the eager model."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, 256, (batch_size, 3, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator),)
