"""What a load test asks: the models in models/, or where BUNDLE_MODELS says, that have a sample."""

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from loadtest.errors import LoadTestError

MODELS = Path(__file__).resolve().parent.parent / "models"


def models_dir() -> Path:
    """Return the folder of the model folders: the one that BUNDLE_MODELS names, else the one beside this package.

    The bundle's rule, written again: the load generator's image carries no bundle.

    Raises:
        LoadTestError: there is no such folder.
    """
    named = os.environ.get("BUNDLE_MODELS")
    if named and not Path(named).is_dir():
        raise LoadTestError(f"BUNDLE_MODELS is {named!r}, and there is no such folder")
    return Path(named).resolve() if named else MODELS


def place(folders: Path) -> str:
    """Return the folder as messages name it."""
    return "models" if folders == MODELS else str(folders)


@dataclass(frozen=True)
class Target:
    """One model to ask.

    Attributes:
        sample: the request's body.
        expect: the label (for MNIST the class) that must come first in the answer; None where any may.
        weight: its share of the users, relative to those of other models.
    """

    name: str
    sample: bytes
    expect: str | None
    weight: int

    @property
    def user(self) -> str:
        """The name of its class of users, as locust's reports show it."""
        return f"{self.name.title().replace('-', '').replace('.', '')}User"


def choose(wish: str = "", folders: Path | None = None) -> list[Target]:
    """The models to ask.

    Args:
        wish: names and weights: "mnist text", "mnist=4 text=1"; "" is all that are always served, alike.
        folders: where the model folders are; by default, see `models_dir`.

    Raises:
        LoadTestError: there is no such model with a sample, or a weight is not a whole number above 0.
    """
    folders = folders or models_dir()
    usable = {name: section for name, section in sections(folders).items() if section.get("sample")}
    weights = parse_weights(wish) or {
        name: 1 for name, section in usable.items() if section.get("served", "always") == "always"
    }
    if unknown := [name for name in weights if name not in usable]:
        there = ", ".join(usable) or "none"
        raise LoadTestError(f"there is no model {unknown[0]!r} with a sample in {place(folders)}/; there are: {there}")
    if not weights:
        raise LoadTestError(
            f"no model in {place(folders)}/ has a sample to send: name one in its model-config.yaml, bundle.sample"
        )
    return [target(folders / name, usable[name], weight) for name, weight in weights.items()]


def sections(folders: Path | None = None) -> dict[str, dict]:
    """What each model folder says of itself (`bundle:` in its model-config.yaml), by its name."""
    folders = folders or models_dir()
    found = {}
    for file in sorted(folders.glob("*/model-config.yaml")):
        try:
            config = yaml.safe_load(file.read_text())
        except yaml.YAMLError as exc:
            raise LoadTestError(f"{place(folders)}/{file.parent.name}/{file.name} is not valid YAML: {exc}") from exc
        found[file.parent.name] = (config or {}).get("bundle") or {}
    return found


def parse_weights(wish: str) -> dict[str, int]:
    """ "mnist=4 text" -> {"mnist": 4, "text": 1}"""
    weights = {}
    for item in wish.split():
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
    return Target(folder.name, sample.read_bytes(), None if expect is None else str(expect), weight)
