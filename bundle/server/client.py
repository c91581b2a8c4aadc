"""Client of TorchServe's HTTP APIs."""

import json
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import requests

from bundle.catalog import ModelFolder
from bundle.errors import BundleError, NotRunning
from bundle.paths import relative
from bundle.samples import first, headers
from bundle.server.http import SECONDS, Session, ca_file, session
from bundle.server.keys import Api, Keys

DESCRIPTION_SECONDS = 10  # a healthy server describes its models faster
MANAGEMENT_SECONDS = 150  # more than unregister_model_timeout, which is 120
UNKNOWN_MODEL = ("ModelNotFoundException", "ModelVersionNotFoundException")  # types of errors
PASSING = (429, 502, 503, 504)  # of a server that is overloaded, starts or ends
PAUSE_SECONDS = 1  # before a request is repeated


class AlreadyRegistered(BundleError):
    """Somebody else has registered the version."""


@dataclass(frozen=True)
class WorkerCount:
    """Number of READY workers, and the minimum that a model must have."""

    ready: int
    wanted: int


@dataclass(frozen=True)
class Client:
    """Client of one server.

    Args:
        inference, management: base URLs.
        keys: the server's keys, if it requires tokens.
    """

    inference: str
    management: str
    keys: Keys | None = None

    def auth(self, api: Api) -> Callable[[requests.PreparedRequest], requests.PreparedRequest] | None:
        """Return the `auth` argument of requests for an API; None if the server does not require tokens."""
        return partial(sign, self.keys, api) if self.keys else None

    def models(self) -> list[str]:
        """Return the names of the registered models."""
        params, auth = {"limit": 1000}, self.auth("management")
        listed = session.get(f"{self.management}/models", params=params, auth=auth, timeout=SECONDS)
        listed.raise_for_status()
        return [model["modelName"] for model in listed.json()["models"]]

    def not_served(self, model: str) -> NotRunning:
        """Return the error of a command whose model is not registered."""
        there = self.models()
        return NotRunning(
            f"{model} is not served; there are: {', '.join(there) or 'none'}. If it has a folder in models/, serve it, "
            f'too: make serve MODELS="{" ".join([*there, model])}"'
        )

    def versions(self, model: str) -> list[dict]:
        """Return the management API's description of every version; an empty list if `model` is not registered."""
        return self._described(f"{model}/all")

    def describe(self, model: str, version: str | None = None) -> dict | None:
        """Return the description of a version, by default the default one; None if it is not registered."""
        return next(iter(self._described("/".join(filter(None, (model, version))))), None)

    def _described(self, path: str) -> list[dict]:
        url, auth = f"{self.management}/models/{path}", self.auth("management")
        answer = session.get(url, auth=auth, timeout=DESCRIPTION_SECONDS)
        if answer.status_code == 404:
            return []
        answer.raise_for_status()
        return answer.json()

    def workers(self, model: str, version: str | None = None) -> WorkerCount:
        """Count the workers of a version, by default the default one."""
        described = self.describe(model, version)
        return WorkerCount(0, 1) if described is None else count_ready(described)

    def register(self, url: str, model: str, workers: int | None = None) -> None:
        """Register an archive of the store as a version of `model`.

        Args:
            workers: number of workers to start. TorchServe ignores it if the archive's model-config.yaml has
                `minWorkers` and `maxWorkers`. This returns when the workers have started.

        Raises:
            AlreadyRegistered: the version is registered.
            BundleError: TorchServe rejects the archive.
        """
        initial = {} if workers is None else {"initial_workers": workers}
        self._manage("POST", "", url=url, model_name=model, **initial)

    def scale(self, model: str, version: str, minimum: int, maximum: int) -> None:
        """Set the minimum and maximum number of workers, which start and end in the background.

        Raises:
            BundleError: TorchServe rejects the call.
        """
        self._manage("PUT", f"/{model}/{version}", min_worker=minimum, max_worker=maximum)

    def set_default(self, model: str, version: str) -> None:
        """Make a version the default."""
        self._manage("PUT", f"/{model}/{version}/set-default")

    def unregister(self, model: str, version: str) -> None:
        """Unregister a version, and end its workers."""
        self._manage("DELETE", f"/{model}/{version}")

    def _manage(self, method: str, path: str, **params: str | int) -> None:
        """Call the management API.

        Raises:
            AlreadyRegistered: the answer is 409.
            BundleError: the answer is another error; the details are TorchServe's reason.
        """
        url, auth = f"{self.management}/models{path}", self.auth("management")
        answer = session.request(method, url, params=params, auth=auth, timeout=MANAGEMENT_SECONDS)
        if not answer.ok:
            refused = AlreadyRegistered if answer.status_code == 409 else BundleError
            raise refused(
                f"TorchServe refused {method} /models{path} with {answer.status_code}.", reason(answer) or answer.text
            )

    def manage(self, method: str, path: str) -> requests.Response:
        """Make any call of the management API, and return its answer.

        Args:
            path: begins with a slash, and may have a query.
        """
        url, auth = f"{self.management}{path}", self.auth("management")
        return session.request(method, url, auth=auth, timeout=MANAGEMENT_SECONDS)

    def schema(self) -> dict:
        """Return the OpenAPI document of the models that are registered.

        Raises:
            BundleError: the server has none, because the frontend's patch is off.
        """
        url, auth = f"{self.inference}/openapi.json", self.auth("inference")
        answer = session.get(url, auth=auth, timeout=SECONDS)
        if not answer.ok:
            raise BundleError(
                f"The server answered /openapi.json with {answer.status_code}. It needs the frontend's patch `routes`: "
                "start the server with it, or leave --running out.",
                reason(answer) or answer.text,
            )
        return answer.json()

    def predict(
        self,
        model: str,
        content: bytes,
        version: str | None = None,
        headers: dict[str, str] | None = None,
        options: Mapping[str, str] | None = None,
        explain: bool = False,
    ) -> requests.Response:
        """Send one input as request body, and return the answer.

        Each call has its own connection, and closes it: TorchServe keeps connections open even when asked to close
        them, and `drain` takes an open connection for a client.

        Args:
            options: parameters of the request, such as {"top_k": "1"}.
            explain: whether to ask for an explanation instead of a prediction.
        """
        url = f"{self.inference}/{path(model, version, explain)}"
        with Session() as once:
            auth = self.auth("inference")
            answer = once.post(url, data=content, headers=headers, params=options, auth=auth, timeout=SECONDS)
            answer.raw.close()  # the end of the session would not close it
        return answer


