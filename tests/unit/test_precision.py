"""Reduced precisions: which one a worker chooses, and which ones an archive may have."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.build.export import import_model
from bundle.build.precision import Judge
from bundle.build.quantize import layers, load, quantize
from bundle.catalog import CONFIG_NAME, ModelFolder, select
from bundle.errors import BundleError
from bundle.mar import contents, read
from bundle.paths import MODELS
from handlers.core.precision import INT8_NAME, fastest, freeze
from handlers.core.predictions import REFERENCE_NAME, Reference
from tests.shipped import DATA_DIR, SHIPPED, skip_without_data_set
from tests.unit.inputs import DIGITS, draw_digit, encode_image

CPU = torch.device("cpu")
OVERFLOWS = ("audio", "float16")  # the energies of real sounds; those of silence fit
AGREEMENT = 0.995  # share of the first classes, the default of model folders


class Cancelling(nn.Module):
    """Computes a small difference of large numbers, which reduced precisions get wrong."""

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


@pytest.mark.parametrize("model", SHIPPED)
def test_frozen_float32_module_computes_the_same(model: str, tmp_path: Path):
    [folder] = select([model])
    module = import_model(model, folder.path / "model.py")
    inputs = module.example_inputs(5)
    plain = scripted(module.build(), tmp_path / "model.pt")
    with torch.inference_mode():
        frozen = freeze(plain, "float32", CPU)
        torch.testing.assert_close(frozen(*inputs), plain(*inputs), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_wanted_precision_is_chosen_only_if_it_is_accurate(tmp_path: Path):
    inputs = (torch.tensor([[1.0, 0.0], [0.0, 3.0]]),)
    right = scripted(nn.Linear(2, 2), tmp_path / "right.pt")
    assert fastest(right, "bfloat16", CPU, inputs, tmp_path)[0] == "bfloat16"
    assert fastest(right, "float32", CPU, inputs, tmp_path)[0] == "float32"
    wrong = scripted(Cancelling(), tmp_path / "wrong.pt")
    for wanted in ("auto", "bfloat16", ["float32", "bfloat16"]):
        assert fastest(wrong, wanted, CPU, inputs, tmp_path)[0] == "float32"


@torch.inference_mode()
def test_precision_outside_the_wanted_list_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("handlers.core.precision.native_precisions", lambda *_: ["bfloat16"])
    seconds = {"float32": 1.0, "bfloat16": 0.1}
    monkeypatch.setattr(
        "handlers.core.precision.measure", lambda modules, *_: {name: seconds[name] for name in modules}
    )
    module, inputs = scripted(nn.Linear(2, 2), tmp_path / "model.pt"), (torch.ones(1, 2),)
    assert fastest(module, "auto", CPU, inputs, tmp_path)[0] == "bfloat16"
    assert fastest(module, ["float32", "bfloat16"], CPU, inputs, tmp_path)[0] == "bfloat16"
    assert fastest(module, ["float32", "int8"], CPU, inputs, tmp_path)[0] == "float32"


def test_int8_without_an_int8_module_raises(tmp_path: Path):
    module = scripted(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="int8: true"):
        fastest(module, "int8", CPU, (torch.zeros(1, 2),), tmp_path)


def mnist_with_examples(tmp_path: Path, count: int = 120, **bundle: object) -> ModelFolder:
    """Copy the MNIST folder, with drawn digits as examples."""
    path = tmp_path / "models" / "mnist"
    shutil.copytree(MODELS / "mnist", path)
    (path / "examples").mkdir()
    for index in range(count):
        digit = sorted(DIGITS)[index % len(DIGITS)]
        picture = draw_digit(digit, size=60 + index % 60, height=0.4 + 0.004 * (index % 60))
        (path / "examples" / f"{index}.png").write_bytes(encode_image(picture, "PNG"))
    config = yaml.safe_load((path / CONFIG_NAME).read_text())
    config["bundle"] |= {"examples": "examples", **bundle}
    (path / CONFIG_NAME).write_text(yaml.safe_dump(config))
    return ModelFolder(path)


def with_module(folder: ModelFolder, source: str) -> ModelFolder:
    """Replace the folder's module, and forget what its configuration says of the old one's layers."""
    (folder.path / "model.py").write_text(source)
    config = folder.config
    del config["bundle"]["grad_cam"]
    (folder.path / CONFIG_NAME).write_text(yaml.safe_dump(config))
    return ModelFolder(folder.path)


VNNI = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 needs a processor with VNNI")


@VNNI
@pytest.mark.slow
def test_int8_archive_answers_like_the_float32_one(tmp_path: Path):
    folder = mnist_with_examples(tmp_path, int8=True, agreement=0.9)
    built = archive(folder, store=tmp_path / "store")
    assert [note.split(":")[0] for note in built.notes] == ["bfloat16", "float16", "int8"]
    assert all("keep their first class" in note and "probability changes by" in note for note in built.notes)
    rows = [{"body": file.read_bytes()} for file in sorted((folder.path / "examples").iterdir())[:32]]
    answers, maps = {}, {}
    for wanted in ("float32", "int8"):
        mar = archive_in(folder, wanted, tmp_path)
        with DryRun(mar) as worker:
            assert worker.handler.precision == wanted
            answers[wanted] = [body["top_3_classes"][0] for _, body in worker.predict(rows)]
            explained = {"data": rows[0]["body"], "method": "grad_cam"}
            maps[wanted] = worker.predict([explained], [{"explain": "True"}])
    same_class = sum(one == other for one, other in zip(*answers.values(), strict=True))
    assert same_class >= 30
    assert maps["int8"] == maps["float32"], "explanations are computed in float32"
    assert maps["int8"][0][0] == 200


def archive_in(folder: ModelFolder, wanted: str, tmp_path: Path) -> Path:
    return archive(set_precision(folder, wanted), store=tmp_path / wanted).path


def set_precision(folder: ModelFolder, wanted: str | list[str]) -> ModelFolder:
    config = yaml.safe_load((folder.path / CONFIG_NAME).read_text())
    config["handler"]["precision"] = wanted
    (folder.path / CONFIG_NAME).write_text(yaml.safe_dump(config))
    return ModelFolder(folder.path)


@VNNI
@pytest.mark.slow
def test_quantize_keeps_sensitive_layers_in_float32(tmp_path: Path):
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


@VNNI
@pytest.mark.slow
def test_quantize_fails_with_half_of_the_layers_in_float32(tmp_path: Path):
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
    torch.jit.script(module.eval()).save(tmp_path / "model.pt")
    in_float32 = []

    def never(candidate: torch.jit.ScriptModule) -> bool:
        in_float32.append(str(candidate.inlined_graph).count("aten::linear("))
        return False

    assert quantize(tmp_path / "model.pt", tmp_path / INT8_NAME, [(torch.rand(4, 2),)], never) is None
    assert in_float32 == [0, 1, 2, 3]


class Answering(nn.Module):
    """Returns the same outputs for every input."""

    def __init__(self, *outputs: float):
        super().__init__()
        self.register_buffer("outputs", torch.tensor(outputs))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.outputs.expand(inputs.size(0), -1)


@pytest.mark.parametrize(
    ("outputs_are", "before", "after", "moved", "good"),
    [
        ("logits", (1.0, 3.0), (1.0, 3.1), 0.0103, True),
        ("logits", (1.0, 3.0), (1.0, 4.0), 0.0718, False),
        ("probabilities", (0.2, 0.8), (0.23, 0.77), 0.03, True),
        ("probabilities", (0.2, 0.8), (0.3, 0.7), 0.1, False),
        ("probabilities", (0.49, 0.51), (0.51, 0.49), 0.02, False),  # another class is first
        ("logits", (1.0, 3.0), (1.0, float("nan")), float("nan"), False),
    ],
)
def test_verdict_requires_the_same_first_class_and_a_close_probability(
    outputs_are: str, before: tuple, after: tuple, moved: float, good: bool, tmp_path: Path
):
    batches = [(torch.zeros(16, 1),), (torch.zeros(4, 1),)]
    judge = Judge(scripted(Answering(*before), tmp_path / "before.pt"), batches, outputs_are, AGREEMENT)
    accuracy = judge.accuracy(scripted(Answering(*after), tmp_path / "after.pt"))
    assert accuracy.move == pytest.approx(moved, abs=1e-3, nan_ok=True)
    assert (accuracy.count, accuracy.good) == (20, good)


MODEL = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        {layers}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.float() / 255
        {forward}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


def example_inputs(batch_size: int) -> tuple[torch.Tensor, ...]:
    return (torch.zeros(batch_size, 1, 28, 28, dtype=torch.uint8),)
"""
# int8 and bfloat16 are wrong in every layer: each computes a small difference of large numbers
FRAGILE = MODEL.format(
    layers="self.first, self.second, self.third = nn.Linear(784, 10), nn.Linear(10, 10), nn.Linear(10, 10)",
    forward="""rows = rows.flatten(1)
        rows = self.first(rows + 1000) - self.first(torch.zeros_like(rows) + 1000)
        rows = self.second(rows + 1000) - self.second(torch.zeros_like(rows) + 1000)
        return self.third(rows + 1000) - self.third(torch.zeros_like(rows) + 1000)""",
)
# `view` fails unless the convolution returns a contiguous tensor
FLATTENING = MODEL.format(
    layers="self.convolve, self.classify = nn.Conv2d(1, 4, 3), nn.Linear(4 * 26 * 26, 10)",
    forward="""features = self.convolve(rows)
        return 10 * self.classify(features.view(features.size(0), -1))""",
)
# `index_add_` fails: autocast reduces its source, and not its target
ACCUMULATING = MODEL.format(
    layers="self.classify = nn.Linear(784, 10)",
    forward="""logits = self.classify(rows.flatten(1))
        return torch.zeros_like(logits, dtype=torch.float32).index_add_(0, torch.arange(logits.size(0)), logits)""",
)
# overflows float16
LARGE = MODEL.format(
    layers="self.classify = nn.Linear(784, 10)", forward="return self.classify(rows.flatten(1) * 1e6) / 1e5"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "wanted", "notes", "kept"),
    [
        (FLATTENING, "auto", {"bfloat16": "keep", "float16": "keep"}, "auto"),
        (ACCUMULATING, "auto", {"bfloat16": "does not run", "float16": "does not run"}, "float32"),
        (ACCUMULATING, "float32", {}, "float32"),
        (FRAGILE, ["float32", "bfloat16"], {"bfloat16": "not used"}, "float32"),
        (LARGE, "auto", {"bfloat16": "keep", "float16": "not used"}, ["float32", "bfloat16"]),
        (LARGE, ["bfloat16", "float16"], {"bfloat16": "keep", "float16": "not used"}, ["float32", "bfloat16"]),
        (LARGE, "bfloat16", {"bfloat16": "keep"}, "bfloat16"),
    ],
)
def test_archive_keeps_the_allowed_precisions_that_are_accurate(
    source: str, wanted: str | list[str], notes: dict[str, str], kept: str | list[str], tmp_path: Path
):
    folder = with_module(set_precision(mnist_with_examples(tmp_path, agreement=0.9), wanted), source)
    built = archive(folder, store=tmp_path / "store")
    assert [note.split(":")[0] for note in built.notes] == list(notes)
    for note, expected in zip(built.notes, notes.values(), strict=True):
        assert expected in note
    with DryRun(built.path) as worker:
        assert worker.handler.settings.precision == kept


