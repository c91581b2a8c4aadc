"""What was changed through the management API, kept over restarts.

TorchServe's own snapshots are used only where it is started without a configuration file, and hold no default version.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bundle.client import Client
from bundle.errors import BundleError
from bundle.readiness import scale_version, start_version
from bundle.rollout import archive_version, withdraw
from bundle.server import Server


@dataclass(frozen=True)
class Registered:
    """A version of a model, as it was registered and scaled."""

    name: str
    version: str
    url: str
    minimum: int
    maximum: int
    default: bool


@dataclass(frozen=True)
class State:
    """What was registered at some moment.

    Attributes:
        offered: the version that each NAME.mar of the store had then. What was offered and not registered had been
            removed by hand; what is offered later is new.
    """

    registered: list[Registered] = field(default_factory=list)
    offered: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "State | None":
        """None where there is none yet.

        Raises:
            BundleError: it cannot be read.
        """
        try:
            values = json.loads(file.read_text())
            return cls([Registered(**version) for version in values["registered"]], values["offered"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise BundleError(f"{file} cannot be read ({exc}). Remove it to start with what models/ says.") from exc

    def write(self, file: Path) -> None:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1))
        partial.replace(file)


def restore(
    server: Server,
    client: Client,
    state: State,
    offered: dict[str, str],
    seconds: float,
    report: Callable[[str], object],
) -> None:
    """Brings a server that was just started to the state: versions, numbers of workers, defaults.

    What cannot be brought back is reported, and the rest goes on.

    Args:
        offered: the version that each NAME.mar of the store has now.
        seconds: to wait at most for a version to be READY.
    """
    for wanted in state.registered:
        try:
            restore_version(server, client, wanted, seconds)
        except BundleError as exc:
            report(f"not restored: {wanted.name} {wanted.version}: {exc}")
            withdraw_unless_offered(client, wanted, offered)
    for wanted in state.registered:
        if wanted.default and client.describe(wanted.name, wanted.version) is not None:
            client.set_default(wanted.name, wanted.version)
    kept = {(wanted.name, wanted.version) for wanted in state.registered}
    for name, version in state.offered.items():
        if (name, version) not in kept and client.describe(name, version) is not None:
            client.unregister(name, version)
            report(f"{name} {version} had been unregistered, and is again")


def restore_version(server: Server, client: Client, wanted: Registered, seconds: float) -> None:
    """Raises:
    BundleError: its archive is gone, or its workers do not come up."""
    described = client.describe(wanted.name, wanted.version)
    workers = wanted.minimum, wanted.maximum
    if described is None:
        archive = archive_of(server.store, wanted).name
        start_version(client, server.logs, archive, wanted.name, wanted.version, workers, seconds)
    elif (described["minWorkers"], described["maxWorkers"]) != workers:
        scale_version(client, server.logs, wanted.name, wanted.version, workers, seconds)


def archive_of(store: Path, wanted: Registered) -> Path:
    """The archive that has the version: under the name it was registered by, or the one it was promoted to."""
    for name in (wanted.url, f"{wanted.name}.mar"):
        file = store / name
        if file.is_file() and archive_version(file) == wanted.version:
            return file
    raise BundleError(f"no archive in {store} has this version any more")


def withdraw_unless_offered(client: Client, wanted: Registered, offered: dict[str, str]) -> None:
    if offered.get(wanted.name) != wanted.version:
        withdraw(client, wanted.name, wanted.version)
