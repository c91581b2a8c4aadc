"""TorchServe's HTTP APIs, as far as the commands need them."""

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import requests

from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from bundle.paths import relative
from bundle.server.http import SECONDS, session
from bundle.server.keys import Api, Keys

DESCRIPTION_SECONDS = 10  # a server that takes longer to say what it has is not well
MANAGEMENT_SECONDS = 150  # ending workers takes its time: unregister_model_timeout is 120
SCALE_TRIES, PAUSE_SECONDS = 5, 0.2
STUMBLE = "ConcurrentModificationException"


@dataclass(frozen=True)
class WorkerCount:
    ready: int
    wanted: int


@dataclass(frozen=True)
class Client:
    """Talks to one server.

    Args:
        inference, management: base URLs.
        keys: where the server asks for them.
    """

    inference: str
    management: str
    keys: Keys | None = None

    def auth(self, api: Api) -> Callable[[requests.PreparedRequest], requests.PreparedRequest] | None:
        """For the argument `auth` of requests."""
        return partial(self._sign, api) if self.keys else None

    def _sign(self, api: Api, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = self.keys.header(api)
        return request

    def models(self) -> list[str]:
        """The names of the registered models."""
        params, auth = {"limit": 1000}, self.auth("management")
        listed = session.get(f"{self.management}/models", params=params, auth=auth, timeout=SECONDS)
        listed.raise_for_status()
        return [model["modelName"] for model in listed.json()["models"]]

    def versions(self, model: str) -> list[dict]:
        """Every version of `model`, as the management API describes it; none where it is not registered."""
        return self._described(f"{model}/all")

    def describe(self, model: str, version: str | None = None) -> dict | None:
        """A version of `model`, by default the one that is the default; None where it is not registered."""
        return next(iter(self._described("/".join(filter(None, (model, version))))), None)

    def _described(self, path: str) -> list[dict]:
        url, auth = f"{self.management}/models/{path}", self.auth("management")
        answer = session.get(url, auth=auth, timeout=DESCRIPTION_SECONDS)
        if answer.status_code == 404:
            return []
        answer.raise_for_status()
        return answer.json()

    def workers(self, model: str, version: str | None = None) -> WorkerCount:
        """How many workers of `model` are READY, and how many it must have at least."""
        described = self.describe(model, version)
        return WorkerCount(0, 1) if described is None else count_ready(described)

    def register(self, url: str, model: str, workers: int | None = None) -> None:
        """Registers an archive of the store as a version of `model`.

        Args:
            workers: to start. By default, those that its model-config.yaml asks for; this returns when they have
                started, and until then TorchServe answers nothing on those connections of other clients that the same
                thread of its serves.
        """
        initial = {} if workers is None else {"initial_workers": workers}
        self._manage("POST", "", url=url, model_name=model, **initial)

    def scale(self, model: str, version: str, minimum: int, maximum: int) -> None:
        """Sets the numbers of workers; they start and end in the background.

        TorchServe's lists of workers have no lock: while it ends workers, it may stumble over them, and is asked again.
        """
        for left in reversed(range(SCALE_TRIES)):
            try:
                self._manage("PUT", f"/{model}/{version}", min_worker=minimum, max_worker=maximum)
                return
            except BundleError as exc:
                if not left or STUMBLE not in exc.details:
                    raise
                time.sleep(PAUSE_SECONDS)

    def set_default(self, model: str, version: str) -> None:
        self._manage("PUT", f"/{model}/{version}/set-default")

    def unregister(self, model: str, version: str) -> None:
        """Ends a version's workers and forgets it."""
        self._manage("DELETE", f"/{model}/{version}")

    def _manage(self, method: str, path: str, **params: str | int) -> None:
        """Raises:
        BundleError: TorchServe refuses; with its reason."""
        url, auth = f"{self.management}/models{path}", self.auth("management")
        answer = session.request(method, url, params=params, auth=auth, timeout=MANAGEMENT_SECONDS)
        if not answer.ok:
            raise BundleError(
                f"TorchServe refused {method} /models{path} with {answer.status_code}.", reason(answer) or answer.text
            )

    def predict(self, model: str, content: bytes, version: str | None = None) -> requests.Response:
        """One prediction, the input as raw body, over a connection of its own: one left open, as TorchServe leaves it
        even when asked to close it, looks like a client to `drain`."""
        url = f"{self.inference}/predictions/{'/'.join(filter(None, (model, version)))}"
        with requests.Session() as once:
            once.trust_env = False
            answer = once.post(url, data=content, auth=self.auth("inference"), timeout=SECONDS)
            answer.raw.close()  # or the session's end would not close it
        return answer


def count_ready(described: dict) -> WorkerCount:
    """Of a version as the management API describes it."""
    ready = sum(worker["status"] == "READY" for worker in described["workers"])
    return WorkerCount(ready, max(1, int(described["minWorkers"])))


def reason(answer: requests.Response) -> str:
    """The message of one of TorchServe's error bodies; "" where it is none."""
    try:
        return answer.json()["message"]
    except (ValueError, KeyError, TypeError):
        return ""


def check_sample(client: Client, folder: ModelFolder, version: str | None = None) -> str | None:
    """Sends the folder's sample to a version, by default to the default one.

    Returns:
        what came first in the answer; None where the folder has no sample.

    Raises:
        BundleError: the answer is an error, or not what the folder expects.
    """
    if folder.sample_file is None:
        return None
    answer = client.predict(folder.name, folder.existing(folder.bundle.sample).read_bytes(), version)
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
    """What to type to try the models with their samples. A key goes to curl through a pipe: everybody on the machine
    can read the arguments of a process."""

    def curl(api: Api) -> str:
        if client.keys is None:
            return "curl"
        return f"jq -r '\"Authorization: Bearer \" + .{api}.key' {relative(client.keys.file)} | curl -H @-"

    def sample(folder: ModelFolder) -> str:
        if folder.sample_file is None:
            return "FILE"
        file = folder.sample_file
        return shlex.quote(str(file.relative_to(root) if file.is_relative_to(root) else file))

    lines = [
        f"{curl('inference')} -T {sample(folder)} {client.inference}/predictions/{folder.name}" for folder in folders
    ]
    return [*lines, f"{curl('management')} {client.management}/models"]
