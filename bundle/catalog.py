"""The model folders, in `models/` or in the folder that BUNDLE_MODELS names, and what each one declares."""

import re
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bundle.errors import BundleError, UsageError
from bundle.labels import read_labels
from bundle.paths import HANDLERS, models_dir, relative
from bundle.versions import VERSION

CONFIG_NAME = "model-config.yaml"
LABELS_NAME = "index_to_name.json"
WEIGHTS_NAME = "weights.safetensors"
ALL = "all"  # instead of names: every model folder
OWN_SECTIONS = ("handler", "bundle")
TORCHSERVE_KEYS = (  # that TorchServe's ModelConfig reads; it ignores others silently
    "minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout", "deviceType",
    "parallelLevel", "parallelType", "deviceIds", "torchrun", "maxRetryTimeoutInSec", "clientTimeoutInMills",
    "jobQueueSize", "useJobTicket", "useVenv", "continuousBatching", "sequenceBatching", "asyncCommunication",
    "sequenceMaxIdleMSec", "sequenceTimeoutMSec", "maxSequenceJobQueueSize", "maxNumSequence",
)  # fmt: skip
OTHER_KINDS = {  # of value than whole numbers
    "deviceType", "parallelType", "deviceIds", "torchrun", "useJobTicket", "useVenv", "continuousBatching",
    "sequenceBatching", "asyncCommunication",
}  # fmt: skip
CONFIG_KEYS = (*TORCHSERVE_KEYS, "patience", *OWN_SECTIONS)  # patience: of the frontend's patch `gather`
PLAIN_MESSAGES = {  # of pydantic's kinds of error
    "extra_forbidden": "unknown setting",
    "string_type": "must be a string: put it in quotes",
    "string_pattern_mismatch": "may have letters, digits, '.', '-' and '_', and begins with a letter or a digit",
}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TorchvisionSource(Section):
    """A model of torchvision's registry: `torchvision.models.get_model(name, weights=weights)`."""

    name: str
    weights: str = "DEFAULT"


class SerializedSource(Section):
    """A user's TorchScript file.

    With `mean` and `std`, the file takes normalised float32 images, and the archive's module normalises them first.
    Without, the file takes what the handler collates.

    Attributes:
        mean, std: one number a channel, of pixels in [0, 1].
    """

    file: str
    mean: list[float] | None = None
    std: list[Annotated[float, Field(gt=0)]] | None = None

    @model_validator(mode="after")
    def check_channels(self) -> "SerializedSource":
        if len(self.mean or []) != len(self.std or []):
            raise ValueError("mean and std must have the same number of values, one for each channel")
        return self


class BundleSection(Section):
    """The `bundle:` section of a model-config.yaml."""

    version: Annotated[str, Field(pattern=f"^{VERSION}$")] = "1.0"
    handler: str  # in handlers/, or the folder's own: ./handler.py
    sample: str | None = None  # file in the folder that `make serve` sends to the model
    expect: str | None = None  # the label (for MNIST the class) that must come first in its answer
    files: list[str] = []  # further files that the handler needs, relative to the folder
    examples: str | None = None  # folder of real inputs, as clients send them: reduced precisions are compared on them
    agreement: Annotated[float, Field(gt=0, le=1)] = 0.995  # share of the examples that must keep their first class
    int8: bool = False  # also make an int8 module, calibrated on half of the examples
    served: Literal["always", "on request"] = "always"
    grad_cam: str | None = None  # the layer whose activations explain an image: a name of named_modules()
    torchvision: TorchvisionSource | None = None
    serialized: SerializedSource | None = None

    @field_validator("handler")
    @classmethod
    def check_handler(cls, handler: str) -> str:
        if not re.fullmatch(r"\w+|\./\w+\.py", handler):
            raise ValueError(
                "write the name of a file in handlers/ without .py, or ./NAME.py for the folder's own file"
            )
        return handler

    @model_validator(mode="after")
    def check_examples(self) -> "BundleSection":
        if self.int8 and not self.examples:
            raise ValueError("int8 needs `examples`, a folder of inputs to calibrate it with")
        return self

    @model_validator(mode="after")
    def check_grad_cam(self) -> "BundleSection":
        if self.grad_cam and self.serialized:
            raise ValueError(
                "grad_cam needs a Python module. A TorchScript file needs the method `with_activations` instead: see "
                "models/README.md"
            )
        return self


