"""Build a model folder's archive, NAME.mar, if it is missing or out of date."""

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from bundle.catalog import ModelFolder
from bundle.digests import changed, digest
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
        notes: what has changed since the build before, and what the build found out, a line each.
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
    inputs, signer = fingerprint(folder), key_id(key)
    recorded = read_record(record)
    if not force and target.is_file() and is_current(recorded, inputs, signer):
        return Archive(target, rebuilt=False)
    from bundle.build import contents  # imports torch, which takes seconds

    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"archive-{folder.name}-") as temporary:
        built, notes = contents.build(folder, Path(temporary))
        seal(built, key)
        with replacing(target) as partial:
            shutil.move(built, partial)
    record.write_text(json.dumps({"inputs": inputs, "signer": signer}, indent=1))
    if recorded and (names := changed(recorded["inputs"], inputs)):
        notes = [f"changed since its last build: {names}", *notes]
    return Archive(target, True, notes)


def read_record(file: Path) -> dict:
    """Return the record of an archive's build; {} if it is missing, or an earlier bundle wrote it."""
    try:
        recorded = json.loads(file.read_text())
        return recorded if isinstance(recorded, dict) else {}
    except (OSError, ValueError):
        return {}


def is_current(recorded: dict, inputs: dict[str, str], signer: str) -> bool:
    """Return whether an archive was built of these inputs and signed with this key.

    Args:
        recorded: of `read_record`.
        inputs: of `fingerprint`.
        signer: of `key_id`. Without a key (""), a signed archive is current, too: building it again would lose the
            signature.
    """
    return recorded.get("inputs") == inputs and (not signer or recorded["signer"] == signer)


def fingerprint(folder: ModelFolder) -> dict[str, str]:
    """Return a digest of each part that decides the archive's content: the folder, the handlers, the build's code.

    Returns:
        by file, in the folder as NAME/FILE wherever it lies; and the versions of the packages, by package.
    """
    ours = [HANDLER_REQUIREMENTS, HANDLERS / "__init__.py", *(HANDLERS / "core").glob("*.py"), MODELS / "weights.py"]
    ours += [file for builder in BUILDERS for file in builder.glob("*.py")]
    own = [file for file in folder.path.rglob("*") if file.is_file() and file.name not in NOT_ARCHIVED]
    own = [file for file in own if "__pycache__" not in file.parts]
    handler, inside = folder.handler_file, folder.path
    (own if handler.is_relative_to(inside) else ours).append(handler)
    files = {str(file.relative_to(ROOT)): file for file in ours}
    files |= {f"{folder.name}/{file.relative_to(inside)}": file for file in own}
    # listed files may lie outside of the folder, and have one of the names that are not archived otherwise
    listed = zip(folder.bundle.files, folder.extra_files, strict=True)
    files |= {f"{folder.name}/{name}": file for name, file in listed}
    packages = {name: version(name) for name in ("torch", "torchvision", "torchaudio", "torch-model-archiver")}
    return {name: digest(file.read_bytes()) for name, file in files.items()} | packages
