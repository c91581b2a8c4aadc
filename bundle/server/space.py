"""The folder for temporary files: TorchServe starts without a model that it cannot unpack there, and only logs why."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bundle import mar
from bundle.errors import BundleError


def temporary_folder() -> str:
    """Return the folder for temporary files.

    Raises:
        BundleError: none can be written, for example because it is full.
    """
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as exc:  # it writes a probe into each of the usual folders
        raise BundleError(
            f"No folder for temporary files can be written: {exc.strerror}. Free some space in one of them, or set "
            "TMPDIR to another folder."
        ) from exc


def check_space(archives: Iterable[Path]) -> None:
    """Check that the folder for temporary files has room for the unpacked archives.

    Raises:
        BundleError: it has not, or there is no such folder.
    """
    needed = 0
    for archive in archives:
        with mar.opened(archive) as file:
            needed += sum(member.file_size for member in file.infolist())
    folder = temporary_folder()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BundleError(
            f"{folder} has {free / 1e6:.1f} MB free, and the unpacked archives take {needed / 1e6:.1f} MB. Free some "
            "space, or set TMPDIR to another folder."
        )
