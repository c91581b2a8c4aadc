"""TorchServe's HTTP APIs, as far as the commands need them."""

import json
from dataclasses import dataclass
from pathlib import Path

import requests

from bundle.catalog import ModelFolder
from bundle.errors import BundleError

SECONDS = 30  # for one answer; no request of the bundle's own takes longer
session = requests.Session()
session.trust_env = False  # a proxy for the internet knows nothing of this machine's loopback


@dataclass(frozen=True)
class WorkerCount:
    ready: int
    wanted: int


@dataclass(frozen=True)
class Client:
    """Talks to one server.

    Args:
        inference, management: base URLs.
    """

    inference: str
    management: str

    def models(self) -> list[str]:
        """The names of the registered models."""
        listed = session.get(f"{self.management}/models", params={"limit": 1000}, timeout=SECONDS)
        listed.raise_for_status()
        return [model["modelName"] for model in listed.json()["models"]]

    def describe(self, model: str) -> dict | None:
        """The default version of `model`, as the management API describes it; None where it is not registered."""
        answer = session.get(f"{self.management}/models/{model}", timeout=SECONDS)
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        return answer.json()[0]

    def workers(self, model: str) -> WorkerCount:
        """How many workers of `model` are READY, and how many it must have at least."""
        described = self.describe(model)
        if described is None:
            return WorkerCount(0, 1)
        ready = sum(worker["status"] == "READY" for worker in described["workers"])
        return WorkerCount(ready, max(1, int(described["minWorkers"])))

    def predict(self, model: str, content: bytes) -> requests.Response:
        """One prediction, the input as raw body."""
        return session.post(f"{self.inference}/predictions/{model}", data=content, timeout=SECONDS)


def check_sample(client: Client, folder: ModelFolder) -> str | None:
    """Sends the folder's sample and returns what came first in the answer; None where the folder has no sample.

    Raises:
        BundleError: the answer is an error, or not what the folder expects.
    """
    if folder.sample_file is None:
        return None
    answer = client.predict(folder.name, folder.existing(folder.bundle.sample).read_bytes())
    if answer.status_code != 200:
        raise BundleError(
            f"{folder.name} answered its own sample {folder.bundle.sample} with {answer.status_code}.", answer.text
        )
    first = first_class(answer.json())
    if folder.bundle.expect is not None and first != folder.bundle.expect:
        raise BundleError(
            f"{folder.name} answered its own sample {folder.bundle.sample} with {first!r}, "
            f"and its {folder.name}/model-config.yaml expects {folder.bundle.expect!r}.",
            json.dumps(answer.json(), indent=2),
        )
    return first


def first_class(answer: dict) -> str:
    """The label (for MNIST the class) that an answer ranks first."""
    if "top_3_classes" in answer:
        return str(answer["top_3_classes"][0])
    return answer["top_k"][0]["label"]


def curl_lines(client: Client, folders: list[ModelFolder], root: Path) -> list[str]:
    """What to type to try the models with their samples."""
    lines = [
        f"curl -T {folder.sample_file.relative_to(root) if folder.sample_file else 'FILE'} "
        f"{client.inference}/predictions/{folder.name}"
        for folder in folders
    ]
    return [*lines, f"curl {client.management}/models"]
