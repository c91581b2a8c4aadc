"""Networks that users may add with `make add-model`, and the folders to add them to: fixture `workbench`."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bundle.build.add_model import add_model
from bundle.build.new_model import NewModel
from bundle.catalog import ModelFolder
from bundle.errors import BundleError

CLASSES = 7
LABELS = [f"label {index}" for index in range(CLASSES)]


class SmallNet(nn.Module):
    """Classifies images of one size only: its linear layer has weights for each pixel."""

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
    """Quantise weights and activations after training, for x86."""
    fused = torch.ao.quantization.fuse_modules(model.eval(), [["convolution", "normalise"]])
    wrapped = torch.ao.quantization.QuantWrapper(fused)
    wrapped.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    prepared = torch.ao.quantization.prepare(wrapped)
    prepared(torch.randn(4, 3, side, side))
    return torch.ao.quantization.convert(prepared)


class Workbench:
    """Folders for models and archives that belong to one test.

    Attributes:
        reported: the lines that `add_model` reported.
    """

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

    def add(self, model: nn.Module | Path, name: str = "theirs", handler: str | None = None, **options) -> ModelFolder:
        serialized = model if isinstance(model, Path) else self.save(model)
        labels = options.pop("labels", None)
        if options.pop("default_labels", True):
            labels = labels or self.labels()
        roots = {"models_dir": self.models, "store": self.store, "report": self.reported.append}
        new = NewModel(name, serialized, labels, handler, files=tuple(options.pop("files", ())), **options)
        return add_model(new, **roots)

    def rejects(self, model: nn.Module | Path, message: str, name: str = "theirs", **options) -> BundleError:
        """Check that a model is rejected with a message of one line, and that no file is left behind."""
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
def workbench(tmp_path: Path) -> Workbench:
    torch.manual_seed(0)
    return Workbench(tmp_path)
