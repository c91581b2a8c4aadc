"""A model folder -> the TorchScript module that its archive carries.

TorchScript is deprecated in PyTorch, and is what TorchServe's workers load: all that knows of it is in this file and
in `BaseHandler`, so that torch.export can take its place here.
"""

import functools
import importlib.util
import shutil
import warnings
import zipfile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from bundle.build import torchvision_source
from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from bundle.paths import MODELS, relative
from handlers.core.precision import main_output

DEFAULT_SIDES = {"image_topk": 224, "mnist": 28}  # pixels: what the handlers make where a folder sets no `crop`


class PreprocessedImages(nn.Module):
    """Puts normalisation in front of an image classifier, so that images travel to the device as bytes."""

    def __init__(self, classifier: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.classifier = classifier
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor):
        """images: uint8 [N, C, H, W] -> what the classifier returns."""
        return self.classifier((images.float() / 255 - self.mean) / self.std)


def export(folder: ModelFolder, target: Path) -> None:
    """Writes the folder's module to `target` as TorchScript, and checks that what is read back computes the same.

    Raises:
        BundleError: the folder's weights are missing; the exported module differs from the eager one, or answers
            another number of classes than the folder has labels.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    source = folder.bundle.serialized
    if source and not source.mean:
        file = folder.existing(source.file)
        load_torchscript(file)
        shutil.copy(file, target)
        return
    eager, inputs = load(folder)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", "Scripted .* always returns")  # GoogLeNet and Inception; `main_output` copes
        torch.jit.script(eager).save(target)
        exported = torch.jit.load(target)
        compare(folder.name, eager, exported, inputs)
        classes = main_output(exported(*inputs[0])).shape[-1]
    if classes != len(labels(folder)):
        raise BundleError(f"{folder.name} answers {classes} classes, and has {len(labels(folder))} labels.")


def labels(folder: ModelFolder) -> list[str]:
    """The labels by class index: torchvision's own, or the folder's."""
    source = folder.bundle.torchvision
    return torchvision_source.labels(source) if source else folder.labels()


def load(folder: ModelFolder) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """The eager module, in evaluation mode, and inputs of several batch sizes to try it with."""
    source = folder.bundle
    sizes = (1, 3)
    if source.torchvision:
        classifier, preset = torchvision_source.load(source.torchvision)
        mean, std = preset.mean, preset.std
    elif source.serialized:
        classifier = load_torchscript(folder.existing(source.serialized.file))
        mean, std = source.serialized.mean, source.serialized.std
    else:
        weights = folder.path / "weights.safetensors"
        if not weights.is_file():
            how = f"make train MODEL={folder.name}" if folder.path.parent == MODELS else "its train.py writes them"
            raise BundleError(f"There is no {relative(weights)}. Train the model first: {how}")
        module = import_model(folder.name, folder.existing("model.py"))
        return module.build(), [module.example_inputs(size) for size in sizes]
    module = PreprocessedImages(classifier, mean, std)
    return module.eval(), [(random_images(size, len(mean), image_side(folder)),) for size in sizes]


@functools.cache  # TorchScript would give the classes of a second import other names, and the archive other content
def import_model(name: str, file: Path) -> ModuleType:
    """A folder's model.py, wherever the folder lies."""
    spec = importlib.util.spec_from_file_location(f"models.{name}.model", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def handler_settings(folder: ModelFolder) -> dict:
    """The `handler:` section that the archive carries: the folder's own, over what torchvision knows of the weights."""
    source = folder.bundle.torchvision
    known = torchvision_source.handler_settings(source) if source else {}
    return known | (folder.config.get("handler") or {})


def image_side(folder: ModelFolder) -> int:
    """Pixels of the square image that the folder's handler makes."""
    return handler_settings(folder).get("crop") or DEFAULT_SIDES[folder.bundle.handler]


def load_torchscript(file: Path) -> torch.jit.ScriptModule:
    """Loads a TorchScript file onto the CPU, in evaluation mode.

    Raises:
        BundleError: it is not one. A pickled checkpoint is refused without being unpickled.
    """
    if not file.is_file():
        raise BundleError(f"There is no file {relative(file)}.")
    try:
        return torch.jit.load(file, map_location="cpu").eval()
    except RuntimeError as exc:
        what = "is a pickled checkpoint, not" if is_checkpoint(file) else "is broken, or is not"
        raise BundleError(
            f"{relative(file)} {what} a TorchScript file. Save one with torch.jit.script(model.eval()).save(path): "
            "weights alone, or a pickled module, cannot be served without their code.",
            str(exc),
        ) from exc


def is_checkpoint(file: Path) -> bool:
    """Whether torch.save wrote the file: TorchScript is such an archive, too, and has its constants beside the data."""
    if not zipfile.is_zipfile(file):
        with file.open("rb") as start:
            return start.read(1) == b"\x80"  # a pickle, as torch.save wrote them before 1.6
    with zipfile.ZipFile(file) as archive:
        members = {member.rsplit("/", 1)[-1] for member in archive.namelist()}
    return "data.pkl" in members and "constants.pkl" not in members


def random_images(size: int, channels: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (size, channels, side, side), dtype=torch.uint8, generator=generator)


def compare(name: str, eager: nn.Module, exported: nn.Module, inputs: list[tuple[Tensor, ...]]) -> None:
    for arguments in inputs:
        actual, expected = main_output(exported(*arguments)), main_output(eager(*arguments))
        try:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        except AssertionError as exc:
            raise BundleError(
                f"{name}: the exported module does not compute what the eager one does.", str(exc)
            ) from exc
