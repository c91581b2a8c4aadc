"""The agent that repairs TorchServe's frontend: how Java loads it, and which of its patches are in.

bundle/frontend/README.md describes the patches.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from bundle.paths import FRONTEND

JAR = FRONTEND / "frontend.jar"
OFF = "BUNDLE_FRONTEND_OFF"  # names of patches to leave out, or `all`; the agent itself reads it
OPTIONS = "JDK_JAVA_OPTIONS"  # Java's launcher reads it; unlike `vmargs`, it allows a path with spaces
STATE = re.compile(r"^frontend patch (\S+): (.+)$", re.MULTILINE)  # what the agent prints


def with_agent(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Java loads the agent, after the options that are there already."""
    return {**environment, OPTIONS: f'{environment.get(OPTIONS, "")} "-javaagent:{JAR}"'.strip()}


def states(console: Path) -> dict[str, str]:
    """Return the state of each patch: "in", "off", or "refused: " and the reason.

    Args:
        console: what Java printed. Without such a file, or with another server's, no patch is known.
    """
    try:
        return dict(STATE.findall(console.read_text(errors="replace")))
    except OSError:
        return {}


def fingerprint(environment: Mapping[str, str]) -> str:
    """Return a digest of the agent and of the patches that are left out."""
    return f"{OFF}={environment.get(OFF, '')} {hashlib.sha256(JAR.read_bytes()).hexdigest()}"
