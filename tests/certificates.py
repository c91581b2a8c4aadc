"""A private certificate authority, and the certificates of servers that it issues."""

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Authority:
    """An authority of the tests.

    Attributes:
        folder: has all of its files; `issue` adds to it.
    """

    folder: Path

    @property
    def file(self) -> Path:
        """The authority's own certificate."""
        return self.folder / "ca.crt"

    @classmethod
    def make(cls, folder: Path) -> "Authority":
        openssl("req", "-x509", *NEW_KEY, "-subj", "/CN=tests", "-keyout", folder / "ca.key", "-out", folder / "ca.crt")
        return cls(folder)

    def issue(self, name: str = "IP:127.0.0.1") -> tuple[Path, Path]:
        """Return the certificate and the key of a server with this name, such as DNS:localhost."""
        certificate, key = self.folder / "server.crt", self.folder / "server.key"
        signed = ("-CA", self.file, "-CAkey", self.folder / "ca.key", "-addext", f"subjectAltName={name}")
        signed += ("-addext", "basicConstraints=critical,CA:FALSE")  # some libraries refuse an authority as a server
        openssl("req", "-x509", *NEW_KEY, "-subj", "/CN=server", *signed, "-keyout", key, "-out", certificate)
        return certificate, key


NEW_KEY = ("-newkey", "rsa:2048", "-nodes", "-days", "2")


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
