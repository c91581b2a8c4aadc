"""Virtual environments for packages that do not fit into the bundle's own, with the bundle's torch."""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from bundle.errors import BundleError
from bundle.paths import relative


class Environment:
    """An environment with packages of its own.

    Torch and the other packages of the models come from the environment that this process runs in, after its own
    packages. So they are the same for all systems of the benchmark, and are installed once.

    Args:
        folder: of the environment.
        requirements: the file of its own packages, pinned.
    """

    def __init__(self, folder: Path, requirements: Path):
        self.folder, self.requirements = folder, requirements

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
