"""Models of torchvision's registry, downloaded by the real code from a local server."""

import functools
import hashlib
import io
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pytest_httpserver import HTTPServer
from torch import nn
from torchvision import models
from torchvision.models import Weights, WeightsEnum
from torchvision.models._api import register_model
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification, SemanticSegmentation

from bundle.build import torchvision_source
from bundle.build.archive import archive, fingerprint
from bundle.build.dryrun import DryRun
from bundle.build.export import PreprocessedImages
from bundle.build.export import load as load_module
from bundle.catalog import ModelFolder, TorchvisionSource
from bundle.errors import BundleError
from handlers.image_topk import ImageTopKHandler, resize_and_crop

LABELS = ["crane", "heron", "stork", "crane", "ibis"]
GEOMETRY = {"resize": 52, "crop": 40, "interpolation": "bicubic"}


def network(seed: int) -> nn.Module:
    """SqueezeNet, the smallest of torchvision's architectures that takes any size."""
    torch.manual_seed(seed)
    return models.squeezenet1_1(num_classes=len(LABELS)).eval()


def checkpoint(seed: int) -> bytes:
    file = io.BytesIO()
    torch.save(network(seed).state_dict(), file)
    return file.getvalue()


CHECKPOINT = checkpoint(seed=1)
FILE_NAME = f"bird_net-{hashlib.sha256(CHECKPOINT).hexdigest()[:8]}.pth"


class BirdNet_Weights(WeightsEnum):
    BIRDS_V1 = Weights(
        url=f"http://nowhere.invalid/models/{FILE_NAME}",
        transforms=functools.partial(
            ImageClassification, crop_size=40, resize_size=52, interpolation=InterpolationMode.BICUBIC
        ),
        meta={"categories": LABELS},
    )
    DEFAULT = BIRDS_V1


@register_model()
def bird_net(*, weights: BirdNet_Weights | None = None, progress: bool = True) -> nn.Module:
    weights = BirdNet_Weights.verify(weights)
    model = network(seed=2)
    if weights is not None:
        model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


SOURCE = TorchvisionSource(name="bird_net", weights="BIRDS_V1")


