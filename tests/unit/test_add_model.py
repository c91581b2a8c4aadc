"""`make add-model`: what is found out of a TorchScript file, what is made of it, and what is refused."""

import io
import json
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torchvision.models import squeezenet1_1

from bundle.add_model import add_model
from bundle.archive import archive
from bundle.catalog import ModelFolder
from bundle.dryrun import DryRun
from bundle.errors import BundleError
from bundle.export import PreprocessedImages
from handlers.core.precision import main_output

CLASSES = 7
LABELS = [f"label {index}" for index in range(CLASSES)]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class SmallNet(nn.Module):
    """Takes images of one size only, as its linear layer looks at every pixel."""

    def __init__(self, channels: int, side: int, classes: int = CLASSES):
        super().__init__()
        self.convolution = nn.Conv2d(channels, 4, 3, padding=1)
        self.normalise = nn.BatchNorm2d(4)
        self.classify = nn.Linear(4 * side * side, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(torch.relu(self.normalise(self.convolution(images))).flatten(1))


class OneAtATime(SmallNet):
    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.convolution(images).view(1, -1))


class Dictionary(SmallNet):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.classify(self.convolution(images).flatten(1))}


class Auxiliary(SmallNet):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classify(self.convolution(images).flatten(1))
        return logits, logits + 1


