"""`python -m bundle.setup` installs into real environments, with the real uv and pip, from indexes on this machine."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bundle.paths import ROOT
from bundle.setup.packages import found_in, site_packages
from bundle.setup.torch_source import CPU_INDEX, DRIVER
from tests.support import wait_for
from tests.unit.package_index import Index, serving, wheel

pytestmark = pytest.mark.slow
PINS = {"torch": "2.11.0", "torchvision": "0.26.0", "torchaudio": "2.11.0"}
CPU = {name: f"{version}+cpu" for name, version in PINS.items()}
CPU_WHEELS = [wheel(name, version, binary=True) for name, version in CPU.items()]
PYPI_WHEELS = [
    wheel("torch", PINS["torch"], ("nvidia-cublas", "triton", "base"), binary=True),
    wheel("torchvision", PINS["torchvision"], ("torch",), binary=True),
    wheel("torchaudio", PINS["torchaudio"], binary=True),
    wheel("nvidia_cublas", "13.0"),
    wheel("triton", "3.6.0"),
    wheel("base", "1.0"),
    wheel("server", "1.0", ("base", "torch")),
    wheel("trainer", "1.0", ("torch", "base")),
]


@dataclass
class Place:
    """A copy of the set-up with small requirements, an environment, and two indexes.

    Attributes:
        cpu, pypi: stand in for PyTorch's index of CPU builds and for PyPI.
        driver: file that says that there is a driver.
    """

    folder: Path
    cpu: Index
    pypi: Index
    driver: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> Path:
        return self.folder / "venv"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "bundle.setup", "--into", str(self.environment), *arguments]

    def variables_with(self, more: dict[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not re.match("PIP_|UV_|TORCH_", name)}
        own = {"PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1", "UV_CACHE_DIR": str(self.folder / "cache")}
        return kept | own | {"PIP_INDEX_URL": self.pypi.url} | self.variables | more

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*(arguments or ("serve", "torch"))),
            cwd=self.folder,
            env=self.variables_with(variables),
            capture_output=True,
            text=True,
            timeout=120,
        )

    def set_up(self, *arguments: str, **variables: str) -> str:
        """Run the set-up, which must succeed without a second installer, and return the lines that it printed."""
        ended = self.run(*arguments, **variables)
        assert ended.returncode == 0, ended.stderr
        assert "Trying pip" not in ended.stderr
        return ended.stderr

    def versions(self) -> dict[str, str]:
        found = found_in(site_packages(self.environment))
        return {name: package.version for name, package in found.items()}

    def builds(self) -> dict[str, str]:
        return {name: version for name, version in self.versions().items() if name in PINS}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    shutil.copytree(ROOT / "bundle" / "setup", tmp_path / "bundle" / "setup")
    (tmp_path / "bundle" / "__init__.py").touch()
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    shutil.copy(ROOT / "requirements" / "uv.txt", requirements)
    (requirements / "torch.txt").write_text("".join(f"{name}=={version}\n" for name, version in PINS.items()))
    (requirements / "serve.txt").write_text("server==1.0\nbase==1.0\n")
    (requirements / "dev.txt").write_text("trainer==1.0\n")
    with serving(*CPU_WHEELS) as cpu, serving(*PYPI_WHEELS) as pypi:
        place = Place(tmp_path, cpu, pypi, tmp_path / "driver")
        for name, constants in {
            "torch_source.py": {repr(CPU_INDEX)[1:-1]: cpu.url, DRIVER[0]: str(place.driver), DRIVER[1]: "/none"},
            "pip_settings.py": {'found[1] if found else ""': repr(pypi.url)},
        }.items():
            file = tmp_path / "bundle" / "setup" / name
            text = file.read_text()
            for old, new in constants.items():
                assert text.count(old) == 1, old
                text = text.replace(old, new)
            file.write_text(text)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", place.environment], check=True, timeout=60)
        yield place


@pytest.mark.parametrize("installer", [(), ("--pip",)])
def test_cpu_builds_are_the_default_without_a_driver(place: Place, installer: tuple[str, ...]):
    said = place.set_up(*installer, "serve", "torch")
    assert place.builds() == CPU
    assert place.versions() == CPU | {"server": "1.0", "base": "1.0"}
    assert "CPU build, because no NVIDIA driver was found" in said
    assert place.cpu.names() == PINS.keys()  # and nothing else
    assert not [path for path in place.pypi.asked if path.startswith("/files/torch")]


def test_pypis_builds_are_the_default_with_a_driver(place: Place):
    place.driver.touch()
    assert "NVIDIA driver was found" in place.set_up()
    assert place.builds() == PINS
    assert place.versions()["nvidia-cublas"] == "13.0"
    assert place.cpu.asked == []


@pytest.mark.parametrize("missing", ["torchaudio", "torch torchvision torchaudio"])
def test_all_come_from_pypi_if_the_index_of_cpu_builds_lacks_one(place: Place, missing: str):
    place.cpu.wheels = {
        file: content for file, content in place.cpu.wheels.items() if file.split("-")[0] not in missing.split()
    }
    assert "does not answer" in place.set_up()
    assert place.builds() == PINS


def test_builds_for_another_python_do_not_count(place: Place):
    place.cpu.wheels = {file.replace("-cp3", "-cp2"): content for file, content in place.cpu.wheels.items()}
    place.set_up()
    assert place.builds() == PINS


def test_torch_index_url_overrides_the_choice(place: Place):
    place.set_up(TORCH_INDEX_URL="pypi")
    assert place.builds() == PINS
    place.driver.touch()
    place.set_up(TORCH_INDEX_URL=place.cpu.url)
    assert place.builds() == CPU


def test_later_run_keeps_the_builds_that_are_installed(place: Place):
    place.set_up()
    place.driver.touch()
    place.cpu.wheels.clear()
    assert "same index" in place.set_up()
    assert place.builds() == CPU
    place.set_up("dev")
    assert place.builds() == CPU
    assert place.versions()["trainer"] == "1.0"


def test_builds_of_an_earlier_bundle_are_kept(place: Place):
    place.set_up(TORCH_INDEX_URL="pypi")
    (place.environment / "torch-index").unlink()  # which it did not write
    assert "same index" in place.set_up()
    assert place.builds() == PINS


@pytest.mark.parametrize("installer", [(), ("--pip",)])
def test_switch_replaces_all_three_and_removes_what_they_alone_needed(place: Place, installer: tuple[str, ...]):
    place.set_up(*installer, "serve", "torch", TORCH_INDEX_URL="pypi")
    assert {"nvidia-cublas", "triton"} <= place.versions().keys()
    place.set_up(*installer, "serve", "torch", TORCH_INDEX_URL=place.cpu.url)
    assert place.versions() == CPU | {"server": "1.0", "base": "1.0"}
    place.set_up(*installer, "serve", "torch", TORCH_INDEX_URL="pypi")
    assert place.builds() == PINS
    assert {"nvidia-cublas", "triton"} <= place.versions().keys()


def test_switch_that_fails_changes_nothing(place: Place):
    place.set_up(TORCH_INDEX_URL="pypi")
    before = place.versions()
    del place.cpu.wheels[CPU_WHEELS[-1][0]]
    failed = place.run(TORCH_INDEX_URL=place.cpu.url)
    assert failed.returncode == 1
    assert "torchaudio" in failed.stderr
    assert place.versions() == before
    place.set_up()
    assert place.versions() == before


def test_interrupted_download_is_continued(place: Place):
    place.pypi.held = {PYPI_WHEELS[0][0]}
    running = subprocess.Popen(
        place.command("serve", "torch"),
        cwd=place.folder,
        env=place.variables_with({"TORCH_INDEX_URL": "pypi"}),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: any(path.startswith("/files/torch-") for path in place.pypi.asked), 60)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=120)[1]
    assert running.returncode == 130, said
    assert said.endswith("Interrupted. The next `make` continues.\n")
    assert "torch" not in place.versions()
    place.pypi.held = set()
    place.set_up(TORCH_INDEX_URL="pypi")
    assert place.builds() == PINS


@pytest.mark.parametrize("harm", ["unlink", "cut"])
def test_package_that_an_interruption_damaged_is_installed_again(place: Place, harm: str):
    place.set_up()
    module = site_packages(place.environment) / "torch" / "__init__.py"
    module.unlink()
    if harm == "cut":
        module.write_text("BUI")  # a new file: that of uv's cache has the same content
    (place.environment / "setup-unfinished").touch()
    assert "Installing again: torch" in place.set_up()
    assert "2.11.0+cpu" in module.read_text()


def test_interrupted_switch_is_continued(place: Place):
    place.set_up(TORCH_INDEX_URL="pypi")
    (place.environment / "torch-index").write_text(place.cpu.url)
    (place.environment / "setup-unfinished").write_text("switching")
    place.set_up()
    assert place.versions() == CPU | {"server": "1.0", "base": "1.0"}


def test_interrupted_switch_that_then_fails_is_still_continued(place: Place):
    place.set_up(TORCH_INDEX_URL="pypi")
    (place.environment / "torch-index").write_text(place.cpu.url)
    (place.environment / "setup-unfinished").write_text("switching")
    wheels, place.cpu.wheels = place.cpu.wheels, {}
    assert place.run().returncode == 1
    place.cpu.wheels = wheels
    place.set_up()
    assert place.builds() == CPU


def test_two_runs_at_once_both_succeed(place: Place):
    """`make --jobs` starts one for each set of packages."""
    place.set_up()
    (place.folder / "requirements" / "loadtest.txt").write_text("base==1.0\n")
    runs = [
        subprocess.Popen(place.command(part), cwd=place.folder, env=place.variables_with({}), stderr=subprocess.PIPE)
        for part in ("dev", "loadtest")
    ]
    said = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert not (place.environment / "setup-unfinished").exists()


def test_pip_installs_everything_if_uv_cannot_be_installed(place: Place):
    (place.folder / "requirements" / "uv.txt").write_text("uv==0.0.0.dev0\n")
    assert "pip installs the packages, because uv cannot be installed." in place.set_up()
    assert place.builds() == CPU


def test_pip_is_tried_where_uv_fails(place: Place):
    ended = place.run(UV_OFFLINE="1")
    assert ended.returncode == 0, ended.stderr
    assert "uv failed. Trying pip." in ended.stderr
    assert place.builds() == CPU


def test_setting_that_uv_does_not_have_leaves_the_work_to_pip(place: Place):
    assert "pip's settings have prefer-binary" in place.set_up(PIP_PREFER_BINARY="1")
    assert place.builds() == CPU


def test_index_in_pips_file_replaces_pypi_and_pytorchs_index(place: Place):
    with serving(*PYPI_WHEELS) as mirror:
        file = place.folder / "pip.conf"
        file.write_text(f"[global]\nindex-url = {mirror.url}\n")
        place.variables = {"PIP_CONFIG_FILE": str(file), "PIP_INDEX_URL": ""}
        assert "index in pip's settings" in place.set_up()
        assert "torch" in mirror.names()
    assert place.builds() == PINS
    assert place.cpu.asked == place.pypi.asked == []


def test_best_version_of_all_indexes_is_installed_as_by_pip(place: Place):
    with serving(wheel("server", "0.9"), wheel("base", "1.0")) as extra:
        place.set_up(PIP_EXTRA_INDEX_URL=extra.url)
        assert "server" in extra.names()
    assert place.versions()["server"] == "1.0"


def test_offline_folder_of_wheels_is_enough(place: Place):
    wheels = place.folder / "wheels"
    wheels.mkdir()
    for name, content in PYPI_WHEELS:
        (wheels / name).write_bytes(content)
    place.set_up(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    assert place.builds() == PINS
    assert place.cpu.asked == place.pypi.asked == []


def test_builds_of_two_kinds_are_rejected(place: Place):
    wheels = place.folder / "wheels"
    wheels.mkdir()
    name, content = CPU_WHEELS[0]
    (wheels / name).write_bytes(content)
    failed = place.run(PIP_FIND_LINKS=str(wheels), TORCH_INDEX_URL="pypi")
    assert failed.returncode == 1
    assert "torch 2.11.0+cpu, torchvision 0.26.0, torchaudio 2.11.0 are builds of different kinds." in failed.stderr


def test_password_of_an_index_is_not_printed(place: Place):
    secret = place.cpu.url.replace("//", "//user:secret@")
    ended = place.run(TORCH_INDEX_URL=secret)
    assert ended.returncode == 0, ended.stderr
    assert "secret" not in ended.stdout + ended.stderr
    assert (place.environment / "torch-index").stat().st_mode & 0o077 == 0
