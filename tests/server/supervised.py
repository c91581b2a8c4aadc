"""A server that `bundle run` supervises, as in a container."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import requests

from bundle.paths import ROOT
from bundle.server.ports import free_ports
from tests.server.place import Place
from tests.support import wait_for


class Supervised:
    """A `bundle run` process that serves MNIST.

    Args:
        folder: where the state, the gate and the output are written.
    """

    def __init__(self, place: Place, folder: Path):
        self.place = place
        self.state, self.gate, self.output = folder / "state.json", folder / "gate", folder / "output.txt"
        self.gate.mkdir()
        [self.port] = free_ports(1)
        self.process: subprocess.Popen | None = None

    def start(self, *options: str) -> None:
        command = [sys.executable, "-m", "bundle", "run", "mnist", "--address", f"127.0.0.1:{self.port}"]
        command += ["--state", str(self.state), "--gate", str(self.gate), *options]
        with self.output.open("a") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.place.environment, stdout=output, stderr=output)
        wait_for(lambda: self.ready() == 200 or self.process.poll() is not None, 120)
        assert self.process.poll() is None, self.output.read_text()

    def ready(self) -> int | None:
        """Return the status of /ready; None if the supervisor does not answer."""
        try:
            return requests.get(f"http://127.0.0.1:{self.port}/ready", timeout=30).status_code
        except requests.RequestException:
            return None

    def metrics(self) -> str:
        return requests.get(f"http://127.0.0.1:{self.port}/metrics", timeout=30).text

    def java(self) -> psutil.Process:
        return psutil.Process(self.place.record()["pid"])

    def worker(self) -> int:
        """Return the PID of a worker of MNIST."""
        return self.place.client.describe("mnist")["workers"][0]["pid"]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(120)

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            self.end(signal.SIGKILL)
