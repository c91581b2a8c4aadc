"""Read model archives, and write copies of them in which some members differ.

A .mar file is a ZIP file whose MAR-INF/MANIFEST.json names the model, its version and its parts. Checksums and
signature are ordinary members here; `bundle.signing` writes and checks them.
"""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from bundle.errors import BundleError, is_full
from bundle.paths import relative
from bundle.versions import VERSION

MANIFEST = "MAR-INF/MANIFEST.json"


def manifest(archive: Path) -> dict:
    """Return the manifest's section `model`: modelName, modelVersion, handler, configFile and so on.

    Raises:
        BundleError: the file is not a model archive. All functions of this module raise it.
    """
    with opened(archive) as file:
        return dict(json.loads(file.read(MANIFEST))["model"])


def version(archive: Path) -> str:
    """Return the model's version.

    Raises:
        BundleError: it has none, or one that URLs and file names cannot hold.
    """
    found = manifest(archive).get("modelVersion")
    if not isinstance(found, str):
        raise BundleError(f"{relative(archive)} is not a model archive: its manifest has no modelVersion.")
    if not re.fullmatch(VERSION, found):
        raise BundleError(
            f"{relative(archive)} has the version {found!r}. A version has letters, digits, '.', '-' and '_', and "
            "begins with a letter or a digit. Build the archive again with such a version."
        )
    return found


def config(archive: Path) -> dict:
    """Return the archive's model-config.yaml, parsed; {} if it has none."""
    name = manifest(archive).get("configFile")
    with opened(archive) as file:
        return dict(yaml.safe_load(file.read(name)) or {}) if name else {}


def names(archive: Path) -> list[str]:
    """Return the names of the members, in the order of the archive."""
    with opened(archive) as file:
        return file.namelist()


def read(archive: Path, name: str) -> bytes:
    """Return the content of one member."""
    with opened(archive) as file:
        return file.read(name)


def unpack(archive: Path, folder: Path) -> Path:
    """Write all members into the folder, as TorchServe does for a worker, and return the folder."""
    with opened(archive) as file:
        file.extractall(folder)
    return folder


def rewrite(source: Path, target: Path, members: Mapping[str, bytes | None]) -> Path:
    """Write a copy of an archive in which some members differ, and return its path.

    Args:
        target: another file than `source`.
        members: new contents by name; None leaves a member out. The old checksums and signature do not fit the copy:
            add `signing.UNSEALED` to leave them out, and call `signing.seal` on the copy.
    """
    with zipfile.ZipFile(target, "w") as new:
        for name, content in contents(source):
            if name not in members:
                new.writestr(name, content)
        for name, replacement in members.items():
            if replacement is not None:
                new.writestr(name, replacement)
    return target


def append(archive: Path, name: str, content: bytes) -> None:
    """Add a member to an archive that has none of this name."""
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, content)


def contents(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each member."""
    with opened(archive) as file:
        for entry in file.infolist():
            yield entry.filename, file.read(entry)


@contextmanager
def opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    """Open the archive for reading; every exception in the block but a full disk becomes an error of the archive."""
    try:
        with zipfile.ZipFile(archive) as file:
            yield file
    except BundleError:
        raise
    except Exception as exc:  # zipfile raises many kinds for damaged archives
        if is_full(exc):
            raise
        raise BundleError(f"{relative(archive)} is not a model archive: {exc}") from exc
