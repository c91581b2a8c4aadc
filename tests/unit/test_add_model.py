"""`make add-model`: what it detects in a TorchScript file, and the model folder and archive that it makes."""

import re
import warnings

import numpy
import pytest
import soundfile
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torchvision.models import squeezenet1_1

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.build.export import PreprocessedImages
from bundle.catalog import ModelFolder
from handlers.core.outputs import main_output
from tests.unit.inputs import encode_image
from tests.unit.workbench import CLASSES, LABELS, Auxiliary, SmallNet, Tone, WordNet, Workbench, static_int8

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def noise(side: int, mode: str = "RGB") -> Image.Image:
    bands = [Image.effect_noise((side, side), 60) for _ in mode]
    return Image.merge(mode, bands) if len(bands) > 1 else bands[0]


ROUNDING = 0.01  # of a probability: workers compute in bfloat16 where that is faster


@torch.inference_mode()
def check_answers(workbench: Workbench, model: nn.Module, folder: ModelFolder, tolerance: float = ROUNDING) -> None:
    """Check that the archive answers as the model does for the same pixels, alone and in a batch."""
    handler, source = folder.config["handler"], folder.bundle.serialized
    image = noise(handler["resize"], "RGB" if handler["channels"] == 3 else "L")  # an image of this size is not resized
    margin = (handler["resize"] - handler["crop"]) // 2
    seen = numpy.array(image.crop((margin, margin, margin + handler["crop"], margin + handler["crop"])))
    pixels = torch.from_numpy(seen.reshape(1, *seen.shape[:2], -1)).permute(0, 3, 1, 2)
    outputs = main_output(PreprocessedImages(model.eval(), source.mean, source.std)(pixels))[0]
    expected = outputs if handler["outputs"] == "probabilities" else outputs.softmax(dim=0)
    with DryRun(workbench.store / f"{folder.name}.mar") as dry_run:
        request = {"body": encode_image(image, "PNG")}
        answers = dry_run.predict([request]) + dry_run.predict([request] * 3)
    for status, body in answers:
        assert status == 200
        assert len(body["top_k"]) == 5
        for entry in body["top_k"]:
            assert entry["label"] == LABELS[entry["class"]]
            assert entry["probability"] == pytest.approx(expected[entry["class"]].item(), abs=tolerance)


@pytest.mark.slow
def test_add_model_scripted_network_of_any_size_is_served_at_224_pixels(workbench):
    model = squeezenet1_1(num_classes=CLASSES)
    folder = workbench.add(model)
    assert (folder.path, folder.bundle.handler) == (workbench.models / "theirs", "image_topk")
    assert folder.config["handler"].items() >= {"resize": 256, "crop": 224, "channels": 3, "outputs": "logits"}.items()
    for found in ("224 x 224", "it also runs on other sizes", "ImageNet's", "7 classes, as logits", "the trial input"):
        assert found in workbench.report()
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in workbench.report()
    assert not archive(folder, workbench.store).rebuilt
    check_answers(workbench, model, folder)


def test_add_model_traced_network_of_one_size_is_served_at_that_size(workbench):
    model = SmallNet(3, 64).eval()
    folder = workbench.add(torch.jit.trace(model, torch.rand(1, 3, 64, 64)))
    assert folder.config["handler"]["crop"] == 64
    assert "it also runs on" not in workbench.report()
    check_answers(workbench, model, folder)


def test_add_model_frozen_network_is_served(workbench):
    model = SmallNet(3, 32).eval()
    folder = workbench.add(torch.jit.freeze(torch.jit.script(model)))
    check_answers(workbench, model, folder)


def test_add_model_unusual_size_must_be_given(workbench):
    model = SmallNet(3, 50)
    workbench.rejects(model, "Set SIZE")
    workbench.rejects(model, "and 51 x 51 pixels", size=51)
    folder = workbench.add(model, size=50, resize=60)
    assert folder.config["handler"].items() >= {"resize": 60, "crop": 50}.items()
    check_answers(workbench, model, folder)


def test_add_model_one_channel_network_takes_grey_images(workbench):
    model = SmallNet(1, 28)
    folder = workbench.add(model)
    assert folder.config["handler"]["channels"] == 1
    assert folder.bundle.serialized.mean == [0.5]
    assert "takes grey images of 28 x 28" in workbench.report()
    check_answers(workbench, model, folder)


