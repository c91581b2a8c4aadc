"""Write and check an archive's checksums, and the signature of the checksums.

The manifest of the checksums has the format of `sha256sum -c`, the signature is the 64 bytes of Ed25519, and keys are
PEM files, so sha256sum and openssl can check an archive without the bundle. Checksums detect accidental changes. Who
changes an archive on purpose can write new checksums, but not the signature.
"""

import hashlib
import os
import posixpath
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import all_suffixes
from pathlib import Path
from typing import IO, TYPE_CHECKING

from bundle.errors import BundleError

if TYPE_CHECKING:  # cryptography is imported where it is used: workers that check no signature start without it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MANIFEST = "MAR-INF/SHA256SUMS"
SIGNATURE = f"{MANIFEST}.sig"
SEALS = (MANIFEST, SIGNATURE)
UNSEALED: dict[str, bytes | None] = dict.fromkeys(SEALS)  # for `mar.rewrite`, to leave both out
SEAL_BYTES = 2**24  # no valid manifest is longer: this is more than 100,000 members
FAULTS_SHOWN = 5
KEY_FILE = Path("keys/signing.key")
BUILD_AGAIN = "Delete it and build it again (make archive), or copy it again from where it was built"
SINCE_USED = (
    "This happened after its first worker had started. A handler may add data files to its folder, but no modules, and "
    "it must not change the archive's files: see `Write files` in handlers/README.md. To restore the folder, register "
    "the model again"
)
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


@dataclass(frozen=True)
class Content:
    """The content of an archive.

    Attributes:
        digests: SHA-256 (hex) of each member except the manifest and the signature, by the member's name.
        seals: the bytes of the manifest and of the signature, if they exist, by name.
    """

    digests: dict[str, str]
    seals: dict[str, bytes]


def seal(archive: Path, key: Path | None) -> None:
    """Add the manifest to an archive that has none and, with a private key, the signature.

    Raises:
        BundleError: the archive has a member that `check` refuses, or the file is not a private key.
    """
    digests = read(archive).digests
    manifest = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr(MANIFEST, manifest)
        if key:
            file.writestr(SIGNATURE, private_key(key).sign(manifest))


def check(archive: Path, trusted: Path | None, used: bool = False) -> None:
    """Check an archive, or the folder that it was unpacked into, against its manifest.

    Args:
        trusted: the public key that must have signed it. With None, signature and manifest may be missing.
        used: whether this is a folder that was checked before and in which workers have run since. It may have further
            files that its workers wrote, unless Python could import them.

    Raises:
        BundleError: the archive was changed since it was built or signed, or it has a member that is not allowed: a
            link, a name that leads out of the archive's folder, a name that occurs twice.
    """
    content = read(archive, used)
    manifest = content.seals.get(MANIFEST)
    if trusted:
        check_signature(archive, content, trusted)
    if manifest is not None and (faults := differences(listed(archive, manifest), content.digests)):
        more = f", and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        raise refusal(
            archive,
            f"{', '.join(faults[:FAULTS_SHOWN])}{more}. {SINCE_USED if used else BUILD_AGAIN}",
        )


def check_signature(archive: Path, content: Content, trusted: Path) -> None:
    """Check the signature of the manifest.

    Raises:
        BundleError: the archive is not signed, or not with this key.
    """
    from cryptography.exceptions import InvalidSignature

    if missing := [name for name in SEALS if name not in content.seals]:
        raise refusal(
            archive,
            f"it is not signed (it has no {missing[0]}), and TRUSTED_KEY requires a signature. Sign it where it is "
            "built: SIGNING_KEY=... make archive",
        )
    try:
        public_key(trusted).verify(content.seals[SIGNATURE], content.seals[MANIFEST])
    except InvalidSignature as exc:
        raise refusal(
            archive, f"its signature was not made with the key of {trusted}, or {MANIFEST} was changed since"
        ) from exc


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return a few words on each member whose digest differs."""
    faults = [f"{name!r} was changed" for name in expected if name in found and expected[name] != found[name]]
    faults += [f"{name!r} is missing" for name in expected if name not in found]
    return faults + [f"{name!r} was added" for name in found if name not in expected]


def listed(archive: Path, manifest: bytes) -> dict[str, str]:
    """Return the digests of a manifest, by the member's name.

    Raises:
        BundleError: the manifest is not in the format of sha256sum.
    """
    lines = manifest.decode(errors="replace").split("\n")
    parsed = [match for line in lines[:-1] if (match := LINE.fullmatch(line))]
    if lines[-1] or len(parsed) < len(lines) - 1:
        raise refusal(archive, f"its {MANIFEST} is not in the format of sha256sum")
    return {line[2]: line[1] for line in parsed}


def read(archive: Path, used: bool = False) -> Content:
    """Read every member of an archive, or of the folder that it was unpacked into.

    Args:
        used: as for `check`.

    Raises:
        BundleError: the archive cannot be read, or has a member that is not allowed.
    """
    digests: dict[str, str] = {}
    seals: dict[str, bytes] = {}
    try:
        for name, stream in files_of_folder(archive, used) if archive.is_dir() else files_of_zip(archive):
            with stream:
                if name in SEALS:
                    seals[name] = stream.read(SEAL_BYTES)
                else:
                    found = hashlib.file_digest(stream, "sha256")  # type: ignore[arg-type]  # both kinds have readinto
                    digests[name] = found.hexdigest()
    except BundleError:
        raise
    except Exception as exc:  # zipfile raises many kinds for damaged archives
        raise refusal(archive, f"it cannot be read: {exc}") from exc
    return Content(digests, seals)


def files_of_zip(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the name and the open content of each file. The caller closes it before taking the next one."""
    seen = set()
    with zipfile.ZipFile(archive) as file:
        for entry in file.infolist():
            # orig_filename, because zipfile cuts a name at a NUL byte, and other programs do not
            name = entry.orig_filename
            check_name(archive, name)
            if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise refusal(archive, f"{name!r} is a link, or something else that is not a file or folder")
            if name in seen:
                raise refusal(archive, f"it has {name!r} twice")
            seen.add(name)
            if not entry.is_dir():
                yield name, file.open(entry)


