"""Build bundle/frontend/frontend.jar from its Java sources. The same sources and compiler make the same bytes.

The jar also has what openapi.json of a server says without the documents of its models.

python -m bundle.build.frontend [JAR]
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from bundle import openapi
from bundle.errors import BundleError
from bundle.files import write_atomically
from bundle.paths import FRONTEND
from bundle.paths import FRONTEND_JAR as JAR

SOURCES = FRONTEND / "java"
SCHEMA = "bundle/frontend/openapi.json"  # Schema.java reads it
RELEASE = 11  # the oldest Java that the bundle accepts: bundle/server/java.py
DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that an archive can have
MANIFEST = """Manifest-Version: 1.0
Premain-Class: bundle.frontend.Agent
Main-Class: bundle.frontend.Agent
Build-Jdk-Spec: {compiler}
"""


def build(jar: Path = JAR) -> None:
    """Compile the sources against the installed TorchServe, and write the jar.

    Raises:
        BundleError: there is no compiler, or it rejects the sources.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiler = compiler_version()
        command = ["javac", "--release", str(RELEASE), "-proc:none", "-Xlint:all,-serial,-options", "-Werror"]
        command += ["-classpath", str(torchserve_jar()), "-d", folder]
        command += map(str, sorted(SOURCES.rglob("*.java")))
        compiled = subprocess.run(command, capture_output=True, text=True)
        if compiled.returncode:
            raise BundleError("javac rejects the sources of the frontend's agent.", compiled.stderr)
        entries = {"META-INF/MANIFEST.MF": MANIFEST.format(compiler=compiler).encode()}
        classes = sorted(Path(folder).rglob("*.class"))
        entries |= {file.relative_to(folder).as_posix(): file.read_bytes() for file in classes}
        entries[SCHEMA] = schema()
        packed = Path(folder) / "packed.jar"
        with zipfile.ZipFile(packed, "w") as archive:  # stored: compressed bytes depend on zlib's version
            for name, content in entries.items():
                entry = zipfile.ZipInfo(name, DATE)
                entry.create_system = 3
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, content)
        write_atomically(jar, packed.read_bytes())


def schema() -> bytes:
    """Return the jar's openapi.json: the common part, and the part of a model without a document, called MODEL."""
    return json.dumps({"server": openapi.common(), "model": openapi.generic("MODEL", "1.0")}, indent=1).encode()


def compiler_version() -> str:
    """Return "17" for javac 17.0.15.

    Raises:
        BundleError: javac is missing.
    """
    if shutil.which("javac") is None:
        raise BundleError("javac is missing. Install a JDK 17. Only changes of the Java sources need one.")
    printed = subprocess.run(["javac", "-version"], capture_output=True, text=True)
    return printed.stdout.split()[-1].split(".")[0]


def built_with(jar: Path = JAR) -> str:
    """Return the version of the compiler that made a jar."""
    with zipfile.ZipFile(jar) as archive:
        manifest = archive.read("META-INF/MANIFEST.MF").decode()
    return manifest.split("Build-Jdk-Spec: ")[1].split()[0]


def torchserve_jar() -> Path:
    """Return the jar of TorchServe's frontend."""
    spec = find_spec("ts")
    if spec is None or spec.origin is None:
        raise BundleError("TorchServe is missing. Install it: make setup")
    return Path(spec.origin).parent / "frontend" / "model-server.jar"


if __name__ == "__main__":
    try:
        build(*map(Path, sys.argv[1:]))
    except BundleError as error:
        sys.exit(f"error: {error}\n{error.details}".strip())
