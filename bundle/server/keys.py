"""The keys that TorchServe requires if token authorization is on."""

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import requests
from filelock import FileLock

from bundle.errors import BundleError
from bundle.paths import relative
from bundle.server.http import SECONDS, session

READ_SECONDS = 1  # to wait for a missing key
TRANSIT_SECONDS = 1  # a key that expires sooner may have expired when it arrives
Api = Literal["inference", "management"]


class NoKey(BundleError, requests.RequestException):
    """TorchServe requires a key, and the key is missing or cannot be renewed."""


@dataclass(frozen=True)
class Keys:
    """The keys of one server: a key for each API, which expires, and the token API's key, which renews the others.

    Args:
        file: where TorchServe writes them, at its start and at each renewal.
        management: base URL of the token API.
    """

    file: Path
    management: str

    def header(self, api: Api) -> str:
        """Return the Authorization header for an API, with a valid key.

        Only an expired key is renewed, because a renewal invalidates the old key, for other clients, too.

        Raises:
            NoKey: the file is missing or invalid, or TorchServe does not renew the key.
        """
        with FileLock(self.file.with_suffix(".lock")):  # only one of several commands renews
            key, seconds = self._read(api)
            if seconds < TRANSIT_SECONDS:
                time.sleep(max(0, seconds))
                self._renew(api)
                key, _ = self._read(api)
        return f"Bearer {key}"

    def _read(self, api: Api) -> tuple[str, float]:
        """Return a key, and for how many seconds it is valid."""
        deadline = time.monotonic() + READ_SECONDS  # TorchServe may be writing it now
        while True:
            try:
                keys = json.loads(self.file.read_text())
                expires = datetime.fromisoformat(keys[api]["expiration time"])
                return keys[api]["key"], (expires - datetime.now(UTC)).total_seconds()
            except (OSError, ValueError, KeyError, TypeError):
                if time.monotonic() > deadline:
                    raise NoKey(f"The key of the {api} API is missing in {relative(self.file)}.") from None
            time.sleep(0.1)

    def _renew(self, api: Api) -> None:
        """Have TorchServe write a new key of an API into the file."""
        headers = {"Authorization": f"Bearer {json.loads(self.file.read_text())['API']['key']}"}
        answer = session.get(f"{self.management}/token", params={"type": api}, headers=headers, timeout=SECONDS)
        if not answer.ok:
            raise NoKey(f"TorchServe did not renew the key of its {api} API: it answered {answer.status_code}.")
