"""`make add-model`: what is refused, in a line, with nothing left behind."""

import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from bundle.errors import BundleError
from tests.unit.workbench import Dictionary, OneAtATime, Segmenting, SmallNet, WordNet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "../up", "a b", "straße"])
def test_a_name_that_is_none(bench, name):
    with pytest.raises(BundleError, match="Invalid model name"):
        bench.add(SmallNet(3, 32), name)
    assert not list(bench.models.iterdir())


def test_a_name_that_is_taken(bench):
    (bench.models / "theirs").mkdir()
    (bench.models / "theirs" / "model-config.yaml").write_text("mine")
    bench.refuses(SmallNet(3, 32), "theirs exists already. Choose another NAME")
    assert (bench.models / "theirs" / "model-config.yaml").read_text() == "mine"


def test_unknown_handlers(bench, monkeypatch):
    bench.refuses(SmallNet(3, 32), "no handler 'image'; there are: .*image_topk", handler="image")
    monkeypatch.setattr("bundle.build.add_model.handlers", lambda: ["image_topk", "video"])
    bench.refuses(SmallNet(3, 32), "Make the folder by hand: .*handler: video", handler="video")


def test_missing_files(bench):
    model = bench.save(SmallNet(3, 32))
    bench.refuses(bench.files / "none.pt", "no file .*none.pt")
    bench.refuses(model, "no file .*none.json", labels=bench.files / "none.json")
    bench.refuses(model, "no file .*none.jpg", sample=bench.files / "none.jpg")


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
    bench.refuses(file, "is damaged, or is not a TorchScript file")


def test_labels_that_do_not_fit(bench):
    bench.refuses(SmallNet(3, 32, classes=6), "has 6 classes, but .*labels.json has 7 labels")


def test_labels_that_are_none(bench):
    bench.refuses(SmallNet(3, 32), "must be a list of labels", labels=bench.labels("cat"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Dictionary(3, 32), "returns a dict with the keys logits"),
        (Segmenting(), r"returns the shape \[1, 3, 224, 224\]"),
        (SmallNet(3, 32, classes=1), r"returns the shape \[1, 1\]"),
        (nn.Sequential(SmallNet(3, 32), nn.Threshold(1e9, float("nan"))), "numbers that are not finite"),
        (WordNet(), "does not run on float32 images"),
        (SmallNet(3, 32).half(), r"weights are torch.float16: call model.float\(\) before"),
    ],
)
def test_what_is_no_image_classifier(bench, model, message):
    bench.refuses(model, message)


def test_a_batch_size_that_is_traced(bench):
    traced = torch.jit.trace(OneAtATime(3, 32).eval(), torch.rand(1, 3, 32, 32))
    bench.refuses(traced, "takes one input, but not a batch")


def test_a_network_traced_in_training_mode(bench):
    traced = torch.jit.trace(SmallNet(3, 32).train(), torch.rand(2, 3, 32, 32), check_trace=False)
    bench.refuses(traced, "saved in training mode")


@pytest.mark.parametrize(
    "options", [{"mean": [0.5] * 3}, {"std": [0.5]}, {"mean": [0.5] * 2, "std": [0.5] * 2}, {"mean": [0.5], "std": [0]}]
)
def test_a_normalisation_that_is_none(bench, options):
    bench.refuses(SmallNet(3, 32), "MEAN and STD are invalid. Set both", **options)


def test_digits_of_another_size(bench):
    bench.refuses(SmallNet(1, 32), "28 x 28", handler="mnist", size=32)


def test_an_image_that_is_none(bench):
    image = bench.files / "image.jpg"
    image.write_text("no image")
    bench.refuses(SmallNet(3, 32), "answered 400 .*not an image in a supported format", sample=image)


def test_files_that_the_handler_cannot_load(bench):
    tokenizer = bench.files / "tokenizer.json"
    tokenizer.write_text("{}")
    bench.refuses(WordNet(), "The handler cannot load the model", handler="text", files=[tokenizer])


def test_a_network_that_does_not_take_what_the_handler_gives(bench):
    error = bench.refuses(
        SmallNet(3, 32), r"fails on the inputs that the handler makes: float32 \[1, 16000\]", handler="audio_mfcc"
    )
    assert error.details