def path(model: str, version: str | None = None, explain: bool = False) -> str:
    """Return the path of requests to a version, by default to the default one."""
    return "/".join(filter(None, ("explanations" if explain else "predictions", model, version)))


def count_ready(described: dict) -> WorkerCount:
    """Count the workers in the management API's description of a version."""
    ready = sum(worker["status"] == "READY" for worker in described["workers"])
    return WorkerCount(ready, max(1, int(described["minWorkers"])))


def reason(answer: requests.Response) -> str:
    """Return TorchServe's error message, or "" if the body is not an error body."""
    try:
        return answer.json()["message"]
    except (ValueError, KeyError, TypeError):
        return ""


def sign(keys: Keys, api: Api, request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Add the key for an API to a request."""
    request.headers["Authorization"] = keys.header(api)
    return request


def check_sample(
    client: Client,
    folder: ModelFolder,
    version: str | None = None,
    patience: float = 0,
    extra: dict[str, str] | None = None,
) -> str | None:
    """Send a folder's sample to a version, by default to the default one.

    Args:
        patience: for how many seconds the request is repeated while the server is overloaded or does not answer.
        extra: headers beside those of the sample.

    Returns:
        the label that ranks first; None if the answer is not a ranking, or the folder has no sample.

    Raises:
        BundleError: the answer is an error, or not what the folder expects.
        requests.RequestException: the server does not answer.
    """
    if folder.bundle.sample is None:
        return None
    sample = folder.existing(folder.bundle.sample)
    content, sent = sample.read_bytes(), headers(sample) | (extra or {})
    answer = repeated(lambda: client.predict(folder.name, content, version, sent), patience)
    try:
        body = answer.json()
    except requests.JSONDecodeError:  # as a handler without the template may answer
        body = answer.text
    return judge(folder, answer.status_code, body)


def repeated(send: Callable[[], requests.Response], seconds: float) -> requests.Response:
    """Send a request until its answer is final or the time is over, and return the last answer.

    Raises:
        requests.RequestException: there was no answer in this time.
    """
    deadline = time.monotonic() + seconds
    while True:
        is_last = time.monotonic() >= deadline
        try:
            answer = send()
        except (requests.ConnectionError, requests.Timeout):
            if is_last:
                raise
        else:
            if is_last or answer.status_code not in PASSING:
                return answer
        time.sleep(PAUSE_SECONDS)


def judge(folder: ModelFolder, status: int, body: object) -> str | None:
    """Judge the answer to a folder's sample.

    Args:
        body: parsed, if it is JSON.

    Returns:
        the label that ranks first; None if the answer is not a ranking.

    Raises:
        BundleError: the answer is an error, or not what the folder expects.
    """
    details = body if isinstance(body, str) else json.dumps(body, indent=2, default=repr)
    if status != 200:
        raise BundleError(f"{folder.name} answered its own sample {folder.bundle.sample} with {status}.", details)
    best = first(body)
    label = best.label if best else None
    if folder.bundle.expect is not None and label != folder.bundle.expect:
        came = repr(label) if best else "an answer that is not a ranking"
        raise BundleError(
            f"{folder.name} answered its own sample {folder.bundle.sample} with {came}, "
            f"and its {folder.name}/model-config.yaml expects {folder.bundle.expect!r}.",
            details,
        )
    return label


def curl_lines(client: Client, folders: list[ModelFolder]) -> list[str]:
    """Return shell commands that send the models their samples.

    Keys are piped to curl, because every user of the machine can read a process's arguments.
    """

    def curl(api: Api) -> str:
        url = client.inference if api == "inference" else client.management
        trusted = ca_file() if url.startswith("https:") else None
        program = f"curl --cacert {shlex.quote(trusted)}" if trusted else "curl"
        if client.keys is None:
            return program
        return f"jq -r '\"Authorization: Bearer \" + .{api}.key' {relative(client.keys.file)} | {program} -H @-"

    def ask(folder: ModelFolder) -> str:
        file = folder.sample_file
        header = "".join(f" -H '{name}: {value}'" for name, value in headers(file).items()) if file else ""
        sample = shlex.quote(relative(file)) if file else "FILE"
        return f"{curl('inference')}{header} -T {sample} {client.inference}/predictions/{folder.name}"

    return [*map(ask, folders), f"{curl('management')} {client.management}/models"]
