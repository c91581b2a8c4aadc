"""Three replicas behind the proxy: no fault of one, and no change of all, fails a request.

Clients keep their connections, as browsers do. nginx closes idle ones when the set of servers changes; a client that
sends at that moment gets no byte of an answer, opens a new connection, and sends its request again (`resends`).

To save time and memory, the replicas serve MNIST alone, with one worker each.
"""

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from bundle.catalog import select
from bundle.server.client import Client
from bundle.server.ports import free_ports
from tests.docker.proxy import used_servers
from tests.docker.stack import SERVICES, UNLIMITED, Stack, build_image, docker, running
from tests.support import reversioned, wait_for
from tests.traffic import Traffic

[MNIST] = select(["mnist"])
DIGIT = MNIST.sample_file.read_bytes()
COUNT = 3


def derived(base: str, tag: str, version: str, *command: str) -> str:
    """Build an image that differs from another one in its command and a label, with a faster check of its health."""
    arguments = ", ".join(f'"{argument}"' for argument in command)
    check = "import urllib.request as r; r.urlopen('http://127.0.0.1:8083/ready', timeout=4)"
    lines = f"FROM {base}\nLABEL version={version}\nCMD [{arguments}]\n"
    lines += f'HEALTHCHECK --interval=2s --start-period=5m CMD [".venv/bin/python", "-c", "{check}"]\n'
    subprocess.run(["docker", "build", "--tag", tag, "-"], input=lines.encode(), check=True, capture_output=True)
    return tag


def adjacent_ports(count: int) -> int:
    """Return the first of some free ports that follow each other."""
    while True:
        found = free_ports(count)
        if found[-1] - found[0] == count - 1:
            return found[0]


@pytest.fixture(scope="module")
def replicas() -> Iterator[Stack]:
    base = build_image()
    image = derived(base, "torchserve-test-replicas", "1", "run", "mnist", "--workers", "mnist=1")
    settings = {"SERVER_IMAGE": image, "REPLICAS": str(COUNT), "MANAGEMENT_PORT": str(adjacent_ports(COUNT))}
    settings["UPSTREAM_TIMEOUT"] = "100"  # longer than a test lets a replica hang
    with running(SERVICES, **settings, **UNLIMITED) as stack:
        yield stack
    docker("rmi", "--force", image, f"{image}:good")


def containers(stack: Stack) -> list[str]:
    return sorted(stack.containers())


def inspected(container: str, template: str) -> str:
    return docker("inspect", "--format", template, container).strip()


def wait_until_healthy(container: str) -> None:
    wait_for(lambda: inspected(container, "{{.State.Health.Status}}") == "healthy", 120)


def addresses(container: str) -> set[str]:
    return set(inspected(container, "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}").split())


def used(stack: Stack) -> set[str]:
    """Return the addresses to which the proxy sends predictions."""
    return used_servers(stack.container("proxy"))


def clients(stack: Stack) -> list[Client]:
    """Return clients of the replicas' own management ports."""
    first = int(stack.environment["MANAGEMENT_PORT"])
    return [Client(stack.url("PORT"), f"http://127.0.0.1:{first + offset}") for offset in range(COUNT)]


def traffic(stack: Stack) -> Traffic:
    return Traffic(f"{stack.url('PORT')}/predictions/mnist", DIGIT, '"top_3_classes": [3', pause=0.05, resends=True)


def check(load: Traffic, what: str) -> None:
    print(f"{what}:", dict(load.counts), "sent again:", load.resent)
    assert set(load.counts) == {200}, load.counts
    assert load.resent <= 20  # the servers change a few times, and each time, few of the clients send at that moment


def up(stack: Stack, **settings: str) -> subprocess.CompletedProcess:
    """Run `make up` with other settings, and return how it ended."""
    changed = Stack(stack.command, {**stack.environment, **settings})
    command = ["make", "up", f"SERVICES={' '.join(SERVICES)}", f"PROJECT={stack.project}"]
    return subprocess.run(command, env=changed.environment, capture_output=True, text=True, timeout=600)


