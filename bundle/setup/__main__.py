"""Install the bundle's packages.

python -m bundle.setup serve torch jre      the packages of requirements/serve.txt, torch.txt and jre.txt
python -m bundle.setup command              the command `bundle`, linked to this checkout

The variable TORCH_INDEX_URL names the package index of torch, or is "pypi".
"""

import argparse
import fcntl
import os
import signal
import sys
from pathlib import Path

from bundle.setup import check_python, packages, torch_source
from bundle.setup.installer import REQUIREMENTS, Installer, InstallError, pins
from bundle.setup.pip_settings import PipSettings
from bundle.setup.torch_source import CPU_INDEX, PACKAGES, PYPI, Probe

ROOT = REQUIREMENTS.parent
SWITCHING = "switching"


def main(arguments: list[str] | None = None) -> int:
    """Install what the command line names; return the exit status."""
    check_python.check(sys.version_info)
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        Setup(options).run(options.parts)
    except InstallError as error:
        print(f"error: {error or 'The packages could not be installed, for the reason above.'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. The next `make` continues.", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bundle.setup", description=__doc__, formatter_class=shown)
    parser.add_argument("parts", nargs="+", help="names of files in requirements/, without .txt; or `command`")
    parser.add_argument("--into", type=Path, default=Path(sys.prefix), help="folder of the virtual environment")
    parser.add_argument("--pip", action="store_true", help="do without uv")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--compile", action="store_true", help="compile all modules to bytecode")
    return parser


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Setup:
    """One environment, and what is installed there.

    Attributes:
        record: file with the index of the torch that is installed.
        unfinished: file that is there during an installation, and after one that was interrupted or failed. It contains
            SWITCHING, if torch is replaced by that of another index.
    """

    def __init__(self, options: argparse.Namespace):
        self.into = options.into.absolute()
        self.record, self.unfinished = self.into / "torch-index", self.into / "setup-unfinished"
        self.site = packages.site_packages(self.into)
        self.settings = PipSettings.read()
        os.environ.update(self.settings.for_uv(os.environ))  # for the probe, too: certificates and proxies
        self.installer = Installer(
            self.into, self.settings, report, quiet=options.quiet, compile_all=options.compile, only_pip=options.pip
        )

    def run(self, parts: list[str]) -> None:
        """Install parts.

        Raises:
            InstallError: it failed. The next run continues.
        """
        with (self.into / "setup.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # `make --jobs`, or another terminal, may install into it, too
            self.run_alone(parts)

    def run_alone(self, parts: list[str]) -> None:
        left = self.unfinished.read_text() if self.unfinished.exists() else None
        if left is not None and (damaged := packages.forget_damaged(self.site)):
            report(f"The last installation did not end. Installing again: {', '.join(damaged)}")
        self.unfinished.write_text(left or "")
        if "torch" in parts:
            self.install_with_torch(parts, interrupted=left == SWITCHING)
        elif parts == ["command"]:
            self.installer.prepare()
            self.installer.install(options=["--no-deps", "--no-build-isolation", "--editable", str(ROOT)])
        else:
            self.installer.prepare()
            # whatever requires torch gets the one that is installed
            self.installer.install(*self.files(parts), options=["--constraint", str(REQUIREMENTS / "torch.txt")])
        self.unfinished.unlink()

    def files(self, parts: list[str]) -> list[Path]:
        return [REQUIREMENTS / f"{part}.txt" for part in parts]

    def install_with_torch(self, parts: list[str], interrupted: bool) -> None:
        """Install parts with torch, torchvision and torchaudio of one index.

        Args:
            interrupted: the last run ended while it replaced those of another index.

        Raises:
            InstallError: it failed, or the three are builds of different kinds.
        """
        asked, recorded = os.environ.get("TORCH_INDEX_URL", "").strip(), self.recorded(interrupted)
        is_open = not (asked or recorded or torch_source.has_driver() or self.settings.replaces_pypi)
        probe = Probe(CPU_INDEX, pins(REQUIREMENTS / "torch.txt")) if is_open else None
        self.installer.prepare()
        source = torch_source.choose(asked, recorded, self.settings.replaces_pypi, probe)
        report(source.line)
        switching = bool(recorded) and (interrupted or source.index != recorded)
        again = PACKAGES if switching else ()
        if switching:
            self.unfinished.write_text(SWITCHING)
        self.write_record(source.index)
        before = self.builds()
        try:
            if switching or source.index != PYPI:
                index = "" if source.index == PYPI else source.index
                self.installer.install(*self.files(["torch"]), index=index, reinstall=again, options=["--no-deps"])
        except InstallError:
            if switching and self.builds() == before:  # nothing is replaced before everything is downloaded
                self.write_record(recorded)
                self.unfinished.write_text(SWITCHING if interrupted else "")
            raise
        # builds for accelerators need more packages of their index
        extra = "" if source.index == PYPI or self.builds()["torch"].endswith("+cpu") else source.index
        self.installer.install(*self.files(parts), extra_index=extra)
        if source.index == PYPI:
            self.check_builds()
        if switching:
            self.installer.remove(packages.needed_by_none(self.site, ("nvidia-", "cuda-", "triton")))

    def builds(self) -> dict[str, str]:
        """Return the versions of those of torch, torchvision and torchaudio that are installed."""
        return packages.versions(self.site, PACKAGES)

    def recorded(self, interrupted: bool) -> str:
        """Return the index of the torch that is installed, or of the one that an interrupted run would; "" without."""
        builds = self.builds()
        if not builds and not interrupted:
            return ""
        if self.record.exists():
            return self.record.read_text()
        # earlier bundles left no record
        return CPU_INDEX if "+cpu" in "".join(builds.values()) else PYPI

    def write_record(self, index: str) -> None:
        self.record.touch(mode=0o600)  # a URL may have a password
        self.record.write_text(index)

    def check_builds(self) -> None:
        """Check that the builds match, which they need not where pip's settings name several places.

        Raises:
            InstallError: they do not match.
        """
        builds = self.builds()
        if len({build.partition("+")[2] for build in builds.values()}) > 1:
            listed = ", ".join(f"{name} {build}" for name, build in builds.items())
            raise InstallError(f"{listed} are builds of different kinds. Name one index for all: TORCH_INDEX_URL=URL")


if __name__ == "__main__":
    sys.exit(main())