@dataclass(frozen=True)
class ModelFolder:
    """One model folder.

    Its TorchScript module comes from `model.py` (the default), from torchvision's registry, or from a TorchScript file.
    """

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def config(self) -> dict:
        """The content of model-config.yaml.

        Raises:
            BundleError: the file is not valid YAML, is not a mapping, or has a setting that TorchServe would ignore.
        """
        file = self.path / CONFIG_NAME
        try:
            config = yaml.safe_load(file.read_text())
        except yaml.YAMLError as exc:
            raise BundleError(f"{relative(file)} is not valid YAML: {exc}") from exc
        if not isinstance(config, dict):
            raise BundleError(f"{relative(file)} must be a mapping.")
        if not isinstance(config.get("handler") or {}, dict):
            raise BundleError(f"{relative(file)}: the section `handler:` must be a mapping.")
        section = config.get("bundle")
        named = section.get("handler") if isinstance(section, dict) else None
        if wrong := unknown_setting(config, own_handler=str(named).startswith("./")) or ignored_value(config):
            raise BundleError(f"{relative(file)}: {wrong}")
        return config

    @cached_property
    def bundle(self) -> BundleSection:
        try:
            return BundleSection.model_validate(self.config.get("bundle") or {})
        except ValidationError as exc:
            raise self.invalid_section("bundle", exc) from exc

    def invalid_section(self, section: str, error: ValidationError) -> BundleError:
        """Return the error that names each invalid value in a section of model-config.yaml."""
        wrong = []
        for each in error.errors():
            key = ".".join(map(str, each["loc"]))
            message = PLAIN_MESSAGES.get(each["type"], each["msg"].removeprefix("Value error, "))
            wrong.append(f"{key}: {message}" if key else message)
        return BundleError(f"{relative(self.path / CONFIG_NAME)}, section {section}: {'; '.join(wrong)}")

    @property
    def handler_file(self) -> Path:
        """The handler's file: one of `handlers/`, given its name, or the folder's own, given its path: ./handler.py."""
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
    def weights_file(self) -> Path | None:
        """The file with the weights, which may be missing; None for a model of torchvision, which is downloaded."""
        if self.bundle.torchvision:
            return None
        return self.path / (self.bundle.serialized.file if self.bundle.serialized else WEIGHTS_NAME)

    @property
    def extra_files(self) -> list[Path]:
        """The files that `files:` lists.

        Raises:
            BundleError: a file is missing, or two have the same name: the archive has one folder for all of them.
        """
        files = [self.existing(name) for name in self.bundle.files]
        for name, count in Counter(file.name for file in files).items():
            if count > 1:
                raise BundleError(f"{self.name}: bundle: files: has two files named {name}. Rename one of them.")
        return files

    def existing(self, name: str) -> Path:
        """Return a file of the folder.

        Raises:
            BundleError: the file is missing.
        """
        file = self.path / name
        if not file.is_file():
            raise BundleError(f"{self.name}: {relative(file)} is missing.")
        return file

    def existing_folder(self, name: str) -> Path:
        """Return a folder of the folder.

        Raises:
            BundleError: the folder is missing.
        """
        folder = self.path / name
        if not folder.is_dir():
            raise BundleError(f"{self.name}: the folder {relative(folder)} is missing.")
        return folder

    @property
    def has_labels(self) -> bool:
        return (self.path / LABELS_NAME).is_file()

    def labels(self) -> list[str]:
        """Return the labels of index_to_name.json, by class index."""
        return read_labels(self.existing(LABELS_NAME))


def unknown_setting(config: dict, own_handler: bool) -> str:
    """Return what is wrong with the first key of a model-config.yaml that nothing reads; "" if there is no such key.

    Args:
        own_handler: whether the folder has a handler of its own. That may read further keys, but none that looks like
            a misspelt one.
    """

    def plain(key: object) -> str:
        return str(key).lower().replace("_", "").replace("-", "")

    known = {plain(key): key for key in CONFIG_KEYS}
    for key in config:
        if key in CONFIG_KEYS:
            continue
        if near := get_close_matches(plain(key), known, n=1, cutoff=0.8):
            return f"unknown setting {key!r}. Write {known[near[0]]!r}."
        if not own_handler:
            return f"unknown setting {key!r}. What the handler reads is in the section `handler:`. Others are: " + (
                f"{', '.join(key for key in CONFIG_KEYS if key not in OWN_SECTIONS)}."
            )
    return ""


def ignored_value(config: dict) -> str:
    """Return what is wrong with the first value of a model-config.yaml that TorchServe ignores; "" if it uses all."""
    for key in TORCHSERVE_KEYS:
        if key in config and key not in OTHER_KINDS and type(config[key]) is not int:  # a bool is an int, too
            return f"{key} is {config[key]!r}, and must be a whole number."
    minimum, maximum = config.get("minWorkers"), config.get("maxWorkers")
    if minimum is not None and maximum is not None and not 1 <= minimum <= maximum:
        return (
            f"minWorkers is {minimum} and maxWorkers is {maximum}. Both must be at least 1, and maxWorkers no "
            "lower than minWorkers."
        )
    return ""


def folders() -> list[ModelFolder]:
    """Return every model folder, sorted by name."""
    return [ModelFolder(file.parent) for file in sorted(models_dir().glob(f"*/{CONFIG_NAME}"))]


def select(names: list[str]) -> list[ModelFolder]:
    """Return the folders with these names; without names, those that are always served; for "all", every folder.

    Raises:
        UsageError: the models folder has no model folders, or none of one of the names.
    """
    known = {folder.name: folder for folder in folders()}
    if not known:
        raise UsageError(
            f"{relative(models_dir())} has no model folders. A model folder has a {CONFIG_NAME}. Set BUNDLE_MODELS, or "
            "--models-dir, to the folder that contains the model folders."
        )
    if names == [ALL]:
        return list(known.values())
    if unknown := [name for name in names if name not in known]:
        there = ", ".join(known) or "none"
        raise UsageError(f"There is no model {unknown[0]!r} in {relative(models_dir())}/; there are: {there}.")
    if names:
        return [known[name] for name in dict.fromkeys(names)]
    return [folder for folder in known.values() if folder.bundle.served == "always"]


def handlers() -> list[str]:
    """Return the names of the handlers in `handlers/`."""
    return sorted(file.stem for file in HANDLERS.glob("*.py") if file.stem != "__init__")