@pytest.fixture
def mirror(httpserver: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HTTPServer:
    """Set WEIGHTS_MIRROR to a server, and empty the cache of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("WEIGHTS_MIRROR", httpserver.url_for("/"))
    return httpserver


def offer(mirror: HTTPServer, content: bytes, status: int = 200) -> None:
    """Answer requests for the weights."""
    mirror.expect_request(f"/{FILE_NAME}").respond_with_data(content, status)


@pytest.fixture
def cached(tmp_path) -> Path:
    """Return the path of the weights in torch.hub's cache."""
    return tmp_path / "torch" / "hub" / "checkpoints" / FILE_NAME


@pytest.fixture
def folder(tmp_path) -> ModelFolder:
    path = tmp_path / "models" / "birds"
    path.mkdir(parents=True)
    config = {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 4,
        "handler": {"top_k": 5},
        "bundle": {"handler": "image_topk", "torchvision": SOURCE.model_dump()},
    }
    (path / "model-config.yaml").write_text(yaml.safe_dump(config))
    return ModelFolder(path)


def test_weights_are_downloaded_from_the_mirror(mirror, cached):
    offer(mirror, CHECKPOINT)
    module, preset = torchvision_source.load(SOURCE)
    assert not module.training
    assert preset.crop_size == [40]
    for name, tensor in network(seed=1).state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    assert cached.read_bytes() == CHECKPOINT


def test_url_without_a_mirror_is_torchvisions(monkeypatch, tmp_path):
    asked = []

    def load_state_dict_from_url(url: str, **_: object) -> dict:
        asked.append(url)
        raise OSError("no network")

    monkeypatch.delenv("WEIGHTS_MIRROR", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load_state_dict_from_url)
    with pytest.raises(BundleError, match=FILE_NAME):
        torchvision_source.load(SOURCE)
    assert asked == [f"http://nowhere.invalid/models/{FILE_NAME}"]


def test_cached_weights_are_loaded_without_network(mirror, cached, monkeypatch):
    monkeypatch.setenv("WEIGHTS_MIRROR", "http://127.0.0.1:1/")
    cached.parent.mkdir(parents=True)
    cached.write_bytes(CHECKPOINT)
    torchvision_source.load(SOURCE)


def assert_download_fails(cached: Path, cause: str) -> None:
    with pytest.raises(BundleError) as caught:
        torchvision_source.load(SOURCE)
    message = str(caught.value)
    for part in (f"/{FILE_NAME}: ", "Cannot download", cause, "WEIGHTS_MIRROR", str(cached)):
        assert part in message
    assert "\n" not in message
    assert not cached.exists()


def test_missing_file_says_what_to_do(mirror, cached):
    offer(mirror, b"", status=404)
    assert_download_fails(cached, "404")


def test_wrong_hash_says_what_to_do(mirror, cached):
    offer(mirror, checkpoint(seed=3))
    assert_download_fails(cached, "invalid hash value")


def test_truncated_download_says_what_to_do(mirror, cached):
    offer(mirror, CHECKPOINT[:1000])
    assert_download_fails(cached, "invalid hash value")


def test_missing_server_says_what_to_do(mirror, cached, monkeypatch):
    monkeypatch.setenv("WEIGHTS_MIRROR", "http://127.0.0.1:1/models")
    assert_download_fails(cached, "http://127.0.0.1:1/models/")


def test_invalid_mirror_url_says_what_to_do(mirror, cached, monkeypatch):
    monkeypatch.setenv("WEIGHTS_MIRROR", "weights")
    assert_download_fails(cached, "unknown url type")


class Unpickled:
    """Prints when it is unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize("content", [b"not weights", CHECKPOINT[:5000], "pickle"])
def test_invalid_cached_file_is_named_and_not_unpickled(mirror, cached, capsys, content):
    cached.parent.mkdir(parents=True)
    if content == "pickle":
        torch.save({"weights": Unpickled()}, cached)
    else:
        cached.write_bytes(content)
    with pytest.raises(BundleError, match="not a readable weights file. Delete it") as caught:
        torchvision_source.load(SOURCE)
    assert str(cached) in str(caught.value)
    assert "unpickled" not in capsys.readouterr().out


def test_weights_of_another_architecture_are_rejected(mirror, cached):
    cached.parent.mkdir(parents=True)
    torch.save(nn.Linear(2, 2).state_dict(), cached)
    with pytest.raises(BundleError, match="does not fit bird_net"):
        torchvision_source.load(SOURCE)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet_50", "DEFAULT", "no model 'resnet_50'; similar names: .*resnet50"),
        ("ResNet50", "DEFAULT", "no model 'ResNet50'; similar names: resnet50"),
        ("zzz", "DEFAULT", "list_models"),
        ("resnet50", "IMAGENET1K_V3", "there are: IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
        ("raft_small", "DEFAULT", "does not classify, detect or segment"),
        ("r3d_18", "DEFAULT", "does not classify, detect or segment"),
        ("vgg16", "IMAGENET1K_FEATURES", "does not classify, detect or segment"),
    ],
)
def test_unknown_model_or_weights_are_rejected_without_a_download(name, weights, message):
    with pytest.raises(BundleError, match=message):
        torchvision_source.load(TorchvisionSource(name=name, weights=weights))


def test_labels_and_settings_are_known_without_a_download(folder):
    assert torchvision_source.labels(SOURCE) == LABELS
    assert torchvision_source.handler_settings(SOURCE) == GEOMETRY
    fingerprint(folder)


def test_every_classifier_has_labels_and_geometry():
    for name in models.list_models(module=models):
        for weights in models.get_model_weights(name):
            if weights.name == "IMAGENET1K_FEATURES":
                continue
            source = TorchvisionSource(name=name, weights=weights.name)
            assert len(torchvision_source.labels(source)) == 1000
            assert set(torchvision_source.handler_settings(source)) == {"resize", "crop", "interpolation"}


@pytest.mark.parametrize(
    ("name", "first", "settings"),
    [
        ("deeplabv3_mobilenet_v3_large", "__background__", {"resize": 520, "interpolation": "bilinear"}),
        ("ssdlite320_mobilenet_v3_large", "__background__", {}),
        ("keypointrcnn_resnet50_fpn", "no person", {}),
    ],
)
def test_segmenters_and_detectors_have_labels_and_settings(name, first, settings):
    source = TorchvisionSource(name=name)
    assert torchvision_source.labels(source)[0] == first
    assert torchvision_source.handler_settings(source) == settings


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_segmenter_is_exported_without_its_auxiliary_classifier(name):
    auxiliary = {"aux_loss": True} if name.startswith("deeplab") else {}
    segmenter = models.get_model(name, weights=None, weights_backbone=None, **auxiliary).eval()
    torchvision_source.drop_auxiliary(segmenter)
    module = torch.jit.script(PreprocessedImages(segmenter, [0.5] * 3, [0.5] * 3))
    outputs = module(torch.zeros(2, 3, 64, 48, dtype=torch.uint8))
    assert {key: value.shape for key, value in outputs.items()} == {"out": (2, 21, 64, 48)}


def test_handler_of_another_kind_is_rejected(mirror, folder, monkeypatch):
    preset = functools.partial(SemanticSegmentation, resize_size=52)
    monkeypatch.setattr(BirdNet_Weights.BIRDS_V1.value, "transforms", preset)
    offer(mirror, CHECKPOINT)
    with pytest.raises(BundleError, match=r"image_topk.py does not serve models such as bird_net. .*segmentation"):
        load_module(folder, ImageTopKHandler())


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw smooth shapes with noise."""
    generator = numpy.random.default_rng(seed)
    y, x = numpy.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [numpy.sin(2 * numpy.pi * (a * x + b * y + c)) for a, b, c in generator.uniform(0.5, 5, (3, 3))]
    pixels = 128 + 80 * numpy.stack(waves, axis=2) + generator.normal(0, 20, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8))


