"""Reduced precisions: what a worker chooses, and what an archive is refused."""

import importlib
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from bundle import catalog
from bundle.archive import archive
from bundle.catalog import CONFIG_NAME, ModelFolder, select
from bundle.dryrun import DryRun
from bundle.errors import BundleError
from bundle.export import import_model
from bundle.quantize import layers, load, quantize
from handlers.core.precision import INT8_NAME, fastest, freeze
from tests.unit.inputs import DIGITS, draw_digit, encode_image

CPU = torch.device("cpu")
DATA_DIR = Path(os.environ.get("DATA_DIR", "data"))
SETS = {
    "mnist": "MNIST/raw/t10k-images-idx3-ubyte",
    "image": "cifar10-images.zip",
    "audio": "speech-commands-12.zip",
    "text": "clinc150/data_full.json",
}
AGREEMENT = 0.995  # of the first classes, as the archives of users' models must keep


class Cancelling(nn.Module):
    """What coarse numbers get wrong: a small difference of large numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
            self.layer.bias.zero_()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs + 10_000)


def scripted(module: nn.Module, file: Path) -> torch.jit.ScriptModule:
    torch.jit.script(module.eval()).save(file)
    return load(file)


@pytest.mark.parametrize("model", ["mnist", "image", "audio", "text"])
def test_frozen_float32_computes_the_same(model: str, tmp_path: Path):
    [folder] = select([model])
    module = import_model(model, folder.path / "model.py")
    inputs = module.example_inputs(5)
    plain = scripted(module.build(), tmp_path / "model.pt")
    with torch.inference_mode():
        frozen = freeze(plain, "float32", CPU)
        torch.testing.assert_close(frozen(*inputs), plain(*inputs), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_precision_that_is_asked_for_is_taken_and_one_that_is_wrong_is_not(tmp_path: Path):
    inputs = (torch.tensor([[1.0, 0.0], [0.0, 3.0]]),)
    right = scripted(nn.Linear(2, 2), tmp_path / "right.pt")
    assert fastest(right, "bfloat16", CPU, inputs, tmp_path)[0] == "bfloat16"
    assert fastest(right, "float32", CPU, inputs, tmp_path)[0] == "float32"
    wrong = scripted(Cancelling(), tmp_path / "wrong.pt")
    for wanted in ("auto", "bfloat16", ["float32", "bfloat16"]):
        assert fastest(wrong, wanted, CPU, inputs, tmp_path)[0] == "float32"


@torch.inference_mode()
def test_of_a_list_only_what_is_in_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("handlers.core.precision.natively", lambda *_: ["bfloat16"])
    seconds = {"float32": 1.0, "bfloat16": 0.1}
    monkeypatch.setattr(
        "handlers.core.precision.measure", lambda modules, *_: {name: seconds[name] for name in modules}
    )
    module, inputs = scripted(nn.Linear(2, 2), tmp_path / "model.pt"), (torch.ones(1, 2),)
    assert fastest(module, "auto", CPU, inputs, tmp_path)[0] == "bfloat16"
    assert fastest(module, ["float32", "bfloat16"], CPU, inputs, tmp_path)[0] == "bfloat16"
    assert fastest(module, ["float32", "int8"], CPU, inputs, tmp_path)[0] == "float32"


def test_int8_takes_an_archive_that_has_it(tmp_path: Path):
    module = scripted(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="int8: true"):
        fastest(module, "int8", CPU, (torch.zeros(1, 2),), tmp_path)


def mnist_with_examples(tmp_path: Path, count: int = 120, **bundle: object) -> ModelFolder:
    """A copy of the MNIST folder with drawn digits as examples."""
    path = tmp_path / "models" / "mnist"
    shutil.copytree(catalog.MODELS / "mnist", path)
    (path / "examples").mkdir()
    for index in range(count):
        digit = sorted(DIGITS)[index % len(DIGITS)]
        picture = draw_digit(digit, size=60 + index % 60, height=0.4 + 0.004 * (index % 60))
        (path / "examples" / f"{index}.png").write_bytes(encode_image(picture, "PNG"))
    config = yaml.safe_load((path / CONFIG_NAME).read_text())
    config["bundle"] |= {"examples": "examples", **bundle}
    (path / CONFIG_NAME).write_text(yaml.safe_dump(config))
    return ModelFolder(path)


VNNI = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 needs a processor with VNNI")


@VNNI
def test_an_int8_archive_answers_as_the_float32_one(tmp_path: Path):
    folder = mnist_with_examples(tmp_path, int8=True, agreement=0.9)
    built = archive(folder, store=tmp_path / "store")
    assert [note.split(":")[0] for note in built.notes] == ["bfloat16", "int8"]
    rows = [{"body": file.read_bytes()} for file in sorted((folder.path / "examples").iterdir())[:32]]
    answers = {}
    for wanted in ("float32", "int8"):
        mar = with_precision(folder, wanted, tmp_path)
        with DryRun(mar) as worker:
            assert worker.handler.precision == wanted
            answers[wanted] = [body["top_3_classes"][0] for _, body in worker.predict(rows)]
    same = sum(one == other for one, other in zip(*answers.values(), strict=True))
    assert same >= 30


def with_precision(folder: ModelFolder, wanted: str, tmp_path: Path) -> Path:
    config = yaml.safe_load((folder.path / CONFIG_NAME).read_text())
    config["handler"]["precision"] = wanted
    (folder.path / CONFIG_NAME).write_text(yaml.safe_dump(config))
    return archive(ModelFolder(folder.path), store=tmp_path / wanted).path


@VNNI
def test_int8_keeps_sensitive_layers_in_float32_and_gives_up_at_half_of_them(tmp_path: Path):
    [folder] = select(["mnist"])
    module = import_model("mnist", folder.path / "model.py")
    file, target = tmp_path / "model.pt", tmp_path / INT8_NAME
    torch.jit.script(module.build()).save(file)
    batches = [module.example_inputs(8)]
    total = len(layers(file))
    tried = []

    def at_the_third(candidate: torch.jit.ScriptModule) -> bool:
        tried.append(candidate)
        return len(tried) == 3

    assert quantize(file, target, batches, at_the_third) == (total - 2, total)
    in_float32 = str(load(target).inlined_graph)
    assert in_float32.count("aten::conv2d(") + in_float32.count("aten::linear(") == 2
    assert quantize(file, target, batches, lambda _: False) is None
    assert not target.exists()


FRAGILE = """
import torch
from torch import nn


