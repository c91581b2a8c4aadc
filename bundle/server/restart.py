"""Why a running server must be restarted to serve the models as they are now."""

from collections.abc import Collection

import requests

from bundle.catalog import ModelFolder
from bundle.digests import changed
from bundle.server.process import Running, Server


def restart_reason(server: Server, running: Running, folders: list[ModelFolder]) -> str:
    """Explain in a few sentences what has changed since the server's start.

    Args:
        server: with the settings and archives of now.
        running: the server as it was started.
        folders: of the models to serve.

    Returns:
        "" if it need not be restarted: nothing has changed, or there are new models, which it can register.
    """
    digests = server.archive_digests(folders)
    reasons: list[str] = []
    if running.key_file and not server.settings.asks_for_keys:
        reasons.append(
            "The running server requires tokens; this restart turns them OFF. "
            "To keep them, set TS_DISABLE_TOKEN_AUTHORIZATION=false."
        )
    dropped = [name for name in running.served if name not in digests]
    if dropped or not can_register(server, running, digests.keys() - running.served.keys()):
        reasons.append(
            f"The running server has the models {', '.join(running.served)} instead of {', '.join(digests)}."
        )
    if dropped:
        reasons.append(f'To keep {", ".join(dropped)}: make serve MODELS="{" ".join([*digests, *dropped])}".')
    if other := [name for name in digests if running.served.get(name, digests[name]) != digests[name]]:
        reasons.append(f"The running server has other archives of {', '.join(other)}.")
    if not running.settings:
        reasons.append("The running server was started by an earlier version of the bundle.")
    elif names := changed(running.settings, server.settings.fingerprint()):
        reasons.append(f"Settings that have changed since the server's start: {names}.")
    return " ".join(reasons)


def can_register(server: Server, running: Running, models: Collection[str]) -> bool:
    """Return whether the running server can register these models beside its own.

    It cannot if it does not answer, or if somebody has registered one of them already, of an archive that may be
    another.
    """
    if not models:
        return True
    if server.settings["enable_model_api"].lower() != "true":
        return False
    try:
        return {*models}.isdisjoint(running.client().models())
    except requests.RequestException:
        return False