class Segmenting(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images * 2


class WordNet(nn.Module):
    """Classifies texts."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.classify = nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        weights = mask.float().unsqueeze(2)
        return self.classify((self.embed(ids) * weights).sum(1) / weights.sum(1))


class Tone(nn.Module):
    """Classifies sounds."""

    def __init__(self):
        super().__init__()
        self.classify = nn.Linear(16_000, CLASSES)

    def forward(self, waveforms: Tensor) -> Tensor:
        return self.classify(waveforms)


def static_int8(model: nn.Module, side: int) -> nn.Module:
    """Post-training quantisation of weights and activations, for x86."""
    fused = torch.ao.quantization.fuse_modules(model.eval(), [["convolution", "normalise"]])
    wrapped = torch.ao.quantization.QuantWrapper(fused)
    wrapped.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    prepared = torch.ao.quantization.prepare(wrapped)
    prepared(torch.randn(4, 3, side, side))
    return torch.ao.quantization.convert(prepared)


class Workbench:
    """Roots of its own for folders and archives, and what was reported."""

    def __init__(self, root: Path):
        self.files = root / "files"
        self.models, self.store = root / "models", root / "model_store"
        self.files.mkdir()
        self.models.mkdir()
        self.reported: list[str] = []

    def labels(self, labels: object = LABELS) -> Path:
        file = self.files / "labels.json"
        file.write_text(json.dumps(labels))
        return file

    def save(self, model: nn.Module) -> Path:
        file = self.files / "theirs.pt"
        module = model if isinstance(model, torch.jit.ScriptModule) else torch.jit.script(model.eval())
        module.save(file)
        return file

    def add(self, model: nn.Module | Path, name: str = "theirs", handler: str = "image_topk", **options) -> ModelFolder:
        serialized = model if isinstance(model, Path) else self.save(model)
        labels = options.pop("labels", None) or self.labels()
        roots = {"models_dir": self.models, "store": self.store, "report": self.reported.append}
        return add_model(name, serialized, labels, handler, **options, **roots)

    def refuses(self, model: nn.Module | Path, message: str, name: str = "theirs", **options) -> BundleError:
        """Checks that it is refused in one line, and that nothing is left behind."""
        before = sorted(self.models.rglob("*"))
        with pytest.raises(BundleError, match=message) as caught:
            self.add(model, name, **options)
        assert "\n" not in str(caught.value)
        assert sorted(self.models.rglob("*")) == before
        assert not (self.store / f"{name}.mar").exists()
        return caught.value

    def report(self) -> str:
        return "\n".join(self.reported)


@pytest.fixture
def bench(tmp_path) -> Workbench:
    torch.manual_seed(0)
    return Workbench(tmp_path)


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
    for found in ("224 x 224", "it runs on others, too", "ImageNet's", "7 classes, as logits", "tried, it answers"):
        assert found in bench.report()
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in bench.report()
    assert not archive(folder, bench.store).rebuilt
    check_answers(bench, model, folder)


def test_a_traced_network_of_another_size(bench):
    model = SmallNet(3, 64).eval()
    folder = bench.add(torch.jit.trace(model, torch.rand(1, 3, 64, 64)))
    assert folder.config["handler"]["crop"] == 64
    assert "it runs on others" not in bench.report()
    check_answers(bench, model, folder)


def test_a_frozen_network(bench):
    model = SmallNet(3, 32).eval()
    folder = bench.add(torch.jit.freeze(torch.jit.script(model)))
    check_answers(bench, model, folder)


def test_an_unusual_size_is_given(bench):
    model = SmallNet(3, 50)
    bench.refuses(model, "Give its SIZE")
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
    folder = bench.add(model, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.1], image=image)
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
    assert "top_3_classes" in bench.report()


def test_a_text_network_needs_its_tokenizer(bench):
    words = ["[PAD]", "[UNK]", "a", "text", "try"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(bench.files / "tokenizer.json"))
    model = WordNet()
    bench.refuses(model, "tokenizer.json", handler="text")
    folder = bench.add(model, handler="text", files=[bench.files / "tokenizer.json"])
    assert folder.bundle.files == ["tokenizer.json"]
    assert "tried, it answers: label" in bench.report()


def test_a_sound_network(bench):
    sound = bench.files / "clip.wav"
    soundfile.write(sound, numpy.zeros(8000), 8000)
    folder = bench.add(Tone(), handler="audio_mfcc", image=sound)
    assert folder.bundle.serialized.mean is None
    assert (folder.path / "model.pt").read_bytes() == (bench.files / "theirs.pt").read_bytes()
    assert "tried, it answers: label" in bench.report()


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "../up", "a b", "straße"])
def test_a_name_that_is_none(bench, name):
    with pytest.raises(BundleError, match="is no name for a model"):
        bench.add(SmallNet(3, 32), name)
    assert not list(bench.models.iterdir())


def test_a_name_that_is_taken(bench):
    (bench.models / "theirs").mkdir()
    (bench.models / "theirs" / "model-config.yaml").write_text("mine")
    bench.refuses(SmallNet(3, 32), "The name theirs is taken")
    assert (bench.models / "theirs" / "model-config.yaml").read_text() == "mine"


def test_unknown_handlers(bench, monkeypatch):
    bench.refuses(SmallNet(3, 32), "no handler 'image'; there are: .*image_topk", handler="image")
    monkeypatch.setattr("bundle.add_model.handlers", lambda: ["image_topk", "video"])
    bench.refuses(SmallNet(3, 32), "Make the folder by hand: .*handler: video", handler="video")


def test_missing_files(bench):
    model = bench.save(SmallNet(3, 32))
    bench.refuses(bench.files / "none.pt", "no file .*none.pt")
    bench.refuses(model, "no file .*none.json", labels=bench.files / "none.json")
    bench.refuses(model, "no file .*none.jpg", image=bench.files / "none.jpg")


class Planted:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize("content", [SmallNet(3, 32).state_dict(), OrderedDict(weights=Planted()), SmallNet(3, 32)])
@pytest.mark.parametrize("as_zip", [True, False])
def test_pickled_checkpoints_are_not_unpickled(bench, capsys, content, as_zip):
    file = bench.files / "theirs.pt"
    torch.save(content, file, _use_new_zipfile_serialization=as_zip)
    bench.refuses(file, r"is a pickled checkpoint, not a TorchScript file. Save one with torch.jit.script")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "zip"])
def test_broken_files(bench, damage):
    file = bench.save(SmallNet(3, 32))
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-2000])
    elif damage == "zip":
        with zipfile.ZipFile(file, "w") as archived:
            archived.writestr("readme.txt", "nothing")
    else:
        file.write_text("" if damage == "empty" else "not a model")
    bench.refuses(file, "is broken, or is not a TorchScript file")


def test_labels_that_do_not_fit(bench):
    bench.refuses(SmallNet(3, 32, classes=6), "answers 6 classes, and .*labels.json has 7 labels")


def test_labels_that_are_none(bench):
    bench.refuses(SmallNet(3, 32), "must be a list of labels", labels=bench.labels("cat"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Dictionary(3, 32), "out came a dict with the keys logits"),
        (Segmenting(), r"out came shape \[1, 3, 224, 224\]"),
        (SmallNet(3, 32, classes=1), r"out came shape \[1, 1\]"),
        (nn.Sequential(SmallNet(3, 32), nn.Threshold(1e9, float("nan"))), "numbers that are not finite"),
        (WordNet(), "runs on no float32 image"),
        (SmallNet(3, 32).half(), "weights are torch.float16: save it after model.float"),
    ],
)
def test_what_is_no_image_classifier(bench, model, message):
    bench.refuses(model, message)


def test_a_batch_size_that_is_traced(bench):
    traced = torch.jit.trace(OneAtATime(3, 32).eval(), torch.rand(1, 3, 32, 32))
    bench.refuses(traced, "one input at a time, and no batches")


def test_a_network_traced_in_training_mode(bench):
    traced = torch.jit.trace(SmallNet(3, 32).train(), torch.rand(2, 3, 32, 32), check_trace=False)
    bench.refuses(traced, "saved in training mode")


@pytest.mark.parametrize(
    "options", [{"mean": [0.5] * 3}, {"std": [0.5]}, {"mean": [0.5] * 2, "std": [0.5] * 2}, {"mean": [0.5], "std": [0]}]
)
def test_a_normalisation_that_is_none(bench, options):
    bench.refuses(SmallNet(3, 32), "MEAN and STD belong together", **options)


def test_digits_of_another_size(bench):
    bench.refuses(SmallNet(1, 32), "28 x 28", handler="mnist", size=32)


def test_an_image_that_is_none(bench):
    image = bench.files / "image.jpg"
    image.write_text("no image")
    bench.refuses(SmallNet(3, 32), "answers 400 .*not an image in a format", image=image)


def test_files_that_the_handler_cannot_load(bench):
    tokenizer = bench.files / "tokenizer.json"
    tokenizer.write_text("{}")
    bench.refuses(WordNet(), "The handler cannot load the model", handler="text", files=[tokenizer])


def test_a_network_that_does_not_take_what_the_handler_gives(bench):
    error = bench.refuses(
        SmallNet(3, 32), r"does not take what the handler gives it: float32 \[1, 16000\]", handler="audio_mfcc"
    )
    assert error.details
