"""Download archives, and check each of them before anything can serve it."""

import hashlib
import re
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests

from bundle.errors import BundleError, UsageError
from bundle.server import s3
from bundle.server.http import SECONDS, ca_file, is_url
from bundle.signing import check
from bundle.versions import VERSION

CHUNK_BYTES = 2**20
PARTIAL = ".fetch-"  # prefix of the folders of unfinished downloads
ABANDONED_SECONDS = 600  # a download that has written nothing for longer was killed: a read times out much sooner
WANTED = re.compile(rf"({VERSION})(?:=((?:https?|s3)://[^#\s]+))?#sha256=([0-9a-fA-F]{{64}})")


@dataclass(frozen=True)
class Wanted:
    """An archive to download.

    Attributes:
        url: "" if another program has downloaded it.
        digest: its SHA-256, hex.
    """

    model: str
    url: str
    digest: str

    @classmethod
    def parse(cls, text: str) -> "Wanted":
        """Parse `mnist=https://models.example/mnist.mar#sha256=9f86...`, or `mnist#sha256=9f86...`.

        Raises:
            UsageError: the text has another form.
        """
        found = WANTED.fullmatch(text)
        if not found or (found[2] and not is_valid(found[2])):
            name = re.split("[^A-Za-z0-9._-]", text)[0]  # what comes after it may be secret
            raise UsageError(
                f"Archive {name!r} must be given as MODEL=URL#sha256=DIGEST or MODEL#sha256=DIGEST, with a valid http, "
                "https or s3 URL and the 64 hexadecimal digits that sha256sum prints."
            )
        return cls(found[1], found[2] or "", found[3].lower())

    @property
    def is_s3(self) -> bool:
        return self.url.startswith("s3:")

    @property
    def place(self) -> str:
        """The URL without the parts that may be secret: a password, and the query, which can be a signature."""
        if self.is_s3:
            return self.url
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def fetch(wanted: Wanted, folder: Path, trusted: Path | None) -> bool:
    """Download an archive into a folder as MODEL.mar. It appears there after all checks, or not at all.

    Proxies and passwords come from the environment, as in curl: HTTPS_PROXY, NETRC. So do credentials of S3.

    Args:
        trusted: the public key that must have signed it; None if it may be unsigned.

    Returns:
        whether it was downloaded; False if the folder has it already.

    Raises:
        BundleError: it cannot be downloaded or written, or it is not the archive that is wanted.
    """
    target = folder / f"{wanted.model}.mar"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if target.is_file() and sha256(target) == wanted.digest:
            check(target, trusted)
            return False
        if not wanted.url:
            found = f"has the SHA-256 {sha256(target)}" if target.is_file() else "is missing"
            raise BundleError(f"{target} {found}. The archive with the SHA-256 {wanted.digest} must be there.")
        remove_abandoned(folder)
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as temporary:
            partial = Path(temporary) / target.name
            if wanted.is_s3:
                s3.download(wanted.url, partial)
            else:
                download(wanted, partial)
            if (found := sha256(partial)) != wanted.digest:
                raise BundleError(
                    f"{wanted.place} has the SHA-256 {found}, and not {wanted.digest}. It was damaged or replaced, or "
                    "the expected digest is that of another file."
                )
            check(partial, trusted)
            partial.replace(target)
    except OSError as exc:
        raise BundleError(f"{target} cannot be written: {exc.strerror or exc}.") from exc
    return True


def remove_abandoned(folder: Path) -> None:
    """Remove what killed downloads have left. Those of other processes that still run stay."""
    for file in folder.glob(f"{PARTIAL}*/*"):
        with suppress(FileNotFoundError):  # its download has just ended
            if time.time() - file.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(file.parent)


def is_valid(url: str) -> bool:
    """Return whether a URL can be requested."""
    return s3.URL.fullmatch(url) is not None if url.startswith("s3:") else is_url(url)


def download(wanted: Wanted, target: Path) -> None:
    """Write what a URL answers into a file.

    Raises:
        BundleError: the server does not answer, answers with an error, or ends its answer early.
        OSError: the file cannot be written.
    """
    try:
        with requests.get(wanted.url, stream=True, timeout=SECONDS, verify=ca_file() or True) as answer:
            if answer.status_code != 200:
                raise BundleError(f"{wanted.place} answered {answer.status_code} {answer.reason}.")
            with target.open("wb") as file:
                for chunk in answer.iter_content(CHUNK_BYTES):
                    file.write(chunk)
    except requests.RequestException as exc:
        raise BundleError(f"{wanted.place} cannot be downloaded: {cause(exc)}.") from exc


def sha256(file: Path) -> str:
    """Return a file's SHA-256, hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cause(error: BaseException) -> str:
    """Return the first error of a chain. The last one, of requests, has the URL with its secrets."""
    while earlier := error.__cause__ or error.__context__:
        error = earlier
    return str(error).rstrip(".")
