"""Keep what was changed through the management API over restarts.

TorchServe's own snapshots are used only if it is started without a configuration file, and hold no default version.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import requests

from bundle import mar
from bundle.errors import BundleError
from bundle.files import write_atomically
from bundle.server.client import Client
from bundle.server.process import Server
from bundle.server.readiness import scale_version, start_version
from bundle.server.rollout import withdrawn_if_it_fails

Key = tuple[str, str]  # a model's name and version


class ArchiveMissing(BundleError):
    """The store has no archive of a version that is to be restored."""


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
    def key(self) -> Key:
        return self.name, self.version

    @property
    def workers(self) -> tuple[int, int]:
        return self.minimum, self.maximum


@dataclass(frozen=True)
class State:
    """What is registered at one moment.

    Attributes:
        removed: which version of a NAME.mar in the store was unregistered, by name.
        given: the numbers of workers with which the server was started, by model.
    """

    registered: list[Registered] = field(default_factory=list)
    removed: dict[str, str] = field(default_factory=dict)
    given: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "State | None":
        """Return the state in a file; None if the file is missing, or invalid: then it is renamed to FILE.bad."""
        try:
            values = json.loads(file.read_text())
            registered = [Registered(**version) for version in values["registered"]]
            return cls(registered, values["removed"], values.get("given", {}))  # earlier bundles wrote no `given`
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            with suppress(FileNotFoundError):  # another replica has renamed it
                file.replace(file.with_suffix(".bad"))
            return None

    def write(self, file: Path) -> None:
        write_atomically(file, json.dumps(asdict(self), indent=1))

    def workers(self) -> dict[Key, tuple[int, int]]:
        """Return the minimum and maximum number of workers of each registered version."""
        return {version.key: version.workers for version in self.registered}

    def defaults(self) -> dict[str, str]:
        """Return the default version of each model."""
        return {version.name: version.version for version in self.registered if version.default}

    def without_outdated(self, given: Mapping[str, int], archives: Mapping[str, str]) -> "State":
        """Return the state without the archives' versions of models whose given number of workers has changed.

        Their saved workers came from the number of an earlier start, or replaced it. A start registers these versions
        in any case.

        Args:
            given: the numbers of workers of this start.
            archives: the version of each NAME.mar.
        """
        outdated = {(name, version) for name, version in archives.items() if self.given.get(name) != given.get(name)}
        return replace(self, registered=[version for version in self.registered if version.key not in outdated])


def merge(saved: State, restored: State, now: State, store: Path) -> State:
    """Return the state to keep: what management has changed since the restore, and what was saved for everything else.

    What could not be restored is thus kept, and tried again at the next start. It is forgotten if the store no longer
    has its archive, or if management has changed it since.

    Args:
        saved: what was to be restored.
        restored: what was there after the restore.
        now: what is there now.
    """
    before, after = restored.workers(), now.workers()

    def unchanged(key: Key) -> bool:
        return before.get(key) == after.get(key)

    kept = {version.key: version for version in now.registered}
    for version in saved.registered:
        if version.key in kept and unchanged(version.key):
            kept[version.key] = replace(kept[version.key], minimum=version.minimum, maximum=version.maximum)
        elif unchanged(version.key) and has_archive(store, version):
            kept[version.key] = version
    removed = dict(now.removed)
    for key in saved.removed.items():
        replaced = any(version.name == key[0] for version in saved.registered)
        others = any(name == key[0] for name, version in kept if (name, version) != key)
        if key in kept and unchanged(key) and (others or not replaced):
            del kept[key]
            removed |= dict([key])
    changed = {name for name, version in now.defaults().items() if restored.defaults().get(name) != version}
    saved_defaults = {key for key in saved.defaults().items() if key in kept and key[0] not in changed}
    defaults = now.defaults() | dict(saved_defaults)
    return State(
        [replace(version, default=defaults.get(version.name) == version.version) for version in kept.values()],
        removed,
        now.given,
    )


def missing(kept: State, now: State) -> list[Key]:
    """Return the versions that are not as the state to keep has them: they could not be restored."""
    there, defaults = now.workers(), now.defaults().items()
    return [
        version.key
        for version in kept.registered
        if there.get(version.key) != version.workers or (version.default and version.key not in defaults)
    ] + [key for key in kept.removed.items() if key in there]


def restore(server: Server, client: Client, state: State, seconds: float, report: Callable[[str], object]) -> None:
    """Bring a server that was just started to the state: versions, numbers of workers, defaults.

    What cannot be restored is reported, and the rest is.

    Args:
        seconds: to wait at most for a version to be READY.
    """

    def attempt(what: str, step: Callable, *arguments: object) -> None:
        try:
            step(*arguments)
        except (BundleError, requests.RequestException) as exc:
            report(f"not restored: {what}: {exc}")

    for version in state.registered:
        attempt(f"{version.name} {version.version}", restore_version, server, client, version, seconds)
    for version in state.registered:
        if version.default:
            attempt(f"{version.name} {version.version} as the default", restore_default, client, version)
    for name, removed in state.removed.items():
        replaced = any(registered.name == name for registered in state.registered)
        attempt(f"the removal of {name} {removed}", remove_again, client, name, removed, replaced)


def restore_version(server: Server, client: Client, version: Registered, seconds: float) -> None:
    """Register and scale a version. If that fails, what was served before still is.

    Raises:
        BundleError: its archive is missing, or its workers do not become READY.
        requests.RequestException: the management API does not answer.
    """
    found = client.describe(*version.key)
    if found is None:
        archive = archive_of(server.store, version).name
        with withdrawn_if_it_fails(client, *version.key):
            start_version(client, server.logs, archive, *version.key, version.workers, seconds)
    elif (found["minWorkers"], found["maxWorkers"]) != version.workers:
        try:
            scale_version(client, server.logs, *version.key, version.workers, seconds)
        except (BundleError, requests.RequestException):
            client.scale(*version.key, found["minWorkers"], found["maxWorkers"])
            raise


def restore_default(client: Client, version: Registered) -> None:
    """Make a version the default, if it is registered."""
    if client.describe(*version.key) is not None:
        client.set_default(*version.key)


def remove_again(client: Client, name: str, version: str, replaced: bool) -> None:
    """Unregister what had been unregistered; if other versions had replaced it, only if one of them is registered."""
    there = [described["modelVersion"] for described in client.versions(name)]
    if version in there and (not replaced or len(there) > 1):
        client.unregister(name, version)


def archive_of(store: Path, version: Registered) -> Path:
    """Return the archive with the version: under the name it was registered by, or the one it was promoted to.

    Raises:
        ArchiveMissing: the store has no such archive.
        BundleError: an archive of one of these names cannot be read.
    """
    for name in (version.url, f"{version.name}.mar"):
        file = store / name
        if file.is_file() and mar.version(file) == version.version:
            return file
    raise ArchiveMissing(f"no archive in {store} has this version any more")


def has_archive(store: Path, version: Registered) -> bool:
    try:
        archive_of(store, version)
    except ArchiveMissing:
        return False
    except BundleError:
        return True  # it may be readable at the next start
    return True
