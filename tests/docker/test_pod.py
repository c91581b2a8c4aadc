"""The pod of the chart, run by the Docker engine: predictions, probes, exposed ports, and an end that loses nothing."""

import hashlib
import http.client
import json
import re
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from bundle.catalog import select as select_folders
from bundle.server.client import Client, check_sample
from bundle.signing import make_keys
from tests.docker.pod import Pod, address_of, running
from tests.docker.pod import http as session
from tests.docker.proxy import IMAGE as NGINX
from tests.docker.stack import build_archive, build_image, docker
from tests.helm import CHART, needs_helm, render
from tests.support import models_expecting_four, wait_for
from tests.traffic import is_closed

pytestmark = needs_helm
[MNIST] = select_folders(["mnist"])
DIGIT = MNIST.sample_file.read_bytes()
PREDICT = "/predictions/mnist"
REMOVED_AFTER = 0.5  # s until no node sends new connections to a pod that ends; less than preStopSeconds
VALUES = """
groups: {main: null, digits: {models: {mnist: {workers: 1}}}}
lifecycle: {preStopSeconds: 4}
"""


OTHER_KEY = """-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAIwvdkrOC7ldkZ5NgDHATi19qH4O5XVCYH9dZvPhG4go=
-----END PUBLIC KEY-----
"""


@pytest.fixture(scope="module")
def image(engine: None) -> str:
    return build_image()


def images(image: str) -> dict[str, str]:
    """Return the local images by the chart's names."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    return {f"torchserve-bundle:{chart['appVersion']}": image, "nginx:1.28-alpine": NGINX}


def start(image: str, folder: Path, values: str = VALUES) -> AbstractContextManager[Pod]:
    return running(render(values), "bundle-digits", folder, images(image))


@pytest.fixture(scope="module")
def pod(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """A pod that the tests share; each leaves it running."""
    with start(image, tmp_path_factory.mktemp("pod")) as pod:
        yield pod


def url(pod: Pod) -> str:
    return f"http://{pod.address}:8080"


class Clients:
    """Clients of a Service with one pod: each sends its requests until the pod is no longer an endpoint.

    Then they open no new connection. Those that keep a connection use it until the server closes it, as a node's
    connection tracking lets them.

    Attributes:
        counts: answers by status; "lost" is a request that was sent and not answered. "closed" is one on a connection
            that had been used before, and that was closed before the first byte of the answer: a server may close an
            idle connection while a request is on its way, so HTTP clients send such a request again.
    """

    def __init__(self, address: str, keep_alive: int = 3, others: int = 3):
        self.address = address
        self.counts: Counter[int | str] = Counter()
        self.removed = threading.Event()
        kinds = [True] * keep_alive + [False] * others
        self.threads = [threading.Thread(target=self.run, args=(kept,), daemon=True) for kept in kinds]

    def run(self, kept: bool) -> None:
        connection: http.client.HTTPConnection | None = None
        while True:
            reused = connection is not None and connection.sock is not None and not is_closed(connection.sock)
            if not reused:
                if self.removed.is_set():
                    return
                connection = http.client.HTTPConnection(self.address, 8080, timeout=60)
            answer = None
            try:
                connection.request("POST", PREDICT, DIGIT, {} if kept else {"Connection": "close"})
                answer = connection.getresponse()
                body = answer.read()
                right = answer.status != 200 or json.loads(body)["top_3_classes"][0] == 3
                self.counts[answer.status if right else "wrong answer"] += 1
            except (OSError, http.client.HTTPException) as error:
                closed = reused and answer is None and isinstance(error, (ConnectionResetError, BrokenPipeError))
                self.counts["closed" if closed else "lost"] += 1
                connection.close()
            time.sleep(0.01)

    def begin(self, requests: int) -> None:
        for thread in self.threads:
            thread.start()
        wait_for(lambda: self.counts.total() >= requests)

    def join(self) -> None:
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()


class SlowUpload(threading.Thread):
    """A client that holds back the last part of its body until `finish` is set."""

    def __init__(self, address: str):
        super().__init__(daemon=True)
        self.finish, self.status = threading.Event(), 0
        self.connection = socket.create_connection((address, 8080), 60)
        head = f"POST {PREDICT} HTTP/1.1\r\nHost: pod\r\nContent-Length: {len(DIGIT)}\r\n\r\n"
        self.connection.sendall(head.encode() + DIGIT[:100])

    def run(self) -> None:
        self.finish.wait(60)
        self.connection.sendall(DIGIT[100:])
        answer = http.client.HTTPResponse(self.connection)
        answer.begin()
        self.status = answer.status


def test_pod_answers_and_is_ready_only_when_its_models_are(pod: Pod):
    server, proxy = pod.containers["torchserve"], pod.containers["proxy"]
    startup = [succeeded for kind, succeeded in server.probed if kind == "startupProbe"]
    assert startup[-1] is True
    assert False in startup, "the pod was started while its models were not"
    assert check_sample(Client(url(pod), ""), MNIST) == MNIST.bundle.expect
    assert "workers of mnist: 1" in server.logs()
    described = json.loads(server.execute("python3", "-c", get("http://127.0.0.1:8081/models/mnist")))
    assert described[0]["minWorkers"] == 1
    assert docker("exec", proxy.id, "id", "-u").strip() == "101"
    assert server.execute("id", "-u").strip() == "10001"


def get(address: str) -> str:
    """Return a program that prints the answer of a URL."""
    return f"from urllib.request import urlopen; print(urlopen({address!r}, timeout=20).read().decode())"


def test_pod_exposes_inference_and_metrics_only(pod: Pod):
    """TorchServe's own ports, 7070, 7071, 8081 and 8085, listen on loopback."""
    open_ports = []
    for port in (7070, 7071, 8080, 8081, 8082, 8083, 8085):
        with socket.socket() as probe:
            probe.settimeout(5)
            if probe.connect_ex((pod.address, port)) == 0:
                open_ports.append(port)
    assert open_ports == [8080, 8082, 8083]
    for path in ("/models", "/metrics", "/api-description"):
        assert session.get(url(pod) + path, timeout=30).status_code == 404
    # KEDA scales by the time in the queue, and by the number of waiting requests
    wait_for(lambda: "bundle_queue_seconds_bucket{" in metrics_after_a_request(pod))
    supervisor = session.get(f"http://{pod.address}:8083/metrics", timeout=30).text
    assert "bundle_workers_ready" in supervisor
    assert 'bundle_queue_pending{model_name="mnist"' in supervisor


