"""Check that TorchServe can unpack its archives: it starts without a model if it cannot, and only its log says why."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bundle import mar
from bundle.errors import BundleError


def check_space(archives: Iterable[Path]) -> None:
    """Check that the folder for temporary files has room for the unpacked archives.

    Raises:
        BundleError: it has not.
    """
    needed = 0
    for archive in archives:
        with mar.opened(archive) as file:
            needed += sum(member.file_size for member in file.infolist())
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BundleError(
            f"{folder} has {free / 1e6:.1f} MB free, and the unpacked archives take {needed / 1e6:.1f} MB. Free some "
            "space, or set TMPDIR to another folder."
        )
