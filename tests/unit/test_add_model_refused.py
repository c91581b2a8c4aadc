"""`make add-model`: invalid input is rejected with a message of one line, and no file is left behind."""

import runpy

import pytest
import torch
from torch import nn

from bundle.errors import BundleError
from tests.unit.workbench import Dictionary, Segmenting, SmallNet, WordNet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "../up", "a b", "straße"])
def test_add_model_invalid_name_is_rejected(workbench, name):
    with pytest.raises(BundleError, match="Invalid model name"):
        workbench.add(SmallNet(3, 32), name)
    assert not list(workbench.models.iterdir())


def test_add_model_existing_name_is_rejected(workbench):
    (workbench.models / "theirs").mkdir()
    (workbench.models / "theirs" / "model-config.yaml").write_text("mine")
    workbench.rejects(SmallNet(3, 32), "theirs exists already. Remove it, or choose another NAME")
    assert (workbench.models / "theirs" / "model-config.yaml").read_text() == "mine"


def test_add_model_unsupported_handler_is_rejected(workbench, monkeypatch):
    workbench.rejects(SmallNet(3, 32), "no handler 'image'; there are: .*image_topk", handler="image")
    monkeypatch.setattr("bundle.build.new_model.handlers", lambda: ["image_topk", "video"])
    workbench.rejects(SmallNet(3, 32), "Make the folder by hand: .*handler: video", handler="video")


def test_add_model_missing_file_is_named(workbench):
    model = workbench.save(SmallNet(3, 32))
    workbench.rejects(workbench.files / "none.pt", "no file .*none.pt")
    workbench.rejects(model, "no file .*none.json", labels=workbench.files / "none.json")
    workbench.rejects(model, "no file .*none.jpg", sample=workbench.files / "none.jpg")


def test_add_model_file_that_is_not_torchscript_is_named_with_the_lines_that_make_one(workbench):
    file = workbench.files / "theirs.pt"
    torch.save(SmallNet(3, 32).state_dict(), file)
    error = workbench.rejects(file, r"it is the weights of a module \(state_dict\).* the lines above make one")
    assert "model.load_state_dict" in error.details


def test_add_model_wrong_number_of_labels_is_rejected(workbench):
    workbench.rejects(SmallNet(3, 32, classes=6), "has 6 classes, but .*labels.json has 7 labels")


def test_add_model_invalid_labels_are_rejected(workbench):
    workbench.rejects(SmallNet(3, 32), "must be a list of labels", labels=workbench.labels("cat"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Dictionary(3, 32), "returns a dict with the keys logits"),
        (SmallNet(3, 32, classes=1), r"returns one number for each input \(the shape \[1, 1\]\)"),
        (nn.Sequential(SmallNet(3, 32), nn.Threshold(1e9, float("nan"))), "numbers that are not finite"),
        (nn.Linear(7, 3), "does not run on float32 images"),
        (SmallNet(3, 32).half(), r"weights are torch.float16: call model.float\(\) before"),
    ],
)
def test_add_model_unsupported_network_is_rejected(workbench, model, message):
    workbench.rejects(model, message)


class OneNumber(nn.Module):
    """Return one number for each image: a probability, or the logit of one."""

    def __init__(self, probability: bool, flat: bool):
        super().__init__()
        self.network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1))
        nn.init.constant_(self.network[2].bias, 3.0)
        self.probability = probability
        self.flat = flat

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = self.network(images)
        if self.probability:
            scores = scores.sigmoid()
        return scores.squeeze(1) if self.flat else scores


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("probability", [True, False])
def test_add_model_network_with_one_number_is_rejected_with_the_lines_that_make_two_classes(
    workbench, monkeypatch, probability, flat
):
    network = OneNumber(probability, flat).eval()
    named = "the probability" if probability else "the logit"
    error = workbench.rejects(network, f"one number for each input .* {named} of the second of two classes")
    monkeypatch.chdir(workbench.files)
    (workbench.files / "made.py").write_text(f"import torch\n{error.details}\n")
    runpy.run_path("made.py", {"model": torch.jit.load("theirs.pt")}, run_name="made")
    workbench.add(workbench.files / "model.pt", labels=workbench.labels(["no", "yes"]))
    assert "as probabilities" in workbench.report()


def test_add_model_network_traced_on_a_gpu_is_rejected_with_what_to_do(workbench):
    class OnGpu(SmallNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            shift = torch.zeros(images.size(0), 1, device="cuda:0")
            return self.classify(self.convolution(images).flatten(1)) + shift

    error = workbench.rejects(OnGpu(3, 32), "the name of a GPU .cuda. in its code")
    assert "model.cpu()" in error.details
    workbench.rejects(OnGpu(3, 32), "the name of a GPU .cuda. in its code", kind="image", size=32)


@pytest.mark.parametrize("options", [{}, {"kind": "image"}, {"handler": "mnist"}, {"kind": "sound"}])
def test_add_model_network_of_two_inputs_names_them(workbench, options):
    class Two(SmallNet):
        def forward(self, images: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
            return self.classify(self.convolution(images).flatten(1)) + ages

    workbench.rejects(Two(3, 32), r"takes 2 inputs \(images, ages\)", **options)


def test_add_model_folder_in_place_of_the_file_is_named(workbench):
    workbench.rejects(workbench.files, "is a folder. Name one file in it")


def test_add_model_segmenter_as_image_classifier_is_rejected(workbench):
    workbench.rejects(Segmenting(), r"returns the shape \[1, 3, 224, 224\]. A classifier must", kind="image")


def test_add_model_network_traced_in_training_mode_is_rejected(workbench):
    traced = torch.jit.trace(SmallNet(3, 32).train(), torch.rand(2, 3, 32, 32), check_trace=False)
    workbench.rejects(traced, "saved in training mode")


@pytest.mark.parametrize(
    "options", [{"mean": [0.5] * 3}, {"std": [0.5]}, {"mean": [0.5] * 2, "std": [0.5] * 2}, {"mean": [0.5], "std": [0]}]
)
def test_add_model_invalid_normalisation_is_rejected(workbench, options):
    workbench.rejects(SmallNet(3, 32), "MEAN and STD are invalid. Set both", **options)


def test_add_model_digit_network_of_another_size_is_rejected(workbench):
    workbench.rejects(SmallNet(1, 32), "28 x 28", handler="mnist", size=32)


def test_add_model_invalid_sample_is_rejected(workbench):
    image = workbench.files / "image.jpg"
    image.write_text("no image")
    workbench.rejects(SmallNet(3, 32), "answered 400 .*not an image in a supported format", sample=image)


def test_add_model_invalid_tokenizer_is_rejected(workbench):
    tokenizer = workbench.files / "tokenizer.json"
    tokenizer.write_text("{}")
    workbench.rejects(WordNet(), "not a tokenizer of the package tokenizers", handler="text", files=[tokenizer])


def test_add_model_network_for_another_input_is_rejected(workbench):
    error = workbench.rejects(
        SmallNet(3, 32), r"fails on the inputs that the handler makes: float32 \[1, 16000\]", handler="audio_mfcc"
    )
    assert error.details
