"""Replace the served version of a model by a new one without a failed request."""

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
    """Register `archive` beside the served version, make it the default, and remove the old version.

    The new version becomes the default once it has answered the folder's sample. The old version is removed once it has
    answered its requests.

    Args:
        archive: outside the store; it is copied.
        seconds: to wait at most until the new version is READY, and until the old one is idle.

    Raises:
        BundleError: the new version failed, and the old one keeps serving; or, as the message says, the old one could
            not be removed.
    """
    name, version = folder.name, mar.version(archive)
    check(archive, key_of("TRUSTED_KEY"))
    old = client.describe(name)
    if old is None:
        served_then = " ".join([*client.models(), name])
        raise BundleError(f'{name} is not served here. Serve it, too: make serve MODELS="{served_then}"')
    if any(served["modelVersion"] == version for served in client.versions(name)):
        raise BundleError(
            f"Version {version} of {name} is served already. Give the new one another version: "
            f"`version` in {relative(folder.path / CONFIG_NAME)}."
        )
    incoming = server.store / f"rollout-{name}-{version}.mar"
    copy(archive, incoming)
    try:
        report(f"{name} {version}: starting beside {old['modelVersion']}")
        workers = old["minWorkers"], old["maxWorkers"]
        start_version(client, server.logs, incoming.name, name, version, workers, seconds)
        first = check_sample(client, folder, version)
        report(f"{name} {version}: READY" + (f", {folder.bundle.sample} is {first!r}" if first else ""))
        client.set_default(name, version)
    except BaseException:
        # Ctrl-C included: the old version is still the default, and stays
        incoming.unlink(missing_ok=True)
        withdraw(client, name, version)
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


def copy(archive: Path, target: Path) -> None:
    """Copy an archive so that readers of the store never see a part of it."""
    with replacing(target) as partial:
        shutil.copyfile(archive, partial)


def withdraw(client: Client, name: str, version: str) -> None:
    """Unregister a version, unless TorchServe has already done so."""
    if client.describe(name, version) is not None:
        client.unregister(name, version)
