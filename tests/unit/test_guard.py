"""What bundle/guard.py starts: a command that it permits, in an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bundle import guard, signing
from bundle.guard import check_folder, torchserve
from bundle.server.frontend import OPTIONS, with_agent
from bundle.server.process import GUARDS
from bundle.signing import make_keys, seal
from tests.unit.test_signing import MEMBERS, unpacked, written

GUARD = Path(guard.__file__)
PRINTS = "import json, os; print(json.dumps(dict(os.environ)))"


@pytest.mark.parametrize("options", [None, "-Xss2m", '"-javaagent:of the user.jar" -Xss2m'])
def test_java_that_a_command_starts_has_the_users_options_without_the_agent(options: str | None):
    own = {name: value for name, value in os.environ.items() if name != OPTIONS}
    own |= {OPTIONS: options} if options else {}
    started = subprocess.run(
        [sys.executable, GUARD, "python", "-c", PRINTS],  # in TorchServe's folder, as its metrics collector
        env={**with_agent(own), "BUNDLE_PYTHON": sys.executable},
        cwd=guard.torchserve(),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(started.stdout).get(OPTIONS) == options


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    key = tmp_path_factory.mktemp("keys") / "signing.key"
    make_keys(key)
    return key.with_name("signing.key.pub")


@pytest.fixture
def model(trusted: Path, tmp_path: Path) -> Path:
    """Return the folder of an unpacked archive. Beside it lies a worker script that prints what it was started with."""
    signed = written(tmp_path / "m.mar", MEMBERS)
    seal(signed, trusted.with_suffix(""))
    (tmp_path / "model_service_worker.py").write_text(
        "import os, resource, sys\n"
        "print(os.getpid(), sys.argv[1:], 'core', resource.getrlimit(resource.RLIMIT_CORE), os.environ)"
    )
    return unpacked(signed, tmp_path / "models" / "0123")


def start_worker(model: Path, trusted: str, *command: str, name: str = "python", **changed: str | None):
    """Start a worker as the frontend does: in the model's folder, from which Python imports first."""
    environment = {**os.environ, "BUNDLE_PYTHON": sys.executable, "TEMP": str(model.parents[1]), "TRUSTED_KEY": trusted}
    environment |= {"PYTHONPATH": str(model), "PATH": f"{GUARDS}{os.pathsep}{os.environ['PATH']}"} | changed
    environment = {key: value for key, value in environment.items() if value is not None}
    command = command or ("-u", str(model.parents[1] / "model_service_worker.py"), "--port", "9000")
    process = subprocess.Popen(
        [GUARDS / name, *command], cwd=model, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return process.pid, *process.communicate(timeout=60), process.returncode


@pytest.mark.parametrize("name", ["python", "python3"])
def test_guard_becomes_the_worker(model: Path, trusted: Path, name: str):
    pid, output, errors, status = start_worker(model, str(trusted), name=name, PYTHONPATH=f"/elsewhere:{model}")
    assert status == 0, errors
    assert output.startswith(f"{pid} ['--port', '9000']")
    assert str(GUARDS) not in output
    assert f"'PYTHONPATH': '{model}:" in output
    assert "/elsewhere" not in output
    assert "'PYTHONDONTWRITEBYTECODE': '1'" in output
    assert "core (0, 0)" in output  # a core dump would be a file that the manifest does not list


@pytest.mark.parametrize("name", ["python", "python3", "torchrun"])
@pytest.mark.parametrize("module", ["sitecustomize", "hashlib", "zipfile", "torch", "bundle"])
def test_added_module_is_rejected_before_it_runs(model: Path, tmp_path: Path, name: str, module: str):
    (model / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    _, output, errors, status = start_worker(model, "", name=name)
    assert status == 1
    assert output == ""
    assert errors.splitlines()[0] == "Backend worker process died."
    assert f"BundleError: The unpacked archive is refused: '{module}.py' was added" in errors
    assert not (tmp_path / "ran").exists()


WRITES = """
import os, pathlib
pathlib.Path("cache/blobs").mkdir(parents=True, exist_ok=True)
pathlib.Path("cache/blobs/a").write_text("x")
pathlib.Path("cache/model.bin").unlink(missing_ok=True)
os.symlink("blobs/a", "cache/model.bin")
"""


def writes(model: Path, code: str) -> None:
    """Let the worker script run this code in the model's folder."""
    (model.parents[1] / "model_service_worker.py").write_text(code)


def test_worker_starts_again_although_workers_wrote_data_into_the_folder(model: Path, trusted: Path):
    writes(model, WRITES)
    for key in (str(trusted), "", str(trusted)):
        _, _, errors, status = start_worker(model, key)
        assert status == 0, errors
    assert (model / "cache" / "model.bin").is_symlink()


def test_data_that_was_there_before_the_first_worker_is_rejected(model: Path, trusted: Path):
    """It came with the archive, which therefore is not the one that was signed."""
    (model / "index_to_name.json").write_text("[]")
    for _ in range(2):
        _, _, errors, status = start_worker(model, str(trusted))
        assert status == 1
        assert "'index_to_name.json' was added. Delete it and build it again" in errors


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("open('torch.py', 'w')", "'torch.py' was added"),
        ("import os; os.makedirs('a'); open('a/b.so', 'w')", "'a/b.so' was added"),
        ("import os; os.symlink('/etc', 'torch')", "'torch' is a link"),
        ("open('handler.py', 'a').write('#')", "'handler.py' was changed"),
        ("import os; os.remove('model.pt')", "'model.pt' is missing"),
    ],
)
def test_modules_and_changes_of_a_worker_are_rejected_with_where_to_write(model: Path, code: str, fault: str):
    writes(model, code)
    assert start_worker(model, "")[-1] == 0
    _, _, errors, status = start_worker(model, "")
    assert status == 1
    assert fault in errors
    if "link" not in fault:
        assert "A handler may add data files to its folder, but no modules" in errors
        assert "`Write files` in handlers/README.md" in errors


