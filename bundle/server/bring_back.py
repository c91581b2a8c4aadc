"""Serve again what the management API has removed, or scaled to zero workers."""

from collections.abc import Callable

from bundle import mar
from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from bundle.server.client import Client
from bundle.server.process import Server
from bundle.server.readiness import scale_version, start_version

RESTART = "To start the server anew: make stop, then make serve."


def bring_back(
    server: Server, client: Client, folder: ModelFolder, seconds: float, report: Callable[[str], object]
) -> bool:
    """Register a model that was unregistered, and start workers of one that has none.

    The version that the management API has made the default stays the default.

    Args:
        seconds: to wait at most until its workers are READY.
        report: called before each step.

    Returns:
        whether something was missing.

    Raises:
        BundleError: it cannot be brought back; the message says how to start the server anew.
    """
    archive, name = server.archive(folder), folder.name
    workers = workers_of(mar.config(archive), int(server.settings["default_workers_per_model"]))
    described = client.describe(name)
    try:
        if described is None:
            report(f"{name} was unregistered through the management API. It is registered again.")
            start_version(client, server.logs, archive.name, name, mar.version(archive), workers, seconds)
        elif described["minWorkers"] == 0:
            report(f"{name} was scaled to 0 workers through the management API. It gets {workers[0]} again.")
            scale_version(client, server.logs, name, described["modelVersion"], workers, seconds)
        else:
            return False
    except BundleError as exc:
        raise BundleError(f"{name} is not served again: {exc} {RESTART}", exc.details) from exc
    return True


def workers_of(config: dict, default: int) -> tuple[int, int]:
    """Return the minimum and maximum number of workers that TorchServe starts for an archive.

    Args:
        config: the archive's model-config.yaml.
        default: used by TorchServe for both unless the file has both, and they are valid.
    """
    minimum, maximum = config.get("minWorkers", 0), config.get("maxWorkers", 0)
    return (minimum, maximum) if 1 <= minimum <= maximum else (default, default)