@torch.inference_mode()
def expected_probabilities(image: Image.Image) -> torch.Tensor:
    """Compute probabilities as torchvision documents it for its weights."""
    batch = BirdNet_Weights.BIRDS_V1.transforms()(image).unsqueeze(0)
    return network(seed=1)(batch).softmax(dim=1)[0]


@pytest.mark.slow
def test_archive_answers_like_torchvisions_own_pipeline(mirror, folder, tmp_path):
    offer(mirror, CHECKPOINT)
    images = [photograph(*size, seed=i) for i, size in enumerate([(100, 80), (47, 333), (39, 41), (640, 480)])]
    rows = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        rows.append({"body": file.getvalue()})
    with DryRun(archive(folder, tmp_path / "store").path) as dry_run:
        carried = dry_run.handler.settings.model_dump()
        answers = dry_run.predict(rows)
    assert carried | GEOMETRY == carried
    for image, (status, body) in zip(images, answers, strict=True):
        assert status == 200
        expected = expected_probabilities(image)
        assert [entry["class"] for entry in body["top_k"]] == expected.argsort(descending=True).tolist()
        for entry in body["top_k"]:
            assert entry["label"] == LABELS[entry["class"]]
            assert entry["probability"] == pytest.approx(expected[entry["class"]].item(), abs=1e-5)


@pytest.mark.slow
def test_geometry_in_the_folder_overrides_the_registrys(mirror, folder, tmp_path):
    offer(mirror, CHECKPOINT)
    config = folder.config | {"handler": {"crop": 48, "threads": 1}}
    (folder.path / "model-config.yaml").write_text(yaml.safe_dump(config))
    with DryRun(archive(ModelFolder(folder.path), tmp_path / "store").path) as dry_run:
        assert dry_run.handler.settings.crop == 48
        assert dry_run.handler.settings.resize == 52


sides = st.integers(8, 350)


@settings(max_examples=80)
@given(
    width=sides,
    height=sides,
    resize=st.integers(8, 200),
    crop=st.integers(8, 200),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_resize_and_crop_matches_torchvisions_pixels(width, height, resize, crop, interpolation):
    image = Image.effect_noise((width, height), 80).convert("RGB")
    image.putpixel((0, height - 1), (255, 0, 0))
    preset = ImageClassification(
        crop_size=crop,
        resize_size=resize,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        interpolation=InterpolationMode(interpolation),
    )
    expected = (preset(image) * 255).round().byte().permute(1, 2, 0).numpy()
    actual = numpy.asarray(resize_and_crop(image, resize, crop, interpolation))
    numpy.testing.assert_array_equal(actual, expected)
