"""A new version of a model takes the place of the one that is served, and no request notices."""

import shutil
from collections.abc import Callable
from pathlib import Path

from bundle import mar
from bundle.catalog import CONFIG_NAME, ModelFolder
from bundle.errors import BundleError
from bundle.files import replacing
from bundle.paths import relative
from bundle.server.client import Client, check_sample
from bundle.server.drain import wait_until_idle
from bundle.server.process import Server
from bundle.server.readiness import start_version
from bundle.signing import check, key_of


def roll_out(
    server: Server, client: Client, folder: ModelFolder, archive: Path, seconds: float, report: Callable[[str], object]
) -> None:
    """Registers `archive` beside what is served, and once it answers the folder's sample, makes it the default; then
    waits for what the old version still has to answer, and removes it.

    Args:
        archive: outside the store; it is copied.
        seconds: to wait at most until the new version is READY, and for the old one's queue to empty.

    Raises:
        BundleError: the new version is not fit, and the old one goes on as before; or, as the message says, the old
            one could not be removed.
    """
    name, version = folder.name, mar.version(archive)
    check(archive, key_of("TRUSTED_KEY"))
    old = client.describe(name)
    if old is None:
        raise BundleError(f"{name} is not served here: there is nothing to roll over. Serve it: make serve")
    if any(served["modelVersion"] == version for served in client.versions(name)):
        raise BundleError(
            f"Version {version} of {name} is served already. Give the new one a higher number: "
            f"`version` in {relative(folder.path / CONFIG_NAME)}."
        )
    incoming = server.store / f"rollout-{name}-{version}.mar"
    copy(archive, incoming)
    try:
        report(f"{name} {version}: starts beside {old['modelVersion']}")
        workers = old["minWorkers"], old["maxWorkers"]
        start_version(client, server.logs, incoming.name, name, version, workers, seconds)
        first = check_sample(client, folder, version)
        report(f"{name} {version}: READY" + (f", {folder.bundle.sample} is {first!r}" if first else ""))
        client.set_default(name, version)
    except BaseException:
        # Ctrl-C included: the old version is the default still, and stays
        incoming.unlink(missing_ok=True)
        withdraw(client, name, version)
        raise
    incoming.replace(server.store / f"{name}.mar")  # what a restart serves
    report(f"{name} {version}: is the default; {old['modelVersion']} answers what it has")
    try:
        wait_until_idle(client, [(name, old["modelVersion"])], server.settings.inference_ports(), seconds)
        client.unregister(name, old["modelVersion"])
    except BundleError as exc:
        raise BundleError(
            f"{name} {version} is served; {old['modelVersion']} still is, too: {exc} Remove it when nobody asks for it "
            f"by number: curl -X DELETE {client.management}/models/{name}/{old['modelVersion']}",
            exc.details,
        ) from exc
    report(f"{name} {old['modelVersion']}: removed")


def copy(archive: Path, target: Path) -> None:
    """A reader of the store never sees half an archive."""
    with replacing(target) as partial:
        shutil.copyfile(archive, partial)


def withdraw(client: Client, name: str, version: str) -> None:
    """Unregisters a version, where TorchServe has not done so itself."""
    if client.describe(name, version) is not None:
        client.unregister(name, version)
