"""Train the segmenter of membranes on ISBI 2012: 20 slices of electron microscopy; the last four are the test split.

This reads `isbi2012-membrane.zip` in the data directory: `membrane/image/N.png` and `membrane/label/N.png`, 512x512.

    make train MODEL=membrane
    python -m models.membrane.train --data-dir data --epochs 240
"""

from dataclasses import replace
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import JaccardIndex
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from models import command_line, data_sets, training
from models.membrane.model import FOLDER, LABELS, UNet
from models.weights import round_weights

RECIPE = training.Recipe(
    epochs=240, batch_size=4, learning_rate=0.006, weight_decay=1e-3, warmup=0.15, optimizer="adamw"
)
SIDE = 256  # of a crop, in pixels
SLICES, TEST = 24, 4  # neighbouring slices resemble each other: the test split is the end of the stack
MEMBRANE_WEIGHT = 1.5  # in the loss: a fifth of the pixels are membrane


def load(data_dir: Path) -> tuple[Tensor, Tensor]:
    """Load the slices: uint8 [24, 1, 512, 512], and classes int64 [24, 512, 512].

    Raises:
        SystemExit: the file is missing.
    """
    source = (
        "download https://github.com/zhixuhao/unet, and pack its images of data/membrane/train as "
        "membrane/image/N.png and membrane/label/N.png."
    )
    with data_sets.open_archive(data_dir / "isbi2012-membrane.zip", "the slices of ISBI 2012", source) as archive:

        def read(kind: str) -> Tensor:
            names = [f"membrane/{kind}/{index}.png" for index in range(SLICES)]
            images = [Image.open(archive.open(name)).convert("L") for name in names]
            return torch.from_numpy(numpy.stack([numpy.array(image) for image in images]))

        return read("image").unsqueeze(1), (read("label") > 127).long()


class Segmenter(training.Classifier):
    """Train on crops with other places, orientations, deformations and contrasts."""

    def training_step(self, batch: tuple[Tensor, ...], _: int) -> Tensor:
        images, classes = distort(*batch)
        weight = torch.tensor([MEMBRANE_WEIGHT, 1.0], device=images.device)
        loss = functional.cross_entropy(self.model(vary_contrast(images)), classes, weight=weight)
        self.log_loss(loss, len(images))
        return loss


def distort(images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Crop, rotate, flip and deform: uint8 [N, 1, H, W], int64 [N, H, W] -> float32 [N, 1, SIDE, SIDE], int64.

    The deformation is a smooth field of 6x6 random shifts, because kornia's needs a Gaussian filter as large as the
    image, which takes longer than the step.
    """
    count, side = len(images), images.size(-1)
    scale = torch.empty(count, 1, 1).uniform_(0.85, 1.15) * SIDE / side
    angle = torch.empty(count).uniform_(-torch.pi, torch.pi)
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=1).view(count, 2, 2)
    flip = torch.ones(count, 2, 1)
    flip[:, 0, 0] = torch.randint(0, 2, (count,)).mul(2).sub(1)
    room = (1 - scale * 1.2).clamp(min=0)
    shift = torch.empty(count, 2, 1).uniform_(-1, 1) * room
    grid = functional.affine_grid(torch.cat((turn * flip * scale, shift), dim=2), [count, 1, SIDE, SIDE], False)
    field = functional.interpolate(torch.randn(count, 2, 6, 6) * 6 / side, SIDE, mode="bicubic", align_corners=True)
    grid = (grid + field.permute(0, 2, 3, 1)).to(images.device)
    cropped = functional.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    mask = functional.grid_sample(classes[:, None].float(), grid, "nearest", "reflection", align_corners=False)
    return cropped, mask[:, 0].long()


def vary_contrast(images: Tensor) -> Tensor:
    """Vary brightness, contrast and noise, float32 [N, 1, H, W] in 0..255."""
    size = (len(images), 1, 1, 1)
    gain, bias = torch.empty(size).uniform_(0.75, 1.3), torch.empty(size).uniform_(-25, 25)
    noise = torch.randn_like(images) * torch.empty(size).uniform_(0, 8)
    return ((images - 127.5) * gain.to(images) + 127.5 + bias.to(images) + noise).clamp(0, 255)


@torch.inference_mode()
def measure(model: nn.Module, images: Tensor, classes: Tensor) -> dict:
    """Return the pixel accuracy, the intersection over union of each class, and the confusion matrix of pixels."""
    metrics = [
        MulticlassAccuracy(len(LABELS), average="micro"),
        JaccardIndex(task="multiclass", num_classes=len(LABELS), average="none"),
        MulticlassConfusionMatrix(len(LABELS)),
    ]
    model.eval()
    for image, target in zip(images, classes, strict=True):
        predicted = model(image.unsqueeze(0)).argmax(1)
        for metric in metrics:
            metric.update(predicted, target.unsqueeze(0))
    accuracy, iou, matrix = (metric.compute() for metric in metrics)
    return {
        "pixel_accuracy": round(accuracy.item(), 4),
        "iou": {label: round(value, 4) for label, value in zip(LABELS, iou.tolist(), strict=True)},
        "confusion_matrix": matrix.tolist(),
    }


def main() -> None:
    options = command_line.arguments(__doc__, RECIPE, FOLDER)
    recipe = replace(RECIPE, epochs=options.epochs)
    images, classes = load(options.data_dir)
    learned = slice(0, SLICES - TEST)

    segmenter = Segmenter(UNet(), recipe)
    batches = training.Batches(images[learned], classes[learned], batch_size=recipe.batch_size, shuffle=True)
    seconds = training.fit(options, training.Stage(segmenter, batches))

    model = round_weights(segmenter.model.cpu())
    report = {
        "model": "membrane",
        "data": {"name": "ISBI 2012", "train": SLICES - TEST, "test": TEST},
        **measure(model, images[-TEST:], classes[-TEST:]),
    }
    training.save(options, model, LABELS, recipe, seconds, report)


if __name__ == "__main__":
    main()
