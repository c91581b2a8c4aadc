"""What an archive says of itself: a manifest of its members' checksums, and a signature of the manifest.

The manifest has the format of `sha256sum -c`, the signature is the 64 bytes of Ed25519, keys are PEM files: sha256sum
and openssl can check an archive without the bundle. The checksums alone tell of accidents; whoever changes an archive
on purpose writes new ones, and the signature tells of that.
"""

import hashlib
import os
import posixpath
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from bundle.errors import BundleError

if TYPE_CHECKING:  # cryptography is imported where it is used: workers that check no signature start without it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MANIFEST = "MAR-INF/SHA256SUMS"
SIGNATURE = f"{MANIFEST}.sig"
SEALS = (MANIFEST, SIGNATURE)
UNSEALED: dict[str, bytes | None] = dict.fromkeys(SEALS)  # for `mar.rewrite`: leaves both out
SEAL_BYTES = 2**24  # a manifest of more than 100,000 members is none
FAULTS_SHOWN = 5
KEY_FILE = Path("keys/signing.key")
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


@dataclass(frozen=True)
class Content:
    """What is in an archive.

    Attributes:
        digests: {member: SHA-256 in hex}, of all but the manifest and its signature.
        seals: {member: bytes} of those two, where they are there.
    """

    digests: dict[str, str]
    seals: dict[str, bytes]


def seal(archive: Path, key: Path | None) -> None:
    """Adds the manifest to an archive that has none and, with a private key, its signature.

    Raises:
        BundleError: a member that `check` would refuse; a file that is no key.
    """
    digests = read(archive).digests
    manifest = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr(MANIFEST, manifest)
        if key:
            file.writestr(SIGNATURE, private_key(key).sign(manifest))


def check(archive: Path, trusted: Path | None) -> None:
    """Holds an archive, or the folder that it was unpacked into, to its manifest.

    Args:
        trusted: the public key that must have signed it. With None, it needs neither signature nor manifest.

    Raises:
        BundleError: it is not what was built, or not what the key's owner signed; or it has members that have no place
            in an archive: names that lead out of its folder, links, a name twice.
    """
    content = read(archive)
    manifest = content.seals.get(MANIFEST)
    if trusted:
        check_signature(archive, content, trusted)
    if manifest is not None and (faults := differences(listed(archive, manifest), content.digests)):
        more = f", and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        raise refusal(
            archive,
            f"{', '.join(faults[:FAULTS_SHOWN])}{more}. Delete it and build it again (make archive), or bring it anew "
            "from where it was built",
        )


def check_signature(archive: Path, content: Content, trusted: Path) -> None:
    from cryptography.exceptions import InvalidSignature

    if missing := [name for name in SEALS if name not in content.seals]:
        raise refusal(
            archive,
            f"it is not signed (it has no {missing[0]}), and TRUSTED_KEY demands it. Sign it where it is built: "
            "SIGNING_KEY=... make archive",
        )
    try:
        public_key(trusted).verify(content.seals[SIGNATURE], content.seals[MANIFEST])
    except InvalidSignature as exc:
        raise refusal(
            archive, f"its signature was not made with the key of {trusted}, or not of this {MANIFEST}"
        ) from exc


def differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    """What tells two {member: digest} apart, a member each."""
    faults = [f"{name!r} was changed" for name in wanted if name in found and wanted[name] != found[name]]
    faults += [f"{name!r} is missing" for name in wanted if name not in found]
    return faults + [f"{name!r} was added" for name in found if name not in wanted]


def listed(archive: Path, manifest: bytes) -> dict[str, str]:
    """{member: digest} of a manifest."""
    lines = manifest.decode(errors="replace").split("\n")
    parsed = [match for line in lines[:-1] if (match := LINE.fullmatch(line))]
    if lines[-1] or len(parsed) < len(lines) - 1:
        raise refusal(archive, f"its {MANIFEST} is not in the format of sha256sum")
    return {line[2]: line[1] for line in parsed}


