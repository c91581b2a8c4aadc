"""Archives are what was built, and come from whom they should; anything else is refused, by name."""

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bundle.errors import BundleError
from bundle.server.process import GUARDS
from bundle.signing import MANIFEST, SIGNATURE, check, key_of, make_keys, seal

MEMBERS = {
    "MAR-INF/MANIFEST.json": b'{"model": {}}',
    "handler.py": b"def handle(data, context):\n    return [1]\n",
    "handlers/core/batch.py": b"",
    "model.pt": bytes(range(256)) * 8,
    "a name with blanks.txt": "Grüße".encode(),
}
LINK = (stat.S_IFLNK | 0o777) << 16
names = st.from_regex(r"[a-z]{1,4}(/[a-z]{1,4}){0,2}", fullmatch=True)
members = st.dictionaries(names, st.binary(max_size=60), min_size=1, max_size=5).filter(
    lambda found: not any(other.startswith(f"{name}/") for name in found for other in found)
)


def written(file: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def contents(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def unpacked(file: Path, folder: Path) -> Path:
    """As TorchServe unpacks it: without permissions and links."""
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "signing.key"
    make_keys(file)
    return file


@pytest.fixture(scope="module")
def trusted(key: Path) -> Path:
    return key.with_name("signing.key.pub")


@pytest.fixture
def signed(tmp_path: Path, key: Path) -> Path:
    file = written(tmp_path / "m.mar", MEMBERS)
    seal(file, key)
    return file


# --- what is right -------------------------------------------------------------------------------------------------


def test_what_was_signed_passes_packed_and_unpacked(signed: Path, trusted: Path, tmp_path: Path):
    for found in (signed, unpacked(signed, tmp_path / "folder")):
        check(found, trusted)
        check(found, None)


def test_other_programs_can_check_it(signed: Path, trusted: Path, tmp_path: Path):
    folder = unpacked(signed, tmp_path / "folder")
    summed = subprocess.run(["sha256sum", "--check", "--strict", MANIFEST], cwd=folder, capture_output=True, text=True)
    assert summed.returncode == 0, summed.stderr
    assert summed.stdout.count(": OK") == len(MEMBERS)
    verify = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", trusted, "-rawin", "-in", MANIFEST]
    verified = subprocess.run([*verify, "-sigfile", SIGNATURE], cwd=folder, capture_output=True, text=True)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_the_manifest_is_sorted(signed: Path):
    names = [line[66:] for line in contents(signed)[MANIFEST].decode().splitlines()]
    assert names == sorted(MEMBERS)


def test_without_a_key_an_archive_needs_no_manifest(tmp_path: Path, trusted: Path):
    """Another builder's archive. With a key, it is refused."""
    file = written(tmp_path / "m.mar", MEMBERS)
    check(file, None)
    with pytest.raises(BundleError, match=r"m\.mar is refused: it is not signed \(it has no MAR-INF/SHA256SUMS\)"):
        check(file, trusted)
    seal(file, None)
    with pytest.raises(BundleError, match=r"it has no MAR-INF/SHA256SUMS\.sig\), and TRUSTED_KEY requires a signature"):
        check(file, trusted)


# --- what was changed ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(members=members, data=st.data())
def test_any_flipped_bit_of_any_member_is_named(tmp_path_factory, members: dict[str, bytes], data: st.DataObject):
    name = data.draw(st.sampled_from(sorted(members)))
    assume(members[name])
    at, bit = data.draw(st.integers(0, len(members[name]) - 1)), data.draw(st.integers(0, 7))
    folder = tmp_path_factory.mktemp("flipped")
    file = written(folder / "m.mar", members)
    seal(file, None)
    changed = contents(file)
    content = bytearray(changed[name])
    content[at] ^= 1 << bit
    changed[name] = bytes(content)
    for found in (written(folder / "changed.mar", changed), unpacked(folder / "changed.mar", folder / "unpacked")):
        with pytest.raises(BundleError) as refused:
            check(found, None)
        assert f"refused: {name!r} was changed. Delete it" in str(refused.value)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_damaged_file_is_refused_or_holds_the_same(tmp_path_factory, at: int, bit: int):
    """A bit anywhere in the file: some are in nobody's way, a member's date, say."""
    file = written(tmp_path_factory.mktemp("damaged") / "m.mar", MEMBERS)
    seal(file, None)
    before, damaged = contents(file), bytearray(file.read_bytes())
    damaged[at % len(damaged)] ^= 1 << bit
    file.write_bytes(damaged)
    try:
        check(file, None)
    except BundleError as refused:
        assert "m.mar is refused" in str(refused)  # noqa: PT017, because it need not be refused
        return
    found = contents(file)
    # what is checked is all there is, unless the damage took the manifest's own name
    assert found == before or MANIFEST not in found


@pytest.mark.parametrize("packed", [True, False])
def test_members_that_are_missing_changed_and_added_are_named(
    signed: Path, trusted: Path, tmp_path: Path, packed: bool
):
    wrong = contents(signed) | {"handler.py": b"import os", "evil.py": b""}
    del wrong["model.pt"]
    file = written(signed, wrong)
    with pytest.raises(BundleError, match="'handler.py' was changed, 'model.pt' is missing, 'evil.py' was added"):
        check(file if packed else unpacked(file, tmp_path / "folder"), trusted)


def test_long_lists_are_cut_short(signed: Path):
    file = written(signed, contents(signed) | {f"{number}.py": b"" for number in range(9)})
    with pytest.raises(BundleError, match="'4.py' was added, and 4 more"):
        check(file, None)


def test_a_new_manifest_needs_a_new_signature(signed: Path, trusted: Path, tmp_path: Path):
    """Who changes an archive can write its manifest, and cannot sign it."""
    wrong = contents(signed) | {"handler.py": b"import os"}
    old = wrong.pop(SIGNATURE)
    del wrong[MANIFEST]
    file = written(tmp_path / "forged.mar", wrong)
    seal(file, None)
    check(file, None)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(SIGNATURE, old)
    with pytest.raises(BundleError, match="forged.mar is refused: its signature was not made with the key of"):
        check(file, trusted)


def test_another_key_is_refused(signed: Path, tmp_path: Path):
    other = make_keys(tmp_path / "other.key")
    with pytest.raises(BundleError, match="not made with the key of .*other.key.pub"):
        check(signed, other)


@pytest.mark.parametrize("manifest", [b"no digest  model.pt\n", b"\xff\n", b"0" * 64 + b"  model.pt", b"\n"])
def test_a_manifest_that_is_none(tmp_path: Path, manifest: bytes):
    with pytest.raises(BundleError, match="is not in the format of sha256sum"):
        check(written(tmp_path / "m.mar", MEMBERS | {MANIFEST: manifest}), None)


# --- what has no place in an archive -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil.py", "/etc/evil.py", "a/../../evil.py", "..", "a/./b", "./a", "a//b", "//a"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str):
    with pytest.raises(BundleError, match=r"m\.mar is refused: the name .* leads out of its folder"):
        check(written(tmp_path / "m.mar", {name: b""}), None)


@pytest.mark.parametrize("name", ["..\\evil.py", "two\nlines", "nul\0.py"])
def test_names_that_programs_read_differently_are_refused(tmp_path: Path, name: str):
    with zipfile.ZipFile(tmp_path / "m.mar", "w") as archive:
        entry = zipfile.ZipInfo("other")
        entry.filename = name  # the constructor would cut it
        archive.writestr(entry, b"")
    with pytest.raises(BundleError, match="has characters that programs read differently"):
        check(tmp_path / "m.mar", None)


def test_links_are_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "m.mar", "w") as archive:
        link = zipfile.ZipInfo("weights.pt")
        link.external_attr = LINK
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(BundleError, match=r"m\.mar is refused: 'weights.pt' is a link"):
        check(tmp_path / "m.mar", None)
    for target in ("file", "folder"):
        folder = tmp_path / target
        folder.mkdir()
        (folder / "link").symlink_to("/etc/passwd" if target == "file" else "/etc")
        with pytest.raises(BundleError, match="The unpacked archive is refused: 'link' is a link"):
            check(folder, None)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_come_twice_are_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "m.mar", "w") as archive:
        archive.writestr("handler.py", b"good")
        archive.writestr("handler.py", b"evil")
    with pytest.raises(BundleError, match="it has 'handler.py' twice"):
        check(tmp_path / "m.mar", None)


