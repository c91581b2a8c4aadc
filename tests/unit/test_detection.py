"""The handler of detectors: placement of images, formats of outputs, options, pictures."""

import base64
import functools
import io
from collections.abc import Iterator

import numpy
import pytest
import torch
from PIL import ExifTags, Image
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import batched_nms

from bundle.build.dryrun import DryRun
from bundle.build.torchvision_source import ListedImages
from handlers.core import boxes, boxes_drawn
from handlers.detection import DetectionHandler
from tests.unit.serialized import compressible, serving_with

LABELS = ["cat", "dog"]
# x and y of the centre, width, height, probabilities of a cat and a dog, in a 640 x 640 input
RAW = (
    (320.0, 320.0, 100.0, 200.0, 0.9, 0.1),
    (322.0, 320.0, 100.0, 200.0, 0.8, 0.2),  # the same cat
    (320.0, 322.0, 100.0, 200.0, 0.1, 0.7),  # a dog in the same place
    (100.0, 300.0, 40.0, 40.0, 0.4, 0.0),
    (500.0, 300.0, 40.0, 40.0, 0.05, 0.0),
)


class Raw(nn.Module):
    """Return `RAW` for each image, in a format of YOLO. If the first pixel is white, all numbers are NaN."""

    def __init__(self, kind: str):
        super().__init__()
        rows = torch.tensor(RAW)
        if kind == "yolov5":  # the probability of any object, and those of the classes if there is one
            rows = torch.cat((rows[:, :4], torch.full((len(rows), 1), 0.5), rows[:, 4:] * 2), dim=1)
        self.register_buffer("rows", rows)
        self.turned = kind == "yolo"

    def forward(self, images: Tensor) -> Tensor:
        spoilt = (images[:, 0, 320, 0] == 255).view(-1, 1, 1)
        rows = self.rows.expand(images.size(0), -1, -1).masked_fill(spoilt, float("nan"))
        return rows.transpose(1, 2) if self.turned else rows


