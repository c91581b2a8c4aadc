"""Tell a proxy whether to send requests to this server, through files in a folder that both see."""

import re
import socket
import threading
from pathlib import Path

import psutil
import requests

from bundle.errors import BundleError
from bundle.server.http import Session

BEAT_SECONDS = 1  # docker/nginx/start.sh leaves out a server without a beat for 5 s, if another one has them
ANSWER_SECONDS = 2
BEAT = "/models?limit=1"  # a small answer
# 2026-11-23T03:19:19,579 - /127.0.0.1:60990 "GET /models?limit=1 HTTP/1.1" 401 1
LOGGED_BEAT = re.compile(rf'\S+ - \S+ "GET {re.escape(BEAT)} HTTP/')  # from the line's begin: a path may contain it


class Gate:
    """The files of one server. Each is named after an address of the server, because several may share the folder.

    - `closed-ADDRESS`: the server takes no requests.
    - `alive-ADDRESS`: its time is when the server last answered. A process that hangs writes nothing.

    Args:
        folder: None to tell nobody.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.addresses = own_addresses() if folder else []

    def close(self) -> None:
        """Make the proxy send no requests.

        Raises:
            BundleError: a file cannot be made: the disk is full, say.
        """
        for file in self._files("closed"):
            try:
                file.touch()
            except OSError as exc:
                raise BundleError(f"{exc.filename} cannot be made: {exc.strerror}. It keeps requests away.") from exc

    def open(self) -> None:
        for file in self._files("closed"):
            file.unlink(missing_ok=True)

    def beat(self, management: str, ended: threading.Event) -> None:
        """Touch the files `alive-ADDRESS` as long as the management API answers, until the event."""
        with Session() as session:
            while not ended.wait(BEAT_SECONDS):
                try:
                    session.get(management + BEAT, timeout=ANSWER_SECONDS)  # an error is an answer, too
                    for file in self._files("alive"):
                        file.touch()
                except (requests.RequestException, OSError):
                    continue  # the missing beat says it

    def _files(self, name: str) -> list[Path]:
        return [self.folder / f"{name}-{address}" for address in self.addresses] if self.folder else []


def own_addresses() -> list[str]:
    """Return the IPv4 addresses of this machine or container; loopback, too: a proxy may be in the same pod."""
    found = psutil.net_if_addrs().values()
    return sorted({each.address for addresses in found for each in addresses if each.family == socket.AF_INET})