def test_what_is_no_archive_is_refused(tmp_path: Path):
    (tmp_path / "m.mar").write_bytes(b"PK")
    for name in ("m.mar", "nowhere.mar"):
        with pytest.raises(BundleError, match=f"{name} is refused: it cannot be read"):
            check(tmp_path / name, None)


# --- keys ----------------------------------------------------------------------------------------------------------


def test_keys_are_secret_and_never_overwritten(tmp_path: Path):
    public = make_keys(tmp_path / "new" / "k")
    assert stat.S_IMODE((tmp_path / "new" / "k").stat().st_mode) == 0o600
    assert "PRIVATE" not in public.read_text()
    for existing in (tmp_path / "new" / "k", public):
        before = existing.read_bytes()
        with pytest.raises(BundleError, match="exists already, and keys are never overwritten"):
            make_keys(tmp_path / "new" / "k")
        assert existing.read_bytes() == before
        (tmp_path / "new" / "k").unlink(missing_ok=True)


def test_keys_that_are_none_are_named(signed: Path, key: Path, trusted: Path, tmp_path: Path, monkeypatch):
    with pytest.raises(BundleError, match="signing.key is not an Ed25519 public key"):
        check(signed, key)
    with pytest.raises(BundleError, match="signing.key.pub is not an Ed25519 private key"):
        seal(written(tmp_path / "other.mar", MEMBERS), trusted)
    monkeypatch.setenv("TRUSTED_KEY", "nowhere.pub")
    with pytest.raises(BundleError, match="TRUSTED_KEY is 'nowhere.pub', and there is no such file.*make keygen"):
        key_of("TRUSTED_KEY")
    monkeypatch.setenv("TRUSTED_KEY", "")
    assert key_of("TRUSTED_KEY") is None


