"""The reverse proxy alone, in a container, with a server of the tests in place of TorchServe.

The container uses the host's network and free ports on loopback. So the server can be a thread of the test, and no
firewall between Docker's bridge and the host interferes. conftest.py makes the fixtures known to this folder. Each test
module of the proxy uses `fresh`.
"""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPMessage, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from bundle.server.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
IMAGE = os.environ.get("NGINX_IMAGE", "nginx:1.28-alpine")  # the default of docker/compose.yaml
UNLIMITED = {"PROXY_RATE": "100000r/s", "BURST": "100000", "CONNECTIONS": "9999", "UPSTREAM_TIMEOUT": "120"}
PREDICT = "/predictions/mnist"
PROCESSES = 2  # of nginx: docker/nginx/nginx.conf

http = requests.Session()
http.trust_env = False  # a proxy in the environment cannot reach loopback
http.headers["Connection"] = "close"  # a reload of the proxy closes kept connections, perhaps as a request comes


@dataclass
class Received:
    """A request, as the upstream received it."""

    method: str
    path: str
    headers: HTTPMessage
    body: bytes
    connection: int  # port of the client


@dataclass
class Upstream:
    """A server that records requests, and gives the answer that a test sets.

    Attributes:
        status: status of the answers; None to close the connection without an answer.
        first: status of the first answer only, if it differs.
        release: answers are held back until this event is set.
    """

    host: str = "127.0.0.1"
    port: int = 0
    received: list[Received] = field(default_factory=list)
    open_connections: int = 0
    status: int | None = 200
    first: int | None = None
    body: bytes = b'{"ok": true}'
    headers: dict[str, str] = field(default_factory=dict)
    release: threading.Event = field(default_factory=threading.Event)

    def reset(self) -> None:
        self.received.clear()
        self.status, self.first, self.body, self.headers = 200, None, b'{"ok": true}', {}
        self.release.set()

    @contextmanager
    def serving(self) -> Iterator["Upstream"]:
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self):
                super().setup()
                upstream.open_connections += 1

            def finish(self):
                upstream.open_connections -= 1
                super().finish()

            def log_message(self, *_):
                pass

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                upstream.received.append(Received(self.command, self.path, self.headers, body, self.client_address[1]))
                status, answer, headers = upstream.status, upstream.body, dict(upstream.headers)
                if upstream.first and len(upstream.received) == 1:
                    status = upstream.first
                upstream.release.wait(120)
                if status is None:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in {"X-Request-Id": "torchserves-own", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_POST = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = do_PATCH = do_GET

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):
                pass  # in some tests, clients close the connection early

        with Server((self.host, self.port), Handler) as server:
            self.port = server.server_port
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            self.reset()
            try:
                yield self
            finally:
                self.release.set()
                server.shutdown()


@dataclass
class Proxy:
    container: str
    port: int
    tls_port: int
    gate: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str = PREDICT, data: object = b"input", **options) -> requests.Response:
        return http.post(self.url + path, data=data, **{"timeout": 120, **options})

    def raw(self, request: str | bytes, seconds: float = 60) -> tuple[int, HTTPMessage, bytes]:
        """Send bytes unchanged, which no HTTP client does, and read one answer."""
        with socket.create_connection(("127.0.0.1", self.port), seconds) as connection:
            connection.sendall(request.encode("latin-1") if isinstance(request, str) else request)
            answer = HTTPResponse(connection)
            answer.begin()
            return answer.status, answer.headers, answer.read()

    def logs(self) -> str:
        done = docker("logs", self.container)
        return done.stdout + done.stderr

    def access_log(self, request_id: str) -> dict:
        """Return the line of the access log with this id."""
        lines = eventually(
            lambda: [line for line in docker("logs", self.container).stdout.splitlines() if request_id in line]
        )
        assert len(lines) == 1, lines
        return json.loads(lines[0])


def docker(*arguments: str, seconds: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=seconds)


def used_servers(container: str) -> set[str]:
    """Return the addresses to which a proxy sends predictions."""
    done = docker("exec", container, "cat", "/tmp/nginx/inference.servers")
    assert done.returncode == 0, done.stderr
    return {line.split()[1].split(":")[0] for line in done.stdout.splitlines() if " down" not in line}


