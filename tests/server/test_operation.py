"""The commands `serve`, `stop`, `status` and `predict`, and their error messages."""

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
from tests.server.place import Place
from tests.shipped import SHIPPED
from tests.support import wait_for

KILLED = """
import os, signal, sys

if "model_service_worker" in sys.argv[0]:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_serve_again_changes_nothing(served):
    record = served.record()
    again = served.bundle("serve", *SHIPPED)
    assert again.returncode == 0, again.stderr
    assert "nothing has changed" in again.stdout
    assert again.stdout.endswith("or in a browser: make page\n")
    assert "built" not in again.stderr
    assert served.record() == record
    assert psutil.Process(record["pid"]).is_running()


def test_status_shows_version_and_workers_of_every_model(served):
    shown = served.bundle("status")
    assert "patches of the frontend: gather" in shown.stdout
    assert "GiB of memory (PSS)" in shown.stdout
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for name in SHIPPED:
        model = served.client.describe(name)
        row = [name, model["modelVersion"], len(model["workers"]), model["minWorkers"], model["maxWorkers"]]
        assert re.search(r"\W+".join(map(str, row)), shown.stdout), shown.stdout


def test_manage_calls_the_management_api_and_shows_its_answer(served):
    shown = served.bundle("manage", "get", "/models/mnist")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)[0]["modelName"] == "mnist"
    assert shown.stderr == ""
    refused = served.bundle("manage", "DELETE", "/models/nonesuch")
    assert refused.returncode == 1
    assert "TorchServe refused DELETE /models/nonesuch with 404: Model not found: nonesuch" in refused.stderr


@pytest.mark.parametrize(
    ("method", "path", "done"), [("GET", "/models", "Answered by"), ("PUT", "/models/mnist/1.0/set-default", "Changed")]
)
def test_manage_with_make_names_the_server(served, method: str, path: str, done: str):
    """make sets COMPOSE, so that it might have been a Docker stack."""
    shown = served.bundle("manage", method, path, COMPOSE="false")
    assert shown.returncode == 0, shown.stderr
    assert f"{done}: the server of {served.environment['RUN_DIR']} (PID " in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("FETCH", "/models"), "The method is 'FETCH'. It must be GET, POST, PUT or DELETE."),
        (("GET", "models"), "The path is 'models'. It must begin with a slash, such as /models."),
    ],
)
def test_manage_with_an_invalid_argument_exits_2(served, arguments: tuple[str, str], message: str):
    refused = served.bundle("manage", *arguments)
    assert (refused.returncode, message in refused.stderr) == (2, True), refused.stderr


def test_status_with_a_worker_missing_exits_1(served):
    """Kill the workers again whenever TorchServe has restarted them, until `status` has returned."""
    done = threading.Event()

    def workers() -> list[dict]:
        return served.client.describe("mnist")["workers"]

    def ready() -> list[dict]:
        return [worker for worker in workers() if worker["status"] == "READY"]

    def kill_workers() -> None:
        while not done.wait(0.1):
            for worker in workers():
                with suppress(psutil.Error, ValueError):
                    psutil.Process(worker["pid"]).kill()

    ended: list[subprocess.CompletedProcess] = []

    def both_show_none() -> bool:
        """On a busy machine, a worker may become READY before it is killed."""
        ended[:] = served.bundle("status"), served.bundle("status", "--json")
        counts = {model["name"]: model["workers"]["ready"] for model in json.loads(ended[1].stdout)["models"]}
        table, named = re.search(r"mnist\W+1\.0\W+0\W", ended[0].stdout), "mnist has 0 of " in ended[0].stderr
        return bool(table) and named and counts["mnist"] == 0

    killer = threading.Thread(target=kill_workers)
    killer.start()
    try:
        wait_for(lambda: not ready())
        wait_for(both_show_none, 200)
    finally:
        done.set()
        killer.join()
    shown, as_json = ended
    assert shown.returncode == 1, shown.stdout + shown.stderr
    assert as_json.returncode == 1, as_json.stderr
    assert json.loads(as_json.stdout)["healthy"] is False
    wait_for(lambda: workers() and len(ready()) == len(workers()), 200)  # TorchServe waits longer after each that ends
    assert served.bundle("status").returncode == 0


def test_status_as_json_agrees_with_the_management_api(served):
    shown = served.bundle("status", "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    status = json.loads(shown.stdout)
    assert (status["running"], status["healthy"], status["pid"]) == (True, True, served.record()["pid"])
    assert 2**28 < status["memory_bytes"] < 2**36
    assert status["memory_kind"] == "PSS"
    assert status["child_processes"] >= len(SHIPPED)
    assert [model["name"] for model in status["models"]] == sorted(SHIPPED)
    for model in status["models"]:
        described = served.client.describe(model["name"])
        workers = {"ready": len(described["workers"]), "min": described["minWorkers"], "max": described["maxWorkers"]}
        assert model["workers"] == workers
        assert (model["version"], model["batch_size"]) == (described["modelVersion"], described["batchSize"])
        assert (model["max_batch_delay_ms"], model["queue"]) == (described["maxBatchDelay"], 0)


def test_archive_prints_paths_to_stdout_and_progress_to_stderr(served):
    built = served.bundle("archive", "mnist")
    assert built.stdout == f"{served.store / 'mnist.mar'}\n"
    assert "up to date" in built.stderr


def test_predict_prints_the_answer_or_the_reason_of_a_rejection(served):
    for arguments in (["mnist"], ["mnist", "--grpc"]):
        shown = served.bundle("predict", *arguments)
        assert json.loads(shown.stdout)["top_3_classes"][0] == 3, shown.stderr
    rejected = served.bundle("predict", "mnist", "README.md")
    assert (rejected.returncode, rejected.stdout) == (1, "")
    assert "not an image" in rejected.stderr


@pytest.mark.parametrize("options", [[], ["--grpc"], ["--explain"], ["--output", "nothing.jsonl"]])
def test_predict_of_a_model_that_is_not_served_exits_3(served, options: list[str]):
    rejected = served.bundle("predict", "nonesuch", "README.md", *options)
    assert (rejected.returncode, rejected.stdout) == (3, "")
    assert rejected.stderr.startswith("error: nonesuch is not served; there are: audio, image, mnist, text.")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["status"], "mnist"),
        (["predict", "mnist"], '"top_3_classes":[3'),
        (["predict", "mnist", "--grpc"], '"top_3_classes":[3'),
    ],
    ids=["status", "predict", "predict --grpc"],
)
def test_installed_command_in_another_folder_works(served, tmp_path: Path, arguments: list[str], expected: str):
    script = Path(sys.executable).parent / "bundle"
    done = subprocess.run(
        [script, *arguments], cwd=tmp_path, env=served.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert expected in re.sub(r"\s", "", done.stdout)


def test_commands_without_a_server_say_that_none_runs(place):
    assert place.bundle("status").returncode == 3
    assert "not running" in place.bundle("stop").stdout
    predicted = place.bundle("predict", "mnist")
    assert predicted.returncode == 3
    assert "make serve" in predicted.stderr


def test_serve_with_an_invalid_address_names_it(place):
    failed = place.bundle("serve", "mnist", TS_INFERENCE_ADDRESS="127.0.0.1:9080")
    assert failed.returncode == 1
    assert "inference_address is '127.0.0.1:9080', and must look like http://127.0.0.1:8080." in failed.stderr


def test_serve_with_an_invalid_setting_leaves_the_server_running(served):
    failed = served.bundle("serve", "mnist", TS_JOB_QUEUE_SIZE="many")
    assert failed.returncode == 1
    assert "TS_JOB_QUEUE_SIZE is 'many', and must be a whole number, like 100." in failed.stderr
    assert served.client.models() == sorted(SHIPPED)


def test_serve_with_a_taken_port_leaves_the_server_running(served):
    """`serve` stops the old server only if a new one can start. The old server's own ports do not count as taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        failed = served.bundle("serve", "mnist", TS_METRICS_ADDRESS=f"http://127.0.0.1:{port}")
    assert failed.returncode == 1
    assert f"Port {port} (metrics_address) is taken by PID {os.getpid()}" in failed.stderr
    assert "is taken" not in failed.stderr.replace(f"Port {port} (metrics_address) is taken", "")
    assert served.client.models() == sorted(SHIPPED)


