"""Look at the packages in an environment's folder, which need not be that of this Python."""

import csv
import re
import shutil
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path


def site_packages(environment: Path) -> Path:
    """Return the folder of an environment's packages."""
    return next(environment.glob("lib/python3*/site-packages"))


def found_in(site: Path) -> dict[str, Distribution]:
    """Return the installed packages by name."""
    every = distributions(path=[str(site)])
    return {canonical(name): found for found in every if (name := found.metadata["Name"])}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(site: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = found_in(site)
    return {name: found[name].version for name in names if name in found}


def forget_damaged(site: Path) -> list[str]:
    """Forget the packages of which files are missing or cut off, so that they are installed again; return their names.

    An interrupted installation leaves such packages, and both uv and pip take them for installed.
    """
    damaged = [folder for folder in site.glob("*.dist-info") if is_damaged(folder)]
    for folder in damaged:
        shutil.rmtree(folder)
    return sorted(folder.name.partition("-")[0] for folder in damaged)


def is_damaged(info: Path) -> bool:
    """Return whether a file of the package is missing, or has another size than its list says."""
    try:
        with (info / "RECORD").open(newline="") as lines:
            return any((info.parent / name).stat().st_size != int(size) for name, _, size in csv.reader(lines) if size)
    except (OSError, ValueError):
        return True


def needed_by_none(site: Path, prefixes: tuple[str, ...]) -> set[str]:
    """Return the packages with these prefixes that no other package requires."""
    found = found_in(site)
    candidates = {name for name in found if name.startswith(prefixes)}
    needed: set[str] = set()
    wanted = [name for name in found if name not in candidates]
    while wanted:
        required = set(required_by(found[wanted.pop()])) & candidates - needed
        needed |= required
        wanted += required
    return candidates - needed


def required_by(package: Distribution) -> Iterator[str]:
    """Yield the names that a package requires, whatever the condition."""
    for line in package.requires or ():
        if match := re.match(r"[\w.-]+", line):
            yield canonical(match[0])
