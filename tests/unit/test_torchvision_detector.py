"""A detector of torchvision's registry, downloaded by the real code from a local server, exported and run."""

import hashlib
import io
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from PIL import Image
from pytest_httpserver import HTTPServer
from torch import nn
from torchvision import models
from torchvision.models import Weights, WeightsEnum
from torchvision.models._api import register_model
from torchvision.transforms._presets import ObjectDetection

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import ModelFolder
from bundle.errors import BundleError

LABELS = ["__background__", "crane", "heron"]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=len(LABELS), score_thresh=0.0
    ).eval()


def checkpoint(seed: int) -> bytes:
    file = io.BytesIO()
    torch.save(network(seed).state_dict(), file)
    return file.getvalue()


CHECKPOINT = checkpoint(seed=1)
FILE_NAME = f"bird_finder-{hashlib.sha256(CHECKPOINT).hexdigest()[:8]}.pth"


class BirdFinder_Weights(WeightsEnum):
    BIRDS_V1 = Weights(
        url=f"http://nowhere.invalid/models/{FILE_NAME}", transforms=ObjectDetection, meta={"categories": LABELS}
    )
    DEFAULT = BIRDS_V1


@register_model()
def bird_finder(*, weights: BirdFinder_Weights | None = None, progress: bool = True) -> nn.Module:
    weights = BirdFinder_Weights.verify(weights)
    model = network(seed=2)
    if weights is not None:
        model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


def model_folder(path: Path, handler: str, settings: dict) -> ModelFolder:
    path.mkdir(parents=True)
    config = {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 2,
        "handler": settings,
        "bundle": {"handler": handler, "torchvision": {"name": "bird_finder"}},
    }
    (path / "model-config.yaml").write_text(yaml.safe_dump(config))
    return ModelFolder(path)


@pytest.fixture(autouse=True)
def mirror(httpserver: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve the weights from WEIGHTS_MIRROR, with an empty cache of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("WEIGHTS_MIRROR", httpserver.url_for("/"))
    httpserver.expect_request(f"/{FILE_NAME}").respond_with_data(CHECKPOINT)


@pytest.mark.slow
def test_downloaded_detector_answers_like_torchvisions_own_pipeline(tmp_path):
    folder = model_folder(tmp_path / "models" / "birds", "detection", {"score_threshold": 0.0, "max_detections": 10})
    pixels = numpy.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=numpy.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    with DryRun(archive(folder, tmp_path / "store").path) as worker:
        [(status, answer), _] = worker.predict([{"body": file.getvalue()}] * 2)
    assert status == 200, answer
    with torch.inference_mode():
        [expected] = network(seed=1)([torch.from_numpy(pixels).permute(2, 0, 1).float() / 255])
    scores = torch.tensor([each["score"] for each in answer["detections"]])
    torch.testing.assert_close(scores, expected["scores"][:10], rtol=1e-3, atol=1e-4)
    assert {each["label"] for each in answer["detections"]} <= set(LABELS[1:])


@pytest.mark.slow
def test_detector_under_a_handler_of_classifiers_is_rejected(tmp_path):
    folder = model_folder(tmp_path / "models" / "birds", "image_topk", {})
    with pytest.raises(BundleError, match="Write `handler: detection`"):
        archive(folder, tmp_path / "store")
