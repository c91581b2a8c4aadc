"""A bare TorchServe with the agent: no proxy, and none of the bundle's commands and handlers."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import requests

from bundle.server import frontend
from bundle.server.client import Client
from bundle.server.frontend import OFF, OPTIONS
from bundle.server.java import java_home
from bundle.server.settings import Settings
from tests.support import wait_for

HANDLER = '''
import os, time

from ts.handler_utils.utils import send_intermediate_predict_response


def wait(action):
    """While there is a file with the name of the action, leave one that says that this process waits for its end."""
    held = os.path.join(os.environ["TEMP"], f"{action}-NAME")
    while os.path.exists(held):
        open(f"{held}-{os.getpid()}", "w").close()
        time.sleep(0.02)


if os.path.exists(os.path.join(os.environ["TEMP"], "break-NAME")):
    raise SystemExit("broken")
wait("start")


def handle(data, context):
    """Answer each request with the size of its batch and what arrived.

    The body b'sleep 2' takes 2 seconds; b'hold' waits as `Bare.holding` says; b'raise' fails the batch; b'header' gets
    an invalid header; b'exit' ends the worker, and leaves a file; b'part' does so after the first part of a streamed
    answer.
    """
    if data is None or context is None:
        return None
    answers = []
    for row in data:
        body = row.get("body", row.get("data", b""))
        body = bytes(body).decode("latin-1") if isinstance(body, (bytes, bytearray)) else str(body)
        json_size = context.get_request_header(len(answers), "Inference-Header-Content-Length")
        if json_size:  # the Open Inference Protocol: the only element follows the JSON and its own length
            body = body[int(json_size) + 4 :]
        if body.startswith("sleep "):
            time.sleep(float(body.split()[1]))
        if body == "hold":
            wait("hold")
        if body == "raise":
            raise ValueError("raise")
        if body == "header":
            context.set_response_header(len(answers), "X-Text", "two\\nlines")
        if body == "part":
            send_intermediate_predict_response(["part"], context.request_ids, "OK", 200, context)
        if body in ("exit", "part"):
            open(os.path.join(os.environ["TEMP"], f"exit-{os.getpid()}"), "w").close()
            os._exit(1)
        fields = {name: str(bytes(value) if isinstance(value, bytearray) else value) for name, value in row.items()}
        answers.append({"batch": len(data), "worker": os.getpid(), "fields": fields})
    return answers
'''
PATIENCE = 2  # seconds
PLAIN = {"batchSize": 1, "maxBatchDelay": 1}
BATCHES = {"batchSize": 8, "maxBatchDelay": 1000 * PATIENCE}
# the models of the server that the tests of the patches share
MODELS = {
    "one": {**PLAIN, "jobQueueSize": 2},
    "two": {**PLAIN, "minWorkers": 2, "maxWorkers": 2},
    "batches": BATCHES,
    "patient": {**BATCHES, "patience": "fixed"},
    "late": {**PLAIN, "clientTimeoutInMills": 1000, "jobQueueSize": 2},
    "later": {**PLAIN, "clientTimeoutInMills": 5000, "jobQueueSize": 2},
    "stuck": {**PLAIN, "responseTimeout": 2},
    "broken": {**PLAIN, "maxRetryTimeoutInSec": 1},
}
ONE_THREAD = {"number_of_netty_threads": "1"}  # which every connection shares


@dataclass(frozen=True)
class Bare:
    """A running server.

    Attributes:
        process: Java.
        console: what Java printed.
    """

    inference: str
    management: str
    grpc: str
    process: psutil.Process
    console: Path

    @property
    def folder(self) -> Path:
        return self.console.parent

    def break_workers(self, model: str) -> None:
        """Make each further start of a worker of this model fail."""
        (self.folder / f"break-{model}").touch()

    @contextmanager
    def holding(self, model: str, action: str = "hold") -> Iterator[None]:
        """Hold a model's workers while the block runs.

        Args:
            action: hold, for those that get a request with the body b"hold"; start, for those that start.
        """
        file = self.folder / f"{action}-{model}"
        for old in self.folder.glob(f"{file.name}-*"):
            old.unlink()
        file.touch()
        try:
            yield
        finally:
            file.unlink()

    def held(self, model: str, action: str = "hold") -> set[int]:
        """Return the process ids of the workers that were held since the block began."""
        return {int(file.name.rpartition("-")[2]) for file in self.folder.glob(f"{action}-{model}-*")}

    def accepted(self, model: str) -> int:
        """Return how many requests of a model are in its queue, or held in its workers."""
        [described] = requests.get(f"{self.management}/models/{model}", timeout=20).json()
        inside = self.held(model) & {worker["pid"] for worker in described["workers"]}
        return described["jobQueueStatus"]["pendingRequests"] + len(inside)

    def posted(self, pool: ThreadPoolExecutor, model: str, *bodies: bytes, **options: float) -> list[Future]:
        """Send requests one after the other; return when all are in the queue or held in a worker, in this order.

        Args:
            bodies: b"hold" for each of the workers, before the others.
        """
        sent = []
        for body in bodies:
            held, count = self.held(model), self.accepted(model)
            sent.append(pool.submit(self.post, model, body, **options))
            if body == b"hold":  # on its way from the queue to the worker, it is counted in neither
                wait_for(lambda held=held: self.held(model) != held)
            else:
                wait_for(lambda count=count: self.accepted(model) == count + 1)
        return sent

    def exits(self) -> set[int]:
        """Return the process ids of the workers that a request has ended."""
        return {int(file.name.removeprefix("exit-")) for file in self.folder.glob("exit-*")}

    def post(self, model: str, body: bytes = b"x", **arguments: object) -> requests.Response:
        return requests.post(f"{self.inference}/predictions/{model}", body, **{"timeout": 120, **arguments})

    def client(self) -> Client:
        return Client(self.inference, self.management)

    def has_workers(self, model: str, count: int) -> bool:
        """Return whether `count` workers are READY; False before the API answers."""
        try:
            return self.client().workers(model).ready == count
        except requests.ConnectionError:
            return False

    def scale(self, model: str, count: int) -> None:
        """Set a model's number of workers, and wait until further ones are gone."""
        query = {"min_worker": count, "max_worker": count, "synchronous": "true"}
        answer = requests.put(f"{self.management}/models/{model}", params=query, timeout=60)
        assert answer.status_code in (200, 206), answer.text  # 206: new workers are still starting

    def restore(self, model: str) -> None:
        """Set a model's number of workers to that of its archive, and wait until they are READY."""
        count = MODELS[model].get("minWorkers", 1)
        self.scale(model, count)
        wait_for(partial(self.has_workers, model, count), 60)

    def workers(self, model: str) -> list[int]:
        """Return the process ids of a model's workers."""
        [described] = requests.get(f"{self.management}/models/{model}", timeout=20).json()
        return [worker["pid"] for worker in described["workers"]]


