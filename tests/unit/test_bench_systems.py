"""How the benchmark starts, configures and ends the servers that it measures."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from PIL import Image

from bundle.build.add_model import NewModel
from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import ModelFolder
from loadtest.bench import paths, resnet
from loadtest.bench.cases import CASES
from loadtest.bench.paths import GENERATED_FROM, ROOT
from loadtest.bench.peers import Task, task
from loadtest.bench.systems import floor
from loadtest.bench.systems.base import Batching, batching
from loadtest.bench.systems.peers import PEERS, Peer
from loadtest.bench.systems.torchserve import TorchServe

# a benchmark with one server, which ignores SIGTERM
BENCHMARK = """
import sys, time
from bundle.cli.console import interrupt_on_signals
from loadtest.bench.systems import processes

processes.STOP_SECONDS = 5
interrupt_on_signals()
server = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
try:
    with processes.workplace("test-stubborn") as place:
        child = place.start([sys.executable, "-c", server])
        while b"up" not in place.log.read_bytes():
            time.sleep(0.02)
        print(child.pid, flush=True)
        time.sleep(300)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_repeated_signals_end_the_servers_once(first: signal.Signals):
    with subprocess.Popen([sys.executable, "-c", BENCHMARK], stdout=subprocess.PIPE, text=True) as benchmark:
        server = psutil.Process(int(benchmark.stdout.readline()))
        benchmark.send_signal(first)
        for again in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            with pytest.raises(subprocess.TimeoutExpired):
                benchmark.wait(0.3)
            benchmark.send_signal(again)
        assert benchmark.stdout.read() == "interrupted\n"
    assert benchmark.returncode == 0
    assert not server.is_running()


def test_ignored_signal_stays_ignored():
    """`nohup` relies on this."""
    code = """
import os, signal
from bundle.cli.console import interrupt_on_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
interrupt_on_signals()
os.kill(os.getpid(), signal.SIGHUP)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_signal_during_the_clean_up_is_raised_after_it():
    code = """
import os, signal
from bundle.cli.console import interrupt_on_signals
from loadtest.bench.systems.processes import signals_deferred
interrupt_on_signals()
try:
    with signals_deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        print("cleaned up", flush=True)
except KeyboardInterrupt:
    print("interrupted")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.splitlines() == ["cleaned up", "interrupted"]


def test_interrupted_model_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def add_model(new: NewModel, *, models_dir: Path, **_: object) -> None:
        (models_dir / new.name).mkdir()
        (models_dir / new.name / "model-config.yaml").write_text("minWorkers: 1\nbundle: {}")

    class Interrupted:
        def save(self, *_: object, **__: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(resnet.paths, "generated", lambda: tmp_path)
    for name, value in {"EXAMPLES": 1, "generated": Path}.items():
        monkeypatch.setattr(resnet, name, value)
    monkeypatch.setattr("bundle.build.add_model.add_model", add_model)
    monkeypatch.setattr(resnet, "scene", lambda *_: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        resnet.add()
    assert [*tmp_path.rglob("*")] == [tmp_path / "models"]

    monkeypatch.setattr(resnet, "scene", lambda *_: Image.new("RGB", (8, 8)))
    resnet.add()
    config = yaml.safe_load((tmp_path / "models" / "resnet18" / "model-config.yaml").read_text())
    assert config == resnet.SETTINGS | {"bundle": {"examples": "examples", "int8": True}}
    assert len([*(tmp_path / "models" / "resnet18" / "examples").iterdir()]) == resnet.KINDS
    assert [*tmp_path.iterdir()] == [tmp_path / "models"]


def test_changed_recipe_is_built_in_another_folder(tmp_path: Path):
    """The settings of the model for photographs are changed in a copy of the benchmark."""
    for file in ("loadtest/bench/paths.py", *GENERATED_FROM):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())

    def generated() -> str:
        code = "from loadtest.bench import paths; print(paths.generated().name)"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    assert generated() == paths.generated().name
    with (tmp_path / "loadtest/bench/resnet.py").open("a") as file:
        file.write("EXAMPLES = 44\n")
    assert generated() != paths.generated().name


@pytest.mark.parametrize("name", ["mnist", "audio", "text"])
def test_batching_of_all_systems_is_that_of_the_model_folder(name: str):
    config = yaml.safe_load((CASES[name].folder / "model-config.yaml").read_text())
    assert batching(CASES[name]) == Batching(config["batchSize"], config["maxBatchDelay"])


@pytest.mark.parametrize(("size", "delay", "expected"), [("32", "5", (32, 0.005)), ("1", "0", (2, 0.001))])
def test_peer_reads_its_task_from_the_command_line(
    size: str, delay: str, expected: tuple, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["lit", "8080", "text", size, delay])
    assert task() == Task(8080, "text", *expected)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peer_has_a_program_and_pinned_packages(peer: Peer):
    assert (ROOT / "loadtest" / "bench" / "peers" / f"{peer.module}.py").is_file()
    packages = peer.environment.requirements.read_text().split()
    assert [package for package in packages if not re.fullmatch(r"[\w.-]+==[\w.]+", package)] == []
    assert peer.version[0].isdigit()


@pytest.mark.parametrize("is_batched", [False, True])
def test_stock_torchserve_batches_like_the_bundle_or_not_at_all(
    is_batched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr("loadtest.bench.systems.torchserve.subprocess.run", lambda *_, **__: done)
    TorchServe("any", is_batched).archive(SimpleNamespace(folder=tmp_path, environment={}), CASES["text"])
    config = yaml.safe_load((tmp_path / "model-config.yaml").read_text())
    wanted = batching(CASES["text"])
    batched = {"batchSize": wanted.size, "maxBatchDelay": wanted.delay}
    assert {key: value for key, value in config.items() if "atch" in key} == (batched if is_batched else {})
    assert config["jobQueueSize"] > max(max(case.concurrencies) for case in CASES.values())


def test_floor_has_the_workers_of_the_model_and_returns_the_reference_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its archive runs in TorchServe's worker code."""
    answer = b'{"top_k": [{"label": "transfer", "class": 130, "probability": 0.99}]}'
    monkeypatch.setattr(floor, "WORK", tmp_path)
    monkeypatch.setattr(floor, "reference_answer", lambda case: answer)
    folder = ModelFolder(floor.make(CASES["text"]))
    ours = ModelFolder(CASES["text"].folder).config
    assert {name for name in ours.keys() | folder.config.keys() if ours.get(name) != folder.config.get(name)} == {
        "bundle",
        "handler",
    }
    with DryRun(archive(folder, tmp_path).path, batch_size=ours["batchSize"]) as worker:
        assert worker.predict([{"body": "x"}] * 3) == [(200, answer.decode())] * 3
