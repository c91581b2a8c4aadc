"""The agent that repairs TorchServe's frontend: how Java loads it, and which of its patches are in.

bundle/frontend/README.md describes the patches.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from bundle.digests import digest
from bundle.errors import BundleError
from bundle.paths import FRONTEND_JAR as JAR
from bundle.paths import relative
from bundle.server.java import has_module

OFF = "BUNDLE_FRONTEND_OFF"  # names of patches to leave out, or `all`; the agent itself reads it
OPTIONS = "JDK_JAVA_OPTIONS"  # Java's launcher reads it; unlike `vmargs`, it allows a path with spaces
STATE = re.compile(r"^frontend patch (\S+): (.+)$", re.MULTILINE)  # what the agent prints
ALL_OFF = "frontend patch all: off\n"  # the same line, for a Java without the agent
MODULE = "java.instrument"


def is_off(environment: Mapping[str, str], patch: str = "all") -> bool:
    """Return whether a patch is left out; by default, whether all are, so that Java needs no agent."""
    return not {"all", patch}.isdisjoint(re.split("[ ,+]+", environment.get(OFF, "")))  # as the agent splits it


def check(java_home: Path, environment: Mapping[str, str]) -> None:
    """Check that Java can load the agent. With an agent that it cannot load, it does not start.

    Raises:
        BundleError: it cannot.
    """
    if is_off(environment):
        return
    if not JAR.is_file():
        problem = f"{JAR} is missing. Restore it (git checkout bundle/frontend/frontend.jar)"
    elif found := [character for character in '="' if character in str(JAR)]:
        problem = f"The path {JAR} has {found[0]}, with which Java loads no agent. Move the bundle to another folder"
    elif not has_module(java_home, MODULE):
        problem = (
            f"The Java in {java_home} lacks the module {MODULE} (see `java --list-modules`). Set JAVA_HOME to a Java "
            "that has it"
        )
    else:
        return
    raise BundleError(f"{problem}, or start TorchServe without the patches of its frontend: set {OFF}=all.")


def with_agent(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Java loads the agent, after the options that are there already.

    If all patches are left out, it is the same environment. bundle/guard.py removes the agent from that of a worker.
    """
    if is_off(environment):
        return dict(environment)
    return {**environment, OPTIONS: f'{environment.get(OPTIONS, "")} "-javaagent:{JAR}"'.strip()}


def states(console: Path) -> dict[str, str]:
    """Return the state of each patch: "in", "off", or "refused: " and the reason; of `all` if Java has no agent.

    Args:
        console: what Java printed. Without such a file, or with another server's, no patch is known.
    """
    try:
        return dict(STATE.findall(console.read_text(errors="replace")))
    except OSError:
        return {}


def fingerprint(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a digest of the agent, and one of the patches that are left out, by name."""
    jar = digest(JAR.read_bytes()) if JAR.is_file() else "missing"
    return {OFF: digest(environment.get(OFF, "")), relative(JAR): jar}
