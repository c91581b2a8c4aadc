"""The stack: predictions, confinement, metrics, load tests, and no lost request in faults, rollouts and restarts.

All tests share one stack. A test does not rely on another: `restored` undoes what tests change, and each test makes the
traffic and the faults that it needs.
"""

import base64
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import requests
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from bundle import mar
from bundle.catalog import CONFIG_NAME, select
from bundle.paths import ROOT
from bundle.samples import first
from bundle.server.client import check_sample
from tests import queries
from tests.docker.stack import SERVICES, Stack, build_archive, docker
from tests.shipped import SHIPPED
from tests.support import altered, repeated, reversioned, wait_for
from tests.traffic import Traffic
from tests.trials.faults.archives import copy_from_image

FOLDERS = select(list(SHIPPED))
[MNIST] = select(["mnist"])
DIGIT = MNIST.sample_file.read_bytes()


@pytest.fixture(autouse=True)
def restored(stack: Stack) -> Iterator[None]:
    """After each test, start TorchServe if it was stopped, and restore the numbers of workers."""
    yield
    if stack.inspect()["State"]["Status"] == "exited":
        docker("start", stack.container())
        stack.wait_until_healthy()
    for folder in FOLDERS:
        numbers = {key: folder.config[key] for key in ("minWorkers", "maxWorkers")}
        described = stack.client.describe(folder.name)
        if {key: described[key] for key in numbers} != numbers:
            scale(stack, folder.name, *numbers.values())


def scale(stack: Stack, model: str, low: int, high: int) -> None:
    """Set the numbers of workers of the default version, and wait until the lower one is READY."""
    stack.client.scale(model, stack.client.describe(model)["modelVersion"], low, high)
    wait_for(lambda: stack.client.workers(model).ready >= low, 120)


def kill_a_worker(stack: Stack) -> int:
    """Kill a worker of mnist, and return its PID in the container."""
    pid = min(worker["pid"] for worker in stack.client.describe("mnist")["workers"])
    stack.execute("sh", "-c", f"kill -9 {pid}")
    return pid


def traffic(stack: Stack, **options) -> Traffic:
    return Traffic(f"{stack.url('PORT')}/predictions/mnist", DIGIT, '"top_3_classes": [3', **options)