def test_serve_while_another_serve_runs_fails(place):
    place.run_dir.mkdir()
    with FileLock(place.run_dir / "lock"):
        failed = place.bundle("serve", "mnist")
    assert failed.returncode == 1
    assert "Another `make serve`" in failed.stderr


def test_sigterm_while_workers_start_leaves_nothing(place):
    command = [sys.executable, "-m", "bundle", "serve", "mnist"]
    serving = subprocess.Popen(command, cwd=MODELS.parent, env=place.environment, stdout=subprocess.DEVNULL)
    while not (place.run_dir / "server.json").exists():
        assert serving.poll() is None
        time.sleep(0.1)
    temporary = Path(place.record()["temporary"])
    serving.terminate()
    assert serving.wait(120) == 128 + signal.SIGTERM
    assert not place.processes()
    assert not temporary.exists()


def test_serve_with_a_taken_port_names_the_port_and_its_owner(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", place.ports["metrics_address"]))
        taken.listen()
        failed = place.bundle("serve", "mnist")
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert f"Port {place.ports['metrics_address']} (metrics_address) is taken by PID {os.getpid()}" in last
    assert not place.processes()


def test_serve_with_a_java_that_cannot_start_shows_its_console(place):
    """Java prints its error before TorchServe can log: here, that the initial heap is too large."""
    failed = place.bundle("serve", "mnist", JAVA_TOOL_OPTIONS="-Xms900g")
    assert failed.returncode == 1
    assert "did not start" in failed.stderr or "ended while it started" in failed.stderr
    assert "Initial heap size" in failed.stderr
    assert not place.processes()


@pytest.fixture
def elsewhere(place, tmp_path: Path) -> Path:
    """A models folder outside the repository, with a copy of MNIST named `digits`, for the server of `place`."""
    models = tmp_path / "my models"
    shutil.copytree(MODELS / "mnist", models / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    place.environment["BUNDLE_MODELS"] = str(models)
    return models


def test_serve_with_another_models_folder_serves_its_models(place, elsewhere: Path):
    served = place.bundle("serve")
    assert served.returncode == 0, served.stderr
    assert "digits: sample.png is '3', as expected" in served.stderr
    assert place.client.models() == ["digits"]
    [curl] = [line.strip() for line in served.stdout.splitlines() if "curl -T" in line]
    answer = subprocess.run(curl, shell=True, cwd=MODELS.parent, capture_output=True, text=True, timeout=60)
    assert json.loads(answer.stdout)["top_3_classes"][0] == 3, answer
    again = place.bundle("serve")
    assert "nothing has changed" in again.stdout, again.stderr
    predicted = place.bundle("predict", "digits")
    assert json.loads(predicted.stdout)["top_3_classes"][0] == 3, predicted.stderr
    unknown = place.bundle("predict", "mnist")
    assert f"There is no sample of mnist in {elsewhere}/; there are samples of: digits." in unknown.stderr


def test_serve_with_an_invalid_handler_setting_names_it(place, elsewhere: Path):
    config = elsewhere / "digits" / "model-config.yaml"
    config.write_text(config.read_text().replace("  threads: 1", "  threads: many"))
    failed = place.bundle("serve", "digits")
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "model-config.yaml, section handler: threads" in last
    assert not place.processes()


def test_serve_with_a_failing_worker_shows_its_error_and_leaves_nothing(place, elsewhere: Path):
    config = elsewhere / "digits" / "model-config.yaml"
    config.write_text(config.read_text().replace("  threads: 1", "  threads: 1\n  precision: int8"))
    failed = place.bundle("serve", "digits")
    assert failed.returncode == 1
    assert "A worker of digits failed" in failed.stderr.strip().splitlines()[-1]
    assert "FileNotFoundError: the archive has no model.int8.pt" in failed.stderr
    assert not place.processes()


def test_serve_with_an_unknown_model_lists_the_models(place):
    failed = place.bundle("serve", "nonesuch")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: There is no model 'nonesuch' in models/; there are: ")


def test_serve_whose_workers_are_killed_reports_the_free_memory(place: Place, elsewhere: Path):
    """So it looks when memory runs out: SIGKILL ends each worker that TorchServe starts."""
    handler = (MODELS.parent / "handlers" / "mnist.py").read_text()
    (elsewhere / "digits" / "handler.py").write_text(f"{handler}\n\n{KILLED}")
    config = elsewhere / "digits" / "model-config.yaml"
    config.write_text(config.read_text().replace("  handler: mnist", "  handler: ./handler.py"))
    failed = place.bundle("serve", "digits")
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert "Workers of digits end before they are READY" in last
    assert "GiB are free" in last
    assert not place.processes()


def test_serve_whose_workers_start_too_slowly_names_the_timeout(place, elsewhere: Path):
    config = elsewhere / "digits" / "model-config.yaml"
    config.write_text(re.sub(r"(?m)^startupTimeout: \d+", "startupTimeout: 1", config.read_text()))
    failed = place.bundle("serve", "digits")
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert "Workers of digits do not start within the startupTimeout" in last
    assert "GiB" not in last
    assert not place.processes()