@pytest.mark.slow
@pytest.mark.parametrize(("source", "pinned"), [(FRAGILE, "bfloat16"), (ACCUMULATING, "bfloat16"), (LARGE, "float16")])
def test_archive_with_an_inaccurate_pinned_precision_is_rejected(source: str, pinned: str, tmp_path: Path):
    folder = with_module(set_precision(mnist_with_examples(tmp_path, agreement=0.9), pinned), source)
    with pytest.raises(BundleError, match=f"not accurate enough in {pinned}: .* to auto or float32"):
        archive(folder, store=tmp_path / "store")
    assert not (tmp_path / "store" / "mnist.mar").exists()


@VNNI
@pytest.mark.slow
def test_archive_with_an_inaccurate_int8_module_is_rejected(tmp_path: Path):
    folder = with_module(mnist_with_examples(tmp_path, count=440, int8=True), FRAGILE)
    with pytest.raises(BundleError, match=r"in int8: .* keep their first class \(at least 99.50% must\)"):
        archive(folder, store=tmp_path / "store")
    assert not (tmp_path / "store" / "mnist.mar").exists()


@pytest.mark.slow
def test_archive_whose_module_fails_in_int8_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("bundle.build.precision.quantize", fails)
    folder = set_precision(mnist_with_examples(tmp_path, int8=True, agreement=0.9), "float32")
    with pytest.raises(BundleError, match="cannot be quantized to int8. Remove bundle: int8:"):
        archive(folder, store=tmp_path / "store")