def prometheus(stack: Stack, query: str) -> list[dict]:
    answer = requests.get(f"{stack.url('PROMETHEUS_PORT')}/api/v1/query", params={"query": query}, timeout=30).json()
    assert answer["status"] == "success", (query, answer)
    return answer["data"]["result"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_prediction_through_the_proxy_is_as_expected(stack: Stack, folder):
    assert check_sample(stack.client, folder) == folder.bundle.expect


def test_file_that_curl_calls_a_form_is_read_as_a_file(stack: Stack):
    answer = stack.client.predict("mnist", DIGIT, headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert (answer.status_code, '"top_3_classes": [3' in answer.text) == (200, True), answer.text


def test_one_setting_limits_bodies_in_the_proxy_and_in_torchserve(stack: Stack):
    """The stack has MAX_BODY=20m; TorchServe's own limit is 16 MiB."""
    url = f"{stack.url('PORT')}/predictions/mnist"
    body = (ROOT / "models" / "mnist" / "sample.png").read_bytes()
    passed = requests.post(url, data=body + bytes(20 * 2**20 - len(body)), timeout=60)
    assert (passed.status_code, passed.json().get("type")) == (200, None)
    refused = requests.post(url, data=bytes(20 * 2**20 + 1), timeout=60)
    assert (refused.status_code, refused.json()["type"]) == (413, "BodyTooLarge")
    assert "20m" in refused.json()["message"]


def test_clients_of_kserve_and_sagemaker_get_answers(stack: Stack):
    instances = {"instances": [{"data": base64.b64encode(DIGIT).decode()}] * 2}
    answer = requests.post(f"{stack.url('PORT')}/v1/models/mnist:predict", json=instances, timeout=30)
    assert answer.status_code == 200, answer.text
    assert [first(each).label for each in answer.json()["predictions"]] == ["3", "3"]
    answer = repeated(lambda: requests.post(f"{stack.url('PORT')}/v1/models/mnist:explain", json=instances, timeout=60))
    assert answer.status_code == 200, answer.text
    assert [each["target"]["label"] for each in answer.json()["predictions"]] == ["3", "3"]
    answer = requests.post(f"{stack.url('PORT')}/invocations?model_name=mnist", data=DIGIT, timeout=30)
    assert (answer.status_code, first(answer.json()).label) == (200, "3"), answer.text


def test_tritons_client_gets_answers(stack: Stack):
    with triton.InferenceServerClient(stack.url("PORT").removeprefix("http://")) as client:
        assert client.is_server_ready()
        assert client.is_model_ready("mnist", "1.0")
        assert client.get_model_metadata("mnist")["inputs"][0]["name"] == "data"
        data = triton.InferInput("data", [2], "BYTES").set_data_from_numpy(numpy.array([DIGIT] * 2, numpy.object_))
        assert client.infer("mnist", [data]).as_numpy("top_3_classes")[:, 0].tolist() == [3, 3]
        with pytest.raises(InferenceServerException, match="Model not found: nothing"):
            client.infer("nothing", [data])


def test_model_without_workers_is_503_with_the_reason(stack: Stack):
    stack.client.scale("mnist", stack.client.describe("mnist")["modelVersion"], 0, 0)
    wait_for(lambda: stack.client.predict("mnist", DIGIT).status_code == 503)
    answer = stack.client.predict("mnist", DIGIT)
    assert (answer.json()["type"], answer.headers["Retry-After"]) == ("NoWorkers", "10")


def test_up_again_changes_nothing(stack: Stack):
    before = stack.container()
    assert "All models are READY" in stack.make("up", f"SERVICES={' '.join(SERVICES)}")
    assert stack.container() == before


def test_published_ports_are_inference_and_loopback_only(stack: Stack):
    for path in ("/models", "/models/mnist", "/metrics", "/api-description", "/workflows", "/page/"):
        assert requests.get(stack.url("PORT") + path, timeout=30).status_code == 404, path
    assert stack.client.models() == sorted(SHIPPED)
    published = {
        (binding["HostIp"], port)
        for service in SERVICES
        for port, bindings in stack.inspect(service)["NetworkSettings"]["Ports"].items()
        for binding in bindings or ()
    }
    ports = {"8080/tcp", "8443/tcp", "8081/tcp", "9090/tcp"}
    assert published == {("127.0.0.1", port) for port in ports}


def test_containers_run_without_privileges_or_build_tools(stack: Stack):
    assert stack.execute("id", "-u").strip() == "10001"
    for service in SERVICES:
        host = stack.inspect(service)["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert not host["Privileged"], service
        assert not [option for option in host["SecurityOpt"] if "unconfined" in option], service
    capabilities = stack.execute("sh", "-c", "grep -E '^Cap(Eff|Prm|Bnd)' /proc/1/status")
    assert {line.split()[1] for line in capabilities.splitlines()} == {"0" * 16}
    assert stack.execute("grep", "^Seccomp:", "/proc/1/status").split() == [
        "Seccomp:",
        "2",
    ]  # 2: a filter, Docker's own
    search = r"command -v gcc cc make; find / -xdev -path '*/.cache/*' 2>/dev/null"
    assert stack.execute("sh", "-c", f"{search}; ls .venv/bin/pip* .venv/bin/uv* 2>/dev/null; true") == ""


def test_prometheus_rules_pass_promtool(stack: Stack):
    image = stack.inspect("prometheus")["Config"]["Image"]
    mount = f"{ROOT / 'docker' / 'prometheus'}:/etc/prometheus:ro"
    promtool = ("run", "--rm", "--entrypoint", "promtool", "-v", mount, image)
    for check in queries.promtool_checks("/etc/prometheus"):
        docker(*promtool, *check)


def test_scaling_down_ends_the_processes_of_the_workers(stack: Stack):
    """TorchServe ends them with a program of the operating system, which an image may lack."""

    def processes() -> int:
        # [m] keeps this command itself out of the count
        count = "grep -l '[m]odel_service_worker' /proc/[0-9]*/cmdline 2>/dev/null | wc -l"
        return int(stack.execute("sh", "-c", count))

    others = processes() - stack.client.workers("text").ready
    assert others > 0
    scale(stack, "text", 3, 3)
    assert processes() == others + 3
    scale(stack, "text", 1, 1)
    wait_for(lambda: processes() == others + 1)


def test_killed_worker_loses_no_request_and_is_replaced(stack: Stack):
    scale(stack, "mnist", 2, 2)
    with traffic(stack) as load:
        load.wait_for(50)
        killed = kill_a_worker(stack)
        load.wait_for(100)
    print("killed worker:", dict(load.counts))
    assert set(load.counts) == {200}, load.counts

    def ready() -> set[int]:
        return {w["pid"] for w in stack.client.describe("mnist")["workers"] if w["status"] == "READY"}

    wait_for(lambda: len(now := ready()) == 2 and killed not in now, 60)


def test_torchserve_uses_the_native_transport(stack: Stack):
    log = stack.execute("grep", "-h", "Inference server with", "/tmp/run/logs/ts_log.log")
    assert "EpollServerSocketChannel" in log


def test_every_metric_that_a_panel_or_a_rule_names_has_samples(stack: Stack):
    """Make traffic of every kind: successful requests, rejected ones, and those of a killed worker."""
    with traffic(stack, clients=2) as load:
        kill_a_worker(stack)
        for folder in FOLDERS:
            for _ in range(3):
                assert stack.client.predict(folder.name, folder.sample_file.read_bytes()).status_code == 200
        assert stack.client.predict("image", b"not an image").status_code == 400
        load.wait_for(50)
        named = {
            metric
            for origin, expression in queries.queries().items()
            if "gpu" not in origin.lower()
            for metric in queries.metric_names(expression)
            if not metric.startswith("DCGM_") and metric not in ("ALERTS", "ALERTS_FOR_STATE")
        }
        assert len(named) > 20

        def missing() -> list[str]:
            return [metric for metric in sorted(named) if not prometheus(stack, metric)]

        deadline = time.monotonic() + 150
        while missing() and time.monotonic() < deadline:
            time.sleep(3)
        assert missing() == []
    for expression in queries.queries().values():
        prometheus(stack, expression)


def test_rollouts_forward_and_back_lose_no_request(stack: Stack, tmp_path: Path):
    """On the way back, clients go on until the replaced version is removed: after its responseTimeout, short here."""
    old = copy_from_image(stack, "mnist", tmp_path)
    new = with_response_timeout(10, reversioned(old, "1.1", tmp_path / "new.mar"))
    with ThreadPoolExecutor(1) as pool, traffic(stack) as load:
        load.wait_for(50)
        rolling = pool.submit(stack.roll_out, "mnist", new)
        wait_for(lambda: rolling.done() or stack.client.describe("mnist")["modelVersion"] == "1.1", 120)
        load.wait_for(50)
    check_rollout(stack, rolling.result(), load, "1.1")

    with traffic(stack) as load:
        load.wait_for(50)
        rolled = stack.roll_out("mnist", old)
        load.wait_for(50)
    check_rollout(stack, rolled, load, "1.0")


def with_response_timeout(seconds: int, archive: Path) -> Path:
    given = mar.read(archive, CONFIG_NAME)
    config, changes = re.subn(rb"(?m)^responseTimeout: \d+", b"responseTimeout: %d" % seconds, given)
    assert changes == 1
    return altered(archive, archive.with_name("timeout.mar"), {CONFIG_NAME: config})


def check_rollout(stack: Stack, rolled: subprocess.CompletedProcess, load: Traffic, version: str) -> None:
    print("rollout:", dict(load.counts))
    assert rolled.returncode == 0, rolled.stdout + rolled.stderr
    assert set(load.counts) == {200}, load.counts
    assert [described["modelVersion"] for described in stack.client.versions("mnist")] == [version]


def test_stop_answers_all_accepted_requests_and_start_restores_the_state(stack: Stack):
    """Only requests that come after the signal are rejected, with a Retry-After header.

    The proxy reloads when TorchServe drains, and closes idle connections. A client whose request meets that sends it
    again, on a new connection.
    """
    container = stack.container()
    served = [(v["modelVersion"], v["minWorkers"]) for v in stack.client.versions("mnist")]
    scale(stack, "text", 3, 3)
    rejections = []

    def collect_rejections() -> None:
        while not stopped.wait(0.05):
            answer = requests.post(f"{stack.url('PORT')}/predictions/mnist", data=DIGIT, timeout=60)
            if answer.status_code != 200:
                rejections.append((answer.status_code, "Retry-After" in answer.headers, "message" in answer.json()))

    stopped = threading.Event()
    collector = threading.Thread(target=collect_rejections)
    with traffic(stack, resends=True) as load:
        load.wait_for(50)
        collector.start()
        docker("stop", "--time", "120", container)
        load.wait_for(20)
        stopped.set()
    collector.join()
    print("stop:", dict(load.counts))
    assert set(load.counts) == {200, 503}, load.counts
    assert set(rejections) == {(503, True, True)}
    state = stack.inspect()["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0), stack.logs()
    assert "bundle: drained" in stack.logs()

    docker("start", container)
    stack.wait_until_healthy()
    assert [(v["modelVersion"], v["minWorkers"]) for v in stack.client.versions("mnist")] == served
    assert stack.client.workers("text").ready == 3
    wait_for(lambda: stack.client.predict("mnist", DIGIT).status_code == 200)


def test_dead_torchserve_restarts_its_container(stack: Stack):
    before = stack.inspect()["State"]["StartedAt"]
    stack.execute(
        "sh", "-c", 'for p in /proc/[0-9]*; do [ "$(cat $p/comm)" = java ] && kill -9 ${p#/proc/}; done; true'
    )
    wait_for(lambda: stack.inspect()["State"]["StartedAt"] != before, 120)
    stack.wait_until_healthy()
    wait_for(lambda: stack.client.predict("mnist", DIGIT).status_code == 200, 120)


def test_locust_without_the_web_interface_sends_requests(stack: Stack):
    stack.compose("--profile", "loadtest", "build", "locust")
    run = stack.compose(
        "--profile", "loadtest", "run", "--rm", "locust",
        "--headless", "--users", "4", "--run-time", "10s", "--host", "http://proxy:8080", "--only-summary",
    )  # fmt: skip
    total = re.search(r"Aggregated +(\d+) +(\d+)", run.stdout + run.stderr)
    assert total, run.stdout + run.stderr
    assert int(total[1]) > 0
    assert int(total[2]) == 0


def test_locust_with_the_web_interface_and_workers_sends_requests(stack: Stack):
    services = ("locust", "locust-worker")
    stack.compose("--profile", "loadtest", "up", "--detach", "--scale", "locust-worker=2", *services)
    url = stack.url("LOCUST_PORT")

    def figures() -> dict:
        try:
            return requests.get(f"{url}/stats/requests", timeout=10).json()
        except requests.RequestException:
            return {}

    wait_for(lambda: len(figures().get("workers", ())) == 2, 180)
    swarm = {"user_count": 4, "spawn_rate": 4, "host": "http://proxy:8080"}
    assert requests.post(f"{url}/swarm", data=swarm, timeout=60).json()["success"]
    wait_for(lambda: (now := figures().get("stats")) and now[-1]["num_requests"] > 50, 180)
    total = figures()["stats"][-1]
    assert (total["name"], total["num_failures"]) == ("Aggregated", 0)
    stack.compose("--profile", "loadtest", "rm", "--stop", "--force", *services)


def test_image_without_archives_serves_mounted_ones(stack: Stack, tmp_path: Path):
    store = tmp_path / "model_store"
    build_archive("mnist", store)
    image = f"{stack.project}-mounted"
    environment = {"SERVER_IMAGE": image, "ARCHIVES": "mounted"}
    Stack(stack.command, stack.environment | environment).compose("build", "torchserve")
    assert docker("run", "--rm", "--entrypoint", "ls", image, "archives") == ""
    mounts = [f"--volume={folder}:/opt/bundle/{folder.name}:ro" for folder in (store, ROOT / "models")]
    container = docker("run", "--detach", "--read-only", "--tmpfs", "/tmp", *mounts, image, "run", "mnist").strip()
    try:
        health = ("inspect", "--format", "{{.State.Health.Status}}", container)
        wait_for(lambda: docker(*health).strip() == "healthy", 180)
    finally:
        docker("rm", "--force", "--volumes", container)
        docker("rmi", image)
