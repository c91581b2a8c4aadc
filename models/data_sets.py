"""Report a data set that is missing and cannot be downloaded."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HELP = "Help: set DATA_DIR, or the option --data-dir, to the folder that has it."


@contextmanager
def downloaded(name: str, data_dir: Path) -> Iterator[None]:
    """Translate the errors of a library that reads a data set, and downloads it if it is missing.

    Args:
        name: of the data set.
        data_dir: the folder in which it is looked for.

    Raises:
        SystemExit: the library raised an OSError (network, files) or a RuntimeError (torchvision).
    """
    try:
        yield
    except (OSError, RuntimeError) as exc:
        reason = (str(exc).strip() or type(exc).__name__).splitlines()[-1]
        raise SystemExit(f"error: {name} is not in {data_dir}, and its download failed: {reason}\n{HELP}") from exc


def open_archive(file: Path, name: str, source: str) -> zipfile.ZipFile:
    """Open the ZIP file of a data set that is not downloaded.

    Args:
        file: the ZIP file.
        name: of the data set.
        source: where users get it, and what the ZIP file has to contain.

    Raises:
        SystemExit: the file is missing, or it is not a ZIP file.
    """
    try:
        return zipfile.ZipFile(file)
    except FileNotFoundError as exc:
        raise SystemExit(f"error: {file} is missing. It has {name}: {source}\n{HELP}") from exc
    except zipfile.BadZipFile as exc:
        raise SystemExit(f"error: {file} is not a ZIP file, or it is incomplete.") from exc
