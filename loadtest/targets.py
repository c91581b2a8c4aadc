"""What a load test asks: the models in models/ that have a sample."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from bundle.samples import headers
from loadtest.errors import LoadTestError

FOLDERS = Path(__file__).resolve().parent.parent / "models"


@dataclass(frozen=True)
class Target:
    """One model to ask.

    Attributes:
        sample: the request's body.
        headers: to send it with.
        expect: the label (for MNIST the class) that must come first in the answer; None where any may.
        weight: its share of the users, relative to those of other models.
    """

    name: str
    sample: bytes
    headers: dict[str, str]
    expect: str | None
    weight: int

    @property
    def user(self) -> str:
        """The name of its class of users, as locust's reports show it."""
        return f"{self.name.title().replace('-', '').replace('.', '')}User"


def choose(wish: str = "", folders: Path = FOLDERS) -> list[Target]:
    """The models to ask.

    Args:
        wish: names and weights: "mnist text", "mnist=4 text=1"; "" is all that are always served, alike.

    Raises:
        LoadTestError: there is no such model with a sample, or a weight is not a whole number above 0.
    """
    usable = {name: section for name, section in sections(folders).items() if section.get("sample")}
    weights = parse_weights(wish) or {
        name: 1 for name, section in usable.items() if section.get("served", "always") == "always"
    }
    if unknown := [name for name in weights if name not in usable]:
        there = ", ".join(usable) or "none"
        raise LoadTestError(f"there is no model {unknown[0]!r} with a sample in models/; there are: {there}")
    if not weights:
        raise LoadTestError(
            "no model in models/ has a sample to send: name one in its model-config.yaml, bundle.sample"
        )
    return [target(folders / name, usable[name], weight) for name, weight in weights.items()]


def sections(folders: Path = FOLDERS) -> dict[str, dict]:
    """What each model folder says of itself (`bundle:` in its model-config.yaml), by its name."""
    found = {}
    for file in sorted(folders.glob("*/model-config.yaml")):
        try:
            config = yaml.safe_load(file.read_text())
        except yaml.YAMLError as exc:
            raise LoadTestError(f"models/{file.parent.name}/{file.name} is not valid YAML: {exc}") from exc
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
        raise LoadTestError(f"models/{folder.name}/{section['sample']}, the sample of {folder.name}, is missing")
    expect = section.get("expect")
    return Target(folder.name, sample.read_bytes(), headers(sample), None if expect is None else str(expect), weight)
