"""A server that answers as a script says, and the command `bundle predict` on it."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from ssl import SSLContext

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from bundle.cli.app import app
from bundle.paths import ROOT
from bundle.server.identity import start_mark
from bundle.server.process import Running
from tests import programs

MODEL = "/predictions/echo"
WORKERS = 3


def rejected(status: int, message: str = "no", kind: str = "Rejected", **headers: str) -> Response:
    """Return an error as TorchServe answers it. The headers have `_` for `-`."""
    body = json.dumps({"code": status, "type": kind, "message": message})
    return Response(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class Echo:
    """A model that answers {"you": its body}, after the errors of its script.

    Attributes:
        run_dir: has the record of the server, as if `bundle serve` had started it.
        errors: for a body, the responses to its first requests.
        times: when each body came, in seconds.
        headers, queries: of the last request.
        gate: requests wait until it is set.
        free: the number of bodies that do not wait for it.
    """

    server: HTTPServer
    run_dir: Path
    errors: dict[str, list[Response]] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    query: str = ""
    gate: threading.Event = field(default_factory=threading.Event)
    free: int = 0

    def __post_init__(self) -> None:
        self.gate.set()
        workers = [{"id": str(9000 + number), "status": "READY"} for number in range(WORKERS)]
        self.server.expect_request("/models/echo").respond_with_json([{"modelName": "echo", "workers": workers}])
        self.server.expect_request("/models/nonesuch").respond_with_json({}, status=404)
        unknown = rejected(404, "Model not found: nonesuch", "ModelNotFoundException")
        self.server.expect_request("/predictions/nonesuch").respond_with_response(unknown)
        self.server.expect_request("/models").respond_with_json({"models": [{"modelName": "echo", "modelUrl": "e"}]})
        for path in (MODEL, "/explanations/echo"):
            self.server.expect_request(path, method="POST").respond_with_handler(self.respond)
        self.record(self.url)

    @property
    def url(self) -> str:
        return self.server.url_for("").rstrip("/")

    @property
    def asked(self) -> Counter[str]:
        """How often each body came."""
        return Counter({body: len(times) for body, times in self.times.items()})

    def record(self, inference: str, key_file: str = "") -> None:
        """Write the record of a running server, with this process as its process."""
        running = Running(os.getpid(), start_mark(os.getpid()), "", {}, {}, inference, self.url, "", key_file)
        self.run_dir.mkdir(exist_ok=True)
        (self.run_dir / "server.json").write_text(json.dumps(asdict(running)))

    def respond(self, request: Request) -> Response:
        body = request.get_data().decode(errors="replace")
        self.times.setdefault(body, []).append(time.monotonic())
        self.headers, self.query = dict(request.headers), request.query_string.decode()
        if len(self.times) > self.free:
            self.gate.wait(120)
        errors = self.errors.get(body)
        return errors.pop(0) if errors else Response(json.dumps({"you": body}))

    def predict(self, *arguments: object) -> programs.Ended:
        """Run `bundle predict echo` in this process."""
        return programs.run(app, "predict", "echo", *map(str, arguments))

    def start(self, *arguments: object, **streams) -> subprocess.Popen:
        """Start `bundle predict echo` as a program of its own, which gets signals even in a background job."""
        command = ["env", "--default-signal=INT,HUP", sys.executable, "-m", "bundle", "predict", "echo"]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
        return subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, **streams)


Serve = Callable[..., HTTPServer]


@pytest.fixture
def serve_http() -> Iterator[Serve]:
    """Return what starts servers on 127.0.0.1, which answer requests at the same time."""
    started = []

    def start(port: int = 0, ssl_context: SSLContext | None = None) -> HTTPServer:
        server = HTTPServer("127.0.0.1", port, ssl_context, threaded=True)
        server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def echo(serve_http: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Echo]:
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("CA_FILE", raising=False)
    made = Echo(serve_http(), tmp_path / "run")
    yield made
    made.gate.set()


@pytest.fixture
def abc(tmp_path: Path) -> Path:
    """A folder of inputs: a, b, c, each with its name as its content."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text(name)
    return folder


def lines(output: Path) -> list[dict]:
    """Return the lines of an output, each of which has its end."""
    content = output.read_bytes()
    assert content == b"" or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def answers(output: Path) -> dict[str, object]:
    """Return what each input was answered, by the last part of its name; the status of an error."""
    found = {}
    for line in lines(output):
        (_, name), (kind, outcome) = line.items()
        found[str(name).rpartition("/")[2]] = outcome["you" if kind == "answer" else "status"]
    return found
