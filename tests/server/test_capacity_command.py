"""`bundle capacity` with a real TorchServe and a real load, in short measurements."""

import json
import shutil
from pathlib import Path

import pytest

from bundle.capacity import figures, measurement
from bundle.cli.app import app
from bundle.errors import BundleError
from tests import programs

pytestmark = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed: apt-get install wrk")

SHORT = {"ROUNDS": 1, "LEAST_SECONDS": 0.7, "CHECK_SECONDS": 1.0, "WARM_UPS": 1, "WARM_UP_SECONDS": 0.5}
SHORT |= {"CHECKED": 0.2}  # at a higher rate, a pause of a busy machine fills the queue


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which figures are kept, beside a store and a run folder of their own."""
    for name, value in SHORT.items():
        monkeypatch.setattr(measurement, name, value)
    monkeypatch.setattr(figures, "KEPT", tmp_path / "capacity")
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path / "store"))
    return tmp_path / "capacity"


def ask(*arguments: str) -> programs.Ended:
    return programs.run(app, "capacity", "mnist", "--anyway", *arguments)


def test_capacity_is_measured_once_and_answers_several_questions(kept: Path, monkeypatch: pytest.MonkeyPatch):
    first = ask("--rate", "2000", "--p99", "60s", "--json")
    assert first.status == 0, first.stderr
    plan = json.loads(first.stdout)
    assert plan["replicas"] >= 2
    assert plan["left"]["p99"] <= 60
    assert 0 < plan["load"] <= 0.7
    replica = plan["replica"]
    assert len(replica["service"]) == plan["figures"]["of"]["settings"]["batch_size"] == 64
    assert 0 < replica["service"][0] <= replica["service"][-1] < 60
    points = plan["figures"]["points"]
    assert [point["clients"] for point in points] == [1, 3, 12, 48, 384]
    assert all(0 < point["p50"] <= point["p99"] for point in points)
    assert replica["capacity"] >= 0.97 * points[-1]["throughput"]
    assert plan["figures"]["check"]["throughput"] == pytest.approx(0.2 * replica["capacity"])
    assert plan["figures"]["memory"] > 50e6
    assert (kept / "mnist.json").exists()
    logs = kept.parent / "run" / "capacity" / "logs"  # of the measured server, which an error names
    assert "tune-1" in (logs / "model_log.log").read_text()
    assert (logs / "access_log.log").exists()

    def no_measurement(*_: object, **__: object) -> None:
        raise BundleError("It measures.")

    monkeypatch.setattr(measurement, "measure", no_measurement)
    second = ask("--rate", "20000", "--p99", "60s", "--spare", "2")
    assert second.status == 0, second.stderr
    assert "2 missing" in second.stdout
    assert "figures: measured by bundle capacity" in second.stdout
    more = json.loads(ask("--rate", "20000", "--p99", "60s", "--json").stdout)
    assert more["replicas"] > plan["replicas"]

    impossible = ask("--rate", "10", "--p99", "0.01ms")
    assert (impossible.status, impossible.stdout) == (1, "")
    assert "No number of replicas keeps a p99 of 0.01 ms" in impossible.stderr

    again = ask("--rate", "10", "--p99", "60s", "--again")
    assert again.status == 1
    assert again.stderr.endswith("error: It measures.\n")

    file = kept / "mnist.json"
    file.write_text(json.dumps(values := json.loads(file.read_text())).replace(values["of"]["archive"], "another"))
    other = ask("--rate", "10", "--p99", "60s")
    assert other.status == 1
    assert "mnist.json is not used: it is of another archive.\n" in other.stderr
    assert other.stderr.endswith("error: It measures.\n")


def test_capacity_of_batches_that_wait_is_refused(kept: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BUNDLE_FRONTEND_OFF", "gather")
    refused = ask("--rate", "10", "--p99", "1s")
    assert refused.status == 1
    assert "its batches wait to fill" in refused.stderr