def metrics_after_a_request(pod: Pod) -> str:
    assert session.post(url(pod) + PREDICT, data=DIGIT, timeout=30).status_code == 200
    return session.get(f"http://{pod.address}:8082/metrics", timeout=30).text


def test_helm_test_passes(pod: Pod, image: str):
    """Its pod asks the Service, whose place the pod's own address takes here."""
    [test] = [found for found in render(VALUES) if found["kind"] == "Pod"]
    [container] = test["spec"]["containers"]
    arguments = [word.replace("bundle-digits:80", f"{pod.address}:8080") for word in container["args"]]
    said = docker(
        "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--cap-drop=ALL", "--user=10001:10001", image, *arguments
    )
    assert said == "mnist: sample.png is answered with '3'\n"


def test_helm_test_fails_if_a_model_answers_wrongly(pod: Pod, image: str, tmp_path: Path):
    models = models_expecting_four(tmp_path / "models")
    options = [f"--volume={models}:/models:ro", "--env=BUNDLE_MODELS=/models"]
    status, said = run(*options, image, "check", f"http://{pod.address}:8080", "mnist", "--patience=2m")
    assert status == 1
    assert "answered its own sample sample.png with '3', and its mnist/model-config.yaml expects '4'." in said


def run(*arguments: str) -> tuple[int, str]:
    """Run a container that ends by itself; return its status, and what it wrote."""
    done = subprocess.run(["docker", "run", "--rm", *arguments], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("volume", "reason"),
    [
        (
            "/opt/bundle/model_store:size=32k",
            r"\S+\.mar cannot be copied into /opt/bundle/model_store: No space left on device",
        ),
        ("/tmp:size=32k", r"/tmp has 0\.0 MB free, and the unpacked archives take \d\.\d MB\."),
        # three: the folder itself, that of the run, and its lock
        ("/tmp:nr_inodes=3", r"No folder for temporary files can be written: .* Free some space in one of them"),
    ],
    ids=["store", "temporary", "temporary without inodes"],
)
def test_server_does_not_start_if_a_volume_is_full(image: str, volume: str, reason: str):
    status, said = run("--read-only", f"--tmpfs={volume},uid=10001", image, "run", "mnist")
    assert status == 1
    assert re.search(f"^error: {reason}", said, re.MULTILINE), said
    assert "Traceback" not in said


def test_dead_server_is_unready_and_comes_back(pod: Pod):
    server, proxy = pod.containers["torchserve"], pod.containers["proxy"]
    kill_java = 'for p in /proc/[0-9]*; do [ "$(cat $p/comm)" = java ] && kill -9 ${p#/proc/}; done; true'
    server.execute("sh", "-c", kill_java)
    wait_for(lambda: not server.state()["Running"], 60)
    assert server.state()["ExitCode"] == 1
    assert not proxy.probe("readinessProbe")
    proxy.wait_for_probe("livenessProbe")  # otherwise, the proxy would be restarted, too
    refused = session.post(url(pod) + PREDICT, data=DIGIT, timeout=30)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    pod.restart("torchserve").wait_for_probe("startupProbe")
    wait_for(lambda: proxy.probe("readinessProbe"))
    assert session.post(url(pod) + PREDICT, data=DIGIT, timeout=30).status_code == 200


