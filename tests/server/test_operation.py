"""`serve`, `stop`, `status`: what they do when all is well, and what they say when it is not."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from bundle.paths import MODELS
from tests.server.conftest import SHIPPED
from tests.support import wait_for


def test_serving_again_changes_nothing(served):
    record = json.loads((Path(served.environment["RUN_DIR"]) / "server.json").read_text())
    again = served.bundle("serve")
    assert again.returncode == 0, again.stderr
    assert "nothing has changed" in again.stdout
    assert "built" not in again.stderr
    assert json.loads((Path(served.environment["RUN_DIR"]) / "server.json").read_text()) == record
    assert psutil.Process(record["pid"]).is_running()


def test_status(served):
    shown = served.bundle("status")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for name in SHIPPED:
        model = served.client.describe(name)
        row = [name, model["modelVersion"], len(model["workers"]), model["minWorkers"], model["maxWorkers"]]
        assert re.search(r"\W+".join(map(str, row)), shown.stdout), shown.stdout


def test_status_with_a_worker_missing_exits_1(served):
    """Workers are killed whenever TorchServe has started them again, until `status` has looked."""
    ended = threading.Event()

    def workers() -> list[dict]:
        return served.client.describe("mnist")["workers"]

    def ready() -> list[dict]:
        return [worker for worker in workers() if worker["status"] == "READY"]

    def kill_workers() -> None:
        while not ended.wait(0.1):
            for worker in workers():
                with suppress(psutil.Error, ValueError):
                    psutil.Process(worker["pid"]).kill()

    killer = threading.Thread(target=kill_workers)
    killer.start()
    try:
        wait_for(lambda: not ready())
        shown = served.bundle("status")
    finally:
        ended.set()
        killer.join()
    assert shown.returncode == 1, shown.stdout + shown.stderr
    assert re.search(r"mnist\W+1\.0\W+0\W", shown.stdout), shown.stdout
    wait_for(lambda: len(ready()) == len(workers()))
    assert served.bundle("status").returncode == 0


def test_status_as_json_says_what_the_management_api_says(served):
    shown = served.bundle("status", "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    status = json.loads(shown.stdout)
    record = json.loads((Path(served.environment["RUN_DIR"]) / "server.json").read_text())
    assert (status["running"], status["healthy"], status["pid"]) == (True, True, record["pid"])
    assert 2**28 < status["memory_bytes"] < 2**36
    assert status["child_processes"] >= len(SHIPPED)
    assert [model["name"] for model in status["models"]] == sorted(SHIPPED)
    for model in status["models"]:
        described = served.client.describe(model["name"])
        workers = {"ready": len(described["workers"]), "min": described["minWorkers"], "max": described["maxWorkers"]}
        assert model["workers"] == workers
        assert (model["version"], model["batch_size"]) == (described["modelVersion"], described["batchSize"])
        assert (model["max_batch_delay_ms"], model["queue"]) == (described["maxBatchDelay"], 0)


def test_status_without_a_worker_is_1(served):
    """TorchServe starts a killed worker again, later each time: it is missing for a moment."""
    [worker, *_] = served.client.describe("mnist")["workers"]
    psutil.Process(worker["pid"]).kill()
    try:
        wait_for(lambda: served.client.workers("mnist").ready < served.client.workers("mnist").wanted, 10)
        shown = served.bundle("status", "--json")
    finally:
        wait_for(lambda: served.client.workers("mnist").ready == served.client.workers("mnist").wanted)
    assert shown.returncode == 1
    status = json.loads(shown.stdout)
    assert status["healthy"] is False
    [mnist] = [model for model in status["models"] if model["name"] == "mnist"]
    assert mnist["workers"]["ready"] < mnist["workers"]["min"]


def test_results_go_to_standard_output_and_progress_to_standard_error(served):
    built = served.bundle("archive", "mnist")
    assert built.stdout == "model_store/mnist.mar\n"
    assert "up to date" in built.stderr


def test_predict_from_the_command_line(served):
    for arguments in (["mnist"], ["mnist", "--grpc"]):
        shown = served.bundle("predict", *arguments)
        assert json.loads(shown.stdout)["top_3_classes"][0] == 3, shown.stderr
    wrong = served.bundle("predict", "mnist", "README.md")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "not an image" in wrong.stderr


@pytest.mark.parametrize("arguments", [["status"], ["predict", "mnist"], ["predict", "mnist", "--grpc"]])
def test_the_command_works_in_any_folder(served, tmp_path: Path, arguments: list[str]):
    script = Path(sys.executable).parent / "bundle"
    done = subprocess.run(
        [script, *arguments], cwd=tmp_path, env=served.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "mnist" in done.stdout or json.loads(done.stdout)["top_3_classes"][0] == 3


def test_nothing_runs(place):
    assert place.bundle("status").returncode == 3
    assert "not running" in place.bundle("stop").stdout
    asked = place.bundle("predict", "mnist")
    assert asked.returncode == 3
    assert "make serve" in asked.stderr


def test_an_address_that_is_none_is_named(place):
    failed = place.bundle("serve", "mnist", TS_INFERENCE_ADDRESS="127.0.0.1:9080")
    assert failed.returncode == 1
    assert "inference_address is '127.0.0.1:9080', and must look like http://127.0.0.1:8080." in failed.stderr


def test_a_setting_that_is_none_ends_nothing(served):
    failed = served.bundle("serve", "mnist", TS_JOB_QUEUE_SIZE="many")
    assert failed.returncode == 1
    assert "TS_JOB_QUEUE_SIZE is 'many', and must be a whole number, like 100." in failed.stderr
    assert served.client.models() == sorted(SHIPPED)


def test_a_port_of_another_ends_nothing(served):
    """What runs is stopped for a new start only where that can come up; its own ports are no hindrance."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        failed = served.bundle("serve", "mnist", TS_METRICS_ADDRESS=f"http://127.0.0.1:{port}")
    assert failed.returncode == 1
    assert f"Port {port} (metrics_address) is taken by PID {os.getpid()}" in failed.stderr
    assert "is taken" not in failed.stderr.replace(f"Port {port} (metrics_address) is taken", "")
    assert served.client.models() == sorted(SHIPPED)