class Bright(nn.Module):
    """Return the box of an image's bright pixels, and nothing for a dark image, as torchvision's detectors do."""

    def forward(self, images: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = []
        for i in range(images.size(0)):
            bright = (images[i, 0, : int(sizes[i, 0]), : int(sizes[i, 1])] > 128).nonzero()
            rows = torch.zeros(0, 4)
            if bright.size(0) > 0:
                corners = torch.cat((bright.amin(dim=0).flip(0), bright.amax(dim=0).flip(0) + 1))
                rows = corners.float().unsqueeze(0).repeat(2, 1)
            scores = torch.tensor([0.4, 0.9])[: rows.size(0)]
            found.append({"boxes": rows, "scores": scores, "labels": torch.ones(rows.size(0), dtype=torch.int64)})
        return found


serving = functools.partial(serving_with, "detection")


@pytest.fixture(scope="module", params=["yolo", "yolov5"])
def yolo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    with serving(tmp_path_factory.mktemp("yolo"), Raw(request.param), LABELS, format=request.param) as worker:
        yield worker


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    with serving(tmp_path_factory.mktemp("bright"), Bright(), LABELS, longest_side=200) as worker:
        yield worker


def scene(width: int, height: int, box: tuple[int, int, int, int] | None) -> Image.Image:
    """Draw a dark image with a white box (left, top, right, bottom)."""
    image = Image.new("RGB", (width, height), (10, 10, 10))
    if box is not None:
        image.paste((255, 255, 255), box)
    return image


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def detect(worker: DryRun, content: bytes, **options: str) -> list[dict]:
    """Return the detections in the answer to one image."""
    row: dict[str, object] = {"data": content} if options else {"body": content}
    [(status, answer)] = worker.predict([row | {name: value.encode() for name, value in options.items()}])
    assert status == 200, answer
    return answer["detections"]


def test_yolo_output_is_suppressed_per_class_and_ranked(yolo):
    found = detect(yolo, encode(scene(640, 640, None)))
    assert [(each["label"], each["class"], round(each["score"], 3)) for each in found] == [
        ("cat", 0, 0.9),
        ("dog", 1, 0.7),
        ("cat", 0, 0.4),
    ]
    assert found[0]["box"] == [270, 220, 370, 420]


@pytest.mark.parametrize("size", [(1280, 960), (320, 240), (240, 320), (999, 333)])
def test_yolo_boxes_are_in_pixels_of_the_original(yolo, size):
    ratio = max(size) / 640
    left, top = (320 - side / ratio / 2 for side in size)  # of the image in the input
    expected = [(270 - left) * ratio, (220 - top) * ratio, (370 - left) * ratio, (420 - top) * ratio]
    expected = [min(max(value, 0), size[i % 2]) for i, value in enumerate(expected)]
    for kind in ("PNG", "JPEG"):  # a large JPEG is decoded at a fraction of its size
        found = detect(yolo, encode(scene(*size, None), kind))
        assert found[0]["box"] == pytest.approx(expected, abs=1.5 * ratio)


def test_yolo_output_with_other_classes_stops_the_worker(tmp_path, caplog):
    labels = [*LABELS, "bird"]
    with pytest.raises(RuntimeError, match="example"), serving(tmp_path, Raw("yolo"), labels, format="yolo"):
        pass
    assert "the format yolo with 3 labels is [N, 7, boxes]" in caplog.text


def test_score_that_is_not_a_number_is_an_error(yolo):
    white = encode(scene(640, 640, (0, 0, 640, 640)))
    [(bad, body), (good, answer)] = yolo.predict([{"body": white}, {"body": encode(scene(640, 640, None))}])
    assert (bad, good) == (500, 200)
    assert "not a finite number" in body["message"]
    assert len(answer["detections"]) == 3


@pytest.mark.parametrize("format", ["json", "png"])
def test_box_that_is_not_a_number_is_an_error(yolo, monkeypatch, format):
    reduce = yolo.handler.reduce

    def spoil(outputs):
        rows = reduce(outputs)
        return rows | {"boxes": rows["boxes"] * float("nan")}

    monkeypatch.setattr(yolo.handler, "reduce", spoil)
    [(status, answer)] = yolo.predict([{"data": encode(scene(64, 48, None)), "format": format.encode()}])
    assert (status, answer["type"]) == (500, "NonFiniteOutput")


def test_class_without_a_label_names_the_label_file(tmp_path, caplog):
    with serving(tmp_path, Bright(), ["cat"]) as worker:
        [(status, _)] = worker.predict([{"body": encode(scene(100, 80, (10, 20, 50, 60)))}])
    assert status == 500
    assert "the model returns the class 1; index_to_name.json has 1 labels" in caplog.text


def test_images_of_different_sizes_share_a_batch(bright):
    places = [((100, 80), (10, 20, 50, 60)), ((60, 190), (5, 100, 25, 180)), ((90, 90), None), ((8, 100), (0, 0, 8, 9))]
    files = [encode(scene(*size, box)) for size, box in places]
    answers = bright.predict([{"body": file} for file in files])
    for (status, answer), (_, box), file in zip(answers, places, files, strict=True):
        assert status == 200
        assert [each["box"] for each in answer["detections"]] == ([list(box)] * 2 if box else [])
        assert answer["detections"] == detect(bright, file)


def test_detections_are_ranked_best_first(bright):
    found = detect(bright, encode(scene(100, 80, (10, 20, 50, 60))))
    assert [each["score"] for each in found] == pytest.approx([0.9, 0.4])


def test_invalid_neighbours_are_rejected_alone(bright):
    good = encode(scene(100, 80, (10, 20, 50, 60)))
    rows = [{"body": b"not an image"}, {"body": good}, {"body": good[:60]}, {"data": good, "score_threshold": b"2"}]
    answers = bright.predict(rows)
    assert [status for status, _ in answers] == [400, 200, 400, 400]
    assert len(answers[1][1]["detections"]) == 2


def test_instances_are_answered_in_order(bright):
    images = [encode(scene(50, 50, (i, i, 40, 40))) for i in (1, 5, 9)]
    body = {"instances": [base64.b64encode(each).decode() for each in images]}
    [(status, answer)] = bright.predict([{"body": body}])
    assert status == 200
    assert [each["detections"][0]["box"][0] for each in answer["predictions"]] == [1, 5, 9]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_those_of_the_upright_image(bright, orientation, kind):
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    box = (160, 320, 640, 480)
    upright = scene(960, 800, box)
    stored = upright.transpose(turns[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    found = detect(bright, encode(stored, kind, quality=95, exif=exif))
    assert found[0]["box"] == pytest.approx(box, abs=5)  # the model sees a fifth of the pixels


@pytest.mark.parametrize("size", [(8, 4000), (4000, 8)])
def test_elongated_image_is_answered(yolo, bright, size):
    content = encode(scene(*size, (0, 0, *size)))
    assert detect(bright, content)[0]["box"] == [0, 0, *size]
    for each in detect(yolo, content):
        assert all(0 <= value <= size[i % 2] for i, value in enumerate(each["box"]))


def test_options_limit_the_detections(yolo):
    content = encode(scene(640, 640, None))
    assert len(detect(yolo, content, score_threshold="0.5")) == 2
    assert len(detect(yolo, content, score_threshold="0")) == 4
    assert [each["label"] for each in detect(yolo, content, max_detections="1")] == ["cat"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_detections": b"101"}, "max_detections must be between 1 and 100"),
        ({"max_detections": b"0"}, "max_detections"),
        ({"score_threshold": b"-0.1"}, "score_threshold"),
        ({"format": b"gif"}, "format"),
    ],
)
def test_invalid_option_is_named(yolo, option, message):
    [(status, body)] = yolo.predict([{"data": encode(scene(64, 64, None)), **option}])
    assert status == 400
    assert message in body["message"]


def picture(worker: DryRun, content: bytes, **options: bytes) -> Image.Image:
    [(status, body)] = worker.predict([{"data": content, "format": b"png", **options}])
    assert status == 200, body
    return Image.open(io.BytesIO(body))


def test_picture_shows_the_boxes_on_the_original(bright):
    original = scene(300, 240, (60, 80, 200, 200))
    shown = picture(bright, encode(original))
    assert shown.size == original.size
    before, after = numpy.asarray(original).astype(int), numpy.asarray(shown).astype(int)
    changed = numpy.argwhere(abs(before - after).sum(axis=2) > 60)
    assert changed.min(axis=0) == pytest.approx([80, 60], abs=2)
    assert changed.max(axis=0) == pytest.approx([200, 200], abs=2)
    assert (after[120:180, 100:190] == 255).all()  # inside of the box


def test_picture_without_detections_is_the_image(bright):
    original = scene(90, 90, None)
    assert picture(bright, encode(original)).tobytes() == original.tobytes()


def test_picture_of_a_large_image_is_reduced(tmp_path):
    with serving(tmp_path, Bright(), LABELS, max_picture_pixels=10_000) as worker:
        shown = picture(worker, encode(scene(400, 100, (100, 20, 200, 80))))
    assert shown.width * shown.height <= 10_000
    assert shown.width / shown.height == pytest.approx(4, rel=0.05)


def test_masks_of_a_picture_show_the_best_one_where_they_overlap():
    image = Image.new("RGB", (200, 100), "black")
    masks = torch.zeros(2, 50, 120, dtype=torch.uint8)
    masks[0, :25, :50] = 1
    masks[1, :, :100] = 1  # the model's input is wider than the image: the rest is padding
    placement = boxes.Placement((200, 100), (2.0, 2.0))
    shown = numpy.array(boxes_drawn.lay_masks(image, masks, [(200, 0, 0), (0, 0, 200)], placement))
    opacity = round(255 * boxes_drawn.MASK_OPACITY) / 255
    assert shown[10, 10].tolist() == [round(200 * opacity), 0, 0]
    assert shown[90, 190].tolist() == [0, 0, round(200 * opacity)]
    none = boxes_drawn.lay_masks(image, masks * 0, [(200, 0, 0), (0, 0, 200)], placement)
    assert none.tobytes() == image.tobytes()


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_suppression_keeps_the_boxes_that_torchvisions_own_keeps(count: int):
    generator = torch.Generator().manual_seed(0)
    corners, sizes = (side * torch.rand(count, 2, generator=generator) for side in (400, 80))
    candidates = torch.cat((corners, corners + sizes), dim=1)
    scores, labels = torch.rand(count, generator=generator) + 0.1, torch.randint(3, (count,), generator=generator)
    found = boxes.suppress(candidates, scores, labels, 0.5)
    kept = batched_nms(candidates, scores, labels, 0.5)
    assert found["scores"].equal(scores[kept])
    assert found["boxes"].equal(candidates[kept])
    assert found["labels"].equal(labels[kept])


def test_best_detections_are_kept_and_padded():
    images = [
        {"boxes": torch.arange(12.0).view(3, 4), "scores": torch.tensor([0.2, 0.9, 0.5]), "labels": torch.arange(3)},
        {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    rows = boxes.stack_detections(images, limit=2)
    assert rows["scores"].tolist() == [[pytest.approx(0.9), 0.5], [-1, -1]]
    assert rows["labels"].tolist() == [[1, 2], [-1, -1]]
    assert rows["boxes"].shape == (2, 2, 4)


def random_detector(name: str) -> nn.Module:
    """Return an architecture of torchvision, with random weights that are stable enough for some detections."""
    torch.manual_seed(0)
    options: dict[str, object] = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 192}
    if name.startswith(("ssd", "retinanet", "fcos")):
        options["score_thresh"] = 0.0
    else:  # few proposals and detections, because the heads of the R-CNN family take a second for hundreds
        options |= {"box_score_thresh": 0.0, "box_detections_per_img": 20, "rpn_post_nms_top_n_test": 100}
    return compressible(models.get_model(name, weights=None, weights_backbone=None, **options)).eval()


def noise(width: int, height: int) -> Image.Image:
    generator = numpy.random.default_rng(width)
    small = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=numpy.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


ARCHITECTURES = models.list_models(module=models.detection)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_answers_like_torchvisions_own_pipeline(name, tmp_path):
    detector = random_detector(name)
    # sizes that torchvision's own resizing, which rounds in float32 once it is scripted, treats like its eager one
    images = [noise(96, 128), noise(160, 100)]
    labels = [str(index) for index in range(91)]
    with serving(tmp_path, ListedImages(detector), labels, batch=1, score_threshold=0.0, max_detections=20) as worker:
        answers = [detect(worker, encode(image)) for image in images]
        shown = picture(worker, encode(images[0]))
    assert shown.size == images[0].size
    for image, found in zip(images, answers, strict=True):
        pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255
        with torch.inference_mode():
            [expected] = detector([pixels])
        count = min(20, len(expected["scores"]))
        assert len(found) == count > 0
        scores = torch.tensor([each["score"] for each in found])
        torch.testing.assert_close(scores, expected["scores"][:count], rtol=1e-3, atol=1e-4)
        # with random weights, many scores are almost equal: rounding may exchange their detections
        distances = (expected["boxes"] - torch.tensor(found[0]["box"])).abs().amax(dim=1)
        same = int(distances.argmin())
        assert distances[same] < 0.5
        assert ("mask" in found[0], "keypoints" in found[0]) == ("masks" in expected, "keypoints" in expected)
        if "mask" in found[0]:
            check_mask(found[0]["mask"], expected["masks"][same, 0])
        if "keypoints" in found[0]:
            keypoints = expected["keypoints"][same, :, :2], expected["keypoints_scores"][same][:, None]
            points = torch.tensor(found[0]["keypoints"])
            torch.testing.assert_close(points, torch.cat(keypoints, dim=1), rtol=1e-2, atol=1.0)


def check_mask(mask: dict, expected: Tensor) -> None:
    left, top, right, bottom = (round(value) for value in mask["box"])
    part = Image.open(io.BytesIO(base64.b64decode(mask["png"])))
    assert part.mode == "1"
    assert part.size == (right - left, bottom - top)
    agreement = torch.from_numpy(numpy.array(part)) == (expected[top:bottom, left:right] > 0.5)
    assert agreement.float().mean() > 0.98


def test_list_of_precisions_is_only_accepted_for_outputs_that_can_be_compared():
    both = ["float32", "bfloat16"]
    assert DetectionHandler.Settings(format="yolo", precision=both).precision == both
    with pytest.raises(ValidationError, match="precision must be one name with the format torchvision"):
        DetectionHandler.Settings(format="torchvision", precision=both)
    with pytest.raises(ValidationError):
        DetectionHandler.Settings(format="yolo", precision="auto")