class Fragile(nn.Module):
    \"\"\"What int8 gets wrong in every layer: a small difference of large numbers.\"\"\"

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(784, 10), nn.Linear(10, 10), nn.Linear(10, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.float().flatten(1) / 255
        rows = self.first(rows + 1000) - self.first(torch.zeros_like(rows) + 1000)
        rows = self.second(rows + 1000) - self.second(torch.zeros_like(rows) + 1000)
        return self.third(rows + 1000) - self.third(torch.zeros_like(rows) + 1000)


def build() -> nn.Module:
    torch.manual_seed(0)
    return Fragile().eval()


def example_inputs(batch_size: int) -> tuple[torch.Tensor, ...]:
    return (torch.zeros(batch_size, 1, 28, 28, dtype=torch.uint8),)
"""


@VNNI
def test_a_precision_that_changes_answers_is_refused(tmp_path: Path):
    folder = mnist_with_examples(tmp_path, count=440, int8=True)
    (folder.path / "model.py").write_text(FRAGILE)
    with pytest.raises(BundleError, match=r"in int8, .* keep their first class, and 99.50% must"):
        archive(folder, store=tmp_path / "store")
    assert not (tmp_path / "store" / "mnist.mar").exists()
    config = yaml.safe_load((folder.path / CONFIG_NAME).read_text())
    config["bundle"]["int8"] = False
    (folder.path / CONFIG_NAME).write_text(yaml.safe_dump(config))
    built = archive(ModelFolder(folder.path), store=tmp_path / "store")
    assert "bfloat16" in built.notes[0]
    assert "it is not used" in built.notes[0]
    with DryRun(built.path) as worker:
        assert worker.handler.settings.precision == "float32"


def test_too_few_examples_and_bad_ones_are_named(tmp_path: Path):
    folder = mnist_with_examples(tmp_path, agreement=0.99)
    (folder.path / "examples" / "0.png").write_bytes(b"no picture")
    with pytest.raises(BundleError, match=r"0.png is refused.*UndecodableImage"):
        archive(folder, store=tmp_path / "store")
    for index in range(30):
        (folder.path / "examples" / f"{index}.png").unlink()
    with pytest.raises(BundleError, match="90 examples are too few; comparing precisions takes 100"):
        archive(folder, store=tmp_path / "store")


def test_int8_without_examples_is_refused(tmp_path: Path):
    folder = mnist_with_examples(tmp_path, int8=True)
    config = yaml.safe_load((folder.path / CONFIG_NAME).read_text())
    del config["bundle"]["examples"]
    (folder.path / CONFIG_NAME).write_text(yaml.safe_dump(config))
    with pytest.raises(BundleError, match="int8 needs examples"):
        _ = ModelFolder(folder.path).bundle


@pytest.mark.parametrize("model", SETS)
def test_bfloat16_keeps_the_answers_of_the_shipped_models(model: str, tmp_path: Path):
    """On held-out data, whatever processor this runs on: bfloat16 is emulated where there are no instructions."""
    if not (DATA_DIR / SETS[model]).exists():
        pytest.skip(f"there is no {SETS[model]} in DATA_DIR")
    plain = scripted(import_model(model, catalog.MODELS / model / "model.py").build(), tmp_path / "model.pt")
    reduced = freeze(plain, "bfloat16", CPU)
    same = total = 0
    with torch.inference_mode():
        for batch in held_out(model, 1000):
            first = [module(*batch).argmax(dim=1) for module in (plain, reduced)]
            same += (first[0] == first[1]).sum().item()
            total += len(first[0])
    assert same / total >= AGREEMENT


def held_out(model: str, count: int) -> list[tuple[torch.Tensor, ...]]:
    train = importlib.import_module(f"models.{model}.train")
    if model == "text":
        texts = [text for text, _ in train.load(DATA_DIR)["test"]][:count]
        with DryRun(archive(*select(["text"])).path) as worker:
            return [
                worker.handler.collate([worker.handler.decode(text) for text in texts[start : start + 50]])
                for start in range(0, len(texts), 50)
            ]
    inputs, _ = train.load(DATA_DIR, "test")
    chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:count]
    return [(batch,) for batch in inputs[chosen].split(50)]
