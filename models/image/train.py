"""Train the image classifier on CIFAR-10.

This reads `cifar10-images.zip` ({train,test}/<class>/NNNN.jpg) in the data directory. If the file is missing, CIFAR-10
is downloaded with torchvision.

    make train MODEL=image
    make train MODEL=image ARGS=--warm-start     # only the last stage, from the present weights
"""

import io
import json
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

from models import command_line, data_sets, evaluation, training
from models.image.model import CLASSES, FOLDER, ImageNet32
from models.weights import load_weights, round_weights

RECIPE = training.Recipe(
    epochs=20, batch_size=256, learning_rate=0.3, weight_decay=1e-3, label_smoothing=0.2, warmup=0.2
)
# second stage: little augmentation (He et al. 2019, "Data Augmentation Revisited", arXiv 1909.09148)
REFINEMENT = replace(RECIPE, epochs=14, learning_rate=0.15, warmup=0.1)
# last stage: the average of the weights along the way (Izmailov et al. 2018, arXiv 1803.05407)
AVERAGING = replace(RECIPE, epochs=8, learning_rate=0.06, warmup=0.05, floor=0.5, averaging=0.999)
GENTLE = 0.3  # strength of the augmentation in the second and last stage
LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def load(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """Load the split "train" or "test": uint8 [N, 3, 32, 32], and int64 [N].

    Raises:
        SystemExit: the data set is missing, and cannot be downloaded.
    """
    archive = data_dir / "cifar10-images.zip"
    if not archive.exists():
        from torchvision.datasets import CIFAR10

        with data_sets.downloaded("CIFAR-10", data_dir):
            dataset = CIFAR10(data_dir, train=split == "train", download=True)
        return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)
    images, targets = [], []
    with zipfile.ZipFile(archive) as files:
        names = [name for name in files.namelist() if name.startswith(f"{split}/") and name.endswith(".jpg")]
        for name in track(names, f"reading {split} images"):
            images.append(numpy.asarray(Image.open(io.BytesIO(files.read(name))).convert("RGB")))
            targets.append(LABELS.index(name.split("/")[1]))
    return torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(targets)


def whitening(images: Tensor, epsilon: float = 5e-4) -> Tensor:
    """Compute whitening filters [24, 3, 2, 2]: the eigenvectors of the covariance of 2x2 patches, with both signs.

    Args:
        images: float32 [N, 3, H, W], normalised.
        epsilon: added to the variances before the filters are scaled to unit variance.
    """
    patches = nn.functional.unfold(images, 2).transpose(1, 2).reshape(-1, 12).double()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + epsilon).sqrt()).T.reshape(12, 3, 2, 2)
    return torch.cat([filters, -filters]).float()


class Augment:
    """Vary what differs between photographs: framing, light, sharpness, noise, resolution; and erase a patch.

    Every image is mirrored at random, and moved by whole pixels, which keeps it sharp. The other operations act on a
    random part of the batch, because most of them visibly blur an image of 32 pixels. Each image has its own amounts.

    Args:
        strength: factor of the probability of the other operations.
    """

    def __init__(self, strength: float = 1.0):
        from kornia import augmentation as K

        self.strength = strength
        self.geometry = nn.Sequential(
            K.RandomHorizontalFlip(p=0.5),
            K.RandomCrop((32, 32), padding=3, padding_mode="reflect"),
            K.RandomAffine(degrees=8, scale=(0.85, 1.15), padding_mode="reflection", p=0.15 * strength),
        )
        self.quality = nn.Sequential(
            K.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25, hue=0.03, p=0.3 * strength),
            K.RandomGaussianBlur((3, 3), (0.3, 1.0), p=0.05 * strength),
            K.RandomGaussianNoise(std=0.04, p=0.05 * strength),
            K.RandomGrayscale(p=0.03 * strength),
            K.RandomErasing(scale=(0.05, 0.15), p=0.3),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Augment images, uint8 [N, 3, 32, 32] -> uint8 [N, 3, 32, 32]."""
        with torch.no_grad():
            altered = self.geometry(images.float() / 255)
            altered = low_resolution(altered, share=0.05 * self.strength)
            return (self.quality(altered).clamp(0, 1) * 255).round().byte()


def low_resolution(images: Tensor, share: float, size: int = 22) -> Tensor:
    """Shrink a random `share` of the images to `size` pixels, and enlarge them again, in place."""
    chosen = torch.rand(len(images), device=images.device) < share
    small = nn.functional.interpolate(images[chosen], size=size, mode="bilinear", antialias=True)
    images[chosen] = nn.functional.interpolate(small, size=images.shape[-1], mode="bilinear")
    return images


def conditions(images: Tensor) -> dict[str, Tensor]:
    """Return the test images (uint8 [N, 3, 32, 32]) as under other conditions of light and camera."""
    from torchvision.io import decode_jpeg, encode_jpeg
    from torchvision.transforms import functional as F

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator) * 10
    return {
        "jpeg_quality_30": torch.stack([decode_jpeg(encode_jpeg(image, 30)) for image in images]),
        "blur": F.gaussian_blur(images, [3, 3], [0.8, 0.8]),
        "noise": (images.float() + noise).round().clamp(0, 255).byte(),
        "dark": F.adjust_brightness(images, 0.6),
        "low_contrast": F.adjust_contrast(images, 0.6),
        "grey": F.rgb_to_grayscale(images, 3),
    }


def main() -> None:
    options = command_line.arguments(__doc__, RECIPE, FOLDER, command_line.warm_start)
    images, targets = load(options.data_dir, "train")
    test_images, test_targets = load(options.data_dir, "test")

    model = ImageNet32().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
    stages = [
        (replace(RECIPE, epochs=options.epochs), Augment()),
        (REFINEMENT, Augment(GENTLE)),
        (AVERAGING, Augment(GENTLE)),
    ]
    report: dict = {"model": "image"}
    if options.warm_start:
        load_weights(model, FOLDER / "weights.safetensors")
        stages = stages[-1:]
        earlier = json.loads((FOLDER / "metrics.json").read_text())
        kept = ("accuracy", "recipe", "seconds", "commit", "resumed_from")
        report["resumed_from"] = {key: earlier[key] for key in kept if key in earlier}
    else:
        some = torch.randperm(len(images))[:5000]  # random, because the files are sorted by class
        model.whiten.weight.data = whitening(model.normalise(images[some]))
    recipe, _ = stages[-1]
    batches = training.Batches(images, targets, batch_size=recipe.batch_size, shuffle=True)
    seconds = training.fit(
        options, *(training.Stage(training.Classifier(model.train(), *stage), batches) for stage in stages)
    )

    model = round_weights(model.cpu())
    report |= {
        "data": {"name": "CIFAR-10", "train": len(images), "test": len(test_images)},
        "stages": [asdict(recipe) for recipe, _ in stages],
        **evaluation.measure(model, (test_images, test_targets), conditions(test_images), CLASSES),
    }
    training.save(options, model, LABELS, recipe, seconds, report)


if __name__ == "__main__":
    main()