@contextmanager
def served(folder: Path, image: str) -> Iterator[str]:
    """Serve a folder over HTTP from a container, and yield its URL."""
    options = ["--detach", f"--volume={folder}:/served:ro", "--entrypoint=python3"]
    server = docker("run", *options, image, "-m", "http.server", "--directory", "/served", "8000").strip()
    try:
        address = address_of(server)
        yield f"http://{address}:8000"
    finally:
        docker("rm", "--force", "--volumes", server)


@dataclass(frozen=True)
class Signed:
    """A signed archive of mnist on an HTTP server.

    Attributes:
        address: the server's URL.
        digest: the archive's SHA-256, hex.
        key: the public key.
    """

    address: str
    digest: str
    key: str

    def values(self) -> str:
        return f"""
groups:
  main: null
  digits: {{models: {{mnist: {{url: "{self.address}/mnist.mar", sha256: "{self.digest}"}}}}}}
archives: {{source: url}}
trustedKey: {{pem: {json.dumps(self.key)}}}
lifecycle: {{preStopSeconds: 4}}
proxy: {{rate: 10000r/s, burst: 10000}}
"""


@pytest.fixture(scope="module")
def signed(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signed]:
    folder = tmp_path_factory.mktemp("signed")
    public = make_keys(folder / "signing.key")
    build_archive("mnist", folder / "store", SIGNING_KEY=str(folder / "signing.key"))
    digest = hashlib.sha256((folder / "store" / "mnist.mar").read_bytes()).hexdigest()
    with served(folder / "store", image) as address:
        yield Signed(address, digest, public.read_text())


@pytest.fixture(scope="module")
def fetched(image: str, signed: Signed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """A pod that has fetched its archive. The last test ends it."""
    with start(image, tmp_path_factory.mktemp("fetched"), signed.values()) as pod:
        yield pod


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"digest": "f" * 64}, f"has the SHA-256 [0-9a-f]+, and not {'f' * 64}"),
        ({"address": "http://127.0.0.1:9"}, "http://127.0.0.1:9/mnist.mar cannot be downloaded: .*Connection refused"),
        ({"key": OTHER_KEY}, "mnist.mar is refused: its signature was not made with the key of"),
    ],
    ids=["checksum", "server", "signature"],
)
def test_pod_does_not_start_with_a_wrong_archive(image: str, signed: Signed, tmp_path: Path, wrong: dict, reason: str):
    pod = Pod(render(replace(signed, **wrong).values()), "bundle-digits", tmp_path / "pod", images(image))
    try:
        with pytest.raises(AssertionError, match=reason):
            pod.start()
        assert list(pod.containers) == ["fetch"]
    finally:
        pod.remove()


def test_fetched_and_signed_archive_is_served(fetched: Pod):
    assert "mnist.mar: downloaded, checked" in fetched.containers["fetch"].logs()
    assert check_sample(Client(url(fetched), ""), MNIST) == MNIST.bundle.expect


def test_end_of_the_pod_loses_no_request(fetched: Pod):
    """The proxy ends when it has answered all requests, slow ones too, and TorchServe after it."""
    clients = Clients(fetched.address)
    clients.begin(50)
    upload = SlowUpload(fetched.address)
    upload.start()
    preparation = fetched.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert float(preparation[1]) > REMOVED_AFTER

    def on_termination() -> None:
        threading.Timer(REMOVED_AFTER, clients.removed.set).start()
        threading.Timer(float(preparation[1]) + 2, upload.finish.set).start()  # after the proxy's SIGQUIT

    seconds = fetched.delete(on_termination)
    clients.join()
    upload.join(60)
    print(f"end of the pod: {dict(clients.counts)}, {seconds:.1f} s")
    assert set(clients.counts) - {"closed"} == {200}
    assert clients.counts["closed"] <= 3  # once for each client that keeps its connection
    assert upload.status == 200
    server, proxy = fetched.containers["torchserve"], fetched.containers["proxy"]
    assert (proxy.state()["ExitCode"], server.state()["ExitCode"]) == (0, 0)
    assert proxy.ended < server.ended
    assert "bundle: drained" in server.logs()
    assert seconds < fetched.spec["terminationGracePeriodSeconds"] / 2
