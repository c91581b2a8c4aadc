"""Change what a running server serves without a failed request: replace the version of a model, add a model."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


def roll_out(
    server: Server, client: Client, folder: ModelFolder, archive: Path, seconds: float, report: Callable[[str], object]
) -> None:
    """Register `archive` beside the served version, make it the default, and remove the old version.

    The new version becomes the default once it has answered the folder's sample. The old version is removed once it has
    answered its requests.

    Args:
        archive: outside the store; it is copied.
        seconds: to wait at most until the new version is READY, and until the old one is idle.

    Raises:
        NotRunning: the model is not served.
        BundleError: the new version failed, and the old one keeps serving; or, as the message says, the old one could
            not be removed.
    """
    name, version = folder.name, mar.version(archive)
    check(archive, key_of("TRUSTED_KEY"))
    old = replaced(client, folder, version)
    incoming = server.store / f"rollout-{name}-{version}.mar"
    copy(archive, incoming)
    try:
        with withdrawn_if_it_fails(client, name, version):
            report(f"{name} {version}: starting beside {old['modelVersion']}")
            workers = old["minWorkers"], old["maxWorkers"]
            start_version(client, server.logs, incoming.name, name, version, workers, seconds)
            first = check_sample(client, folder, version)
            report(f"{name} {version}: READY" + (f", {folder.bundle.sample} is {first!r}" if first else ""))
            client.set_default(name, version)
    except BaseException:
        incoming.unlink(missing_ok=True)
        raise
    incoming.replace(server.store / f"{name}.mar")  # what a restart serves
    report(f"{name} {version}: is the default; {old['modelVersion']} finishes its requests")
    try:
        wait_until_idle(client, [(name, old["modelVersion"])], server.settings.inference_ports(), seconds)
        client.unregister(name, old["modelVersion"])
    except BundleError as exc:
        raise BundleError(
            f"{name} {version} is served, and so is still {old['modelVersion']}: {exc} Remove it when no client "
            f"requests it by number: curl -X DELETE {client.management}/models/{name}/{old['modelVersion']}",
            exc.details,
        ) from exc
    report(f"{name} {old['modelVersion']}: removed")


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
