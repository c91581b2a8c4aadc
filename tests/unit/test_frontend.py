"""The Java agent for TorchServe's frontend: its jar is what its sources say, and every patch finds its place."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bundle.build import frontend as building
from bundle.errors import BundleError
from bundle.server import frontend
from bundle.server.frontend import JAR, OFF, OPTIONS
from bundle.server.java import java_home
from bundle.server.status import Status

pytestmark = pytest.mark.slow  # most tests start Java
PATCHES = ["gather", "overload", "lost", "timeouts", "forms", "drain", "management", "scaling"]
PATCHES += ["gzip", "buckets", "close", "query", "routes", "grpc", "oversized", "registration"]
NO_COMPILER = shutil.which("javac") is None and os.environ.get("CI") != "true"  # there, a test fails without a JDK
HELLO = 'public class Hello { public static void main(String[] a) { System.out.println("started"); } }'
# reads the list of a model's workers while it changes
SCALING = """
import java.util.List;
public class Scaling {
    public static void main(String[] arguments) throws Exception {
        Class<?> manager = Class.forName("org.pytorch.serve.wlm.WorkLoadManager");
        Class<?> name = Class.forName("org.pytorch.serve.wlm.ModelVersionName");
        var make = manager.getDeclaredMethod("lambda$modelChanged$0", name);
        make.setAccessible(true);
        @SuppressWarnings("unchecked")
        List<Object> workers = (List<Object>) make.invoke(null, (Object) null);
        workers.addAll(List.of(1, 2, 3));
        try {
            for (Object worker : workers) workers.remove(worker);
            System.out.println("read");
        } catch (java.util.ConcurrentModificationException error) {
            System.out.println(error);
        }
    }
}
"""
# prints the upper bounds of a histogram's buckets
BUCKETS = """
import java.util.*;
public class Buckets {
    public static void main(String[] arguments) throws Exception {
        var type = org.pytorch.serve.metrics.MetricBuilder.MetricType.HISTOGRAM;
        new org.pytorch.serve.metrics.format.prometheous.PrometheusHistogram(type, "h", arguments[0], List.of("Model"))
            .addOrUpdate(List.of("a"), 3);
        var registry = io.prometheus.client.CollectorRegistry.defaultRegistry;
        for (var family : Collections.list(registry.metricFamilySamples()))
            for (var sample : family.samples)
                if (sample.name.equals("h_bucket")) System.out.print(sample.labelValues.get(1) + " ");
        System.out.println();
    }
}
"""
DEFAULT_BUCKETS = "0.005 0.01 0.025 0.05 0.075 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 +Inf"
# Models of another TorchServe
WITHOUT_QUEUE = """
package org.pytorch.serve.wlm;
public class Model { public void pollBatch(String thread, long wait, java.util.Map<String, Object> jobs) {} }
"""
WITH_LONG_DELAY = """
package org.pytorch.serve.wlm;
import java.util.Map;
import java.util.concurrent.*;
public class Model {
    long maxBatchDelay;
    LinkedBlockingDeque<Object> jobs;
    public void pollBatch(String thread, long wait, Map<String, Object> repository) throws InterruptedException {
        jobs.poll(1, TimeUnit.DAYS); jobs.poll(1, TimeUnit.DAYS); jobs.poll(maxBatchDelay, TimeUnit.DAYS);
    }
    public void pollInferJob(Map<String, Object> repository, int size, LinkedBlockingDeque<Object> jobs)
            throws InterruptedException {
        jobs.poll(1, TimeUnit.DAYS); jobs.poll(maxBatchDelay, TimeUnit.DAYS);
    }
}
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchServe's classes write logs where they are loaded."""
    monkeypatch.chdir(tmp_path)


def run_java(*arguments: str, **environment: str) -> str:
    java = java_home() / "bin" / "java"
    variables = {key: value for key, value in os.environ.items() if key not in (OFF, OPTIONS)} | environment
    return subprocess.run([java, *arguments], env=variables, capture_output=True, text=True, check=True).stdout


def states_of(tmp_path: Path, class_path: str, **environment: str) -> dict[str, str]:
    """Return the states of the patches for the TorchServe on the class path."""
    console = tmp_path / "console.log"
    console.write_text(run_java("-cp", f"{JAR}:{class_path}", "bundle.frontend.Agent", **environment))
    return frontend.states(console)


