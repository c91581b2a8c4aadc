"""A user's own detector and segmenter, added with `bundle add-model` and served together by a real TorchServe."""

import base64
import io
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import requests
import torch
from PIL import Image

from tests.server.place import Place, new_place, serving
from tests.unit.networks import Blobs, Levels

BOX = (320, 160, 352, 192)  # one cell of the detector's input, in pixels of an image twice as wide


def scene() -> bytes:
    """Draw a black image with a white box."""
    image = Image.new("RGB", (1280, 640))
    image.paste((255, 255, 255), BOX)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server of the two models, with the same sample."""
    folder = tmp_path_factory.mktemp("added")
    place = new_place(folder / "run", folder / "store")
    place.environment["BUNDLE_MODELS"] = str(folder / "models")
    (folder / "models").mkdir()
    (folder / "photo.png").write_bytes(scene())
    (folder / "labels.json").write_text('["spot", "line"]')
    torch.jit.script(Blobs(2, turned=True).eval()).save(folder / "detector.pt")
    torch.jit.script(Levels(2).eval()).save(folder / "segmenter.pt")
    options = {
        "spots": ["--serialized", f"{folder}/detector.pt", "--labels", f"{folder}/labels.json"],
        "areas": ["--serialized", f"{folder}/segmenter.pt", "--mean", "0,0,0", "--std", "1,1,1", "--size", "256"],
    }

    def add(name: str) -> subprocess.CompletedProcess:
        return place.bundle("add-model", name, "--sample", f"{folder}/photo.png", *options[name])

    with ThreadPoolExecutor() as pool:
        for made in pool.map(add, options):
            assert made.returncode == 0, made.stderr
    with serving(place):
        yield place


def post(place: Place, model: str, content: bytes) -> dict:
    answer = requests.post(f"{place.url('inference_address')}/predictions/{model}", data=content, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_added_detector_and_segmenter_answer_their_sample(added: Place):
    sample = (Path(added.environment["BUNDLE_MODELS"]) / "spots" / "sample.png").read_bytes()
    [found] = post(added, "spots", sample)["detections"]
    assert (found["label"], found["box"]) == ("spot", pytest.approx(BOX, abs=0.5))
    answer = post(added, "areas", sample)
    mask = numpy.array(Image.open(io.BytesIO(base64.b64decode(answer["mask"]))))
    expected = numpy.zeros((640, 1280))
    expected[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 1
    assert (mask == expected).all()
    assert [each["label"] for each in answer["classes"]] == ["class_0", "class_1"]


def test_predict_sends_the_sample_and_shows_the_expected_detection(added: Place):
    shown = added.bundle("predict", "spots")
    assert shown.returncode == 0, shown.stderr
    assert '"label": "spot"' in shown.stdout