@pytest.mark.slow
def test_archive_with_invalid_or_too_few_examples_is_rejected(tmp_path: Path):
    folder = mnist_with_examples(tmp_path, agreement=0.99)
    (folder.path / "examples" / "0.png").write_bytes(b"no picture")
    with pytest.raises(BundleError, match=r"rejects the example .*0.png.*UndecodableImage"):
        archive(folder, store=tmp_path / "store")
    for index in range(30):
        (folder.path / "examples" / f"{index}.png").unlink()
    with pytest.raises(BundleError, match="90 examples; comparing precisions needs 100"):
        archive(folder, store=tmp_path / "store")


def test_folder_with_int8_but_no_examples_is_rejected(tmp_path: Path):
    folder = mnist_with_examples(tmp_path, int8=True)
    config = yaml.safe_load((folder.path / CONFIG_NAME).read_text())
    del config["bundle"]["examples"]
    (folder.path / CONFIG_NAME).write_text(yaml.safe_dump(config))
    with pytest.raises(BundleError, match="section bundle: int8 needs `examples`"):
        _ = ModelFolder(folder.path).bundle


@pytest.mark.slow
@pytest.mark.parametrize("model", SHIPPED)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_shipped_models_are_accurate_in_reduced_precision(precision: str, model: str, tmp_path: Path):
    """Judge on held-out data. A processor without instructions for a precision emulates it."""
    skip_without_data_set(model)
    plain = scripted(import_model(model, MODELS / model / "model.py").build(), tmp_path / "model.pt")
    good, why = Judge(plain, held_out(model, 1000), "logits", AGREEMENT).frozen(precision)
    assert good == ((model, precision) != OVERFLOWS), why