def compile_java(folder: Path, source: str, class_path: Path | str | None = None) -> None:
    file = folder / f"{source.split('class ')[1].split()[0]}.java"
    file.write_text(source)
    subprocess.run(["javac", "-cp", class_path or folder, "-d", folder, file], check=True)


def test_every_patch_finds_its_place_in_the_installed_torchserve(tmp_path: Path):
    assert states_of(tmp_path, str(building.torchserve_jar())) == dict.fromkeys(PATCHES, "in")


def test_agent_loads_no_class_of_torchserve_before_it_is_changed(tmp_path: Path):
    console = tmp_path / "console.log"
    console.write_text(run_java(f"-javaagent:{JAR}", "-cp", str(building.torchserve_jar()), "bundle.frontend.Agent"))
    assert frontend.states(console) == dict.fromkeys(PATCHES, "in")


def test_patched_classes_pass_the_verifier():
    torchserve = str(building.torchserve_jar())
    run_java("-Xverify:all", "-cp", f"{JAR}:{torchserve}", "bundle.frontend.Agent", "verify")


@pytest.mark.parametrize("off", [*PATCHES, "all"])
def test_patch_that_is_turned_off_is_not_applied(tmp_path: Path, off: str):
    states = states_of(tmp_path, str(building.torchserve_jar()), **{OFF: off})
    assert states == {name: "off" if off in (name, "all") else "in" for name in PATCHES}


def test_unknown_patch_that_is_turned_off_is_reported(tmp_path: Path):
    states = states_of(tmp_path, str(building.torchserve_jar()), **{OFF: "gahter"})
    assert states["gahter"].startswith("refused: there is no patch with this name")
    assert states == {**dict.fromkeys(PATCHES, "in"), "gahter": states["gahter"]}


@pytest.mark.skipif(NO_COMPILER, reason="no JDK")
@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (WITHOUT_QUEUE, "pollBatch has 0 calls of java/util/concurrent/LinkedBlockingDeque.poll, not 3"),
        (WITH_LONG_DELAY, "pollBatch reads maxBatchDelay of type I 0 times, not once"),
    ],
    ids=["queue", "delay"],
)
def test_class_of_another_version_is_left_alone_and_java_starts(tmp_path: Path, other: str, reason: str):
    compile_java(tmp_path, other)
    compile_java(tmp_path, HELLO)
    class_path = f"{tmp_path}:{building.torchserve_jar()}"
    console = tmp_path / "console.log"
    console.write_text(run_java(f"-javaagent:{JAR}", "-cp", class_path, "Hello"))
    assert "started" in console.read_text()
    assert frontend.states(console)["gather"] == f"refused: org.pytorch.serve.wlm.Model: {reason}"


@pytest.mark.skipif(NO_COMPILER, reason="no JDK")
@pytest.mark.parametrize(("off", "printed"), [("", "read"), ("scaling", "java.util.ConcurrentModificationException")])
def test_list_of_workers_is_read_while_it_changes_with_the_patch_only(tmp_path: Path, off: str, printed: str):
    compile_java(tmp_path, SCALING)
    class_path = f"{tmp_path}:{building.torchserve_jar()}"
    output = run_java(f"-javaagent:{JAR}", "-cp", class_path, "Scaling", **{OFF: off})
    assert output.splitlines()[-1] == printed


@pytest.mark.skipif(NO_COMPILER, reason="no JDK")
@pytest.mark.parametrize(
    ("unit", "off", "bounds"),
    [
        ("Seconds", "", f"2.5E-4 5.0E-4 0.001 0.0025 {DEFAULT_BUCKETS}"),
        ("Count", "", "1.0 2.0 4.0 8.0 16.0 32.0 64.0 128.0 256.0 +Inf"),
        ("Percent", "", DEFAULT_BUCKETS),
        ("Count", "buckets", DEFAULT_BUCKETS),
    ],
)
def test_histogram_has_the_buckets_of_its_unit_with_the_patch_only(tmp_path: Path, unit: str, off: str, bounds: str):
    torchserve = building.torchserve_jar()
    compile_java(tmp_path, BUCKETS, torchserve)
    output = run_java(f"-javaagent:{JAR}", "-cp", f"{tmp_path}:{torchserve}", "Buckets", unit, **{OFF: off})
    assert output.splitlines()[-1].strip() == bounds


