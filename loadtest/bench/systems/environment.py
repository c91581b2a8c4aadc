"""A virtual environment for each peer, with its own packages and the bundle's torch."""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from bundle.errors import BundleError
from bundle.paths import relative
from loadtest.bench.paths import WORK

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"


class Environment:
    """The environment build/bench/env/NAME with the packages of requirements/NAME.txt.

    Torch and the other packages of the models come from the environment that the benchmark runs in, after the peer's
    own packages. So they are the same for all systems and are installed once.
    """

    def __init__(self, name: str):
        self.folder = WORK / "env" / name
        self.requirements = REQUIREMENTS / f"{name}.txt"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def version(self, package: str) -> str:
        """Return the version of a package that the requirements pin."""
        pins = dict(line.split("==") for line in self.requirements.read_text().split("\n") if "==" in line)
        return pins[package].split(" ")[0]

    def install(self) -> None:
        """Make the environment, unless it is up to date.

        Raises:
            BundleError: uv is missing, or cannot install the requirements.
        """
        ours = sysconfig.get_path("purelib")
        wanted = hashlib.sha256(f"{sys.version} {ours}\n{self.requirements.read_text()}".encode()).hexdigest()
        done = self.folder / "done"
        if done.is_file() and done.read_text() == wanted:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.uv("venv", "--quiet", "--python", sys.executable, str(self.folder))
        self.uv("pip", "install", "--quiet", "--python", str(self.python), "--requirements", str(self.requirements))
        [packages] = self.folder.glob("lib/python*/site-packages")
        (packages / "torch-of-the-bundle.pth").write_text(f"{ours}\n")
        done.write_text(wanted)

    def uv(self, *arguments: str) -> None:
        uv = Path(sys.executable).with_name("uv")
        if not uv.is_file():
            raise BundleError(f"{relative(uv)} is missing. Install it: make dev")
        run = subprocess.run([uv, *arguments], capture_output=True, text=True)
        if run.returncode:
            raise BundleError(f"uv cannot make {relative(self.folder)}.", run.stderr)
