"""The detector of blood cells behind a real TorchServe."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import requests
import tritonclient.http as triton
from PIL import Image

from bundle.paths import MODELS
from tests.server.place import Place

SAMPLE = MODELS / "cells" / "sample.jpg"
WHITE_CELL = (298, 148, 482, 332)  # where make_sample.py draws it
CLIENTS = 12


@pytest.fixture
def cells(served_on_request: Place) -> str:
    """The URL of the model's predictions."""
    return f"{served_on_request.url('inference_address')}/predictions/cells"


def resized(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.open(SAMPLE).resize((width, height)).save(file, "PNG")
    return file.getvalue()


def white_cells(answer: dict) -> list[list[float]]:
    return [each["box"] for each in answer["detections"] if each["label"] == "WBC"]


def test_sample_has_its_white_cell(cells):
    answer = requests.post(cells, data=SAMPLE.read_bytes(), timeout=60).json()
    [box] = white_cells(answer)
    assert box == pytest.approx(WHITE_CELL, abs=20)
    scores = [each["score"] for each in answer["detections"]]
    assert scores == sorted(scores, reverse=True)


def test_images_of_many_sizes_beside_poisoned_neighbours_get_their_own_boxes(cells):
    sizes = [(640 + 40 * i, 480 + 30 * i) for i in range(CLIENTS // 2)]
    images = [resized(*size) for size in sizes]
    contents = [each for image in images for each in (image, image[:3000])]  # the other half of them is truncated
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda content: requests.post(cells, data=content, timeout=60), contents))
    for (width, _), answer, poisoned in zip(sizes, answers[::2], answers[1::2], strict=True):
        assert (poisoned.status_code, poisoned.json()["type"]) == (400, "UndecodableImage")
        [box] = white_cells(answer.json())
        assert box == pytest.approx([side * width / 640 for side in WHITE_CELL], abs=20 * width / 640)


def test_boxes_are_a_tensor_for_tritons_client(served_on_request: Place, cells):
    content = SAMPLE.read_bytes()
    expected = requests.post(cells, data=content, timeout=60).json()["detections"]
    given = triton.InferInput("data", [1], "BYTES").set_data_from_numpy(numpy.array([content], numpy.object_))
    asked = [triton.InferRequestedOutput(name) for name in ("label", "score", "box")]
    with triton.InferenceServerClient(served_on_request.client.inference.removeprefix("http://")) as client:
        result = client.infer("cells", [given], outputs=asked)
    boxes = result.as_numpy("box")
    assert (boxes.dtype, boxes.shape) == (numpy.float32, (1, len(expected), 4))
    assert boxes[0] == pytest.approx(numpy.array([each["box"] for each in expected]), abs=1)
    assert [label.decode() for label in result.as_numpy("label")[0]] == [each["label"] for each in expected]
    assert result.as_numpy("score")[0] == pytest.approx([each["score"] for each in expected], abs=0.02)


def test_picture_is_a_png_of_the_same_size(cells):
    answer = requests.post(cells, files={"data": SAMPLE.read_bytes()}, data={"format": "png"}, timeout=60)
    assert answer.headers["Content-Type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (640, 480)


def test_invalid_option_is_a_400(cells):
    answer = requests.post(cells, files={"data": SAMPLE.read_bytes()}, data={"max_detections": "0"}, timeout=60)
    assert answer.status_code == 400
    assert "max_detections" in answer.json()["message"]
