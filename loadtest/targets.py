"""The models that a load test sends requests to: those with a sample, in models/ or the folder BUNDLE_MODELS."""

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from bundle.samples import headers
from loadtest.errors import LoadTestError

MODELS = Path(__file__).resolve().parent.parent / "models"


def models_dir() -> Path:
    """Return the folder of the model folders: the one that BUNDLE_MODELS names, else the one beside this package.

    This repeats the rule of bundle/paths.py, which the load generator's image does not contain.

    Raises:
        LoadTestError: there is no such folder.
    """
    named = os.environ.get("BUNDLE_MODELS")
    if named and not Path(named).is_dir():
        raise LoadTestError(f"BUNDLE_MODELS is {named!r}, and there is no such folder")
    return Path(named).resolve() if named else MODELS


def place(folders: Path) -> str:
    """Return the folder's name for messages."""
    return "models" if folders == MODELS else str(folders)


@dataclass(frozen=True)
class Target:
    """One model to test.

    Attributes:
        sample: the body of every request.
        headers: the headers of every request.
        expect: the label (for MNIST the class) that the answer must rank first; None if any JSON answer is right.
        weight: its share of the users, relative to the weights of other models.
    """

    name: str
    sample: bytes
    headers: dict[str, str]
    expect: str | None
    weight: int

    @property
    def user(self) -> str:
        """The name of its user class in locust's reports."""
        return f"{self.name.title().replace('-', '').replace('.', '')}User"


def choose(wanted: str = "", folders: Path | None = None) -> list[Target]:
    """Return the models to test.

    Args:
        wanted: names and weights: "mnist text", "mnist=4 text=1"; "" selects all models that are always served, with
            equal weights.
        folders: the folder of the model folders; by default that of `models_dir`.

    Raises:
        LoadTestError: a model is unknown or has no sample, or a weight is not a whole number above 0.
    """
    folders = folders or models_dir()
    usable = {name: section for name, section in sections(folders).items() if section.get("sample")}
    weights = parse_weights(wanted) or {
        name: 1 for name, section in usable.items() if section.get("served", "always") == "always"
    }
    if unknown := [name for name in weights if name not in usable]:
        known = ", ".join(usable) or "none"
        raise LoadTestError(f"there is no model {unknown[0]!r} with a sample in {place(folders)}/; there are: {known}")
    if not weights:
        raise LoadTestError(
            f"no model in {place(folders)}/ has a sample to send. Name a file as bundle.sample in a model-config.yaml"
        )
    return [target(folders / name, usable[name], weight) for name, weight in weights.items()]


def sections(folders: Path | None = None) -> dict[str, dict]:
    """Return the `bundle` section of each model folder's model-config.yaml, by the folder's name.

    Raises:
        LoadTestError: a file is not valid YAML.
    """
    folders = folders or models_dir()
    found = {}
    for file in sorted(folders.glob("*/model-config.yaml")):
        try:
            config = yaml.safe_load(file.read_text())
        except yaml.YAMLError as exc:
            raise LoadTestError(f"{place(folders)}/{file.parent.name}/{file.name} is not valid YAML: {exc}") from exc
        found[file.parent.name] = (config or {}).get("bundle") or {}
    return found


def known_models() -> set[str]:
    """Return the models that thresholds may name: those of `models_dir` and, for the shipped thresholds, of MODELS."""
    return {*sections(), *sections(MODELS)}


def parse_weights(wanted: str) -> dict[str, int]:
    """Parse "mnist=4 text" as {"mnist": 4, "text": 1}."""
    weights = {}
    for item in wanted.split():
        name, equals, weight = item.partition("=")
        if equals and not (weight.isdecimal() and int(weight)):
            raise LoadTestError(f"the weight of {name} is {weight!r}, and must be a whole number of at least 1")
        weights[name] = int(weight or 1)
    return weights


def target(folder: Path, section: dict, weight: int) -> Target:
    sample = folder / section["sample"]
    if not sample.is_file():
        file = f"{place(folder.parent)}/{folder.name}/{section['sample']}"
        raise LoadTestError(f"{file}, the sample of {folder.name}, is missing")
    expect = section.get("expect")
    return Target(folder.name, sample.read_bytes(), headers(sample), None if expect is None else str(expect), weight)