def eventually(found: Callable[[], object], seconds: float = 60) -> object:
    """Call `found` until its result is true, and return the result."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, f"still nothing after {seconds:g} s"
        time.sleep(0.05)
    return result


def settled(proxy: "Proxy", found: Callable[[], object]) -> None:
    """Wait until `found` is true, and only nginx's newest processes accept connections.

    After a reload, the old ones accept them, too, for 0.1 s; then they are "shutting down".
    """
    eventually(found)
    shown = ("top", proxy.container, "-eo", "pid,args")
    eventually(lambda: docker(*shown).stdout.count("nginx: worker process\n") == PROCESSES)


@pytest.fixture(scope="session")
def engine() -> None:
    if shutil.which("docker") is None:
        pytest.skip("the docker command is missing")
    try:
        answered = docker("info", "--format", "{{.ServerVersion}}", seconds=60)
    except subprocess.TimeoutExpired:
        pytest.skip("the Docker engine does not answer")
    if answered.returncode:
        pytest.skip(f"no Docker engine answers: {answered.stderr.strip()}")


def run_arguments(gate: Path, settings: dict[str, str], mounts: dict[Path, str]) -> list[str]:
    """Return the arguments of `docker run`: as in the compose file, except for the network."""
    arguments = ["--network=host", "--user=101:101", "--read-only", "--tmpfs=/tmp:mode=1777", "--cap-drop=ALL"]
    arguments += ["--security-opt=no-new-privileges", f"--volume={ROOT / 'docker' / 'nginx'}:/etc/bundle:ro"]
    arguments += [f"--volume={gate}:/run/gate:ro"]
    arguments += [f"--volume={source}:{target}:ro" for source, target in mounts.items()]
    arguments += [f"--env={name}={value}" for name, value in settings.items()]
    return [*arguments, IMAGE, "sh", "/etc/bundle/start.sh"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream, supervisor: Upstream) -> Iterator[Callable]:
    """A function that starts a proxy. The proxies run until the module's tests are done."""
    with ExitStack() as stack:

        def start_proxy(mounts: dict[Path, str] | None = None, **settings: str) -> Proxy:
            gate = tmp_path_factory.mktemp("gate")
            for folder in (gate, *gate.parents[:2]):
                folder.chmod(0o755)  # readable for the user in the container
            proxy = Proxy(f"bundle-test-proxy-{uuid.uuid4().hex[:8]}", *free_ports(2), gate)
            settings = {
                "TORCHSERVE_HOST": "127.0.0.1",
                "TORCHSERVE_PORT": str(upstream.port),
                "SUPERVISOR_PORT": str(supervisor.port),
                "LISTEN": f"127.0.0.1:{proxy.port}",
                "LISTEN_TLS": f"127.0.0.1:{proxy.tls_port}",
                "TLS_PORT": str(proxy.tls_port),
                **UNLIMITED,
                **settings,
            }
            started = docker("run", "--detach", "--name", proxy.container, *run_arguments(gate, settings, mounts or {}))
            stack.callback(docker, "rm", "--force", proxy.container)
            assert started.returncode == 0, started.stderr
            eventually(lambda: answers(proxy))
            return proxy

        yield start_proxy


def answers(proxy: Proxy) -> bool:
    running = docker("inspect", "--format", "{{.State.Running}}", proxy.container).stdout.strip()
    assert running == "true", proxy.logs()
    try:
        # a connection is not enough, because nginx -t listens, too; the path is one that is not passed on
        http.head(f"{proxy.url}/error", timeout=5, allow_redirects=False)
    except requests.RequestException:
        return False
    return True


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream().serving() as server:
        yield server


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Upstream]:
    with Upstream().serving() as server:
        yield server


@pytest.fixture
def fresh(engine: None, upstream: Upstream, supervisor: Upstream) -> None:
    """An upstream and a supervisor with their default answers and no recorded requests."""
    upstream.reset()
    supervisor.reset()


@pytest.fixture(scope="module")
def proxy(start) -> Proxy:
    return start(MAX_BODY="1m")


def check_error(answer: requests.Response, status: int, error: str, retry_after: str | None = None) -> None:
    """Check that the answer is one of the bundle's JSON errors."""
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/json"), answer.text
    assert answer.headers.get("Retry-After") == retry_after, answer.headers
    body = answer.json()
    assert (body["code"], body["type"]) == (status, error), body
    assert len(body["message"]) > 20, body
    assert answer.headers["X-Request-Id"], answer.headers


def make_certificate(folder: Path, name: str = "localhost") -> Path:
    folder.mkdir(exist_ok=True)
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2"]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    subprocess.run(command, check=True, capture_output=True)
    for file in folder.iterdir():
        file.chmod(0o644)
    folder.chmod(0o755)
    return folder
