"""Load tests of a few seconds, as `make loadtest` runs them."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import yaml

from bundle.paths import ROOT
from tests.server.place import Place
from tests.support import wait_for

FILES = {
    "report.html",
    "run_stats.csv",
    "run_stats_history.csv",
    "run_points.csv",
    "run_latency.png",
    "run_latency.svg",
}
LENIENT = {"defaults": {"p99_ms": 60_000, "failures": 0, "wrong": 0, "throughput": 0.05}}


def command(place: Place, results: Path, limits: dict, *arguments: str) -> list[str]:
    file = results.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(limits))
    options = ("--host", place.url("inference_address"), "--results", str(results), "--thresholds", str(file))
    return [sys.executable, "-m", "loadtest", "run", *arguments, *options]


def loadtest(*arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(command(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def stats(results: Path) -> dict[str, dict[str, str]]:
    """Return locust's own statistics, by model."""
    with (results / "run_stats.csv").open() as file:
        return {row["Name"].removeprefix("/predictions/"): row for row in csv.DictReader(file)}


def test_run_within_its_thresholds_exits_0_and_writes_its_report(served: Place, tmp_path: Path):
    results = tmp_path / "run"
    run = loadtest(served, results, LENIENT, "mnist=2", "text", "--users", "6", "--duration", "8s")
    assert run.returncode == 0, run.stdout + run.stderr
    assert {file.name for file in results.iterdir()} >= FILES
    with (results / "run_points.csv").open() as file:
        points = list(csv.DictReader(file))
    assert [(point["model"], point["users"]) for point in points] == [
        (model, users) for model in ("mnist", "text") for users in ("3", "6")
    ]
    assert all(float(point["throughput"]) > 0 and point["failed"] == "0" for point in points)
    assert int(stats(results)["mnist"]["Request Count"]) > 0
    again = loadtest(served, results, LENIENT, "mnist")
    assert again.returncode == 2
    assert "holds the results of another run" in again.stderr


def test_run_of_models_on_request_checks_the_answers_to_their_samples(served_on_request: Place, tmp_path: Path):
    models = ("molecule", "avdigits", "cells", "membrane")
    run = loadtest(served_on_request, tmp_path / "run", LENIENT, *models, "--users", "4", "--duration", "8s")
    assert run.returncode == 0, run.stdout + run.stderr
    for model in models:
        row = stats(tmp_path / "run")[model]
        assert int(row["Request Count"]) > 0, model
        assert row["Failure Count"] == "0", model


def test_run_with_missed_thresholds_exits_1_and_counts_like_locust(served: Place, tmp_path: Path):
    """The counts of the two worker processes must add up to locust's."""
    limits = {"defaults": LENIENT["defaults"] | {"throughput": 1_000_000}, "models": {"text": {"p99_ms": 0.1}}}
    results = tmp_path / "run"
    run = loadtest(served, results, limits, "mnist", "text", "--users", "4", "--duration", "5s", "--workers", "2")
    assert run.returncode == 1, run.stdout + run.stderr
    missed = [line for line in run.stdout.splitlines() if line.startswith("missed: ")]
    assert len(missed) == 3
    assert "right answers a second, and must be at least 1000000.0" in missed[0]
    assert missed[1].startswith("missed: text: p99 was ")
    rows = {cells[0]: cells[1] for line in run.stdout.splitlines() if (cells := line.split())[-1:] == ["missed"]}
    for model in ("mnist", "text"):
        assert rows[model] == stats(results)[model]["Request Count"] != "0"


def test_run_with_an_arrival_rate_keeps_it(served: Place, tmp_path: Path):
    """Each of 40 users sends one request per second. Without the rate, they would send many times more."""
    results = tmp_path / "run"
    limits = {"defaults": LENIENT["defaults"] | {"arrivals": 0.5}}
    arguments = ("text=3", "mnist", "--shape", "rate", "--rate", "40", "--duration", "15s")
    run = loadtest(served, results, limits, *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads((results / "run_record.json").read_text())
    seconds = record["stopped"] - record["started"]
    for model, users in (("text", 30), ("mnist", 10)):
        count = int(stats(results)[model]["Request Count"])
        # on a busy machine, users start late and their last requests are still due when the run ends
        assert 0.5 * users * seconds <= count <= users * (seconds + 1), (model, count, seconds)


def test_wrong_answers_fail_the_run_in_the_image_of_the_load_generator(served: Place, tmp_path: Path):
    """The image of the load generator has loadtest/, models/ and three files of bundle/, and runs locust itself."""
    shutil.copytree(ROOT / "loadtest", tmp_path / "loadtest", ignore=shutil.ignore_patterns("bench", "__pycache__"))
    for model in ("mnist", "text"):
        shutil.copytree(ROOT / "models" / model, tmp_path / "models" / model)
    (tmp_path / "bundle").mkdir()
    for file in ("__init__.py", "durations.py", "samples.py"):
        shutil.copy(ROOT / "bundle" / file, tmp_path / "bundle")
    config = tmp_path / "models" / "mnist" / "model-config.yaml"
    config.write_text(config.read_text().replace('expect: "3"', 'expect: "7"'))
    (tmp_path / "loadtest" / "thresholds.yaml").write_text(yaml.safe_dump({"defaults": {"wrong": 0}}))
    host = ("--host", served.url("inference_address"))
    load = ("--headless", "--only-summary", "--users", "2", "--spawn-rate", "2", "--run-time", "3s")
    run = subprocess.run(
        [sys.executable, "-m", "locust", "--locustfile", "loadtest/locustfile.py", *host, *load],
        cwd=tmp_path, env={**os.environ, "COLUMNS": "160"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 1, run.stdout + run.stderr
    assert "x 3 instead of 7" in run.stdout
    assert "missed: mnist: no right answer" in run.stdout
    assert "missed: text" not in run.stdout


def test_run_with_a_model_that_is_not_served_exits_3(served: Place, tmp_path: Path):
    served.client.unregister("mnist", "1.0")
    try:
        run = loadtest(served, tmp_path / "run", LENIENT, "text", "mnist")
    finally:
        served.client.register("mnist.mar", "mnist")
    assert run.returncode == 3
    assert "mnist is not served at" in run.stderr


def test_sigterm_ends_the_run_and_its_workers(served: Place, tmp_path: Path):
    arguments = ("mnist", "--users", "2", "--duration", "60s", "--workers", "2")
    process = subprocess.Popen(
        command(served, tmp_path / "run", LENIENT, *arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: (tmp_path / "run" / "run_stats_history.csv").exists())
        wait_for(lambda: "/predictions/mnist" in (tmp_path / "run" / "run_stats.csv").read_text())
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        process.send_signal(signal.SIGTERM)
        shown, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "The run was interrupted" in shown
    assert not psutil.wait_procs(workers, timeout=60)[1]
