"""A stand-in for Amazon S3, its users, roles and metadata service: moto's server. A relay breaks its answers."""

import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import requests

from bundle.paths import ROOT
from bundle.server.ports import free_ports
from loadtest.bench.systems.environment import Environment
from tests.support import wait_for

READ = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"}]}'


@dataclass(frozen=True)
class Store:
    """A running server. It asks for credentials only while `authorizing` is on."""

    url: str

    def put(self, path: str, content: bytes = b"") -> None:
        """Make a bucket, or an object in one."""
        answer = requests.put(f"{self.url}/{path}", data=content, headers=by_anybody("s3"), timeout=30)
        assert answer.status_code == 200, answer.text

    def ask(self, service: str, action: str, **parameters: str) -> str:
        """Call an action of a service such as iam."""
        parameters |= {"Action": action}
        answer = requests.post(self.url, data=parameters, headers=by_anybody(service), timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.text

    def user(self, name: str, may_read: bool) -> dict[str, str]:
        """Make a user, and return the environment with its key."""
        self.ask("iam", "CreateUser", UserName=name)
        if may_read:
            self.ask("iam", "PutUserPolicy", UserName=name, PolicyName="read", PolicyDocument=READ)
        made = self.ask("iam", "CreateAccessKey", UserName=name)
        names = ("AccessKeyId", "SecretAccessKey")
        key, secret = (re.search(f"<{element}>(.+)</{element}>", made)[1] for element in names)
        return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}

    @contextmanager
    def authorizing(self) -> Iterator[None]:
        """Check the signature and the rights of each request."""
        self.allow(0)
        try:
            yield
        finally:
            self.allow(10**9)

    def allow(self, requests_without: int) -> None:
        requests.post(f"{self.url}/moto-api/reset-auth", data=str(requests_without), timeout=30).raise_for_status()


def by_anybody(service: str) -> dict[str, str]:
    """Return the header of a request whose signature is not checked."""
    return {"Authorization": f"AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/{service}/aws4_request"}


@contextmanager
def running(folder: Path) -> Iterator[Store]:
    """Start a store. Its packages do not fit into the environment of the tests."""
    environment = Environment(ROOT / "build" / "s3", ROOT / "requirements" / "s3.txt")
    environment.install()
    [port] = free_ports(1)
    command = [environment.python.with_name("moto_server"), "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "store.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_for(lambda: is_open(port), 120)
            yield Store(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Relay:
    """Passes on connections, and ends those of the first answers early.

    Args:
        store: to which they lead.
        cut: number of bytes after which an answer ends early.
        times: number of answers that end early.

    Attributes:
        passed: bytes of all answers.
        sockets: of all connections. Both sides are closed as soon as one has ended.
    """

    def __init__(self, store: Store, cut: int, times: int):
        self.target, self.cut, self.times = int(store.url.rpartition(":")[2]), cut, times
        self.passed = self.connections = 0
        self.sockets: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            self.connections += 1
            limit = self.cut if self.connections <= self.times else None
            server = socket.create_connection(("127.0.0.1", self.target))
            self.sockets += [client, server]
            threading.Thread(target=self.copy, args=(client, server), daemon=True).start()
            threading.Thread(target=self.answer, args=(server, client, limit), daemon=True).start()

    def is_closed(self) -> bool:
        return all(each.fileno() < 0 for each in self.sockets)

    def copy(self, source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):  # one side has ended
            while data := source.recv(2**16):
                to.sendall(data)

    def answer(self, server: socket.socket, client: socket.socket, limit: int | None) -> None:
        count = 0
        with suppress(OSError):  # one side has ended
            while (limit is None or count < limit) and (data := server.recv(2**12)):
                count += len(data)
                self.passed += len(data)
                client.sendall(data)
        for each in (client, server):
            with suppress(OSError):  # the other side has ended
                each.shutdown(socket.SHUT_RDWR)  # which ends `copy`, as close does not
            each.close()
