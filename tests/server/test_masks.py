"""The segmenter of membranes behind a real TorchServe."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import requests
from PIL import Image

from bundle.paths import MODELS
from tests.server.place import Place

SAMPLE = MODELS / "membrane" / "sample.png"
SIZES = [(512, 512), (300, 200), (700, 400), (256, 256)]


@pytest.fixture
def membrane(served_on_request: Place) -> str:
    """The URL of the model's predictions."""
    return f"{served_on_request.url('inference_address')}/predictions/membrane"


def cropped(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.open(SAMPLE).resize((max(width, 512), max(height, 512))).crop((0, 0, width, height)).save(file, "PNG")
    return file.getvalue()


def post(url: str, content: bytes, **options: str) -> requests.Response:
    return requests.post(url, files={"data": content}, data=options, timeout=60)


def test_images_of_different_sizes_get_masks_of_their_sizes_beside_a_poisoned_one(membrane: str):
    contents = [cropped(*size) for size in SIZES] + [b"not an image"]
    with ThreadPoolExecutor(len(contents)) as pool:
        *answers, poisoned = pool.map(lambda content: post(membrane, content), contents)
    assert (poisoned.status_code, poisoned.json()["type"]) == (400, "UndecodableImage")
    for (width, height), answer in zip(SIZES, answers, strict=True):
        body = answer.json()
        assert body["size"] == [width, height]
        mask = numpy.array(Image.open(io.BytesIO(base64.b64decode(body["mask"]))))
        assert mask.shape == (height, width)
        counted = {each["class"]: each["pixels"] for each in body["classes"]}
        assert counted == {index: int((mask == index).sum()) for index in (0, 1) if (mask == index).any()}


def test_mask_and_overlay_are_pictures(membrane: str):
    mask, overlay = (post(membrane, SAMPLE.read_bytes(), format="png", **more) for more in ({}, {"overlay": "true"}))
    assert mask.headers["Content-Type"] == overlay.headers["Content-Type"] == "image/png"
    assert (Image.open(io.BytesIO(mask.content)).mode, Image.open(io.BytesIO(overlay.content)).mode) == ("P", "RGB")


def test_image_of_too_many_tiles_is_rejected_with_the_limit(membrane: str):
    answer = post(membrane, cropped(3900, 3900))
    assert (answer.status_code, answer.json()["type"]) == (413, "ImageTooLarge")
    assert "at most 32 are accepted" in answer.json()["message"]