def held_out(model: str, count: int) -> list[tuple[torch.Tensor, ...]]:
    train = importlib.import_module(f"models.{model}.train")
    if model == "text":
        texts = [text for text, _ in train.load(DATA_DIR)["test"]][:count]
        with DryRun(archive(*select(["text"])).path) as worker:
            samples = [sample for text in texts for sample in worker.decode({"body": text})]
            return [worker.handler.collate(samples[start : start + 50]) for start in range(0, len(samples), 50)]
    inputs, _ = train.load(DATA_DIR, "test")
    chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:count]
    return [(batch,) for batch in inputs[chosen].split(50)]


@pytest.mark.slow
def test_archive_has_a_reference_of_the_predictions_for_its_examples(tmp_path: Path):
    folder = mnist_with_examples(tmp_path, agreement=0.9)
    (folder.path / REFERENCE_NAME).unlink(missing_ok=True)
    built = archive(folder, store=tmp_path / "store")
    recorded = Reference.model_validate_json(read(built.path, REFERENCE_NAME))
    assert (recorded.source, recorded.examples) == ("the folder's examples", 120)
    assert len(recorded.classes) > 5
    assert not any("reference" in note for note in built.notes)


@pytest.mark.slow
def test_archive_of_too_few_examples_for_a_reference_has_a_note_instead(tmp_path: Path):
    folder = mnist_with_examples(tmp_path, count=50, agreement=0.9)
    (folder.path / REFERENCE_NAME).unlink(missing_ok=True)
    built = archive(folder, store=tmp_path / "store")
    assert any("A reference of mnist needs 100 examples; there are 50." in note for note in built.notes)
    assert REFERENCE_NAME not in dict(contents(built.path))
