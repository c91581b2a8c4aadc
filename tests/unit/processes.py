"""Real processes for tests: children that always end, and a program in place of Java.

TorchServe's own launcher starts the program instead of Java. So `Server.start`, `stop` and the record are tested with
real processes within a second, and with faults that Java does not show on request.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bundle.server.ports import free_ports
from bundle.server.process import Server
from bundle.server.settings import ADDRESSES, GRPC_PORTS, Settings

PROGRAM = """#!{python}
import signal, socket, subprocess, sys, time
if sys.argv[-1:] == ["-version"]:
    sys.exit(print('openjdk version "17.0.9"', file=sys.stderr))
{body}
"""
RUNS = "time.sleep(600)"


@contextmanager
def child(*command: str) -> Iterator[subprocess.Popen]:
    """Run a command, by default one that only waits, until the block ends."""
    process = subprocess.Popen(command or ("sleep", "600"))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def isolated(folder: Path, **overrides: str) -> Server:
    """Return a server with its own run folder, store and free ports."""
    (folder / "store").mkdir(parents=True, exist_ok=True)
    keys = (*ADDRESSES, *GRPC_PORTS)
    ports = dict(zip(keys, free_ports(len(keys)), strict=True))
    own = {key: f"http://127.0.0.1:{ports[key]}" for key in ADDRESSES} | {key: str(ports[key]) for key in GRPC_PORTS}
    own["model_store"] = str(folder / "store")
    return Server(folder / "run", Settings(overrides={**own, **overrides}))


def java_is(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a Java that runs the lines of Python in `body`."""
    java = folder / "java" / "bin" / "java"
    java.parent.mkdir(parents=True, exist_ok=True)
    java.write_text(PROGRAM.format(python=sys.executable, body=body))
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(folder / "java"))
