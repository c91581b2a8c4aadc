"""Signed archives: an unchanged one is accepted, and everything else is rejected by name."""

import stat
import subprocess
import zipfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bundle.errors import BundleError
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
    """Unpack as TorchServe does: without permissions and links."""
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


# --- unchanged archives ----------------------------------------------------------------------------------------------


def test_signed_archive_is_accepted_packed_and_unpacked(signed: Path, trusted: Path, tmp_path: Path):
    for found in (signed, unpacked(signed, tmp_path / "folder")):
        check(found, trusted)
        check(found, None)


def test_signed_archive_is_accepted_by_sha256sum_and_openssl(signed: Path, trusted: Path, tmp_path: Path):
    folder = unpacked(signed, tmp_path / "folder")
    summed = subprocess.run(["sha256sum", "--check", "--strict", MANIFEST], cwd=folder, capture_output=True, text=True)
    assert summed.returncode == 0, summed.stderr
    assert summed.stdout.count(": OK") == len(MEMBERS)
    verify = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", trusted, "-rawin", "-in", MANIFEST]
    verified = subprocess.run([*verify, "-sigfile", SIGNATURE], cwd=folder, capture_output=True, text=True)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_manifest_is_sorted_by_name(signed: Path):
    names = [line[66:] for line in contents(signed)[MANIFEST].decode().splitlines()]
    assert names == sorted(MEMBERS)


def test_unsigned_archive_is_rejected_only_with_a_trusted_key(tmp_path: Path, trusted: Path):
    """An archive that another builder made has no manifest."""
    file = written(tmp_path / "m.mar", MEMBERS)
    check(file, None)
    with pytest.raises(BundleError, match=r"m\.mar is refused: it is not signed \(it has no MAR-INF/SHA256SUMS\)"):
        check(file, trusted)
    seal(file, None)
    with pytest.raises(BundleError, match=r"it has no MAR-INF/SHA256SUMS\.sig\), and TRUSTED_KEY requires a signature"):
        check(file, trusted)


# --- changed archives ----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(members=members, data=st.data())
def test_flipped_bit_in_a_member_is_rejected_by_name(tmp_path_factory, members: dict[str, bytes], data: st.DataObject):
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


@settings(max_examples=200)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_damaged_file_is_rejected_or_has_the_same_members(tmp_path_factory, at: int, bit: int):
    """Some bits do not matter: those of a member's date, for example."""
    file = written(tmp_path_factory.mktemp("damaged") / "m.mar", MEMBERS)
    seal(file, None)
    before, damaged = contents(file), bytearray(file.read_bytes())
    damaged[at % len(damaged)] ^= 1 << bit
    file.write_bytes(damaged)
    try:
        check(file, None)
    except BundleError as refused:
        assert "m.mar is refused" in str(refused)  # noqa: PT017 - not every damage is rejected
        return
    found = contents(file)
    # without its manifest, an archive counts as unsigned
    assert found == before or MANIFEST not in found


@pytest.mark.parametrize("packed", [True, False])
def test_changed_missing_and_added_members_are_named(signed: Path, trusted: Path, tmp_path: Path, packed: bool):
    wrong = contents(signed) | {"handler.py": b"import os", "evil.py": b""}
    del wrong["model.pt"]
    file = written(signed, wrong)
    with pytest.raises(BundleError, match="'handler.py' was changed, 'model.pt' is missing, 'evil.py' was added"):
        check(file if packed else unpacked(file, tmp_path / "folder"), trusted)


def test_long_list_of_wrong_members_is_cut(signed: Path):
    file = written(signed, contents(signed) | {f"{number}.py": b"" for number in range(9)})
    with pytest.raises(BundleError, match="'4.py' was added, and 4 more"):
        check(file, None)


def test_old_signature_of_a_new_manifest_is_rejected(signed: Path, trusted: Path, tmp_path: Path):
    """Anybody can write a new manifest for a changed archive, but not sign it."""
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


def test_signature_of_another_key_is_rejected(signed: Path, tmp_path: Path):
    other = make_keys(tmp_path / "other.key")
    with pytest.raises(BundleError, match="not made with the key of .*other.key.pub"):
        check(signed, other)


@pytest.mark.parametrize("manifest", [b"no digest  model.pt\n", b"\xff\n", b"0" * 64 + b"  model.pt", b"\n"])
def test_invalid_manifest_is_rejected(tmp_path: Path, manifest: bytes):
    with pytest.raises(BundleError, match="is not in the format of sha256sum"):
        check(written(tmp_path / "m.mar", MEMBERS | {MANIFEST: manifest}), None)


# --- members that no archive may have -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil.py", "/etc/evil.py", "a/../../evil.py", "..", "a/./b", "./a", "a//b", "//a"])
def test_member_name_outside_the_folder_is_rejected(tmp_path: Path, name: str):
    with pytest.raises(BundleError, match=r"m\.mar is refused: the name .* leads out of its folder"):
        check(written(tmp_path / "m.mar", {name: b""}), None)


@pytest.mark.parametrize("name", ["..\\evil.py", "two\nlines", "nul\0.py"])
def test_ambiguous_member_name_is_rejected(tmp_path: Path, name: str):
    with zipfile.ZipFile(tmp_path / "m.mar", "w") as archive:
        entry = zipfile.ZipInfo("other")
        entry.filename = name  # the constructor would change it
        archive.writestr(entry, b"")
    with pytest.raises(BundleError, match="has characters that programs read differently"):
        check(tmp_path / "m.mar", None)


def test_link_is_rejected(tmp_path: Path):
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
def test_duplicate_member_name_is_rejected(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "m.mar", "w") as archive:
        archive.writestr("handler.py", b"good")
        archive.writestr("handler.py", b"evil")
    with pytest.raises(BundleError, match="it has 'handler.py' twice"):
        check(tmp_path / "m.mar", None)


def test_unreadable_archive_is_rejected(tmp_path: Path):
    (tmp_path / "m.mar").write_bytes(b"PK")
    for name in ("m.mar", "nowhere.mar"):
        with pytest.raises(BundleError, match=f"{name} is refused: it cannot be read"):
            check(tmp_path / name, None)


# --- keys ----------------------------------------------------------------------------------------------------------


def test_keys_are_private_and_never_overwritten(tmp_path: Path):
    public = make_keys(tmp_path / "new" / "k")
    assert stat.S_IMODE((tmp_path / "new" / "k").stat().st_mode) == 0o600
    assert "PRIVATE" not in public.read_text()
    for existing in (tmp_path / "new" / "k", public):
        before = existing.read_bytes()
        with pytest.raises(BundleError, match="exists already, and keys are never overwritten"):
            make_keys(tmp_path / "new" / "k")
        assert existing.read_bytes() == before
        (tmp_path / "new" / "k").unlink(missing_ok=True)


def test_invalid_key_is_rejected_by_name(signed: Path, key: Path, trusted: Path, tmp_path: Path, monkeypatch):
    with pytest.raises(BundleError, match="signing.key is not an Ed25519 public key"):
        check(signed, key)
    with pytest.raises(BundleError, match="signing.key.pub is not an Ed25519 private key"):
        seal(written(tmp_path / "other.mar", MEMBERS), trusted)
    monkeypatch.setenv("TRUSTED_KEY", "nowhere.pub")
    with pytest.raises(BundleError, match="TRUSTED_KEY is 'nowhere.pub', and there is no such file.*make keygen"):
        key_of("TRUSTED_KEY")
    monkeypatch.setenv("TRUSTED_KEY", "")
    assert key_of("TRUSTED_KEY") is None
