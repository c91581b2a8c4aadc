"""`make add-model` with detectors: the YOLO family, and those that return a list of dicts as torchvision's do."""

import io

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import detection

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.build.inspect_detector import known_classes
from tests.unit.networks import Blobs, Fixed, Listed
from tests.unit.workbench import CLASSES, LABELS, Workbench

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
FORMATS = [("yolo", True), ("yolov5", False)]
ROWS = torch.rand(1, 1600, 4, generator=torch.Generator().manual_seed(0)) * 600  # boxes in pixels


def scene(width: int, height: int, box: tuple[int, int, int, int]) -> bytes:
    """Draw a black image with a white box."""
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), box)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def detect(workbench: Workbench, *files: bytes) -> list[list[dict]]:
    with DryRun(workbench.store / "theirs.mar") as worker:
        answers = worker.predict([{"body": file} for file in files])
    assert all(status == 200 for status, _ in answers), answers
    return [body["detections"] for _, body in answers]


@pytest.mark.parametrize(("kind", "turned"), FORMATS)
@pytest.mark.parametrize("has_labels", [True, False])
def test_yolo_format_is_found_and_boxes_are_in_pixels_of_the_image(workbench: Workbench, kind, turned, has_labels):
    labels = workbench.labels() if has_labels else None
    names = LABELS if has_labels else [f"class_{index}" for index in range(CLASSES)]
    folder = workbench.add(Blobs(CLASSES, turned), labels=labels, default_labels=has_labels)
    assert folder.bundle.handler == "detection"
    assert (folder.config["handler"]["format"], folder.config["handler"]["size"]) == (kind, [640, 640])
    assert folder.labels() == names
    assert f"FORMAT={kind}" in workbench.report()
    assert not archive(folder, workbench.store).rebuilt
    # the image fills the input's width; a cell of 16 pixels of the input is 32 of the image
    boxes = [(320, 160, 352, 192), (960, 320, 992, 352)]
    for [found], box in zip(detect(workbench, *(scene(1280, 640, box) for box in boxes)), boxes, strict=True):
        assert (found["label"], found["class"]) == (names[0], 0)
        assert found["box"] == pytest.approx(box, abs=0.5)


def test_detection_in_the_given_sample_is_expected(workbench: Workbench):
    sample = workbench.files / "photo.PNG"
    sample.write_bytes(scene(640, 640, (16, 16, 32, 32)))
    folder = workbench.add(Blobs(CLASSES, True), kind="detection", sample=sample)
    assert (folder.bundle.sample, folder.bundle.expect) == ("sample.png", "label 0")
    assert not archive(folder, workbench.store).rebuilt
    assert "label 0 1.00" in workbench.report()


def test_without_a_sample_one_is_drawn_and_nothing_is_expected(workbench: Workbench):
    folder = workbench.add(Blobs(CLASSES, True))
    assert Image.open(folder.path / "sample.png").size == (320, 240)
    assert folder.bundle.expect is None


def test_yolo_traced_with_a_batch_of_one_is_served_with_its_cost(workbench: Workbench):
    class One(Blobs):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images).reshape(1, 4 + self.classes, -1)

    workbench.add(torch.jit.trace(One(CLASSES, True), torch.rand(1, 3, 320, 320)), size=320)
    assert "a batch of N takes N times as long" in workbench.report()
    boxes = [(16, 16, 32, 32), (160, 32, 176, 48)]
    for [found], box in zip(detect(workbench, *(scene(320, 320, box) for box in boxes)), boxes, strict=True):
        assert found["box"] == pytest.approx(box, abs=0.5)


def test_size_and_normalisation_are_used(workbench: Workbench):
    given = {"size": 320, "mean": [0.5] * 3, "std": [0.5] * 3}
    folder = workbench.add(Blobs(CLASSES, True), **given)
    assert folder.config["handler"]["size"] == [320, 320]
    assert folder.bundle.serialized.mean == [0.5] * 3


def rows(*columns: torch.Tensor) -> torch.Tensor:
    return torch.cat(columns, dim=2)


