"""The files that tell a proxy whether to send requests to a server."""

import threading
import time
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer

from bundle.server.ports import free_ports
from bundle.server.process import Server
from bundle.supervisor.gate import BEAT_SECONDS, Gate, own_addresses
from bundle.supervisor.supervisor import Options, Supervisor


def test_gate_has_a_file_for_each_address_and_opening_removes_only_those(tmp_path: Path):
    (tmp_path / "closed-198.51.100.7").touch()  # another server's
    gate = Gate(tmp_path)
    gate.close()
    gate.close()
    own = {f"closed-{address}" for address in own_addresses()}
    assert "closed-127.0.0.1" in own
    assert {file.name for file in tmp_path.iterdir()} == {*own, "closed-198.51.100.7"}
    gate.open()
    gate.open()
    assert [file.name for file in tmp_path.iterdir()] == ["closed-198.51.100.7"]


def test_without_a_folder_nothing_is_written():
    gate = Gate(None)
    gate.close()
    gate.open()


def beats(folder: Path, management: str, seconds: float, enough: int = 1) -> int:
    """Let a gate beat for some seconds, or until the file's time has changed often enough; return how often it did."""
    ended, file, seen = threading.Event(), folder / "alive-127.0.0.1", set()
    thread = threading.Thread(target=Gate(folder).beat, args=(management, ended))
    thread.start()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and len(seen) < enough:
        if file.exists():
            seen.add(file.stat().st_mtime_ns)
        time.sleep(0.05)
    ended.set()
    thread.join()
    return len(seen)


def test_server_that_answers_beats_also_with_an_error(tmp_path: Path, httpserver: HTTPServer):
    httpserver.expect_request("/models").respond_with_json({}, status=401)
    assert beats(tmp_path, httpserver.url_for("").rstrip("/"), 60, enough=2) == 2


def test_server_that_does_not_answer_has_no_beat(tmp_path: Path):
    assert beats(tmp_path, f"http://127.0.0.1:{free_ports(1)[0]}", 2.5 * BEAT_SECONDS) == 0


LOGGED = '2026-11-23T03:19:19,579 - /127.0.0.1:60990 "GET /models?limit=1 HTTP/1.1" 401 1'
OTHERS = [
    LOGGED.replace("limit=1", "limit=10"),
    LOGGED.replace("GET /models?limit=1", "DELETE /models/mnist?x=/models?limit=1"),
    LOGGED.replace("GET /models?limit=1", 'DELETE /models/mnist?x="GET /models?limit=1 HTTP/'),
]


@pytest.mark.parametrize(("replicas", "hidden"), [(3, True), (1, False), (None, False)])
def test_beat_alone_is_left_out_of_the_log_if_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture, replicas: int | None, hidden: bool
):
    options = Options("127.0.0.1", 0, None, tmp_path, replicas, 1, 1, 1, {})
    supervisor = Supervisor(Server(tmp_path), options, print)
    supervisor.server.logs.mkdir()
    access, others = (supervisor.server.logs / name for name in ("access_log.log", "ts_log.log"))
    others.write_text(f"{LOGGED}\n")
    access.write_text("".join(f"{line}\n" for line in [LOGGED, *OTHERS]))
    supervisor.ended.set()
    supervisor.relay_logs()
    assert capsys.readouterr().out.splitlines() == [LOGGED, *([] if hidden else [LOGGED]), *OTHERS]
