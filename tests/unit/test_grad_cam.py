"""Grad-CAM: as Captum computes it on the Python module, and only where a module returns the activations of a layer."""

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from captum.attr import LayerAttribution, LayerGradCam
from PIL import Image
from torch import Tensor, nn
from torchvision import models

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.build.export import PreprocessedImages, import_model
from bundle.build.grad_cam import add_activations
from bundle.catalog import CONFIG_NAME, ModelFolder, select
from bundle.errors import BundleError
from bundle.paths import MODELS, ROOT
from handlers.core.admission import Deadline
from handlers.core.attribution import Run
from handlers.core.explain import ExplanationOptions
from tests.trials.explanations import explained_sample
from tests.unit.inputs import encode_image
from tests.unit.serialized import serving_with
from tests.unit.workbench import CLASSES, SmallNet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

EXPLAIN = {"explain": "True"}
TARGET = 3


def noise(width: int, height: int) -> Image.Image:
    pixels = numpy.random.default_rng(0).integers(0, 256, (height, width, 3), numpy.uint8)
    return Image.fromarray(pixels)


PHOTOGRAPH = encode_image(noise(40, 32), "PNG")


def log_probabilities(outputs: Tensor) -> Tensor:
    return outputs.log_softmax(1)


def of_captum(module: nn.Module, layer: str, image: Tensor, target: int) -> Tensor:
    """Return Captum's map, float32 [1, 1, H, W]."""
    method = LayerGradCam(lambda images: log_probabilities(module(images)), module.get_submodule(layer))
    coarse = method.attribute(image.float().requires_grad_(), target, relu_attributions=True)
    return LayerAttribution.interpolate(coarse, tuple(image.shape[2:]), "bilinear").detach()


def explain(worker: DryRun, **options: object) -> tuple[int, dict]:
    worker.handler.settings = worker.handler.settings.model_copy(update={"max_explain_seconds": 300.0})
    [answer] = worker.predict([{"data": PHOTOGRAPH, **options}], [EXPLAIN])
    return answer


# --- the map -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["layer4", "layer4.1.bn2", "layer2.0.conv1", "relu"])
def test_map_of_a_network_that_normalises_outside_equals_captums(layer: str):
    torch.manual_seed(0)
    module = PreprocessedImages(models.resnet18(num_classes=CLASSES).eval(), [0.5] * 3, [0.2] * 3).eval()
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    expected = of_captum(module, f"classifier.{layer}", image, TARGET)
    exported = torch.jit.script(add_activations("birds", module, layer, within="classifier"))

    def activations(images: Tensor) -> tuple[Tensor, Tensor]:
        outputs, found = exported.with_activations(images)
        return log_probabilities(outputs)[:, TARGET], found

    unused = (torch.zeros(1),)
    [attributions] = Run(lambda _: unused[0], (image.float(),), unused, unused, None, 1, activations).grad_cam()
    assert expected.max() > 0
    torch.testing.assert_close(attributions.sum(1, keepdim=True), expected, rtol=1e-4, atol=1e-4 * expected.max())


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    [folder] = select(["mnist"])
    with DryRun(archive(folder, tmp_path_factory.mktemp("store")).path) as worker:
        yield worker


def attributions_of(worker: DryRun, content: bytes) -> Tensor:
    explainable = worker.handler.explainable(explained_sample(worker.handler, {"data": content}))
    options = ExplanationOptions(method="grad_cam", target=TARGET)
    return worker.handler.attribute(explainable, options, Deadline.after(300, "Explaining")).attributions[0]


@pytest.mark.slow
def test_map_of_an_archive_equals_captums(mnist: DryRun):
    [folder] = select(["mnist"])
    content = folder.sample_file.read_bytes()
    [sample] = mnist.decode({"data": content})
    module = import_model("mnist", MODELS / "mnist" / "model.py").build()
    expected = of_captum(module, folder.bundle.grad_cam, sample.tensors[None], TARGET)[0]
    found = attributions_of(mnist, content)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.max())


