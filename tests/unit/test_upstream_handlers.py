"""TorchServe's own default handlers, in archives that a user makes with torch-model-archiver."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bundle.build.dryrun import DryRun
from tests.unit.inputs import encode_image

SIDE = 64


class Classifier(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        means = images.mean(dim=(1, 2, 3), keepdim=False).unsqueeze(1)
        return torch.cat([means * index for index in range(6)], dim=1)


class Segmenter(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": images}


class Detector(nn.Module):
    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        boxes, labels = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2), torch.tensor([1, 0])
        return [{"boxes": boxes, "labels": labels, "scores": torch.tensor([0.9, 0.1])} for _ in images]


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.EmbeddingBag(8, 3, mode="sum")

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.embedding(ids, offsets)


EAGER = """
import torch


class Eager(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(6))

    def forward(self, images):
        return images.mean(dim=(1, 2, 3)).unsqueeze(1) * self.scale
"""
SUBCLASS = """
from ts.torch_handler.image_classifier import ImageClassifier


class Mine(ImageClassifier):
    topk = 2
"""


def pack(folder: Path, handler: str, model: nn.Module, *extra: Path, code: Path | None = None) -> Path:
    """Make the archive as TorchServe's documentation says.

    Args:
        code: the file with the module's class, if the archive has weights in place of TorchScript.
    """
    torch.manual_seed(0)
    if code:
        torch.save(model.state_dict(), folder / "model.pt")
    else:
        torch.jit.script(model.eval()).save(folder / "model.pt")
    labels = folder / "index_to_name.json"
    labels.write_text(json.dumps({str(index): f"n{index}" for index in range(6)}))
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "user", "--version", "1.0"]
    command += ["--handler", handler, "--serialized-file", "model.pt", "--export-path", "."]
    command += ["--model-file", str(code)] if code else []
    files = ",".join(map(str, [labels, *extra]))
    subprocess.run([*command, "--extra-files", files], cwd=folder, check=True)
    return folder / "user.mar"


@pytest.fixture
def image() -> bytes:
    return encode_image(Image.new("RGB", (SIDE, SIDE), "white"), "PNG")


def parsed(answers: list[tuple[int, object]]) -> list:
    assert [status for status, _ in answers] == [200] * len(answers), answers
    return [json.loads(str(body)) for _, body in answers]


def test_image_classifier_predicts_and_explains(tmp_path: Path, image: bytes):
    with DryRun(pack(tmp_path, "image_classifier", Classifier()), batch_size=4) as worker:
        first, second = parsed(worker.predict([{"body": image}, {"data": image}]))
        assert first == second
        assert list(first) == ["n5", "n4", "n3", "n2", "n1"]
        [attributions] = parsed(worker.predict([{"body": image}], [{"explain": "True"}]))
        assert torch.tensor(attributions).shape == (3, 224, 224)


def test_image_classifier_loads_weights_with_the_code_of_their_module(tmp_path: Path, image: bytes):
    """The first example of TorchServe's documentation is such an archive, of a DenseNet."""
    code = tmp_path / "eager.py"
    code.write_text(EAGER)
    model = nn.Module()
    model.scale = nn.Parameter(torch.arange(6.0))
    with DryRun(pack(tmp_path, "image_classifier", model, code=code), batch_size=4) as worker:
        for answer in parsed(worker.predict([{"body": image}, {"data": image}])):
            assert list(answer) == ["n5", "n4", "n3", "n2", "n1"]


def test_users_subclass_of_a_default_handler_is_served(tmp_path: Path, image: bytes):
    handler = tmp_path / "mine.py"
    handler.write_text(SUBCLASS)
    with DryRun(pack(tmp_path, str(handler), Classifier()), batch_size=4) as worker:
        [answer] = parsed(worker.predict([{"body": image}]))
        assert list(answer) == ["n5", "n4"]


def test_object_detector_answers_boxes_above_its_threshold(tmp_path: Path, image: bytes):
    with DryRun(pack(tmp_path, "object_detector", Detector()), batch_size=4) as worker:
        for found in parsed(worker.predict([{"body": image}, {"body": image}])):
            assert found == [{"n1": [1.0, 2.0, 3.0, 4.0], "score": pytest.approx(0.9)}]


def test_image_segmenter_answers_a_class_for_each_pixel(tmp_path: Path, image: bytes):
    with DryRun(pack(tmp_path, "image_segmenter", Segmenter()), batch_size=4) as worker:
        [pixels] = parsed(worker.predict([{"body": image}]))
        assert torch.tensor(pixels).shape == (224, 224, 2)


def test_text_classifier_answers_a_probability_for_each_class(tmp_path: Path):
    vocabulary = tmp_path / "source_vocab.pt"
    words = ["my", "luggage", "my luggage", "is", "luggage is", "lost", "is lost"]
    torch.save({word: index for index, word in enumerate(words)}, vocabulary)
    with DryRun(pack(tmp_path, "text_classifier", Words(), vocabulary), batch_size=1) as worker:
        [answer] = parsed(worker.predict([{"body": b"My luggage is lost!"}]))
        assert set(answer) == {"n0", "n1", "n2"}
        assert sum(answer.values()) == pytest.approx(1)
