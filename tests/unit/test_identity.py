"""The identity of a process: a changed clock does not change it, and a later process with the same PID has another."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from bundle.server import identity
from bundle.server.identity import start_mark
from bundle.server.process import Running
from tests.unit.processes import child as child_process


@pytest.fixture
def child() -> Iterator[subprocess.Popen]:
    with child_process() as process:
        yield process


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Return a folder of links to /proc, which a test may replace."""
    folder = tmp_path / "proc"
    folder.mkdir()
    for entry in Path("/proc").iterdir():
        (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def step_clock(proc: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Set the clock forward by an hour, as psutil sees it: the kernel's boot time (btime) moves with the clock."""
    lines = Path("/proc/stat").read_text().splitlines()
    (proc / "stat").unlink()
    stepped = [f"btime {int(line.split()[1]) + 3600}" if line.startswith("btime ") else line for line in lines]
    (proc / "stat").write_text("\n".join(stepped) + "\n")
    return lambda: monkeypatch.setattr(psutil, "PROCFS_PATH", str(proc))


def recorded(process: subprocess.Popen) -> Running:
    return Running(process.pid, start_mark(process.pid), "", {}, {}, "http://a", "http://b", "c")


def test_process_after_clock_step_is_found(child: subprocess.Popen, step_clock: Callable[[], None]):
    running, created = recorded(child), psutil.Process(child.pid).create_time()
    step_clock()
    assert abs(psutil.Process(child.pid).create_time() - created) > 3000  # the step is visible
    assert running.process().pid == child.pid


def test_process_that_ended_is_not_found(child: subprocess.Popen):
    running = recorded(child)
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert running.process() is None  # a zombie
    child.wait()
    assert running.process() is None


def test_later_process_with_the_same_id_is_another(child: subprocess.Popen, proc: Path, monkeypatch):
    """The start time differs, or the boot does."""
    running = recorded(child)
    monkeypatch.setattr(identity, "PROC", proc)
    assert running.process()
    (proc / str(child.pid)).unlink()
    (proc / str(child.pid)).mkdir()
    before, _, after = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")
    fields = after.split()
    fields[19] = str(int(fields[19]) + 1)
    (proc / str(child.pid) / "stat").write_text(f"{before}) {' '.join(fields)}")
    assert running.process() is None
    (proc / str(child.pid) / "stat").write_text(f"{before}){after}")
    assert running.process()
    (proc / "sys").unlink()
    boot = proc / "sys" / "kernel" / "random" / "boot_id"
    boot.parent.mkdir(parents=True)
    boot.write_text("11111111-2222-3333-4444-555555555555\n")
    assert running.process() is None


def test_process_name_with_parentheses_is_read(tmp_path: Path):
    program = tmp_path / ") 1 (2"
    program.symlink_to("/bin/sleep")
    with child_process(str(program), "600") as process:
        ticks = psutil.Process(process.pid).create_time() - psutil.boot_time()
        mark = start_mark(process.pid)
    assert int(mark.split()[-1]) == pytest.approx(100 * ticks, abs=100)


def test_process_without_proc_is_found_by_its_start_time(child: subprocess.Popen, tmp_path: Path, monkeypatch):
    """macOS has no /proc."""
    monkeypatch.setattr(identity, "PROC", tmp_path / "missing")
    running = recorded(child)
    assert running.started == f"created {psutil.Process(child.pid).create_time()}"
    assert running.process().pid == child.pid
    time.sleep(0.05)  # psutil's resolution is 10 ms
    with child_process() as other:
        assert start_mark(other.pid) != running.started
    with pytest.raises(psutil.NoSuchProcess):
        start_mark(other.pid)


# --- records of earlier bundles ----------------------------------------------------------------------------------


def old_record(file: Path, pid: int, temporary: str) -> Path:
    values = asdict(Running(pid, "", temporary, {}, {}, "http://a", "http://b", "c"))
    del values["started"]
    file.write_text(json.dumps({**values, "created": 1.5, "settings": "0123abcd"}))
    return file


def test_old_record_of_a_live_server_is_read(tmp_path: Path):
    program = "import time; time.sleep(600)"
    with child_process(sys.executable, "-c", program, "-Djava.io.tmpdir=/tmp/torchserve-x1") as server:
        running = Running.read(old_record(tmp_path / "server.json", server.pid, "/tmp/torchserve-x1"))
        assert running.process().pid == server.pid
        assert running.settings == {}


def test_old_record_of_another_process_is_not_running(child: subprocess.Popen, tmp_path: Path):
    file = tmp_path / "server.json"
    assert Running.read(old_record(file, child.pid, "/tmp/torchserve-x1")).process() is None
    assert Running.read(old_record(file, child.pid, "")).process() is None
    child.kill()
    child.wait()
    assert Running.read(old_record(file, child.pid, "/tmp/torchserve-x1")).process() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"pid": 1}', '{"pid": 1, "created": 1.5}'])
def test_invalid_record_is_no_server(tmp_path: Path, text: str):
    (tmp_path / "server.json").write_text(text)
    assert Running.read(tmp_path / "server.json") is None
    assert Running.read(tmp_path / "missing.json") is None