def test_add_model_softmax_network_is_detected_as_probabilities(workbench):
    model = nn.Sequential(SmallNet(3, 32), nn.Softmax(dim=1))
    folder = workbench.add(model)
    assert folder.config["handler"]["outputs"] == "probabilities"
    check_answers(workbench, model, folder)


def test_add_model_sigmoid_network_is_reported(workbench):
    folder = workbench.add(nn.Sequential(SmallNet(3, 32), nn.Sigmoid()))
    assert folder.config["handler"]["outputs"] == "logits"
    assert "if they are sigmoids" in workbench.report()


def test_add_model_tuple_of_outputs_uses_the_first(workbench):
    model = Auxiliary(3, 32)
    check_answers(workbench, model, workbench.add(model))


def test_add_model_statically_quantised_network_is_served_on_the_cpu(workbench):
    with warnings.catch_warnings(action="ignore"):
        model = static_int8(SmallNet(3, 32), side=32)
    folder = workbench.add(model)
    assert "quantised to 8 bits" in workbench.report()
    assert folder.config["deviceType"] == "cpu"
    check_answers(workbench, model, folder)


def test_add_model_dynamically_quantised_network_is_served(workbench):
    with warnings.catch_warnings(action="ignore"):
        model = torch.ao.quantization.quantize_dynamic(SmallNet(3, 32).eval(), {nn.Linear})
    folder = workbench.add(model)
    assert "quantised to 8 bits" in workbench.report()
    check_answers(workbench, model, folder, tolerance=1e-3)


def test_add_model_given_normalisation_and_sample_are_used(workbench):
    image = workbench.files / "Photo.PNG"
    noise(100).save(image)
    model = SmallNet(3, 32)
    folder = workbench.add(model, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.1], sample=image)
    assert folder.bundle.serialized.model_dump() == {
        "file": "model.pt",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.1],
    }
    assert folder.sample_file == folder.path / "sample.png"
    assert folder.sample_file.read_bytes() == image.read_bytes()
    check_answers(workbench, model, folder)


@pytest.mark.parametrize("name", ["store", "v1.2_b-3", "9", "training"])
def test_add_model_valid_name_is_accepted(workbench, name):
    folder = workbench.add(SmallNet(3, 32), name)
    assert folder.name == name
    assert [path.name for path in workbench.models.iterdir()] == [name]
    assert sorted(path.name for path in workbench.store.iterdir()) == [f"{name}.fingerprint", f"{name}.mar"]


def test_add_model_labels_in_imagenets_format_are_read(workbench):
    labels = {str(index): [f"n{index:08}", label] for index, label in enumerate(LABELS)}
    model = SmallNet(3, 32)
    folder = workbench.add(model, labels=workbench.labels(labels))
    assert folder.labels() == LABELS
    check_answers(workbench, model, folder)


def test_add_model_digit_network_uses_mnists_normalisation(workbench):
    folder = workbench.add(
        SmallNet(1, 28, classes=10), handler="mnist", labels=workbench.labels([str(i) for i in range(10)])
    )
    assert folder.bundle.serialized.mean == [0.1307]
    assert re.search(r"answers the trial input: \d 0\.\d\d, \d 0\.\d\d, \d 0\.\d\d", workbench.report())


def test_add_model_text_network_requires_its_tokenizer(workbench):
    words = ["[PAD]", "[UNK]", "a", "text", "try"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(workbench.files / "tokenizer.json"))
    model = WordNet()
    workbench.rejects(model, "tokenizer.json", handler="text")
    folder = workbench.add(model, handler="text", files=[workbench.files / "tokenizer.json"])
    assert folder.bundle.files == ["tokenizer.json"]
    assert "answers the trial input: label" in workbench.report()


def test_add_model_sound_network_is_copied_unchanged(workbench):
    sound = workbench.files / "clip.wav"
    soundfile.write(sound, numpy.zeros(8000), 8000)
    folder = workbench.add(Tone(), handler="audio_mfcc", sample=sound)
    assert folder.bundle.serialized.mean is None
    assert (folder.path / "model.pt").read_bytes() == (workbench.files / "theirs.pt").read_bytes()
    assert "answers the trial input: label" in workbench.report()