def archive(store: Path, name: str, **config: object) -> None:
    """Write the archive of a model with this configuration and one worker.

    Args:
        config: keys of model-config.yaml.
    """
    config = {"minWorkers": 1, "maxWorkers": 1, "responseTimeout": 60, "startupTimeout": 60, **config}
    model = {"modelName": name, "handler": "handler.py", "modelVersion": "1.0", "configFile": "model-config.yaml"}
    with zipfile.ZipFile(store / f"{name}.mar", "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
        file.writestr("handler.py", HANDLER.replace("NAME", name))
        file.writestr("model-config.yaml", "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items()))


@contextmanager
def bare(folder: Path, models: dict[str, dict], off: str = "", wait: bool = True, **settings: str) -> Iterator[Bare]:
    """Serve models while the block runs.

    Args:
        models: the keys of each model's model-config.yaml.
        off: names of patches to leave out, as in BUNDLE_FRONTEND_OFF.
        wait: whether the block begins when all workers are READY.
        settings: further keys of config.properties.
    """
    store = folder / "store"
    store.mkdir(parents=True)
    for name, config in models.items():
        archive(store, name, **config)
    isolated = Settings.isolated(store, enable_envvars_config="true", enable_model_api="true", **settings)
    (folder / "config.properties").write_text("enable_envvars_config=true\nenable_model_api=true\n")
    given = {key: value for key, value in os.environ.items() if not key.startswith("TS_") and key != OPTIONS}
    environment = frontend.with_agent(given) | isolated.overrides
    environment |= {"TMPDIR": str(folder), "TEMP": str(folder), "LOG_LOCATION": str(folder / "logs")}
    environment |= {"METRICS_LOCATION": str(folder / "logs"), "JAVA_HOME": str(java_home()), OFF: off}
    command = [sys.executable, "-m", "ts.model_server", "--start", "--ts-config", str(folder / "config.properties")]
    command += [
        "--no-config-snapshots",
        "--model-store",
        str(store),
        "--models",
        *(f"{name}={name}.mar" for name in models),
    ]
    console = folder / "console.log"
    with console.open("wb") as output:
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=output, stderr=output)
    process = psutil.Process(int((folder / ".model_server.pid").read_text()))
    urls = isolated.url("inference_address"), isolated.url("management_address")
    grpc = f"127.0.0.1:{isolated.listeners()['grpc_inference_port'][1]}"
    server = Bare(*urls, grpc, process, console)
    try:
        for name, config in models.items() if wait else ():
            wait_for(partial(server.has_workers, name, config.get("minWorkers", 1)), 300)
        yield server
    finally:
        family = [process, *process.children(recursive=True)] if process.is_running() else []
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=30)
