"""What was changed through the management API, kept over restarts.

TorchServe's own snapshots are used only where it is started without a configuration file, and hold no default version.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import requests

from bundle import mar
from bundle.errors import BundleError
from bundle.files import write_atomically
from bundle.server.client import Client
from bundle.server.process import Server
from bundle.server.readiness import scale_version, start_version
from bundle.server.rollout import withdraw


@dataclass(frozen=True)
class Registered:
    """A version of a model, as it was registered and scaled."""

    name: str
    version: str
    url: str
    minimum: int
    maximum: int
    default: bool

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.version


@dataclass(frozen=True)
class State:
    """What was registered at some moment, and which version of a NAME.mar in the store had been unregistered."""

    registered: list[Registered] = field(default_factory=list)
    removed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "State | None":
        """None where there is none yet, or none that can be read: that one is kept aside, as FILE.bad."""
        try:
            values = json.loads(file.read_text())
            return cls([Registered(**version) for version in values["registered"]], values["removed"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            file.replace(file.with_suffix(".bad"))
            return None

    def write(self, file: Path) -> None:
        write_atomically(file, json.dumps(asdict(self), indent=1))


def restore(server: Server, client: Client, state: State, seconds: float, report: Callable[[str], object]) -> None:
    """Brings a server that was just started to the state: versions, numbers of workers, defaults.

    What cannot be brought back is reported, and the rest goes on.

    Args:
        seconds: to wait at most for a version to be READY.
    """

    def attempt(what: str, step: Callable, *arguments: object) -> None:
        try:
            step(*arguments)
        except (BundleError, requests.RequestException) as exc:
            report(f"not restored: {what}: {exc}")

    for wanted in state.registered:
        attempt(f"{wanted.name} {wanted.version}", restore_version, server, client, wanted, seconds)
    for wanted in state.registered:
        if wanted.default:
            attempt(f"{wanted.name} {wanted.version} as the default", restore_default, client, wanted)
    for name, version in state.removed.items():
        replaced = any(wanted.name == name for wanted in state.registered)
        attempt(f"the absence of {name} {version}", remove_again, client, name, version, replaced)


def restore_version(server: Server, client: Client, wanted: Registered, seconds: float) -> None:
    """Raises:
    BundleError: its archive is gone, or its workers do not come up; what was served before still is."""
    found = client.describe(*wanted.key)
    workers = wanted.minimum, wanted.maximum
    if found is None:
        archive = archive_of(server.store, wanted).name
        try:
            start_version(client, server.logs, archive, *wanted.key, workers, seconds)
        except BundleError:
            withdraw(client, *wanted.key)
            raise
    elif (found["minWorkers"], found["maxWorkers"]) != workers:
        try:
            scale_version(client, server.logs, *wanted.key, workers, seconds)
        except BundleError:
            client.scale(*wanted.key, found["minWorkers"], found["maxWorkers"])
            raise


def restore_default(client: Client, wanted: Registered) -> None:
    if client.describe(*wanted.key) is not None:
        client.set_default(*wanted.key)


def remove_again(client: Client, name: str, version: str, replaced: bool) -> None:
    """Unregisters what had been unregistered; where other versions had taken its place, only if one of them is back."""
    there = [described["modelVersion"] for described in client.versions(name)]
    if version in there and (not replaced or len(there) > 1):
        client.unregister(name, version)


def archive_of(store: Path, wanted: Registered) -> Path:
    """The archive that has the version: under the name it was registered by, or the one it was promoted to."""
    for name in (wanted.url, f"{wanted.name}.mar"):
        file = store / name
        if file.is_file() and mar.version(file) == wanted.version:
            return file
    raise BundleError(f"no archive in {store} has this version any more")
