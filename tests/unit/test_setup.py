"""The parts of `python -m bundle.setup` that install nothing."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bundle.paths import ROOT
from bundle.setup import torch_source
from bundle.setup.check_python import check
from bundle.setup.packages import is_damaged, site_packages
from bundle.setup.pip_settings import PipSettings, parse, pypi
from bundle.setup.torch_source import DRIVER


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 10, 13), (3, 14, 0), (4, 0, 0)])
def test_python_outside_of_the_tested_range_is_rejected_in_one_line(version: tuple[int, ...]):
    with pytest.raises(SystemExit) as ended:
        check(version)
    assert str(ended.value).startswith(f"error: This is Python {version[0]}.{version[1]},")
    assert "\n" not in str(ended.value)


OLD_PYTHON = f"""#!{sys.executable}
import os, runpy, sys

if sys.argv[1].startswith("-"):
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
sys.version_info = (3, 10, 13)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_make_serve_rejects_a_python_before_it_makes_an_environment(tmp_path: Path):
    """In a copy without `bundle.setup`, so that nothing could be installed."""
    for name in ("Makefile", "pyproject.toml", "requirements", "bundle/setup/check_python.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python3.10"
    python.write_text(OLD_PYTHON)
    python.chmod(0o755)
    command = ["make", "serve", f"PYTHON={python}"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.stderr.startswith("error: This is Python 3.10,"), ended.stdout + ended.stderr
    assert (ended.returncode, ended.stdout) == (2, "")
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("minor", [11, 12, 13])
def test_python_of_the_tested_range_is_accepted(minor: int):
    check((3, minor, 0, "final", 0))


def test_makefile_looks_for_the_driver_in_the_same_places():
    [listed] = re.findall(r"^DRIVER := \$\(wildcard (.+)\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tuple(listed.split()) == DRIVER


@pytest.mark.parametrize(("build", "driver", "said"), [("+cpu", True, True), ("+cpu", False, False), ("", True, False)])
def test_gpu_that_a_cpu_build_leaves_unused_is_reported(
    build: str, driver: bool, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch_source, "DRIVER", (str(tmp_path if driver else tmp_path / "none"),))
    monkeypatch.setattr(torch_source, "version", lambda name: f"2.11.0{build}")
    assert bool(torch_source.unused_gpu()) is said


def test_environment_and_install_section_come_before_pips_global_settings():
    listed = ["global.timeout='1'", ":env:.timeout='3'", "install.timeout='2'", "global.find-links='\\n/a\\n/b'"]
    listed += ["global.cert='/c'", ":env:.cert=''", "list.format='json'"]
    assert parse("\n".join(listed)) == {"timeout": "3", "find-links": "\n/a\n/b", "cert": "/c"}


def test_quiet_pip_lists_its_settings_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_QUIET", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert PipSettings.read().no_index


def test_uv_gets_pips_settings_and_its_own_come_first():
    settings = PipSettings({"index-url": "https://a/", "find-links": "/a /b", "cert": "/c", "proxy": "http://p"})
    told = settings.for_uv({"UV_INDEX_URL": "https://own/", "https_proxy": "http://own"})
    assert told["UV_FIND_LINKS"] == "/a,/b"
    assert told["SSL_CERT_FILE"] == "/c"
    assert told["HTTP_PROXY"] == "http://p"
    assert not told.keys() & {"UV_DEFAULT_INDEX", "HTTPS_PROXY"}


def test_index_of_a_pip_without_settings_is_not_that_of_its_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://own/simple")
    pypi.cache_clear()
    assert re.fullmatch(r"https://\S+/simple", pypi())
    assert pypi() != "https://own/simple"
    assert PipSettings({"index-url": "https://own/simple"}).replaces_pypi
    assert not PipSettings({"index-url": f"{pypi()}/"}).replaces_pypi


def test_further_indexes_of_pip_come_after_its_first_one():
    """Of equal versions, uv takes that of the first index, even if its wheel suits the system less."""
    settings = PipSettings({"extra-index-url": "https://more/"})
    assert settings.for_uv({})["UV_INDEX"] == f"{pypi()} https://more/"
    assert settings.for_uv({"UV_DEFAULT_INDEX": "https://own/"})["UV_INDEX"] == "https://own/ https://more/"


def test_installed_packages_are_not_damaged():
    assert [info.name for info in site_packages(Path(sys.prefix)).glob("py*.dist-info") if is_damaged(info)] == []
