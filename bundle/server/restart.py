"""Why a running server must be restarted to serve the models as they are now."""

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
    new = [name for name in digests if name not in running.served]
    if dropped:
        reasons.append(
            f"The running server has the models {', '.join(running.served)} instead of {', '.join(digests)}. "
            f'To keep {", ".join(dropped)}: make serve MODELS="{" ".join([*digests, *dropped])}".'
        )
    elif new and (hindrance := why_not_registered(server, running, new)):
        reasons.append(hindrance)
    if other := [name for name in digests if running.served.get(name, digests[name]) != digests[name]]:
        reasons.append(f"The running server has other archives of {', '.join(other)}.")
    if not running.settings:
        reasons.append("The running server was started by an earlier version of the bundle.")
    elif names := changed(running.settings, server.settings.fingerprint()):
        reasons.append(f"Settings that have changed since the server's start: {names}.")
    return " ".join(reasons)


def why_not_registered(server: Server, running: Running, new: list[str]) -> str:
    """Explain why the running server cannot register new models beside its own; return "" if it can."""
    if server.settings["enable_model_api"].lower() != "true":
        return f"TorchServe cannot register {', '.join(new)} while it runs, because enable_model_api is false."
    try:
        registered = running.client().models()
    except requests.RequestException:
        return f"The running server does not answer, so it cannot register {', '.join(new)}."
    if known := [name for name in new if name in registered]:
        return f"{', '.join(known)} was registered through the management API, perhaps from another archive."
    return ""