def read(archive: Path) -> Content:
    """Reads every member of an archive, or of the folder that it was unpacked into.

    Raises:
        BundleError: it cannot be read, or has members that have no place in an archive.
    """
    digests: dict[str, str] = {}
    seals: dict[str, bytes] = {}
    try:
        for name, stream in files_of_folder(archive) if archive.is_dir() else files_of_zip(archive):
            with stream:
                if name in SEALS:
                    seals[name] = stream.read(SEAL_BYTES)
                else:
                    found = hashlib.file_digest(stream, "sha256")  # type: ignore[arg-type]  # both kinds have readinto
                    digests[name] = found.hexdigest()
    except BundleError:
        raise
    except Exception as exc:  # damaged archives make zipfile raise a dozen kinds
        raise refusal(archive, f"it cannot be read: {exc}") from exc
    return Content(digests, seals)


def files_of_zip(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of each file, open. The caller closes it before it asks for the next."""
    seen = set()
    with zipfile.ZipFile(archive) as file:
        for entry in file.infolist():
            # orig_filename, because zipfile cuts a name at a NUL byte where others may not
            name = entry.orig_filename
            check_name(archive, name)
            if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise refusal(archive, f"{name!r} is a link, or another thing that is neither file nor folder")
            if name in seen:
                raise refusal(archive, f"it has {name!r} twice")
            seen.add(name)
            if not entry.is_dir():
                yield name, file.open(entry)


def files_of_folder(folder: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Likewise."""

    def give_up(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, onerror=give_up):
        for path in (Path(root, name) for name in (*folders, *files)):
            name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if stat.S_ISREG(mode):
                yield name, path.open("rb")
            elif not stat.S_ISDIR(mode):
                raise refusal(folder, f"{name!r} is a link, or another thing that is neither file nor folder")


def check_name(archive: Path, name: str) -> None:
    """Raises:
    BundleError: a member's name that is absolute, leads out of the archive's folder, or can be written otherwise.
    """
    plain = name.removesuffix("/")
    if name.startswith("/") or ".." in plain.split("/") or plain != posixpath.normpath(plain):
        raise refusal(archive, f"the name {name!r} leads out of its folder, or is not in its shortest form")
    if not name.isprintable() or "\\" in name:
        raise refusal(archive, f"the name {name!r} has characters that not every program reads alike")


def refusal(archive: Path, why: str) -> BundleError:
    what = "The unpacked archive" if archive.is_dir() else archive.name
    return BundleError(f"{what} is refused: {why}.")


def make_keys(private: Path) -> Path:
    """Writes a new private key, for its owner's eyes only, and beside it the public one, whose file is returned.

    Raises:
        BundleError: one of the files exists.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = private.with_name(f"{private.name}.pub")
    if existing := [file for file in (private, public) if file.exists()]:
        raise BundleError(f"{existing[0]} exists, and keys are never overwritten. Name another file, or move this one.")
    key = Ed25519PrivateKey.generate()
    private.parent.mkdir(parents=True, exist_ok=True)
    private.touch(mode=0o600, exist_ok=False)
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return public


def key_of(variable: str) -> Path | None:
    """The key file that an environment variable names, SIGNING_KEY or TRUSTED_KEY; None where it is not set.

    Raises:
        BundleError: there is no such file.
    """
    named = os.environ.get(variable)
    if not named:
        return None
    file = Path(named).resolve()
    if not file.is_file():
        raise BundleError(f"{variable} is {named!r}, and there is no such file. Make a pair of keys: make keygen")
    return file


def key_id(key: Path | None) -> str:
    """What tells one private key from another and is no secret: a digest of its public one; "" without a key."""
    return hashlib.sha256(private_key(key).public_key().public_bytes_raw()).hexdigest() if key else ""


def private_key(file: Path) -> "Ed25519PrivateKey":
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    return load_key(file, lambda pem: load_pem_private_key(pem, None), Ed25519PrivateKey, "private")


def public_key(file: Path) -> "Ed25519PublicKey":
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    return load_key(file, load_pem_public_key, Ed25519PublicKey, "public")


def load_key(file: Path, parse: Callable[[bytes], object], kind: type, name: str):
    """Raises:
    BundleError: the file holds something else.
    """
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        key = parse(file.read_bytes())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, kind):
        raise BundleError(f"{file} is not an Ed25519 {name} key as `make keygen` writes it.")
    return key