def test_one_serve_at_a_time(place):
    Path(place.environment["RUN_DIR"]).mkdir()
    with FileLock(Path(place.environment["RUN_DIR"]) / "lock"):
        failed = place.bundle("serve", "mnist")
    assert failed.returncode == 1
    assert "Another `make serve`" in failed.stderr


def test_an_ended_serve_leaves_nothing(place):
    """SIGTERM, while the workers start."""
    command = [sys.executable, "-m", "bundle", "serve", "mnist"]
    serving = subprocess.Popen(command, cwd=MODELS.parent, env=place.environment, stdout=subprocess.DEVNULL)
    record = Path(place.environment["RUN_DIR"]) / "server.json"
    while not record.exists():
        assert serving.poll() is None
        time.sleep(0.1)
    temporary = Path(json.loads(record.read_text())["temporary"])
    serving.terminate()
    assert serving.wait(60) == 128 + signal.SIGTERM
    assert not children_of(place)
    assert not temporary.exists()


def test_a_taken_port_is_named(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", place.ports["metrics_address"]))
        taken.listen()
        failed = place.bundle("serve", "mnist")
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert f"Port {place.ports['metrics_address']} (metrics_address) is taken by PID {os.getpid()}" in last
    assert not children_of(place)


def test_a_java_that_will_not_run_is_shown(place):
    """It says why on its console, before TorchServe can log: a heap larger than the limit, here."""
    failed = place.bundle("serve", "mnist", JAVA_TOOL_OPTIONS="-Xms900g")
    assert failed.returncode == 1
    assert "did not start" in failed.stderr or "ended while it started" in failed.stderr
    assert "Initial heap size" in failed.stderr
    assert not children_of(place)


@pytest.fixture
def elsewhere(place, tmp_path: Path) -> Path:
    """A models folder outside of the repository, with a copy of MNIST under another name, for the server of `place`."""
    models = tmp_path / "my models"
    shutil.copytree(MODELS / "mnist", models / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    place.environment.update(BUNDLE_MODELS=str(models), TS_MODEL_STORE=str(tmp_path / "store"))
    return models


def test_serve_with_another_models_folder_serves_its_models(place, elsewhere: Path):
    served = place.bundle("serve")
    assert served.returncode == 0, served.stderr
    assert "digits: sample.png is '3', as expected" in served.stdout
    assert place.client.models() == ["digits"]
    [curl] = [line.strip() for line in served.stdout.splitlines() if "curl -T" in line]
    answer = subprocess.run(curl, shell=True, cwd=MODELS.parent, capture_output=True, text=True, timeout=60)
    assert json.loads(answer.stdout)["top_3_classes"][0] == 3, answer
    again = place.bundle("serve")
    assert "nothing has changed" in again.stdout, again.stderr
    asked = place.bundle("predict", "digits")
    assert json.loads(asked.stdout)["top_3_classes"][0] == 3, asked.stderr
    unknown = place.bundle("predict", "mnist")
    assert f"There is no model 'mnist' in {elsewhere}/; there are: digits." in unknown.stderr


def test_serve_with_a_handler_that_fails_shows_it_and_leaves_nothing(place, elsewhere: Path):
    config = elsewhere / "digits" / "model-config.yaml"
    config.write_text(config.read_text().replace("  threads: 1", "  threads: 1\n  precision: int8"))
    failed = place.bundle("serve", "digits")
    assert failed.returncode == 1
    assert "A worker of digits failed" in failed.stderr.strip().splitlines()[-1]
    assert "FileNotFoundError: the archive has no model.int8.pt" in failed.stderr
    assert not children_of(place)


def test_an_unknown_model_is_named(place):
    failed = place.bundle("serve", "nonesuch")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: There is no model 'nonesuch' in models/; there are: ")


def children_of(place) -> list[psutil.Process]:
    """What runs with this place's run folder in its environment, the test's own process aside."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RUN_DIR") == place.environment["RUN_DIR"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_workers_that_are_killed_are_told_from_those_that_fail(place):
    """Out of memory looks like this: the kernel kills a worker, TorchServe starts another, and so on."""
    ended = threading.Event()

    def kill_workers() -> None:
        while not ended.wait(0.2):
            for process in children_of(place):
                if "model_service_worker" in " ".join(command_line(process)):
                    process.kill()

    killer = threading.Thread(target=kill_workers)
    killer.start()
    try:
        failed = place.bundle("serve", "mnist")
    finally:
        ended.set()
        killer.join()
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert "Workers of mnist end before they are READY" in last
    assert "GiB are free" in last
    assert not children_of(place)


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
