"""`make add-model` with segmenters."""

import base64
import io

import numpy
import pytest
import torch
from PIL import Image

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from tests.unit.networks import AsDict, Levels
from tests.unit.workbench import Workbench

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NAMES = ["dark", "grey", "bright"]


def halves(width: int, height: int) -> bytes:
    """Draw an image whose left half is black, and whose right half is white."""
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), (width // 2, 0, width, height))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def masks(workbench: Workbench, *files: bytes) -> list[numpy.ndarray]:
    with DryRun(workbench.store / "theirs.mar") as worker:
        answers = worker.predict([{"body": file} for file in files])
    assert all(status == 200 for status, _ in answers), answers
    return [numpy.array(Image.open(io.BytesIO(base64.b64decode(body["mask"])))) for _, body in answers]


def check_halves(workbench: Workbench) -> None:
    """Check the masks of two images in one batch; the larger one is cut into tiles."""
    sizes = [(700, 300), (60, 90)]
    for (width, height), mask in zip(sizes, masks(workbench, *(halves(*size) for size in sizes)), strict=True):
        assert mask.shape == (height, width)
        assert (mask[:, : width // 2 - width // 20] == 0).all()
        assert (mask[:, width // 2 + width // 20 :] == 2).all()


UNCHANGED = {"mean": [0.0] * 3, "std": [1.0] * 3}


@pytest.mark.parametrize("network", [Levels, AsDict])
def test_segmenter_is_found_by_its_output(workbench: Workbench, network):
    folder = workbench.add(network(3), labels=workbench.labels(NAMES), **UNCHANGED)
    assert folder.bundle.handler == "segmentation"
    assert folder.config["handler"].items() >= {"tile": 512, "overlap": 64, "channels": 3}.items()
    assert folder.labels() == NAMES
    assert folder.bundle.sample == "sample.png"
    assert "KIND=segmentation" in workbench.report()
    assert not archive(folder, workbench.store).rebuilt
    check_halves(workbench)


def test_segmenter_of_one_size_without_labels_is_served_in_tiles(workbench: Workbench):
    class Fixed(Levels):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images.view(-1, 3, 96, 96))

    folder = workbench.add(
        torch.jit.trace(Fixed(3), torch.rand(1, 3, 96, 96)), resize=150, default_labels=False, **UNCHANGED
    )
    assert folder.config["handler"].items() >= {"tile": 96, "overlap": 24, "resize": 150}.items()
    assert folder.labels() == ["class_0", "class_1", "class_2"]
    [mask] = masks(workbench, halves(300, 200))
    assert (mask[:, :140] == 0).all()
    assert (mask[:, 160:] == 2).all()


def test_segmenter_traced_with_a_batch_of_one_is_served_with_its_cost(workbench: Workbench):
    class One(Levels):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images).view(1, 3, 64, 64)

    model = torch.jit.trace(One(3), torch.rand(1, 3, 64, 64))
    folder = workbench.add(model, labels=workbench.labels(NAMES), **UNCHANGED)
    assert folder.config["handler"].items() >= {"tile": 64, "resize": 64}.items()
    assert "a batch of N takes N times as long" in workbench.report()
    check_halves(workbench)


def test_grey_segmenter_takes_one_channel(workbench: Workbench):
    folder = workbench.add(Levels(3, channels=1), labels=workbench.labels(NAMES), mean=[0.0], std=[1.0], size=64)
    assert folder.config["handler"].items() >= {"tile": 64, "channels": 1}.items()
    check_halves(workbench)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Levels(3, shrink=4), r"shape \[1, 3, 128, 128\] for 1 images of 512 x 512.*torch.nn.functional.interpolate"),
        (Levels(1), r"return torch.cat\(\[-logits, logits\], 1\)"),
        (Levels(2), "has 2 classes, but .*labels.json has 3 labels"),
    ],
)
def test_unsuitable_segmenter_is_rejected_with_what_to_do(workbench: Workbench, network, message):
    workbench.rejects(network, message, labels=workbench.labels(NAMES), kind="segmentation")


def test_text_or_image_classifier_as_segmenter_is_rejected(workbench: Workbench):
    pooled = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    workbench.rejects(
        pooled, r"A segmenter must return floating-point numbers \[N, classes, H, W\]", kind="segmentation"
    )
