"""The model folders, in `models/` or where BUNDLE_MODELS says, and what each one says of itself."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bundle.errors import BundleError, UsageError
from bundle.paths import HANDLERS, models_dir, relative

CONFIG_NAME = "model-config.yaml"
LABELS_NAME = "index_to_name.json"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TorchvisionSource(Section):
    """A classifier out of torchvision's registry: `torchvision.models.get_model(name, weights=weights)`."""

    name: str
    weights: str = "DEFAULT"


class SerializedSource(Section):
    """A TorchScript file of the user's own.

    With `mean` and `std` (one number a channel, of pixels in [0, 1]) it takes normalised float32 images, and the
    normalisation is put in front of it. Without, it takes what the handler collates.
    """

    file: str
    mean: list[float] | None = None
    std: list[Annotated[float, Field(gt=0)]] | None = None

    @model_validator(mode="after")
    def check_channels(self) -> "SerializedSource":
        if len(self.mean or []) != len(self.std or []):
            raise ValueError("mean and std must have the same number of values, one a channel")
        return self


class BundleSection(Section):
    """The `bundle:` section of a model-config.yaml."""

    version: Annotated[str, Field(pattern=r"^\d+(\.\d+)*$")] = "1.0"
    handler: Annotated[str, Field(pattern=r"^(\w+|\./\w+\.py)$")]  # of handlers/, or the folder's own: ./handler.py
    sample: str | None = None  # file in the folder that `make serve` sends to the model
    expect: str | None = None  # the label (for MNIST the class) that must come first in its answer
    files: list[str] = []  # what else the handler needs from the folder
    examples: str | None = None  # folder of real inputs, as clients send them: reduced precisions are compared on them
    agreement: Annotated[float, Field(gt=0, le=1)] = 0.995  # share of the examples that must keep their first class
    int8: bool = False  # make an int8 module, too, calibrated on half of the examples
    served: Literal["always", "on request"] = "always"
    torchvision: TorchvisionSource | None = None
    serialized: SerializedSource | None = None

    @model_validator(mode="after")
    def check_examples(self) -> "BundleSection":
        if self.int8 and not self.examples:
            raise ValueError("int8 needs examples: a folder of inputs to calibrate it on")
        return self


@dataclass(frozen=True)
class ModelFolder:
    """One folder of `models/`.

    Its TorchScript module comes from one of three places: `model.py` (the default), torchvision's registry, or a
    TorchScript file.
    """

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def config(self) -> dict:
        """The whole model-config.yaml."""
        file = self.path / CONFIG_NAME
        try:
            config = yaml.safe_load(file.read_text())
        except yaml.YAMLError as exc:
            raise BundleError(f"{relative(file)} is not valid YAML: {exc}") from exc
        if not isinstance(config, dict):
            raise BundleError(f"{relative(file)} must hold a mapping.")
        return config

    @cached_property
    def bundle(self) -> BundleSection:
        try:
            return BundleSection.model_validate(self.config.get("bundle") or {})
        except ValidationError as exc:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
            raise BundleError(f"{relative(self.path / CONFIG_NAME)}, section bundle: {wrong}") from exc

    @property
    def handler_file(self) -> Path:
        """The file of the handler: one of `handlers/` by its name, or the folder's own by its path, ./handler.py."""
        if self.bundle.handler.startswith("./"):
            return self.existing(self.bundle.handler)
        file = HANDLERS / f"{self.bundle.handler}.py"
        if not file.is_file():
            raise BundleError(f"{self.name}: there is no handler {relative(file)}; there are: {', '.join(handlers())}.")
        return file

    @property
    def sample_file(self) -> Path | None:
        return self.path / self.bundle.sample if self.bundle.sample else None

    @property
    def extra_files(self) -> list[Path]:
        return [self.existing(name) for name in self.bundle.files]

    def existing(self, name: str) -> Path:
        file = self.path / name
        if not file.is_file():
            raise BundleError(f"{self.name}: {relative(file)} is missing.")
        return file

    def existing_folder(self, name: str) -> Path:
        folder = self.path / name
        if not folder.is_dir():
            raise BundleError(f"{self.name}: the folder {relative(folder)} is missing.")
        return folder

    @property
    def has_labels(self) -> bool:
        return (self.path / LABELS_NAME).is_file()

    def labels(self) -> list[str]:
        """The labels of the folder's index_to_name.json, by class index."""
        return read_labels(self.existing(LABELS_NAME))


def read_labels(file: Path) -> list[str]:
    """A JSON list of labels, or an object {"0": label, ...}; a label may be [id, name], as ImageNet's often are."""
    try:
        labels = json.loads(file.read_text())
    except ValueError as exc:
        raise BundleError(f"{relative(file)} is not valid JSON: {exc}") from exc
    if isinstance(labels, dict):
        if set(labels) != {str(index) for index in range(len(labels))}:
            raise BundleError(f'{relative(file)} must have the keys "0" to "{len(labels) - 1}".')
        labels = [labels[str(index)] for index in range(len(labels))]
    if not isinstance(labels, list) or not labels:
        raise BundleError(f'{relative(file)} must be a list of labels, or an object {{"0": label, ...}}.')
    names = [label[-1] if isinstance(label, list) and label else label for label in labels]
    if not all(isinstance(name, str) for name in names):
        raise BundleError(f"{relative(file)}: a label must be a string.")
    return names


def folders() -> list[ModelFolder]:
    """Every model folder, by name."""
    return [ModelFolder(file.parent) for file in sorted(models_dir().glob(f"*/{CONFIG_NAME}"))]


def select(names: list[str]) -> list[ModelFolder]:
    """The folders of these names; without names, all that are not served on request only."""
    known = {folder.name: folder for folder in folders()}
    if unknown := [name for name in names if name not in known]:
        there = ", ".join(known) or "none"
        raise UsageError(f"There is no model {unknown[0]!r} in {relative(models_dir())}/; there are: {there}.")
    if names:
        return [known[name] for name in dict.fromkeys(names)]
    return [folder for folder in known.values() if folder.bundle.served == "always"]


def handlers() -> list[str]:
    return sorted(file.stem for file in HANDLERS.glob("*.py") if file.stem != "__init__")
