"""Install packages into a virtual environment with uv, and with pip where uv fails."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bundle.setup.pip_settings import PipSettings

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"
# they would contradict the arguments below
NOT_PASSED = {"UV_PYTHON", "UV_SYSTEM_PYTHON", "UV_TORCH_BACKEND"}


class InstallError(Exception):
    """pip failed, too, and has printed why."""


class Installer:
    """Install into one environment.

    Args:
        into: the folder of the environment.
        settings: of pip.
        report: prints a line.
        quiet: print errors only.
        compile_all: compile all modules to bytecode. Otherwise, with uv, the first import of a module does.
        only_pip: do without uv.
    """

    def __init__(
        self,
        into: Path,
        settings: PipSettings,
        report: Callable[[str], object],
        *,
        quiet: bool,
        compile_all: bool,
        only_pip: bool,
    ):
        self.into, self.settings, self.report = into, settings, report
        self.quiet, self.compile_all, self.only_pip = quiet, compile_all, only_pip
        self.why_pip = ""  # why uv is not used

    def prepare(self) -> None:
        """Install uv for this Python, or find out that pip must do."""
        if self.only_pip:
            self.why_pip = "INSTALLER=pip is set"
            return
        if unknown := self.settings.not_known_to_uv:
            self.why_pip = f"pip's settings have {', '.join(unknown)}, which uv does not have"
        else:
            pinned = pins(REQUIREMENTS / "uv.txt")["uv"]
            if installed("uv") != pinned and self.pip("install", "-qq", f"uv=={pinned}", own=True):
                self.why_pip = "uv cannot be installed"
        if self.why_pip:
            self.report(f"pip installs the packages, because {self.why_pip}. uv would be faster.")

    def install(
        self,
        *requirements: str | Path,
        index: str = "",
        extra_index: str = "",
        reinstall: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:
        """Install packages.

        Args:
            requirements: files of requirements.
            index: take everything from this index, and from nowhere else.
            extra_index: a further index.
            reinstall: packages of the files to replace, although they have the required version.
            options: of uv and of pip alike.

        Raises:
            InstallError: neither uv nor pip could.
        """
        files = [argument for file in requirements for argument in ("-r", str(file))]
        if not self.why_pip:
            again = [argument for name in reinstall for argument in ("--reinstall-package", name)]
            if self.uv(*options, *again, *files, index=index, extra_index=extra_index) == 0:
                return
            self.why_pip = "uv failed"
            self.report("uv failed. Trying pip.")
        again = ["--force-reinstall"] if reinstall else []
        if self.pip("install", *options, *again, *files, index=index, extra_index=extra_index):
            raise InstallError

    def remove(self, names: Iterable[str]) -> None:
        """Uninstall packages.

        Raises:
            InstallError: pip could not.
        """
        if (names := sorted(names)) and self.pip("uninstall", "--yes", "--quiet", *names):
            raise InstallError

    def uv(self, *arguments: str, index: str, extra_index: str) -> int:
        """Run `uv pip install`, and return its exit status."""
        environment = {name: value for name, value in os.environ.items() if name not in NOT_PASSED}
        environment = {"UV_LINK_MODE": self.link_mode()} | environment
        if index:
            for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_INDEX_URL", "UV_FIND_LINKS"):
                environment.pop(name, None)
            environment["UV_DEFAULT_INDEX"] = index
        elif extra_index:
            indexes = [environment.get(name, "") for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL")]
            environment |= {"UV_INDEX": " ".join([*indexes, extra_index]), "UV_INDEX_STRATEGY": "unsafe-best-match"}
        options = ["--quiet"] if self.quiet else []
        options += ["--compile-bytecode"] if self.compile_all else []
        options += ["--no-config"] if index else []
        options += ["--no-index"] if self.settings.no_index and not index else []
        return call([*UV, "pip", "install", *options, "--python", str(self.python), *arguments], environment)

    def link_mode(self) -> str:
        """Return how uv takes files from its cache: by links, or by copies onto another file system."""
        asked = subprocess.run([*UV, "cache", "dir"], capture_output=True, text=True)
        cache = Path(asked.stdout.strip() or Path.home())
        cache = next(folder for folder in (cache, *cache.parents) if folder.exists())
        return "hardlink" if cache.stat().st_dev == self.into.stat().st_dev else "copy"

    def pip(self, command: str, *arguments: str, index: str = "", extra_index: str = "", own: bool = False) -> int:
        """Run pip, and return its exit status.

        Args:
            own: for this Python, which may be another one than that of the environment.
        """
        environment = dict(os.environ)
        if index:
            for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
                environment.pop(name, None)
            environment |= self.settings.for_pip() | {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index}
        elif extra_index:
            indexes = self.settings.values.get("extra-index-url", "")
            environment["PIP_EXTRA_INDEX_URL"] = f"{indexes} {extra_index}"
        # a virtual environment's Python is a link to another one, so the folders tell them apart
        target = [] if own or self.into.samefile(sys.prefix) else ["--python", str(self.python)]
        options = ["--disable-pip-version-check", *target, command, *(["--quiet"] if self.quiet else [])]
        return call([sys.executable, "-m", "pip", *options, *arguments], environment)

    @property
    def python(self) -> Path:
        return self.into / "bin" / "python"


UV = (sys.executable, "-m", "uv")


def call(command: Sequence[str], environment: Mapping[str, str]) -> int:
    return subprocess.run(command, env=environment).returncode


def pins(file: Path) -> dict[str, str]:
    """Return the version of each package that a requirements file pins."""
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    return {name: pinned for name, _, pinned in (line.partition("==") for line in lines) if pinned}


def installed(name: str) -> str:
    """Return the version of a package of this Python; "" without it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