def test_worker_that_starts_while_the_first_one_writes_is_accepted(model: Path, monkeypatch: pytest.MonkeyPatch):
    check_strictly = signing.check

    def checked_late(folder: Path, trusted: Path | None, used: bool = False) -> None:
        if not used:  # the other worker is faster: it was checked, and has written
            folder.with_name(f"{folder.name}.checked").touch()
            (folder / "cache.txt").write_text("x")
        check_strictly(folder, trusted, used)

    monkeypatch.setattr(signing, "check", checked_late)
    check_folder(model, None)
    monkeypatch.undo()
    check_folder(model, None)


def test_model_outside_the_unpacked_archives_is_rejected(model: Path, tmp_path: Path):
    elsewhere = shutil.copytree(model, tmp_path / "elsewhere" / "models" / "0123")
    link = model.parent / "link"
    link.symlink_to(elsewhere)
    for folder in (elsewhere, link):
        _, output, errors, status = start_worker(folder, "", TEMP=str(tmp_path))
        assert (status, output) == (1, "")
        assert f"{elsewhere} is refused: it was not unpacked from an archive of the model store" in errors


@pytest.mark.parametrize(
    "command", [("-m", "pip", "install", "-r", "requirements.txt"), ("setup_model_venv.py", "venv")]
)
def test_package_installation_is_rejected(model: Path, command: tuple[str, ...]):
    _, output, errors, status = start_worker(model, "", *command)
    assert (status, output) == (1, "")
    assert "Packages are not installed for a model" in errors


def test_torchserve_behind_a_link_has_the_folder_that_its_collector_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    installed = tmp_path / "installed"
    (installed / "ts").mkdir(parents=True)
    (installed / "ts" / "__init__.py").touch()
    (tmp_path / "link").symlink_to(installed)
    monkeypatch.delitem(sys.modules, "ts", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "link")
    assert torchserve() == installed


@pytest.mark.parametrize("variable", ["TRUSTED_KEY", "TEMP", "BUNDLE_PYTHON"])
def test_guard_without_its_settings_starts_no_worker(model: Path, variable: str):
    """The setting `blacklist_env_vars` can hide them from workers."""
    _, output, errors, status = start_worker(model, "", **{variable: None})
    assert status != 0
    assert output == ""
    assert variable in errors
