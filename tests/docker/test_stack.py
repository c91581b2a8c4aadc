"""What users of the stack see: predictions, metrics, and nothing lost when something is killed, rolled or stopped.

One stack has it all in this order, as a day has it: what a test changes, the next one finds.
"""

import threading
import time
from pathlib import Path

import pytest
import requests

from bundle.catalog import select
from bundle.server.client import check_sample
from tests import queries
from tests.docker.conftest import SERVICES
from tests.docker.stack import ROOT, Stack, docker
from tests.support import Traffic, reversioned, wait_for

FOLDERS = select(["mnist", "image", "audio", "text"])
MNIST = FOLDERS[0]
DIGIT = MNIST.sample_file.read_bytes()


def traffic(stack: Stack, **options) -> Traffic:
    return Traffic(f"{stack.url('PORT')}/predictions/mnist", DIGIT, '"top_3_classes": [3', **options)


def prometheus(stack: Stack, query: str) -> list[dict]:
    answer = requests.get(f"{stack.url('PROMETHEUS_PORT')}/api/v1/query", params={"query": query}, timeout=30).json()
    assert answer["status"] == "success", (query, answer)
    return answer["data"]["result"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_predictions_through_the_proxy(stack: Stack, folder):
    assert check_sample(stack.client, folder) == folder.bundle.expect


def test_up_again_changes_nothing(stack: Stack):
    before = stack.container()
    assert "All models are READY" in stack.make("up", f"SERVICES={' '.join(SERVICES)}")
    assert stack.container() == before


def test_only_inference_is_published(stack: Stack):
    for path in ("/models", "/models/mnist", "/metrics", "/api-description", "/workflows"):
        assert requests.get(stack.url("PORT") + path, timeout=30).status_code == 404, path
    assert stack.client.models() == ["audio", "image", "mnist", "text"]
    published = {
        (binding["HostIp"], port)
        for service in ("torchserve", "proxy", "prometheus")
        for port, bindings in stack.inspect(service)["NetworkSettings"]["Ports"].items()
        for binding in bindings or ()
    }
    ports = {"8080/tcp", "8443/tcp", "8081/tcp", "9090/tcp"}
    assert published == {("127.0.0.1", port) for port in ports}


def test_the_container_is_confined(stack: Stack):
    assert stack.execute("id", "-u").strip() == "10001"
    for service in ("torchserve", "proxy", "prometheus"):
        host = stack.inspect(service)["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert not host["Privileged"], service
        assert not [option for option in host["SecurityOpt"] if "unconfined" in option], service
    capabilities = stack.execute("sh", "-c", "grep -E '^Cap(Eff|Prm|Bnd)' /proc/1/status")
    assert {line.split()[1] for line in capabilities.splitlines()} == {"0" * 16}
    assert stack.execute("grep", "^Seccomp:", "/proc/1/status").split() == ["Seccomp:", "2"]  # Docker's filter
    search = (
        r"command -v gcc cc make; find / -xdev -path '*/.cache/pip/*' 2>/dev/null; ls .venv/bin/pip* 2>/dev/null; true"
    )
    assert stack.execute("sh", "-c", search) == ""


def test_the_rules_pass_promtool(stack: Stack):
    image = stack.inspect("prometheus")["Config"]["Image"]
    mount = f"{ROOT / 'docker' / 'prometheus'}:/etc/prometheus:ro"
    promtool = ("run", "--rm", "--entrypoint", "promtool", "-v", mount, image)
    for check in queries.promtool_checks("/etc/prometheus"):
        docker(*promtool, *check)


def test_scaling_down_ends_the_workers(stack: Stack):
    """Their processes, too: TorchServe asks a program for that, which an image may lack."""

    def processes() -> int:
        count = "grep -l '[m]odel_service_worker' /proc/[0-9]*/cmdline 2>/dev/null | wc -l"  # not the shell itself
        return int(stack.execute("sh", "-c", count))

    others = processes() - stack.client.workers("text").ready
    assert others > 0
    stack.client.scale("text", "1.0", 3, 3)
    wait_for(lambda: stack.client.workers("text").ready == 3, 120)
    assert processes() == others + 3
    stack.client.scale("text", "1.0", 1, 1)  # as many as the maximum stay
    wait_for(lambda: processes() == others + 1)


def test_a_killed_worker_costs_only_what_it_had(stack: Stack):
    stack.client.scale("mnist", "1.0", 2, 2)
    wait_for(lambda: stack.client.workers("mnist").ready == 2, 120)
    before = {worker["pid"] for worker in stack.client.describe("mnist")["workers"]}
    with traffic(stack) as load:
        load.wait_for(50)
        stack.execute("sh", "-c", f"kill -9 {min(before)}")
        load.wait_for(100)
    print("killed worker:", dict(load.counts))
    assert set(load.counts) <= {200, 500, 503, 507}, load.counts
    assert load.counts.total() - load.counts[200] <= 4  # one request of each client at most

    def ready() -> set[int]:
        return {w["pid"] for w in stack.client.describe("mnist")["workers"] if w["status"] == "READY"}

    wait_for(lambda: len(now := ready()) == 2 and min(before) not in now, 60)


def test_the_native_transport_is_used(stack: Stack):
    log = stack.execute("grep", "-h", "Inference server with", "/tmp/run/logs/ts_log.log")
    assert "EpollServerSocketChannel" in log


def test_every_metric_that_a_panel_or_a_rule_names_has_samples(stack: Stack):
    """After traffic of every kind: right, wrong, and failed when a worker was killed, by the test before."""
    with traffic(stack, clients=2) as load:
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
    for origin, expression in queries.queries().items():
        prometheus(stack, expression), origin


def test_a_rollout_loses_nothing(stack: Stack, tmp_path: Path):
    archive = tmp_path / "mnist.mar"
    docker("cp", f"{stack.container()}:/opt/bundle/archives/mnist.mar", str(archive))
    new = reversioned(archive, "1.1", tmp_path / "new.mar")
    with traffic(stack) as load:
        load.wait_for(50)
        rolled = stack.roll_out("mnist", new)
        load.wait_for(50)
    print("rollout:", dict(load.counts))
    assert rolled.returncode == 0, rolled.stdout + rolled.stderr
    assert set(load.counts) == {200}, load.counts
    assert [version["modelVersion"] for version in stack.client.versions("mnist")] == ["1.1"]


def test_a_stop_answers_what_was_accepted_and_a_start_remembers(stack: Stack):
    """Refused are only requests that came after the signal, and those are told when to come again."""
    container = stack.container()
    served = [(v["modelVersion"], v["minWorkers"]) for v in stack.client.versions("mnist")]
    stack.client.scale("text", "1.0", 2, 2)
    wait_for(lambda: stack.client.workers("text").ready == 2, 120)
    refusals = []

    def watch() -> None:
        while not stopped.wait(0.05):
            answer = requests.post(f"{stack.url('PORT')}/predictions/mnist", data=DIGIT, timeout=60)
            if answer.status_code != 200:
                refusals.append((answer.status_code, "Retry-After" in answer.headers, "message" in answer.json()))

    stopped = threading.Event()
    watcher = threading.Thread(target=watch)
    with traffic(stack) as load:
        load.wait_for(50)
        watcher.start()
        docker("stop", "--time", "120", container)
        load.wait_for(20)
        stopped.set()
    watcher.join()
    print("stop:", dict(load.counts))
    assert set(load.counts) == {200, 503}, load.counts
    assert set(refusals) == {(503, True, True)}
    state = stack.inspect()["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0), stack.logs()
    assert "bundle: drained" in stack.logs()

    docker("start", container)
    stack.wait_until_healthy()
    assert [(v["modelVersion"], v["minWorkers"]) for v in stack.client.versions("mnist")] == served
    assert stack.client.workers("text").ready == 2
    wait_for(lambda: stack.client.predict("mnist", DIGIT).status_code == 200, 30)


def test_a_dead_torchserve_is_started_again(stack: Stack):
    before = stack.inspect()["State"]["StartedAt"]
    stack.execute(
        "sh", "-c", 'for p in /proc/[0-9]*; do [ "$(cat $p/comm)" = java ] && kill -9 ${p#/proc/}; done; true'
    )
    wait_for(lambda: stack.inspect()["State"]["StartedAt"] != before, 60)
    stack.wait_until_healthy()
    wait_for(lambda: stack.client.predict("mnist", DIGIT).status_code == 200, 120)


def test_locust(stack: Stack):
    stack.compose("--profile", "loadtest", "build", "locust")
    run = stack.compose(
        "--profile", "loadtest", "run", "--rm", "locust",
        "--headless", "--users", "4", "--run-time", "10s", "--host", "http://proxy:8080", "--only-summary",
    )  # fmt: skip
    assert "Aggregated" in run.stdout + run.stderr


def test_locust_with_workers(stack: Stack):
    """As people use it: the master's web interface, and workers that make the load."""
    services = ("locust", "locust-worker")
    stack.compose("--profile", "loadtest", "up", "--detach", "--scale", "locust-worker=2", *services)
    url = stack.url("LOCUST_PORT")

    def figures() -> dict:
        try:
            return requests.get(f"{url}/stats/requests", timeout=10).json()
        except requests.RequestException:
            return {}

    wait_for(lambda: len(figures().get("workers", ())) == 2)
    load = {"user_count": 4, "spawn_rate": 4, "host": "http://proxy:8080"}
    assert requests.post(f"{url}/swarm", data=load, timeout=10).json()["success"]
    wait_for(lambda: (now := figures().get("stats")) and now[-1]["num_requests"] > 50)
    total = figures()["stats"][-1]
    assert (total["name"], total["num_failures"]) == ("Aggregated", 0)
    stack.compose("--profile", "loadtest", "rm", "--stop", "--force", *services)


def test_archives_can_be_mounted(stack: Stack):
    """An image without archives, on those of this checkout."""
    image = f"{stack.project}-mounted"
    environment = {"SERVER_IMAGE": image, "ARCHIVES": "mounted"}
    Stack(stack.command, stack.environment | environment).compose("build", "torchserve")
    assert docker("run", "--rm", "--entrypoint", "ls", image, "archives") == ""
    mounts = [f"--volume={ROOT / name}:/opt/bundle/{name}:ro" for name in ("model_store", "models")]
    container = docker("run", "--detach", "--read-only", "--tmpfs", "/tmp", *mounts, image, "run", "mnist").strip()
    try:
        health = ("inspect", "--format", "{{.State.Health.Status}}", container)
        wait_for(lambda: docker(*health).strip() == "healthy", 180)
    finally:
        docker("rm", "--force", "--volumes", container)
        docker("rmi", image)