def files_of_folder(folder: Path, used: bool) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the name and the open content of each file; in a used folder, not of what `is_data` that workers wrote."""

    def give_up(error: OSError) -> None:
        raise error

    manifest = folder / MANIFEST
    known = {*SEALS, *listed(folder, manifest.read_bytes())} if used and manifest.is_file() else set()
    for root, folders, files in os.walk(folder, onerror=give_up):
        for path in (Path(root, name) for name in (*folders, *files)):
            name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if used and name not in known and is_data(path):
                continue
            if stat.S_ISREG(mode):
                yield name, path.open("rb")
            elif not stat.S_ISDIR(mode):
                raise refusal(folder, f"{name!r} is a link, or something else that is not a file or folder")


def is_data(path: Path) -> bool:
    """Return whether this is a file that Python cannot import: no module, and no link to a folder of modules."""
    return not path.is_dir() and not path.name.endswith(tuple(all_suffixes()))


def check_name(archive: Path, name: str) -> None:
    """Check the name of a member.

    Raises:
        BundleError: the name is absolute, leads out of the archive's folder, or is not in its shortest form.
    """
    plain = name.removesuffix("/")
    if name.startswith("/") or ".." in plain.split("/") or plain != posixpath.normpath(plain):
        raise refusal(archive, f"the name {name!r} leads out of its folder, or is not in its shortest form")
    if not name.isprintable() or "\\" in name:
        raise refusal(archive, f"the name {name!r} has characters that programs read differently")


def refusal(archive: Path, why: str) -> BundleError:
    """Return the error of an archive that must not be served."""
    what = "The unpacked archive" if archive.is_dir() else archive.name
    return BundleError(f"{what} is refused: {why}.")


def make_keys(private: Path) -> Path:
    """Write a new private key, which only its owner can read, and the public key; return the public key's file.

    Raises:
        BundleError: one of the files exists already.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = private.with_name(f"{private.name}.pub")
    if existing := [file for file in (private, public) if file.exists()]:
        raise BundleError(
            f"{existing[0]} exists already, and keys are never overwritten. Name another file, or move this one."
        )
    key = Ed25519PrivateKey.generate()
    private.parent.mkdir(parents=True, exist_ok=True)
    private.touch(mode=0o600, exist_ok=False)
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return public


def key_of(variable: str) -> Path | None:
    """Return the key file that SIGNING_KEY or TRUSTED_KEY names; None if the variable is not set.

    Raises:
        BundleError: the file does not exist.
    """
    named = os.environ.get(variable)
    if not named:
        return None
    file = Path(named).resolve()
    if not file.is_file():
        raise BundleError(f"{variable} is {named!r}, and there is no such file. Make a pair of keys: make keygen")
    return file


def key_id(key: Path | None) -> str:
    """Return an id of a private key that is not a secret, a digest of its public key; "" without a key."""
    return hashlib.sha256(private_key(key).public_key().public_bytes_raw()).hexdigest() if key else ""


def private_key(file: Path) -> "Ed25519PrivateKey":
    """Read a private key.

    Raises:
        BundleError: the file is not one.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = read_key(file, lambda pem: load_pem_private_key(pem, None))
    if not isinstance(key, Ed25519PrivateKey):
        raise invalid_key(file, "private")
    return key


def public_key(file: Path) -> "Ed25519PublicKey":
    """Read a public key.

    Raises:
        BundleError: the file is not one.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = read_key(file, load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise invalid_key(file, "public")
    return key


def read_key(file: Path, parse: Callable[[bytes], object]) -> object:
    """Return the key in a PEM file, of whatever kind; None if there is none."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return parse(file.read_bytes())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None


def invalid_key(file: Path, kind: str) -> BundleError:
    return BundleError(f"{file} is not an Ed25519 {kind} key. Make a pair of keys: make keygen")