# --- the guard of the workers --------------------------------------------------------------------------------------


@pytest.fixture
def model(signed: Path, tmp_path: Path) -> Path:
    """The folder that TorchServe unpacked the archive into, beside a worker that says what it got."""
    (tmp_path / "model_service_worker.py").write_text(
        "import os, resource, sys\n"
        "print(os.getpid(), sys.argv[1:], 'core', resource.getrlimit(resource.RLIMIT_CORE), os.environ)"
    )
    return unpacked(signed, tmp_path / "models" / "0123")


def start_worker(model: Path, trusted: str, *command: str, name: str = "python", **changed: str | None):
    """As the frontend starts one: in the model's folder, which is the first place that Python imports from."""
    environment = {**os.environ, "BUNDLE_PYTHON": sys.executable, "TEMP": str(model.parents[1]), "TRUSTED_KEY": trusted}
    environment |= {"PYTHONPATH": str(model), "PATH": f"{GUARDS}{os.pathsep}{os.environ['PATH']}"} | changed
    environment = {key: value for key, value in environment.items() if value is not None}
    command = command or ("-u", str(model.parents[1] / "model_service_worker.py"), "--port", "9000")
    process = subprocess.Popen(
        [GUARDS / name, *command], cwd=model, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return process.pid, *process.communicate(timeout=60), process.returncode


@pytest.mark.parametrize("name", ["python", "python3"])
def test_the_guard_becomes_the_worker(model: Path, trusted: Path, name: str):
    pid, output, errors, status = start_worker(model, str(trusted), name=name, PYTHONPATH=f"/elsewhere:{model}")
    assert status == 0, errors
    assert output.startswith(f"{pid} ['--port', '9000']")
    assert str(GUARDS) not in output
    assert f"'PYTHONPATH': '{model}:" in output
    assert "/elsewhere" not in output
    assert "'PYTHONDONTWRITEBYTECODE': '1'" in output
    assert "core (0, 0)" in output  # which would be a file that the manifest does not list


@pytest.mark.parametrize("name", ["python", "python3", "torchrun"])
@pytest.mark.parametrize("module", ["sitecustomize", "hashlib", "zipfile", "torch", "bundle"])
def test_nothing_of_a_model_runs_before_it_is_checked(model: Path, tmp_path: Path, name: str, module: str):
    (model / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    _, output, errors, status = start_worker(model, "", name=name)
    assert status == 1
    assert output == ""
    assert errors.splitlines()[0] == "Backend worker process died."
    assert f"BundleError: The unpacked archive is refused: '{module}.py' was added" in errors
    assert not (tmp_path / "ran").exists()


def test_a_model_that_was_not_unpacked_is_refused(model: Path, tmp_path: Path):
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
def test_no_packages_are_installed_for_a_model(model: Path, command: tuple[str, ...]):
    _, output, errors, status = start_worker(model, "", *command)
    assert (status, output) == (1, "")
    assert "Packages are not installed for a model" in errors


@pytest.mark.parametrize("variable", ["TRUSTED_KEY", "TEMP", "BUNDLE_PYTHON"])
def test_without_its_settings_the_guard_starts_no_worker(model: Path, variable: str):
    """As when `blacklist_env_vars` matches them."""
    _, output, errors, status = start_worker(model, "", **{variable: None})
    assert status != 0
    assert output == ""
    assert variable in errors
