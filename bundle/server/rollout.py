"""Change what a running server serves without a failed request: replace the version of a model, add a model."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import requests

from bundle import mar
from bundle.catalog import CONFIG_NAME, ModelFolder
from bundle.errors import BundleError
from bundle.files import replacing
from bundle.paths import relative
from bundle.server.bring_back import workers_of
from bundle.server.client import AlreadyRegistered, Client, check_sample
from bundle.server.drain import wait_until_idle
from bundle.server.process import Server
from bundle.server.readiness import start_version
from bundle.signing import check, key_of


@dataclass(frozen=True)
class Rollout:
    """The version of a model that is to replace another one on a server."""

    model: str
    old: str
    new: str

    @property
    def archive(self) -> str:
        """The new version's file in the store, until it is promoted to MODEL.mar."""
        return f"rollout-{self.model}-{self.new}.mar"


class PreparedNevertheless(KeyboardInterrupt):
    """Ctrl-C came while a replica prepared. The step could not be stopped, and has succeeded.

    Attributes:
        rollout: what the step returned.
    """

    def __init__(self, rollout: Rollout):
        super().__init__()
        self.rollout = rollout


class Replica(Protocol):
    """One of the servers that serve the same: the steps of a rollout on it, each of which may raise a BundleError."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def prepare(self, archive: Path) -> Rollout:
        """Register the archive beside the served version, and have it answer its sample; after a failure, neither.

        Raises:
            PreparedNevertheless: it was interrupted, and is to be undone.
        """

    def switch(self, rollout: Rollout) -> None:
        """Make the new version the default."""

    def finish(self, rollout: Rollout) -> None:
        """Remove the old version when it has answered its requests."""

    def undo(self, rollout: Rollout) -> None:
        """Make the old version the default, and remove the new one."""


def roll_out(replicas: Sequence[Replica], archive: Path, report: Callable[[str], object]) -> None:
    """Replace the version of a model on all replicas, or on none: no step begins before all have done the last one.

    The replicas prepare one after the other: a bad version is found on the first, and takes the memory of one.

    Args:
        archive: outside the store; it is copied.

    Raises:
        NotRunning: the model is not served.
        BundleError: the new version failed, and the old one keeps serving; or, as the message says, the old one could
            not be removed.
    """
    prepared: list[tuple[Replica, Rollout]] = []
    try:
        for replica in replicas:
            try:
                prepared.append((replica, replica.prepare(archive)))
            except PreparedNevertheless as exc:
                prepared.append((replica, exc.rollout))
                raise
        for replica, rollout in prepared:
            replica.switch(rollout)
    except BaseException:
        for replica, rollout in reversed(prepared):
            try:
                replica.undo(rollout)
            except (BundleError, OSError) as exc:  # a request that failed is an OSError, too
                report(f"{rollout.model} {rollout.new} could not be removed from {replica.name}: {exc}")
        raise
    with ThreadPoolExecutor(len(prepared)) as pool:  # each may wait for its clients
        finished = [pool.submit(replica.finish, rollout) for replica, rollout in prepared]
    for each in finished:
        each.result()


@dataclass(frozen=True)
class LocalReplica:
    """A server of this machine or container.

    Args:
        seconds: to wait at most until the new version is READY, and until the old one is idle.
    """

    server: Server
    client: Client
    folder: ModelFolder
    seconds: float
    report: Callable[[str], object]
    name: str = "this server"

    def prepare(self, archive: Path) -> Rollout:
        client, folder, name, version = self.client, self.folder, self.folder.name, mar.version(archive)
        check(archive, key_of("TRUSTED_KEY"))
        old = replaced(client, folder, version)
        rollout = Rollout(name, old["modelVersion"], version)
        incoming = self.server.store / rollout.archive
        copy(archive, incoming)
        try:
            with withdrawn_if_it_fails(client, name, version):
                self.report(f"{name} {version}: starting beside {rollout.old}")
                workers = old["minWorkers"], old["maxWorkers"]
                start_version(client, self.server.logs, incoming.name, name, version, workers, self.seconds)
                first = check_sample(client, folder, version)
        except BaseException:
            incoming.unlink(missing_ok=True)
            raise
        self.report(f"{name} {version}: READY" + (f", {folder.bundle.sample} is {first!r}" if first else ""))
        return rollout

    def switch(self, rollout: Rollout) -> None:
        self.client.set_default(rollout.model, rollout.new)

    def undo(self, rollout: Rollout) -> None:
        (self.server.store / rollout.archive).unlink(missing_ok=True)
        self.client.set_default(rollout.model, rollout.old)
        withdraw(self.client, rollout.model, rollout.new)

    def finish(self, rollout: Rollout) -> None:
        name, old, new, client = rollout.model, rollout.old, rollout.new, self.client
        with suppress(FileNotFoundError):  # another replica with the same store has done it
            (self.server.store / rollout.archive).replace(self.server.store / f"{name}.mar")  # what a restart serves
        self.report(f"{name} {new}: is the default; {old} finishes its requests")
        try:
            wait_until_idle(client, [(name, old)], self.server.settings.inference_ports(), self.seconds)
            client.unregister(name, old)
        except BundleError as exc:
            raise BundleError(
                f"{name} {new} is served, and so is still {old}: {exc} Remove it when no client "
                f'requests it by number: make manage CALL="DELETE /models/{name}/{old}"',
                exc.details,
            ) from exc
        self.report(f"{name} {old}: removed")


def replaced(client: Client, folder: ModelFolder, version: str) -> dict:
    """Return the description of the version that a new one is to replace.

    Args:
        version: the new one.

    Raises:
        NotRunning: the model is not served.
        BundleError: the new version is served already.
    """
    old = client.describe(folder.name)
    if old is None:
        raise client.not_served(folder.name)
    if any(served["modelVersion"] == version for served in client.versions(folder.name)):
        raise BundleError(
            f"Version {version} of {folder.name} is served already. Give the new one another version: "
            f"`version` in {relative(folder.path / CONFIG_NAME)}."
        )
    return old


def add(server: Server, client: Client, folder: ModelFolder, seconds: float, report: Callable[[str], object]) -> None:
    """Register a model that the server does not have, from its archive in the store, and have it answer its sample.

    Args:
        seconds: to wait at most until its workers are READY.

    Raises:
        BundleError: it failed, and the server has what it had before.
    """
    archive, name = server.archive(folder), folder.name
    version = mar.version(archive)
    check(archive, key_of("TRUSTED_KEY"))
    report(f"{name} is new. It is registered beside the other models.")
    workers = workers_of(mar.config(archive), int(server.settings["default_workers_per_model"]))
    with withdrawn_if_it_fails(client, name, version):
        start_version(client, server.logs, archive.name, name, version, workers, seconds)
        check_sample(client, folder, version)


@contextmanager
def withdrawn_if_it_fails(client: Client, name: str, version: str) -> Iterator[None]:
    """Unregister a version after any failure of the block, Ctrl-C included: what was served before stays."""
    try:
        yield
    except AlreadyRegistered:
        raise  # the version is not of this block
    except BaseException:
        with suppress(BundleError, requests.RequestException):  # the server may have ended: the block's error says why
            withdraw(client, name, version)
        raise


def copy(archive: Path, target: Path) -> None:
    """Copy an archive so that readers of the store never see a part of it."""
    with replacing(target) as partial:
        shutil.copyfile(archive, partial)


def withdraw(client: Client, name: str, version: str) -> None:
    """Unregister a version, unless TorchServe has already done so."""
    if client.describe(name, version) is not None:
        client.unregister(name, version)
