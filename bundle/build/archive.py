"""Build a model folder's archive, NAME.mar, if it is missing or out of date."""

import hashlib
import shutil
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from bundle.catalog import ModelFolder
from bundle.files import replacing
from bundle.paths import HANDLER_REQUIREMENTS, HANDLERS, MODEL_STORE, MODELS, ROOT
from bundle.signing import key_id, key_of, seal

BUILDERS = (ROOT / "bundle", ROOT / "bundle" / "build")  # their modules decide what an archive contains
NOT_ARCHIVED = {"train.py", "make_sample.py", "README.md", "metrics.json", "tuning.json", "tuning.svg"}


@dataclass(frozen=True)
class Archive:
    """A built archive.

    Attributes:
        rebuilt: whether it was out of date or missing.
        notes: what the build found out, a line each.
    """

    path: Path
    rebuilt: bool
    notes: list[str] = field(default_factory=list)


def archive(folder: ModelFolder, store: Path = MODEL_STORE, force: bool = False) -> Archive:
    """Build the folder's archive if it is missing or out of date, and sign it if SIGNING_KEY names a key.

    Args:
        store: the folder of the archive.
        force: build an archive that is up to date, too.

    Raises:
        BundleError: a part of the archive is missing or invalid. An existing archive stays as it is.
    """
    target = store / f"{folder.name}.mar"
    record = target.with_suffix(".fingerprint")
    key = key_of("SIGNING_KEY")
    content, signer = fingerprint(folder), key_id(key)
    if not force and target.is_file() and is_current(record, content, signer):
        return Archive(target, rebuilt=False)
    from bundle.build import contents  # imports torch, which takes seconds

    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"archive-{folder.name}-") as temporary:
        built, notes = contents.build(folder, Path(temporary))
        seal(built, key)
        with replacing(target) as partial:
            shutil.move(built, partial)
    record.write_text(f"{content} {signer}".rstrip())
    return Archive(target, True, notes)


def is_current(record: Path, content: str, signer: str) -> bool:
    """Return whether an archive was built of this content and signed with this key.

    Args:
        record: the file beside the archive that says so.
        content: of `fingerprint`.
        signer: of `key_id`. Without a key (""), a signed archive is current, too: building it again would lose the
            signature.
    """
    recorded = record.read_text().split(" ") if record.is_file() else []
    return recorded[:1] == [content] and (not signer or recorded[1:] == [signer])


def fingerprint(folder: ModelFolder) -> str:
    """Return a digest of everything that decides the archive's content: the folder, the handlers, the build's code."""
    ours = [HANDLER_REQUIREMENTS, HANDLERS / "__init__.py", *(HANDLERS / "core").glob("*.py"), MODELS / "weights.py"]
    ours += [file for builder in BUILDERS for file in builder.glob("*.py")]
    own = [file for file in folder.path.rglob("*") if file.is_file() and file.name not in NOT_ARCHIVED]
    inputs = [(str(file.relative_to(ROOT)), file) for file in ours]
    # relative to the folder, because the digest must be the same wherever the folder lies
    inputs += [(str(file.relative_to(folder.path)), file) for file in own if "__pycache__" not in file.parts]
    # listed files may lie outside of the folder, and have one of the names that are not archived otherwise
    inputs += [(folder.bundle.handler, folder.handler_file), *zip(folder.bundle.files, folder.extra_files, strict=True)]
    digest = hashlib.sha256()
    for name, file in sorted(inputs):
        digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    for package in ("torch", "torchvision", "torchaudio", "torch-model-archiver"):
        digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()
