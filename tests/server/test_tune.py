"""`make tune` with a real TorchServe and real load, on a copy of a model's folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from bundle.build.archive import archive
from bundle.catalog import ModelFolder
from bundle.cli.measure import tune_session
from bundle.errors import BundleError
from bundle.paths import MODELS, ROOT
from bundle.tuning import search
from bundle.tuning.session import Session
from bundle.tuning.tuner import read_inputs
from tests.support import wait_for

pytest.importorskip("matplotlib", reason="it draws the chart: pip install -r requirements/loadtest.txt")
pytestmark = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed: apt-get install wrk")


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    """MNIST with settings that nobody can be happy with: batches of 300, which take 1.5 s to give up filling."""
    shutil.copytree(MODELS / "mnist", tmp_path / "mnist", ignore=shutil.ignore_patterns("tuning.*"))
    file = tmp_path / "mnist" / "model-config.yaml"
    text = re.sub(r"batchSize: \d+ ", "batchSize: 300", file.read_text())
    file.write_text(re.sub(r"maxBatchDelay: \d+ ", "maxBatchDelay: 1500", text))
    return ModelFolder(tmp_path / "mnist")


def files(folder: ModelFolder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.path.iterdir() if file.is_file()}


def servers(run_dir: Path) -> list[psutil.Process]:
    """Java processes that log into this run folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if "java" in process.name() and process.environ().get("LOG_LOCATION") == str(run_dir / "logs"):
                found.append(process)
        except psutil.Error:
            pass
    return found


def test_better_settings_are_found_and_written(
    folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(search, "ENOUGH", 2)
    before = files(folder)
    old = folder.config
    mar = archive(folder, tmp_path / "store").path
    run_dir = tmp_path / "run"

    tune_session(Session(folder, mar, 1.2, 10, read_inputs(folder, []), run_dir=run_dir))

    shown = capsys.readouterr().out
    assert "The current settings miss the target." in shown
    assert "Pareto front" in shown
    new = yaml.safe_load((folder.path / "model-config.yaml").read_text())
    found = json.loads((folder.path / "tuning.json").read_text())
    best = found["best"]
    assert new["batchSize"] == best["batch_size"] <= 64
    assert new["maxBatchDelay"] == best["delay"] <= 10
    assert new["minWorkers"] == best["workers"] <= new["maxWorkers"]
    assert new["handler"]["threads"] == best["threads"]
    tuned = ("batchSize", "maxBatchDelay", "minWorkers", "maxWorkers", "handler")
    assert {key: new[key] for key in new if key not in tuned} == {key: old[key] for key in old if key not in tuned}
    assert "# maximum number of requests in the queue" in (folder.path / "model-config.yaml").read_text()
    assert b"<svg" in (folder.path / "tuning.svg").read_bytes()
    assert files(folder).keys() - before.keys() == {"tuning.json", "tuning.svg"}

    # the evidence: the current settings never came within the target, the best did in the final, with real answers
    assert found["current"]["batch_size"] == 300
    within = [m for m in found["measurements"] if m["p99_ms"] and m["p99_ms"] <= 1200 and not m["failed"]]
    assert not [m for m in within if m["settings"] == found["current"]]
    assert [m for m in within if m["settings"] == best and m["stage"] == "final" and m["answered"] > 10]
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["versions"]["torchserve"] == "0.12.0"

    assert not servers(run_dir)
    assert not (run_dir / "server.json").exists()


def test_a_target_that_nothing_reaches_changes_nothing(folder: ModelFolder, tmp_path: Path):
    before = files(folder)
    mar = archive(folder, tmp_path / "store").path
    with pytest.raises(BundleError, match=r"meet the p99 target of 0\.01 ms\. Closest: .* ms at .* answers/s"):
        tune_session(Session(folder, mar, 0.00001, 1, read_inputs(folder, []), run_dir=tmp_path / "run"))
    assert files(folder) == before
    assert not servers(tmp_path / "run")


def test_ctrl_c_while_tuning_ends_the_server_and_writes_nothing(folder: ModelFolder, tmp_path: Path):
    archive(folder, tmp_path / "store")
    before = files(folder)
    place = {"BUNDLE_MODELS": tmp_path, "TS_MODEL_STORE": tmp_path / "store", "RUN_DIR": tmp_path}
    run_dir = tmp_path / "tune"
    command = [sys.executable, "-m", "bundle", "tune", "mnist", "--p99", "1200ms", "--minutes", "5"]
    run = subprocess.Popen(
        ["env", "--default-signal=INT", *command],  # a shell's background jobs ignore it
        cwd=ROOT,
        env={**os.environ, **{name: str(path) for name, path in place.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: (run_dir / "server.json").is_file(), 120)
        time.sleep(8)  # a candidate starts, or is measured
        [server] = servers(run_dir)
        family = [server, *server.children(recursive=True)]
        run.send_signal(signal.SIGINT)
        said, _ = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 130, said
    assert "nothing is written" in said
    assert not [member for member in family if member.is_running()]
    assert files(folder) == before