CLEAR = rows(ROWS, torch.rand(1, 1600, 80))
AMBIGUOUS = rows(ROWS[:, :12], torch.rand(1, 12, 7)).transpose(1, 2)  # [1, 11, 12]: 7 classes in both formats


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        (rows(ROWS[:, :5], torch.rand(1, 5, 1)), {"labels": None}, r"shape \[1, 5, 5\] .* Set LABELS or FORMAT\.$"),
        (rows(ROWS[:, :5], torch.rand(1, 5, 2)), {"labels": None}, r"yolo is \[N, 4 \+ classes, boxes\], yolov5 is"),
        (AMBIGUOUS, {}, r"yolo is \[N, 4 \+ classes.* Set FORMAT\.$"),
        (CLEAR.transpose(1, 2), {}, r"\[1, 84, 1600\].* With 7 labels, yolo is \[N, 11, boxes\].* Correct LABELS"),
        (rows(ROWS, torch.rand(1, 1600, 7)), {}, r"It looks turned: return output.transpose\(1, 2\)"),
        (CLEAR.transpose(1, 2), {"format": "yolov5", "labels": None}, "score"),
        (rows(ROWS, 9 * torch.rand(1, 1600, 7)).transpose(1, 2), {}, "go from .* Apply a sigmoid"),
        (rows(ROWS / 640, torch.rand(1, 1600, 7)).transpose(1, 2), {}, "shares of the image.* Multiply them by 640"),
        (
            rows(ROWS[:, :300], torch.linspace(1, 0, 300).view(1, -1, 1), torch.ones(1, 300, 1)),
            {"labels": None},
            r"\[1, 300, 6\]: boxes from which the overlapping ones are removed already.*nms=False",
        ),
    ],
)
def test_unclear_or_wrong_outputs_are_rejected_with_what_was_seen(workbench: Workbench, output, options, message):
    labels = {"labels": options["labels"], "default_labels": False} if "labels" in options else {}
    rest = {name: value for name, value in options.items() if name != "labels"}
    workbench.rejects(Fixed(output), message, kind="detection", **labels, **rest)


def test_format_decides_where_the_shape_does_not(workbench: Workbench):
    folder = workbench.add(Fixed(AMBIGUOUS), format="yolo")
    assert folder.config["handler"]["format"] == "yolo"


def test_list_of_dicts_without_losses_is_served(workbench: Workbench):
    folder = workbench.add(Listed())
    assert folder.config["handler"]["format"] == "torchvision"
    [[found]] = detect(workbench, scene(64, 48, (0, 0, 8, 8)))
    assert found == {"label": "label 1", "class": 1, "score": 0.75, "box": [0, 0, 32, 24]}


def test_list_of_dicts_with_a_class_without_label_is_rejected(workbench: Workbench):
    workbench.rejects(Listed(), "finds class 1, but LABELS has 1 labels", labels=workbench.labels(["background"]))
    workbench.rejects(Listed(), "Set LABELS, with the background as class 0", labels=None, default_labels=False)
    workbench.rejects(Listed(), "Leave out SIZE, MEAN and STD", size=320)
    workbench.rejects(Listed(), "With FORMAT=yolo, a model must take one tensor", format="yolo")
    workbench.rejects(Blobs(CLASSES, True), "This one takes one tensor", format="torchvision")


def test_scripted_detector_of_torchvision_is_served(workbench: Workbench):
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    folder = workbench.add(model)
    assert folder.config["handler"]["format"] == "torchvision"
    assert folder.labels() == LABELS
    detect(workbench, scene(320, 200, (8, 8, 80, 80)), scene(100, 300, (8, 8, 80, 80)))


def test_classes_of_faster_rcnn_are_those_of_its_last_layer():
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=CLASSES)
    assert known_classes(model) == CLASSES
    assert known_classes(Listed()) is None


def test_scripted_detector_of_two_arguments_is_copied_unchanged(workbench: Workbench):
    class Padded(nn.Module):
        def forward(self, images: torch.Tensor, sizes: torch.Tensor) -> list[dict[str, torch.Tensor]]:
            found: list[dict[str, torch.Tensor]] = []
            for i in range(images.size(0)):
                box = torch.cat((torch.zeros(2), sizes[i].flip(0).float())).unsqueeze(0)
                found.append({"boxes": box, "scores": torch.ones(1), "labels": torch.ones(1, dtype=torch.int64)})
            return found

    folder = workbench.add(Padded(), kind="detection")
    assert (folder.path / "model.pt").read_bytes() == (workbench.files / "theirs.pt").read_bytes()
    [[found], _] = detect(workbench, scene(64, 48, (0, 0, 8, 8)), scene(80, 100, (0, 0, 8, 8)))
    assert found["box"] == [0, 0, 64, 48]
