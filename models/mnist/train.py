"""Train the digit classifier on MNIST.

This reads `MNIST/raw` in the data directory. If it is missing, torchvision downloads it there.

    make train MODEL=mnist
    python -m models.mnist.train --data-dir data --epochs 16
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.datasets import MNIST

from models import command_line, data_sets, evaluation, training
from models.mnist.model import CLASSES, FOLDER, DigitNet
from models.weights import round_weights

RECIPE = training.Recipe(
    epochs=16, batch_size=128, learning_rate=0.2, weight_decay=5e-4, label_smoothing=0.02, warmup=0.2
)
LABELS = [str(digit) for digit in range(CLASSES)]


def load(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """Load the split "train" or "test": uint8 [N, 1, 28, 28], and int64 [N].

    Raises:
        SystemExit: the data set is missing, and cannot be downloaded.
    """
    with data_sets.downloaded("MNIST", data_dir):
        dataset = MNIST(data_dir, train=split == "train", download=True)
    return dataset.data.unsqueeze(1), dataset.targets


class Augment:
    """Vary what differs between images of digits: the handwriting, the pen, the camera.

    The handler crops digits to their ink, fits them into 20x20 and centres them by mass, as in MNIST. So size and
    position vary little here, and the width and the darkness of the strokes vary much. Each image has its own amounts.
    """

    def __init__(self):
        from kornia import augmentation as K

        self.hand = nn.Sequential(
            K.RandomAffine(
                degrees=12,
                translate=(0.06, 0.06),
                scale=(0.8, 1.1),
                shear=(-12, 12, -5, 5),  # type: ignore[arg-type]  # kornia takes four numbers, its types two
                p=0.8,
            ),
            K.RandomPerspective(0.2, p=0.2),
            K.RandomElasticTransform(kernel_size=(13, 13), sigma=(4.0, 4.0), alpha=(1.0, 1.0), p=0.3),
        )
        self.camera = nn.Sequential(
            K.RandomGaussianBlur((5, 5), (0.3, 1.2), p=0.15),
            K.RandomGamma(gamma=(0.6, 1.6), gain=(0.6, 1.0), p=0.3),
            K.RandomGaussianNoise(std=0.06, p=0.15),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Augment images, uint8 [N, 1, 28, 28] -> uint8 [N, 1, 28, 28]."""
        with torch.no_grad():
            digits = self.hand(images.float() / 255)
            digits = self.camera(restroke(digits, share=0.5))
            return (digits.clamp(0, 1) * 255).round().byte()


def restroke(digits: Tensor, share: float) -> Tensor:
    """Make the strokes of a random `share` of the digits, float32 [N, 1, H, W], up to two pixels thinner or thicker."""
    from kornia.morphology import dilation, erosion

    pen = torch.ones(3, 3, device=digits.device)
    amount = torch.empty(len(digits), 1, 1, 1, device=digits.device).uniform_(-0.8, 1)
    amount *= torch.rand_like(amount) < share
    altered = torch.where(amount > 0, dilation(digits, pen), erosion(digits, pen))
    return digits.lerp(altered, amount.abs())


def conditions(images: Tensor) -> dict[str, Tensor]:
    """Return the test images (uint8 [N, 1, 28, 28]) as from other handwriting, pens and cameras."""
    from kornia.morphology import dilation, erosion
    from torchvision.transforms import functional as F

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator) * 40
    pen = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    return {
        "thin": ((images + erosion(images.float(), pen)) / 2).byte(),
        "thick": dilation(images.float(), pen).byte(),
        "faint": (images * 0.4).byte(),
        "blur": F.gaussian_blur(images, [5, 5], [1.2, 1.2]),
        "noise": (images.float() + noise).round().clamp(0, 255).byte(),
        "rotated_15_left": F.rotate(images, 15, F.InterpolationMode.BILINEAR),
        "rotated_15_right": F.rotate(images, -15, F.InterpolationMode.BILINEAR),
        "shifted_2_pixels": F.affine(images, 0, [2, 2], 1, [0, 0]),
        "sheared_15": F.affine(images, 0, [0, 0], 1, [15, 0], F.InterpolationMode.BILINEAR),
        "smaller": F.affine(images, 0, [0, 0], 0.8, [0, 0], F.InterpolationMode.BILINEAR),
    }


def main() -> None:
    options = command_line.arguments(__doc__, RECIPE, FOLDER)
    recipe = replace(RECIPE, epochs=options.epochs)
    images, targets = load(options.data_dir, "train")
    test_images, test_targets = load(options.data_dir, "test")

    model = DigitNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
    classifier = training.Classifier(model, recipe, Augment())
    batches = training.Batches(images, targets, batch_size=recipe.batch_size, shuffle=True)
    seconds = training.fit(options, training.Stage(classifier, batches))

    model = round_weights(model.cpu())
    report = {
        "model": "mnist",
        "data": {"name": "MNIST", "train": len(images), "test": len(test_images)},
        **evaluation.measure(model, (test_images, test_targets), conditions(test_images), CLASSES),
    }
    training.save(options, model, LABELS, recipe, seconds, report)


if __name__ == "__main__":
    main()
