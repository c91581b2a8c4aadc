"""`make add-model`: what is found out of a TorchScript file, and what is made of it."""

import io
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
from tests.unit.workbench import CLASSES, LABELS, Auxiliary, SmallNet, Tone, WordNet, Workbench, static_int8

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def noise(side: int, mode: str = "RGB") -> Image.Image:
    bands = [Image.effect_noise((side, side), 60) for _ in mode]
    return Image.merge(mode, bands) if len(bands) > 1 else bands[0]


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


ROUNDING = 0.01  # of a probability: workers compute in bfloat16 where that is faster


@torch.inference_mode()
def check_answers(bench: Workbench, model: nn.Module, folder: ModelFolder, tolerance: float = ROUNDING) -> None:
    """The archive answers what the model says of the same pixels, one by one and in a batch."""
    handler, source = folder.config["handler"], folder.bundle.serialized
    image = noise(handler["resize"], "RGB" if handler["channels"] == 3 else "L")  # of this size, it is not resized
    margin = (handler["resize"] - handler["crop"]) // 2
    seen = numpy.array(image.crop((margin, margin, margin + handler["crop"], margin + handler["crop"])))
    pixels = torch.from_numpy(seen.reshape(1, *seen.shape[:2], -1)).permute(0, 3, 1, 2)
    outputs = main_output(PreprocessedImages(model.eval(), source.mean, source.std)(pixels))[0]
    expected = outputs if handler["outputs"] == "probabilities" else outputs.softmax(dim=0)
    with DryRun(bench.store / f"{folder.name}.mar") as dry_run:
        answers = dry_run.predict([{"body": encoded(image)}])
        answers += dry_run.predict([{"body": encoded(image)}] * 3)
    for status, body in answers:
        assert status == 200
        assert len(body["top_k"]) == 5
        for entry in body["top_k"]:
            assert entry["label"] == LABELS[entry["class"]]
            assert entry["probability"] == pytest.approx(expected[entry["class"]].item(), abs=tolerance)


def test_a_scripted_network_that_takes_any_size(bench):
    model = squeezenet1_1(num_classes=CLASSES)
    folder = bench.add(model)
    assert (folder.path, folder.bundle.handler) == (bench.models / "theirs", "image_topk")
    assert folder.config["handler"].items() >= {"resize": 256, "crop": 224, "channels": 3, "outputs": "logits"}.items()
    for found in ("224 x 224", "it also runs on other sizes", "ImageNet's", "7 classes, as logits", "the trial input"):
        assert found in bench.report()
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in bench.report()
    assert not archive(folder, bench.store).rebuilt
    check_answers(bench, model, folder)


def test_a_traced_network_of_another_size(bench):
    model = SmallNet(3, 64).eval()
    folder = bench.add(torch.jit.trace(model, torch.rand(1, 3, 64, 64)))
    assert folder.config["handler"]["crop"] == 64
    assert "it also runs on" not in bench.report()
    check_answers(bench, model, folder)


def test_a_frozen_network(bench):
    model = SmallNet(3, 32).eval()
    folder = bench.add(torch.jit.freeze(torch.jit.script(model)))
    check_answers(bench, model, folder)


def test_an_unusual_size_is_given(bench):
    model = SmallNet(3, 50)
    bench.refuses(model, "Set SIZE")
    bench.refuses(model, "and 51 x 51 pixels", size=51)
    folder = bench.add(model, size=50, resize=60)
    assert folder.config["handler"].items() >= {"resize": 60, "crop": 50}.items()
    check_answers(bench, model, folder)


def test_a_grey_network(bench):
    model = SmallNet(1, 28)
    folder = bench.add(model)
    assert folder.config["handler"]["channels"] == 1
    assert folder.bundle.serialized.mean == [0.5]
    assert "takes grey images of 28 x 28" in bench.report()
    check_answers(bench, model, folder)


def test_probabilities_are_found_out(bench):
    model = nn.Sequential(SmallNet(3, 32), nn.Softmax(dim=1))
    folder = bench.add(model)
    assert folder.config["handler"]["outputs"] == "probabilities"
    check_answers(bench, model, folder)


def test_sigmoids_are_pointed_out(bench):
    folder = bench.add(nn.Sequential(SmallNet(3, 32), nn.Sigmoid()))
    assert folder.config["handler"]["outputs"] == "logits"
    assert "if they are sigmoids" in bench.report()


def test_of_a_tuple_the_first_counts(bench):
    model = Auxiliary(3, 32)
    check_answers(bench, model, bench.add(model))


def test_a_statically_quantised_network(bench):
    with warnings.catch_warnings(action="ignore"):
        model = static_int8(SmallNet(3, 32), side=32)
    folder = bench.add(model)
    assert "quantised to 8 bits" in bench.report()
    assert folder.config["deviceType"] == "cpu"
    check_answers(bench, model, folder)


def test_a_dynamically_quantised_network(bench):
    with warnings.catch_warnings(action="ignore"):
        model = torch.ao.quantization.quantize_dynamic(SmallNet(3, 32).eval(), {nn.Linear})
    folder = bench.add(model)
    assert "quantised to 8 bits" in bench.report()
    check_answers(bench, model, folder, tolerance=1e-3)


def test_the_users_normalisation_and_image(bench):
    image = bench.files / "Photo.PNG"
    noise(100).save(image)
    model = SmallNet(3, 32)
    folder = bench.add(model, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.1], sample=image)
    assert folder.bundle.serialized.model_dump() == {
        "file": "model.pt",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.1],
    }
    assert folder.sample_file == folder.path / "sample.png"
    assert folder.sample_file.read_bytes() == image.read_bytes()
    check_answers(bench, model, folder)


@pytest.mark.parametrize("name", ["store", "v1.2_b-3", "9", "training"])
def test_names(bench, name):
    folder = bench.add(SmallNet(3, 32), name)
    assert folder.name == name
    assert [path.name for path in bench.models.iterdir()] == [name]
    assert sorted(path.name for path in bench.store.iterdir()) == [f"{name}.fingerprint", f"{name}.mar"]


def test_labels_as_imagenet_has_them(bench):
    labels = {str(index): [f"n{index:08}", label] for index, label in enumerate(LABELS)}
    model = SmallNet(3, 32)
    folder = bench.add(model, labels=bench.labels(labels))
    assert folder.labels() == LABELS
    check_answers(bench, model, folder)


def test_a_network_for_digits(bench):
    folder = bench.add(SmallNet(1, 28, classes=10), handler="mnist", labels=bench.labels([str(i) for i in range(10)]))
    assert folder.bundle.serialized.mean == [0.1307]
    assert re.search(r"answers the trial input: \d 0\.\d\d, \d 0\.\d\d, \d 0\.\d\d", bench.report())


def test_a_text_network_needs_its_tokenizer(bench):
    words = ["[PAD]", "[UNK]", "a", "text", "try"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(bench.files / "tokenizer.json"))
    model = WordNet()
    bench.refuses(model, "tokenizer.json", handler="text")
    folder = bench.add(model, handler="text", files=[bench.files / "tokenizer.json"])
    assert folder.bundle.files == ["tokenizer.json"]
    assert "answers the trial input: label" in bench.report()


def test_a_sound_network(bench):
    sound = bench.files / "clip.wav"
    soundfile.write(sound, numpy.zeros(8000), 8000)
    folder = bench.add(Tone(), handler="audio_mfcc", sample=sound)
    assert folder.bundle.serialized.mean is None
    assert (folder.path / "model.pt").read_bytes() == (bench.files / "theirs.pt").read_bytes()
    assert "answers the trial input: label" in bench.report()