@pytest.mark.slow
def test_map_of_a_mirror_image_is_the_mirror_image_of_the_map(tmp_path: Path):
    """The model averages over an image and its mirror image, and so must the map."""
    [folder] = select(["image"])
    image = noise(32, 32)
    image.paste((200, 30, 30), (3, 8, 12, 25))
    mirrored = encode_image(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG")
    with DryRun(archive(folder, tmp_path).path) as worker:
        found, of_mirror = (attributions_of(worker, each) for each in (encode_image(image, "PNG"), mirrored))
    assert (found - found.flip(2)).abs().max() > 0.1 * found.max(), "the map itself must not be symmetric"
    torch.testing.assert_close(of_mirror.flip(2), found, rtol=1e-3, atol=1e-3 * found.max())


class Fused(nn.Module):
    """TorchScript differentiates everything behind the convolution in one step, once it has optimised the method."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.classify = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.with_activations(images)[0]

    @torch.jit.export
    def with_activations(self, images: Tensor) -> tuple[Tensor, Tensor]:
        activations = (self.convolution(images.float() / 255) * 2 + 1).relu()
        features = (activations * 2).sigmoid() * activations.tanh() + activations
        return self.classify(((features * 2).sigmoid() * features.tanh()).mean((2, 3))), activations


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    torch.manual_seed(0)
    labels = [str(index) for index in range(CLASSES)]
    with serving_with("image_topk", tmp_path_factory.mktemp("fused"), Fused(), labels, resize=32, crop=32) as worker:
        yield worker


@pytest.mark.slow
def test_map_of_a_repeated_request_stays_the_same(fused: DryRun):
    status, first = explain(fused, method="grad_cam")
    assert (status, first["method"]) == (200, "grad_cam")
    assert numpy.max(first["attributions"]) > 0
    for _ in range(4):
        assert explain(fused, method="grad_cam") == (200, first)


@pytest.mark.slow
def test_predictions_beside_maps_are_answered_as_alone(fused: DryRun):
    good = {"data": PHOTOGRAPH}
    [alone], [map_alone] = fused.predict([good]), fused.predict([good | {"method": "grad_cam"}], [EXPLAIN])
    assert numpy.max(map_alone[1]["attributions"]) > 0
    wrong = {"data": b"no image", "method": "grad_cam"}
    rows = [good, good | {"method": "grad_cam"}, good, wrong]
    answers = fused.predict(rows, [{}, EXPLAIN, {}, EXPLAIN])
    assert [status for status, _ in answers] == [200, 200, 200, 400]
    assert answers[1] == map_alone
    for _, body in (answers[0], answers[2]):
        assert body["top_k"][0]["probability"] == pytest.approx(alone[1]["top_k"][0]["probability"], abs=1e-4)


@pytest.mark.slow
def test_model_without_activations_is_rejected_with_its_methods(tmp_path: Path):
    with serving_with("image_topk", tmp_path, Plain(), ["a", "b"], resize=32, crop=32) as worker:
        status, answer = explain(worker, method="grad_cam")
    assert (status, answer["type"]) == (400, "InvalidOption")
    assert re.match("method must be one of integrated_gradients, saliency, feature_ablation", answer["message"])


# --- the export ----------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.convolution(images.float()).mean((2, 3))


def mnist_with(tmp_path: Path, layer: str, source: str | None = None) -> ModelFolder:
    path = tmp_path / "models" / "mnist"
    shutil.copytree(MODELS / "mnist", path)
    config = yaml.safe_load((path / CONFIG_NAME).read_text())
    config["bundle"]["grad_cam"] = layer
    (path / CONFIG_NAME).write_text(yaml.safe_dump(config))
    if source:
        (path / "model.py").write_text(source)
    return ModelFolder(path)


def test_method_leaves_the_weights_and_the_frozen_graph_as_they_are(tmp_path: Path):
    torch.manual_seed(0)
    module = models.resnet18(num_classes=CLASSES).eval()
    torch.jit.script(module).save(tmp_path / "plain.pt")
    torch.jit.script(add_activations("birds", module, "layer4")).save(tmp_path / "explained.pt")
    plain, explained = (torch.jit.load(tmp_path / name).eval() for name in ("plain.pt", "explained.pt"))
    assert (tmp_path / "explained.pt").stat().st_size < (tmp_path / "plain.pt").stat().st_size + 10_000
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in explained.named_modules()]
    assert hasattr(explained, "with_activations")
    frozen = [torch.jit.freeze(each) for each in (plain, explained)]
    assert not hasattr(frozen[1], "with_activations")
    graphs = [re.sub(r"#.*|___torch_mangle_\d+\.", "", str(each.graph)) for each in frozen]
    assert graphs[0] == graphs[1]


MODEL = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 10, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        {body}
{further}

def build() -> nn.Module:
    return Model().eval()


def example_inputs(batch_size: int) -> tuple[torch.Tensor, ...]:
    return (torch.zeros(batch_size, 1, 28, 28, dtype=torch.uint8),)
"""
ONCE = "return self.convolution(images.float()).mean((2, 3))"
TWICE = "return (self.convolution(images.float()) + self.convolution(images.float().flip(3))).mean((2, 3))"
BRANCHING = """if images.float().mean() > 300:
            images = images.flip(3)
        return self.convolution(images.float()).mean((2, 3))"""
OWN = """
    @torch.jit.export
    def with_activations(self, images: torch.Tensor):
        return self(images), images
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "source", "message"),
    [
        ("blocks.7", None, r"mnist: bundle: grad_cam: there is no layer 'blocks.7'. Some layers: blocks.\d"),
        ("xyz", None, "there is no layer 'xyz'. Some layers: .*, classify"),
        ("classify", None, r"needs activations \[N, C, H, W\] .* for a batch of 1, .* the shape \[1, 10\]"),
        ("convolution", MODEL.format(body=TWICE, further=""), "'convolution' runs 2 times .* `with_activations`"),
        ("convolution", MODEL.format(body=BRANCHING, further=""), "cannot trace .* `with_activations`"),
        ("convolution", MODEL.format(body=ONCE, further=OWN), "`with_activations` of its own. Remove bundle: grad_cam"),
    ],
)
def test_layer_that_cannot_be_explained_is_rejected(layer: str, source: str | None, message: str, tmp_path: Path):
    with pytest.raises(BundleError, match=message):
        archive(mnist_with(tmp_path, layer, source), store=tmp_path / "store")
    assert not (tmp_path / "store" / "mnist.mar").exists()


@pytest.mark.slow
def test_layer_of_a_model_of_texts_is_rejected(tmp_path: Path):
    shutil.copytree(MODELS / "text", tmp_path / "text")
    with (tmp_path / "text" / CONFIG_NAME).open("a") as file:
        file.write("  grad_cam: members.0.normalise\n")
    with pytest.raises(BundleError, match=r"text: .* take only images \[N, C, H, W\]; this one takes \[1, "):
        archive(ModelFolder(tmp_path / "text"), store=tmp_path / "store")


@pytest.mark.slow
def test_layer_of_a_model_whose_handler_does_not_explain_is_rejected(tmp_path: Path):
    shutil.copytree(ROOT / "tests" / "models" / "boxes", tmp_path / "boxes")
    with (tmp_path / "boxes" / CONFIG_NAME).open("a") as file:
        file.write("  grad_cam: convolution\n")
    with pytest.raises(BundleError, match="boxes: bundle: grad_cam: needs a handler with explanations"):
        archive(ModelFolder(tmp_path / "boxes"), store=tmp_path / "store")


def test_layer_of_a_torchscript_file_is_rejected(tmp_path: Path):
    section = {"handler": "image_topk", "serialized": {"file": "model.pt"}, "grad_cam": "layer4"}
    (tmp_path / CONFIG_NAME).write_text(yaml.safe_dump({"bundle": section}))
    with pytest.raises(BundleError, match="section bundle: .*needs the method `with_activations`"):
        _ = ModelFolder(tmp_path).bundle


def test_layer_that_imagenet_names_exists():
    [folder] = select(["imagenet"])
    module = models.get_model(folder.bundle.torchvision.name, weights=None).eval()
    add_activations("imagenet", module, folder.bundle.grad_cam)
    outputs, activations = module.with_activations(torch.zeros(1, 3, 64, 64))
    assert (outputs.shape, activations.shape) == ((1, 1000), (1, 2048, 2, 2))


# --- a user's TorchScript file -------------------------------------------------------------------------------------


class Explained(SmallNet):
    @torch.jit.export
    def with_activations(self, images: Tensor) -> tuple[Tensor, Tensor]:
        activations = torch.relu(self.normalise(self.convolution(images)))
        return self.classify(activations.flatten(1)), activations


class Different(SmallNet):
    @torch.jit.export
    def with_activations(self, images: Tensor) -> tuple[Tensor, Tensor]:
        activations = self.convolution(images)
        return self.classify(activations.flatten(1)), activations


class Detached(SmallNet):
    @torch.jit.export
    def with_activations(self, images: Tensor) -> tuple[Tensor, Tensor]:
        activations = torch.relu(self.normalise(self.convolution(images)))
        return self.classify(activations.flatten(1)), activations.detach()


class Alone(SmallNet):
    @torch.jit.export
    def with_activations(self, images: Tensor) -> Tensor:
        return self.convolution(images)


class Coarse(SmallNet):
    @torch.jit.export
    def with_activations(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(images), images.mean((2, 3), keepdim=True)


@pytest.mark.slow
def test_file_of_a_user_with_the_method_is_explained(workbench):
    folder = workbench.add(Explained(3, 32))
    assert "with_activations: explanations with grad_cam" in workbench.report()
    with DryRun(workbench.store / f"{folder.name}.mar") as worker:
        status, answer = explain(worker, method="grad_cam")
        assert (status, answer["method"], len(answer["attributions"])) == (200, "grad_cam", 32)
        status, picture = explain(worker, method="grad_cam", format="png")
        with Image.open(io.BytesIO(picture)) as image:
            assert (status, image.format) == (200, "PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Different, "return different outputs"),
        (Detached, r"cannot be differentiated .* without detach\(\)"),
        (Alone, "must return two values"),
        (Coarse, r"of more than one pixel, .* shape \[1, 3, 1, 1\]"),
    ],
)
def test_file_of_a_user_with_an_invalid_method_is_rejected(workbench, network: type[SmallNet], message: str):
    torch.manual_seed(0)
    workbench.rejects(network(3, 32), message)
