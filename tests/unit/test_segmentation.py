"""The handler of segmenters: masks, tiles, options, limits, and torchvision's architectures."""

import base64
import functools
import io
import json
import time
from collections.abc import Iterator

import numpy
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor, nn
from torchvision import models

from bundle import samples
from bundle.build.dryrun import DryRun
from bundle.build.export import PreprocessedImages
from bundle.build.torchvision_source import drop_auxiliary
from handlers.core import masks
from tests.unit.serialized import compressible, serving_with

LABELS = ["background", "grey", "white"]
SPOILT = 7  # a brightness for which the module below returns NaN
ARCHITECTURES = (
    "lraspp_mobilenet_v3_large",
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
)


class Brightness(nn.Module):
    """Segment by the mean brightness of a pixel's surroundings, 7 x 7: black, grey, white."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        grey = images[:, :1].float()
        spoilt = (images[:, :1] == 7).float().amax((1, 2, 3), keepdim=True) > 0
        near = nn.functional.avg_pool2d(nn.functional.pad(grey, (3, 3, 3, 3), "reflect"), 7, 1)
        centres = torch.tensor([0.0, 128.0, 255.0], device=images.device).view(1, 3, 1, 1)
        return {"out": (-(near - centres).abs()).masked_fill(spoilt, float("nan"))}


serving = functools.partial(serving_with, "segmentation")


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    folder = tmp_path_factory.mktemp("tiled")
    with serving(folder, Brightness(), LABELS, tile=64, overlap=16, max_tiles=12, max_pixels=40_000) as worker:
        yield worker


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    with serving(tmp_path_factory.mktemp("whole"), Brightness(), LABELS, tile=160, overlap=16) as worker:
        yield worker


def scene(width: int, height: int) -> Image.Image:
    """Draw a black image whose left quarter is white, and whose lower right quarter is grey."""
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), (0, 0, width // 4, height))
    image.paste((128, 128, 128), (width // 2, height // 2, width, height))
    return image


def speckled(width: int, height: int) -> Image.Image:
    """Draw blurred noise, with all three classes in irregular patches."""
    coarse = numpy.random.default_rng(0).integers(8, 256, (height // 8, width // 8), dtype=numpy.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).convert("RGB")


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ask(worker: DryRun, content: bytes, **options: str) -> object:
    """Return the answer to one image."""
    row: dict[str, object] = {"data": content} if options else {"body": content}
    [(status, answer)] = worker.predict([row | {name: value.encode() for name, value in options.items()}])
    assert status == 200, answer
    return answer


def refused(worker: DryRun, content: bytes, **options: str) -> tuple[int, str]:
    [(status, answer)] = worker.predict(
        [{"data": content, **{name: value.encode() for name, value in options.items()}}]
    )
    return status, answer["message"]


def mask_of(answer: dict) -> numpy.ndarray:
    image = Image.open(io.BytesIO(base64.b64decode(answer["mask"])))
    assert image.mode == "P"
    assert list(image.size) == answer["size"]
    return numpy.array(image)


def test_mask_has_the_class_of_each_pixel_at_the_original_size(tiled):
    answer = ask(tiled, encode(scene(160, 100)))
    mask = mask_of(answer)
    assert mask.shape == (100, 160)
    assert (mask[10:90, 5:35] == 2).all()
    assert (mask[60:90, 90:150] == 1).all()
    assert (mask[10:40, 50:150] == 0).all()


def test_classes_of_an_answer_are_ranked_by_their_pixels(tiled):
    answer = ask(tiled, encode(scene(160, 100)))
    mask = mask_of(answer)
    assert [each["label"] for each in answer["classes"]] == ["background", "grey", "white"]
    for each in answer["classes"]:
        assert each["pixels"] == (mask == each["class"]).sum()
        assert each["share"] == pytest.approx(each["pixels"] / mask.size, abs=1e-6)
    assert samples.first(answer) == ("background", 0, answer["classes"][0]["share"])


def test_class_that_does_not_occur_is_not_in_the_answer(tiled):
    answer = ask(tiled, encode(Image.new("RGB", (30, 20), "white")))
    assert answer["classes"] == [{"label": "white", "class": 2, "share": 1.0, "pixels": 600}]


def test_pixel_with_equal_scores_gets_the_first_of_the_classes():
    blend = masks.Blend(torch.Size((2, 2)), torch.ones(2, 2))
    blend.add(torch.tensor([[[0.0, 1.0], [2.0, 0.0]], [[0.0, 1.0], [3.0, 0.0]], [[0.0, 1.0], [3.0, -1.0]]]), 0, 0)
    assert blend.mask().tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("size", [(160, 160), (150, 90), (65, 64), (20, 160), (40, 9)])
def test_tiles_agree_with_the_whole_image(tiled, whole, size):
    content = encode(speckled(*size))
    in_tiles, at_once = mask_of(ask(tiled, content)), mask_of(ask(whole, content))
    assert len(numpy.unique(at_once)) > 1
    assert (in_tiles == at_once).mean() > 0.999


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_image_turned_by_its_exif_orientation_has_an_upright_mask(tiled, kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the file's left side is up
    answer = ask(tiled, encode(scene(160, 100), kind, quality=95, exif=exif.tobytes()))
    assert answer["size"] == [100, 160]
    mask = mask_of(answer)
    assert (mask[5:35, 10:90] == 2).all()
    assert (mask[90:150, 10:40] == 1).all()


def test_batch_of_different_sizes_with_invalid_images_answers_each_as_alone(tiled):
    spoilt = speckled(150, 90)
    spoilt.putpixel((140, 80), (SPOILT,) * 3)
    contents = [encode(image) for image in (scene(160, 100), spoilt, scene(20, 30), speckled(100, 100))]
    contents.insert(1, b"no image")
    contents.insert(3, contents[0][:200])
    answers = tiled.predict([{"body": content} for content in contents])
    assert [status for status, _ in answers] == [200, 400, 500, 400, 200, 200]
    assert answers[2][1]["type"] == "NonFiniteOutput"
    for content, (status, answer) in zip(contents, answers, strict=True):
        if status == 200:
            assert answer == ask(tiled, content)


@pytest.mark.parametrize("step", ["add", "mask"])
def test_image_whose_blending_exceeds_the_memory_fails_alone(tiled, monkeypatch, step):
    served = tiled.handler.predict.__func__.__wrapped__.__globals__[
        "masks"
    ].Blend  # of the archive's own copy of the module
    blend = getattr(served, step)

    def limited(self, *arguments):
        if self.size == (160, 160):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return blend(self, *arguments)

    monkeypatch.setattr(served, step, limited)
    answers = tiled.predict([{"body": encode(speckled(*size))} for size in ((100, 90), (160, 160), (150, 100))])
    assert [status for status, _ in answers] == [200, 507, 200]


def test_images_past_the_time_limit_of_inference_are_rejected(tiled, monkeypatch):
    """A batch of large images, or of many instances, must end before TorchServe kills the worker."""
    impatient = tiled.handler.settings.model_copy(update={"max_inference_seconds": 0.05})
    monkeypatch.setattr(tiled.handler, "settings", impatient)
    model = tiled.handler.model

    def slow(images: Tensor) -> object:
        time.sleep(0.1)
        return model(images)

    monkeypatch.setattr(tiled.handler, "model", slow)
    answers = tiled.predict([{"body": encode(scene(20, 30))}, {"body": encode(speckled(160, 160))}])
    assert answers[1][0] == 429
    assert answers[1][1]["message"].startswith("Running this batch took too long.")
    assert tiled.predict([{"body": encode(scene(20, 30))}])[0][0] == 200


def test_instances_of_different_sizes_are_one_answer(tiled):
    images = [scene(160, 100), speckled(30, 70)]
    instances = json.dumps({"instances": [base64.b64encode(encode(image)).decode() for image in images]})
    [(status, answer)] = tiled.predict([{"body": instances.encode()}], [{"Content-Type": "application/json"}])
    assert status == 200
    assert answer["predictions"] == [ask(tiled, encode(image)) for image in images]


def test_picture_is_the_mask_with_a_colour_per_class(tiled):
    content = encode(scene(160, 100))
    image = Image.open(io.BytesIO(ask(tiled, content, format="png")))
    assert (image.format, image.mode, image.size) == ("PNG", "P", (160, 100))
    assert numpy.array_equal(numpy.array(image), mask_of(ask(tiled, content)))
    colours = {image.convert("RGB").getpixel(place) for place in ((10, 50), (120, 80), (100, 20))}
    assert len(colours) == 3


def test_overlay_colours_the_classes_and_leaves_the_background(tiled):
    original = scene(160, 100)
    image = Image.open(io.BytesIO(ask(tiled, encode(original), format="png", overlay="true")))
    assert (image.mode, image.size) == ("RGB", (160, 100))
    assert image.getpixel((100, 20)) == original.getpixel((100, 20))
    for place in ((10, 50), (120, 80)):
        assert image.getpixel(place) != original.getpixel(place)


def test_overlay_without_png_is_rejected(tiled):
    status, message = refused(tiled, encode(scene(160, 100)), overlay="true")
    assert status == 400
    assert '"overlay" needs "format": "png"' in message


def test_image_of_too_many_pixels_is_rejected_with_the_limit(tiled):
    status, message = refused(tiled, encode(scene(250, 200)))
    assert status == 413
    assert "at most 40000 pixels" in message


def test_image_of_too_many_tiles_is_rejected_with_the_limit(tiled):
    status, message = refused(tiled, encode(Image.new("RGB", (2000, 10))))
    assert status == 413
    assert "42 tiles of 64 x 64 pixels; at most 12" in message


def test_resized_image_has_a_mask_at_its_original_size(tmp_path):
    with serving(tmp_path, Brightness(), LABELS, tile=64, overlap=16, resize=64) as worker:
        mask = mask_of(ask(worker, encode(scene(320, 200), "JPEG", quality=95)))
        assert mask.shape == (200, 320)
        assert (mask[20:180, 10:60] == 2).all()
        assert (mask[20:80, 110:300] == 0).all()
        status, message = refused(worker, encode(Image.new("RGB", (8000, 8))))
        assert status == 413
        assert "resized for the model" in message


def test_tiles_cover_a_side_with_the_overlap():
    for length in range(64, 400):
        begins = masks.starts(length, 64, 16)
        assert begins[0] == 0
        assert begins[-1] + 64 == length
        assert all(0 < after - before <= 48 for before, after in zip(begins, begins[1:], strict=False))


def test_colours_are_those_of_pascal_voc():
    assert masks.colours()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    assert masks.colours()[-3:] == [224, 224, 192]


@torch.no_grad()
def calibrated(module: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Give a random network the statistics of an image, so that it finds every class in it; return its logits."""
    norms = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # its statistics are those of the next pass alone
    module.train()(pixels.repeat(2, 1, 1, 1))
    last = [each for each in module.modules() if isinstance(each, nn.Conv2d) and each.out_channels == len(LABELS)][-1]
    last.bias -= module.eval()(pixels)["out"][0].mean((1, 2))
    return module(pixels)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if index else []) for index, name in enumerate(ARCHITECTURES)]
)
def test_torchvision_architecture_serves_as_it_computes(tmp_path, name):
    torch.manual_seed(0)
    network = compressible(models.get_model(name, weights=None, weights_backbone=None, num_classes=3))
    drop_auxiliary(network)
    module = PreprocessedImages(network, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).eval()
    image = speckled(96, 96)
    pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).unsqueeze(0)
    expected = calibrated(module, pixels)["out"][0].argmax(0).numpy()
    assert len(numpy.unique(expected)) == len(LABELS)  # a mask of one class would be the same upside down
    with serving(tmp_path, module, LABELS, batch=2, tile=96, overlap=16, precision="float32") as worker:
        assert (mask_of(ask(worker, encode(image))) == expected).mean() > 0.99
        assert mask_of(ask(worker, encode(speckled(160, 96)))).shape == (96, 160)