def manage(stack: Stack, call: str, tmp_path: Path) -> subprocess.CompletedProcess:
    command = ["make", "manage", f"CALL={call}", f"PROJECT={stack.project}"]
    environment = {**stack.environment, "RUN_DIR": str(tmp_path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_prometheus_has_every_replica_and_up_again_changes_nothing(replicas: Stack):
    before = containers(replicas)
    assert len(before) == COUNT
    done = up(replicas)
    assert done.returncode == 0, done.stdout + done.stderr
    assert containers(replicas) == before

    def instances(job: str) -> set[str]:
        url = f"{replicas.url('PROMETHEUS_PORT')}/api/v1/query"
        answer = requests.get(url, params={"query": f'up{{job="{job}"}} == 1'}, timeout=30).json()
        return {sample["metric"]["instance"] for sample in answer["data"]["result"]}

    wait_for(lambda: instances("torchserve") == instances("bundle") == used(replicas))
    assert len(used(replicas)) == COUNT


def test_killed_and_restarted_replicas_fail_no_request(replicas: Stack):
    killed, restarted, _ = containers(replicas)
    with traffic(replicas) as load:
        load.wait_for(50)
        docker("kill", killed)
        load.wait_for(50)
        docker("restart", "--time", "120", restarted)
        docker("start", killed)
        load.wait_for(50)
        for container in (killed, restarted):
            wait_until_healthy(container)
        wait_for(lambda: len(used(replicas)) == COUNT)
        load.wait_for(50)
    check(load, "killed, restarted")


def test_hung_replica_is_left_out_and_comes_back(replicas: Stack):
    """The requests that it had are answered when it goes on, within UPSTREAM_TIMEOUT."""
    hung = containers(replicas)[0]
    java = 'for p in /proc/[0-9]*; do [ "$(cat $p/comm)" = java ] && kill -%s ${p#/proc/}; done; true'
    with traffic(replicas) as load:
        load.wait_for(50)
        docker("exec", hung, "sh", "-c", java % "STOP")
        try:
            wait_for(lambda: not used(replicas) & addresses(hung))
            time.sleep(3)  # nginx reads the file
            # clients whose request hangs wait; new ones are served
            with traffic(replicas) as others:
                others.wait_for(100)
            check(others, "while one hangs")
        finally:
            docker("exec", hung, "sh", "-c", java % "CONT")
        wait_for(lambda: used(replicas) & addresses(hung))
        load.wait_for(50)
    check(load, "hung")
    assert load.longest > 2, "no request was in the replica that hung"


def test_change_from_outside_is_refused_and_manage_reaches_every_replica(replicas: Stack, tmp_path: Path):
    client, *_ = clients(replicas)
    refused = requests.put(f"{client.management}/models/mnist?min_worker=2", timeout=30)
    assert (refused.status_code, refused.json()["type"]) == (409, "OneOfSeveralReplicas")
    assert 'make manage CALL="PUT /models/mnist?min_worker=2"' in refused.json()["message"]
    for method, path in (("POST", "/models?url=mnist.mar&model_name=more"), ("DELETE", "/models/mnist")):
        assert requests.request(method, client.management + path, timeout=30).status_code == 409, method

    done = manage(replicas, "POST /models?url=mnist.mar&model_name=more", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(inspected(each, "{{.Name}}").lstrip("/") for each in containers(replicas))
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["replica"] for each in answers] == names
    assert all("registered" in each["answer"]["status"] for each in answers), answers
    assert f"Changed: {', '.join(names)}" in done.stderr
    assert [each.models() for each in clients(replicas)] == [["mnist", "more"]] * COUNT

    # one replica has the change already, as after a call that reached only some
    first, *others = containers(replicas)
    docker("exec", first, ".venv/bin/python", "-m", "bundle", "manage", "DELETE", "/models/more")
    done = manage(replicas, "DELETE /models/more", tmp_path)
    assert done.returncode != 0
    assert "TorchServe refused DELETE /models/more with 404" in done.stderr
    first, *others = (inspected(each, "{{.Name}}").lstrip("/") for each in (first, *others))
    assert f"The call failed on {first}, as said above, and succeeded on {', '.join(sorted(others))}." in done.stderr
    assert [each.models() for each in clients(replicas)] == [["mnist"]] * COUNT


def test_get_is_answered_while_a_replica_is_stopped_and_a_change_is_refused(replicas: Stack, tmp_path: Path):
    stopped, *_ = containers(replicas)
    name = inspected(stopped, "{{.Name}}").lstrip("/")
    docker("stop", "--time", "120", stopped)
    try:
        done = manage(replicas, "GET /models", tmp_path)
        refused = manage(replicas, "PUT /models/mnist?min_worker=1", tmp_path)
    finally:
        docker("start", stopped)
        wait_until_healthy(stopped)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == COUNT - 1
    start = f"Start it: docker start {name}\n"
    assert refused.returncode == 2, refused.stdout + refused.stderr  # of make
    assert f"No answer: {name} is not running. {start}" in done.stderr
    assert f"error: {name} is not running, so not all replicas would change. {start}" in refused.stderr


def versions(stack: Stack) -> list[list[str]]:
    return [[described["modelVersion"] for described in each.versions("mnist")] for each in clients(stack)]


def defaults(stack: Stack) -> list[str]:
    return [each.describe("mnist")["modelVersion"] for each in clients(stack)]


def test_rollout_reaches_all_replicas_or_none(replicas: Stack, tmp_path: Path):
    _, second, _ = sorted(containers(replicas), key=lambda each: inspected(each, "{{.Name}}"))
    bundle = ("exec", second, ".venv/bin/python", "-m", "bundle")
    new = tmp_path / "new.mar"
    docker("cp", f"{second}:/opt/bundle/archives/mnist.mar", str(tmp_path / "mnist.mar"))
    reversioned(tmp_path / "mnist.mar", "1.1", new)
    with ThreadPoolExecutor(1) as pool, traffic(replicas) as load:
        load.wait_for(50)
        # one replica has the version already, so that the rollout fails there
        content = new.read_bytes()
        write = ["docker", "exec", "-i", second, "sh", "-c", "cat >model_store/taken.mar"]
        subprocess.run(write, input=content, check=True)
        docker(*bundle, "manage", "POST", "/models?url=taken.mar&model_name=mnist&initial_workers=0")
        failed = replicas.roll_out("mnist", new)
        assert failed.returncode == 1
        assert "Version 1.1 of mnist is served already" in failed.stderr
        assert inspected(second, "{{.Name}}").lstrip("/") in failed.stderr
        assert sorted(versions(replicas)) == [["1.0"], ["1.0"], ["1.0", "1.1"]]
        assert defaults(replicas) == ["1.0"] * COUNT
        docker(*bundle, "manage", "DELETE", "/models/mnist/1.1")
        docker("exec", second, "rm", "model_store/taken.mar")

        rolling = pool.submit(replicas.roll_out, "mnist", new)
        wait_for(lambda: rolling.done() or defaults(replicas) == ["1.1"] * COUNT, 120)
        load.wait_for(50)
    check(load, "rollouts")
    # without open connections, the old version is idle at once
    rolled = rolling.result()
    assert rolled.returncode == 0, rolled.stdout + rolled.stderr
    assert versions(replicas) == [["1.1"]] * COUNT
    left = docker("exec", second, "sh", "-c", "cd model_store; ls *1.1* taken.mar 2>/dev/null; true")
    assert left == ""


def test_replicas_are_replaced_one_after_the_other_and_a_bad_image_costs_one(replicas: Stack):
    served = versions(replicas)
    image = replicas.environment["SERVER_IMAGE"]
    good = f"{image}:good"
    docker("tag", image, good)  # a name, because BuildKit takes no id in FROM
    with traffic(replicas) as load:
        load.wait_for(50)
        before = containers(replicas)
        derived(image, image, "2", "run", "nonesuch")
        failed = up(replicas)
        assert failed.returncode != 0
        assert "The new replica does not become ready" in failed.stderr
        assert "There is no model 'nonesuch'" in failed.stderr
        assert len(set(before) & set(containers(replicas))) == COUNT - 1

        derived(good, image, "3", "run", "mnist", "--workers", "mnist=1")
        done = up(replicas)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not set(before) & set(containers(replicas))
        load.wait_for(50)
    check(load, "replaced")
    assert versions(replicas) == served  # not that of the image: the rollout reached those that were replaced