@pytest.mark.skipif(NO_COMPILER, reason="no JDK")
def test_java_without_torchserve_starts_with_the_agent(tmp_path: Path):
    compile_java(tmp_path, HELLO)
    output = run_java(f"-javaagent:{JAR}", "-cp", str(tmp_path), "Hello")
    assert "started" in output
    assert "frontend patch all: refused: java.lang.NoClassDefFoundError: org/pytorch/serve" in output


@pytest.mark.skipif(NO_COMPILER, reason="no JDK")
def test_jar_built_again_is_the_committed_one_byte_for_byte(tmp_path: Path):
    if building.compiler_version() != building.built_with():
        pytest.skip(f"the jar was made with javac {building.built_with()}")
    building.build(tmp_path / "again.jar")
    assert (tmp_path / "again.jar").read_bytes() == JAR.read_bytes(), "build it again: make frontend"


def test_environment_keeps_other_java_options():
    environment = frontend.with_agent({OPTIONS: "-Xss2m", "A": "b"})
    assert environment == {"A": "b", OPTIONS: f'-Xss2m "-javaagent:{JAR}"'}
    assert frontend.with_agent({})[OPTIONS] == f'"-javaagent:{JAR}"'


@pytest.mark.parametrize("off", ["all", "gather,all", "lost all"])
def test_environment_without_any_patch_has_no_agent(off: str):
    given = {OPTIONS: "-Xss2m", OFF: off}
    assert frontend.with_agent(given) == given


@pytest.mark.parametrize(
    ("folder", "loads"),
    [("it's a folder, (1)", True), ("a=b", False), ('say "a"', False), ("missing", False)],
)
def test_check_accepts_the_agents_path_if_java_starts_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, loads: bool
):
    jar = tmp_path / folder / "frontend.jar"
    jar.parent.mkdir()
    if folder != "missing":
        shutil.copy(JAR, jar)
    monkeypatch.setattr(frontend, "JAR", jar)
    assert starts(java_home(), frontend.with_agent(os.environ)) is loads
    check_agrees(java_home(), {}, None if loads else 'frontend.jar (is missing|has [="])')


@pytest.mark.skipif(NO_COMPILER, reason="no JDK")
def test_java_without_the_module_for_agents_starts_with_all_patches_off_only(tmp_path: Path):
    small = tmp_path / "java"
    subprocess.run(["jlink", "--add-modules", "java.base", "--output", small], check=True)
    assert not starts(small, frontend.with_agent(os.environ))
    check_agrees(small, {}, "java lacks the module java.instrument .* Set JAVA_HOME")
    assert starts(small, frontend.with_agent({**os.environ, OFF: "all"}))
    check_agrees(small, {OFF: "all"}, None)


def starts(home: Path, environment: dict[str, str]) -> bool:
    return subprocess.run([home / "bin" / "java", "-version"], env=environment, capture_output=True).returncode == 0


def check_agrees(home: Path, environment: dict[str, str], problem: str | None) -> None:
    """Check that `frontend.check` raises an error with this problem, or none."""
    if problem is None:
        frontend.check(home, environment)
    else:
        with pytest.raises(BundleError, match=f"{problem}.* set {OFF}=all"):
            frontend.check(home, environment)


def test_fingerprint_without_the_agent_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = frontend.fingerprint({})
    monkeypatch.setattr(frontend, "JAR", tmp_path / "missing.jar")
    assert frontend.fingerprint({}) != before


def test_states_without_a_console_are_empty(tmp_path: Path):
    assert frontend.states(tmp_path / "console.log") == {}


@pytest.mark.parametrize(
    ("patches", "line"),
    [
        ({"a": "in", "b": "in"}, "patches of the frontend: a, b"),
        ({"a": "in", "b": "off"}, "patches of the frontend: a; b is off"),
        ({"a": "refused: Model: no poll"}, "patches of the frontend: none; a is refused: Model: no poll"),
        ({"all": "off"}, "patches of the frontend: none; all is off"),
        ({}, "patches of the frontend: none"),
    ],
    ids=str,
)
def test_status_shows_each_patch(patches: dict[str, str], line: str):
    assert Status(1, 2, 3, "PSS", [], patches).frontend() == line
