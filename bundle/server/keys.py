"""The keys that TorchServe asks for where token authorization is on."""

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

READ_SECONDS = 1  # for a key to be there
TRANSIT_SECONDS = 1  # a key with less to live may be dead when it arrives
Api = Literal["inference", "management"]


class NoKey(BundleError, requests.RequestException):
    """The request cannot be made: TorchServe asks for a key, and there is none to send."""


@dataclass(frozen=True)
class Keys:
    """The keys that TorchServe asks for where `disable_token_authorization` is false: one for each API, which expires,
    and the token API's own, which renews them and lives as long as the server.

    Args:
        file: TorchServe writes them there, at its start and with each renewal.
        management: base URL of the token API.
    """

    file: Path
    management: str

    def header(self, api: Api) -> str:
        """The Authorization header for an API, with a key that is valid now.

        Only a key that has expired is replaced, because the old one is dead at once, for other clients, too.

        Raises:
            NoKey: the file is not there, or says nothing; or TorchServe does not renew the key.
        """
        with FileLock(self.file.with_suffix(".lock")):  # of several commands, one renews
            key, seconds = self._read(api)
            if seconds < TRANSIT_SECONDS:
                time.sleep(max(0, seconds))
                self._renew(api)
                key, _ = self._read(api)
        return f"Bearer {key}"

    def _read(self, api: Api) -> tuple[str, float]:
        """A key, and for how many seconds it is valid."""
        deadline = time.monotonic() + READ_SECONDS  # somebody else's renewal may have TorchServe write it just now
        while True:
            try:
                keys = json.loads(self.file.read_text())
                expires = datetime.fromisoformat(keys[api]["expiration time"])
                return keys[api]["key"], (expires - datetime.now(UTC)).total_seconds()
            except (OSError, ValueError, KeyError, TypeError):
                if time.monotonic() > deadline:
                    raise NoKey(f"There is no key of the {api} API in {relative(self.file)}.") from None
            time.sleep(0.1)

    def _renew(self, api: Api) -> None:
        headers = {"Authorization": f"Bearer {json.loads(self.file.read_text())['API']['key']}"}
        answer = session.get(f"{self.management}/token", params={"type": api}, headers=headers, timeout=SECONDS)
        if not answer.ok:
            raise NoKey(f"TorchServe refused to renew the key of its {api} API with {answer.status_code}.")
