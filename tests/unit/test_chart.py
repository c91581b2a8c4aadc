"""The chart: what it makes of many values is valid for three versions of Kubernetes, confined, and of one piece."""

import functools
import json
import re
import tarfile
from pathlib import Path

import jsonschema
import pytest
import yaml

from bundle.paths import ROOT
from bundle.server.process import KILL_SECONDS, TERMINATE_SECONDS
from tests.helm import (
    CHART,
    MATRIX,
    NAMESPACE,
    RELEASE,
    containers,
    environment,
    helm,
    needs_helm,
    of_kind,
    pods,
    render,
)
from tests.manifests import check, check_once

pytestmark = needs_helm


@pytest.fixture(params=MATRIX)
def objects(request: pytest.FixtureRequest) -> tuple[dict, ...]:
    return render(MATRIX[request.param])


@pytest.mark.slow
@pytest.mark.parametrize("values", MATRIX)
def test_objects_are_valid_for_each_version_of_kubernetes(values: str):
    for found in render(MATRIX[values]):
        check_once(json.dumps(found, sort_keys=True))


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "template", "spec", "containers", 0, "securityContext", "readonly"), True),
        ("Deployment", ("spec", "replicas"), "1"),
        ("NetworkPolicy", ("spec", "ingress", 0, "form"), []),
        ("HTTPRoute", ("spec", "rules", 0, "backendRefs", 0, "weight"), "10"),
        ("HTTPRoute", ("spec", "hostname"), "models.example.com"),
    ],
)
def test_invalid_object_is_found(kind: str, path: tuple, value: object):
    found = json.loads(json.dumps(next(iter(of_kind(render(MATRIX["two groups, canary, routes"]), kind).values()))))
    check(found)
    place = functools.reduce(lambda inside, key: inside[key], path[:-1], found)
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["on", "null"])
def test_objects_are_valid_for_a_release_whose_name_yaml_reads_as_something_else(name: str):
    done = helm("template", name, str(CHART), values=MATRIX["monitoring"])
    assert done.returncode == 0, done.stderr
    for found in filter(None, yaml.safe_load_all(done.stdout)):
        check(found)


@pytest.mark.slow
def test_chart_passes_lint_with_each_of_the_values():
    for values in MATRIX.values():
        linted = helm("lint", "--strict", str(CHART), values=values)
        assert linted.returncode == 0, linted.stdout + linted.stderr


# --- confinement -----------------------------------------------------------------------------------------------------


def test_every_container_is_confined(objects: tuple[dict, ...]):
    """As in docker/compose.yaml, and as the Pod Security Standard `restricted` demands."""
    for name, pod in pods(objects):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"}
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        kinds = {key for volume in spec["volumes"] for key in volume} - {"name"}
        assert kinds <= {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}
        for container in containers(pod).values():
            context = spec["securityContext"] | container["securityContext"]
            assert context["runAsUser"] in (101, 10001)
            assert context["runAsGroup"] == context["runAsUser"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "privileged" not in context


def test_every_container_has_requests_and_limits(objects: tuple[dict, ...]):
    for _, pod in pods(objects):
        for container in containers(pod).values():
            for kind in ("requests", "limits"):
                assert container["resources"][kind].keys() >= {"cpu", "memory", "ephemeral-storage"}, container["name"]
        volumes = [volume["emptyDir"] for volume in pod["spec"]["volumes"] if "emptyDir" in volume]
        assert all("sizeLimit" in volume for volume in volumes)


def test_every_container_that_stays_has_probes(objects: tuple[dict, ...]):
    for _, pod in pods(objects):
        if pod.get("kind") == "Pod":
            continue
        found = containers(pod)
        assert {"torchserve", "proxy"} <= found.keys()
        for name in ("torchserve", "proxy"):
            assert found[name].keys() >= {"readinessProbe", "livenessProbe"}
        assert found["torchserve"]["startupProbe"]["httpGet"] == {"path": "/ready", "port": 8083}
        assert found["torchserve"]["readinessProbe"]["httpGet"] == {"path": "/ready", "port": 8083}


def test_only_inference_is_exposed(objects: tuple[dict, ...]):
    """Services lead to the proxy. Other servers listen on the pod's loopback, except for those of metrics."""
    for service in of_kind(objects, "Service").values():
        assert [port["targetPort"] for port in service["spec"]["ports"]] == ["http"]
    for policy in of_kind(objects, "NetworkPolicy").values():
        ports = [[port["port"] for port in rule["ports"]] for rule in policy["spec"]["ingress"]]
        assert ports == [[8080], [8082, 8083]]
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        assert all(rule["from"] for rule in policy["spec"]["ingress"])
    for _, pod in pods(objects):
        named = {port["name"]: port["containerPort"] for c in containers(pod).values() for port in c.get("ports", ())}
        if pod.get("kind") != "Pod":
            assert named == {"http": 8080, "metrics": 8082, "supervisor": 8083}
            variables = environment(containers(pod)["torchserve"])
            assert variables["TS_INFERENCE_ADDRESS"].startswith("http://127.0.0.1:")
            assert variables["TS_GRPC_INFERENCE_ADDRESS"] == "127.0.0.1"
            assert not variables.keys() & {"TS_MANAGEMENT_ADDRESS", "TS_GRPC_MANAGEMENT_ADDRESS"}


def test_policy_applies_to_servers_and_lets_the_tests_reach_them(objects: tuple[dict, ...]):
    for policy in of_kind(objects, "NetworkPolicy").values():
        selected = policy["spec"]["podSelector"]["matchLabels"].items()
        clients = policy["spec"]["ingress"][0]["from"]
        for _, pod in pods(objects):
            labels = pod["metadata"]["labels"].items()
            is_test = pod.get("kind") == "Pod"
            assert (selected <= labels) is not is_test
            local = [peer["podSelector"].get("matchLabels", {}) for peer in clients if "podSelector" in peer]
            assert not is_test or any(wanted.items() <= labels for wanted in local)


def test_pods_reach_other_servers_only_to_fetch_archives_and_to_send_traces():
    for name, values in MATRIX.items():
        for policy in of_kind(render(values), "NetworkPolicy").values():
            assert bool(policy["spec"]["egress"]) == bool(re.match("archives (by|from S3)|traces", name))
    for name, ports in (("archives from S3", [53, 53, 80, 443, 9000]), ("traces", [53, 53, 4317])):  # of the endpoint
        [policy] = of_kind(render(MATRIX[name]), "NetworkPolicy").values()
        [rule] = policy["spec"]["egress"]
        assert [port["port"] for port in rule["ports"]] == ports


# --- of one piece ----------------------------------------------------------------------------------------------------


def test_mounts_have_volumes_and_volumes_have_mounts(objects: tuple[dict, ...]):
    for _, pod in pods(objects):
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert {mount["name"] for c in containers(pod).values() for mount in c["volumeMounts"]} == volumes


def test_every_named_object_of_the_release_exists(objects: tuple[dict, ...]):
    theirs = {"signing-key", "passwords", "authorities", "2024"}
    made = {kind: of_kind(objects, kind).keys() for kind in ("ConfigMap", "Secret", "Service", "Deployment")}
    for _, pod in pods(objects):
        for volume in pod["spec"]["volumes"]:
            assert volume.get("configMap", {"name": None})["name"] in {None, *made["ConfigMap"]}
            assert volume.get("secret", {"secretName": None})["secretName"] in {None, *made["Secret"], *theirs}
    for ingress in of_kind(objects, "Ingress").values():
        paths = ingress["spec"]["rules"][0]["http"]["paths"]
        assert {path["backend"]["service"]["name"] for path in paths} <= made["Service"]
    for route in of_kind(objects, "HTTPRoute").values():
        assert {backend["name"] for rule in route["spec"]["rules"] for backend in rule["backendRefs"]} <= made[
            "Service"
        ]
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        assert {scaled["spec"]["scaleTargetRef"]["name"] for scaled in of_kind(objects, kind).values()} <= made[
            "Deployment"
        ]


def test_services_and_budgets_select_the_pods_of_their_own_track(objects: tuple[dict, ...]):
    labels = {name: pod["metadata"]["labels"].items() for name, pod in pods(objects) if pod.get("kind") != "Pod"}
    services = {name: found["spec"]["selector"] for name, found in of_kind(objects, "Service").items()}
    budgets = of_kind(objects, "PodDisruptionBudget").items()
    for selectors in (services, {name: found["spec"]["selector"]["matchLabels"] for name, found in budgets}):
        assert selectors.keys() == labels.keys()
        for name, selector in selectors.items():
            assert [pod for pod, given in labels.items() if selector.items() <= given] == [name]


def test_grace_period_is_as_long_as_every_step_of_the_end_may_take(objects: tuple[dict, ...]):
    for _, pod in pods(objects):
        if pod.get("kind") != "Pod":
            found = containers(pod)
            sleep, seconds = found["proxy"]["lifecycle"]["preStop"]["exec"]["command"]
            assert sleep == "sleep"
            answering = int(environment(found["proxy"])["UPSTREAM_TIMEOUT"]) + 10  # nginx's worker_shutdown_timeout
            draining = int(environment(found["torchserve"])["BUNDLE_DRAIN_SECONDS"])
            steps = int(seconds) + answering + draining + TERMINATE_SECONDS + KILL_SECONDS
            assert steps < pod["spec"]["terminationGracePeriodSeconds"] <= steps + 15


def test_tests_run_on_the_nodes_of_their_track():
    found = dict(pods(render(MATRIX["gpu"])))
    for name in ("nodeSelector", "tolerations"):
        assert found["bundle-main-test"]["spec"][name] == found["bundle-main"]["spec"][name]


def test_torchserve_starts_before_the_proxy_and_ends_after_it(objects: tuple[dict, ...]):
    """Kubernetes ends sidecar containers last: init containers that are restarted always."""
    for _, pod in pods(objects):
        if pod.get("kind") != "Pod":
            assert pod["spec"]["initContainers"][-1]["name"] == "torchserve"
            assert pod["spec"]["initContainers"][-1]["restartPolicy"] == "Always"
            assert [container["name"] for container in pod["spec"]["containers"]] == ["proxy"]


# --- one source with the Docker stack --------------------------------------------------------------------------------


def test_proxy_has_the_files_of_the_stack():
    [proxy] = [found for name, found in of_kind(render(), "ConfigMap").items() if name.endswith("-proxy")]
    assert proxy["data"] == {
        name: (ROOT / "docker" / "nginx" / name).read_text() for name in ("nginx.conf", "start.sh")
    }


def test_dashboard_is_that_of_the_stack():
    dashboard = of_kind(render(MATRIX["monitoring"]), "ConfigMap")[f"{RELEASE}-dashboard"]["data"]
    source = ROOT / "docker" / "grafana" / "dashboards" / "torchserve.json"
    assert dashboard == {source.name: source.read_text()}


def test_rules_are_those_of_the_stack_with_runbooks_for_a_cluster():
    [made] = of_kind(render(MATRIX["monitoring"]), "PrometheusRule").values()
    files = sorted((ROOT / "docker" / "prometheus" / "rules").glob("*.yml"))
    assert "stack.yml" in {file.name for file in files}
    files = [file for file in files if file.name != "stack.yml"]  # about containers of the Docker stack
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]

    def without_runbooks(groups: list[dict]) -> list[dict]:
        copy = json.loads(json.dumps(groups))
        for rule in (rule for group in copy for rule in group["rules"]):
            rule.get("annotations", {}).pop("runbook", None)
        return copy

    assert without_runbooks(made["spec"]["groups"]) == without_runbooks(groups)
    books = [
        rule["annotations"]["runbook"] for group in made["spec"]["groups"] for rule in group["rules"] if "alert" in rule
    ]
    assert len(books) > 5
    assert [book for book in books if re.search("docker|`make|127.0.0.1", book)] == []
    assert any(f"kubectl -n {NAMESPACE} logs -l app.kubernetes.io/instance={RELEASE}" in book for book in books)


def test_metrics_are_read_as_by_the_stack():
    [monitor] = of_kind(render(MATRIX["monitoring"]), "PodMonitor").values()
    stack = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job.get("metric_relabel_configs", []) for job in stack["scrape_configs"]}
    relabelings = {job["job_name"]: job.get("relabel_configs") for job in stack["scrape_configs"]}
    names = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    read = {}
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        assert (endpoint["interval"], endpoint["scrapeTimeout"]) == ("5s", "4s")
        job, *targets = endpoint["relabelings"]
        assert job["targetLabel"] == "job"
        assert [{names.get(k, k): v for k, v in rule.items()} for rule in targets] == relabelings[job["replacement"]]
        rules = endpoint.get("metricRelabelings", [])
        read[job["replacement"]] = endpoint["port"], [{names.get(k, k): v for k, v in rule.items()} for rule in rules]
    assert read == {"torchserve": ("metrics", jobs["torchserve"]), "bundle": ("supervisor", jobs["bundle"])}


def test_package_contains_the_files_of_the_stack(tmp_path: Path):
    """The chart links to them; a packaged chart has them."""
    done = helm("package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    links = [path for path in (CHART / "files").rglob("*") if path.is_symlink()]
    sources = {f"torchserve-bundle/{path.relative_to(CHART)}": path.resolve() for path in links}
    assert len(sources) == len([path for path in (CHART / "files").rglob("*") if path.is_file()]) >= 6
    assert all(source.is_relative_to(ROOT / "docker") for source in sources.values())
    with tarfile.open(next(tmp_path.iterdir())) as packed:
        assert {name: packed.extractfile(name).read() for name in sources} == {
            name: source.read_bytes() for name, source in sources.items()
        }


# --- KServe ----------------------------------------------------------------------------------------------------------

KSERVE = {
    file.stem: yaml.safe_load(file.read_text()) for file in sorted((ROOT / "kubernetes" / "kserve").glob("*.yaml"))
}


@pytest.mark.parametrize("name", KSERVE)
def test_object_of_kserve_is_valid(name: str):
    check(KSERVE[name])


@pytest.mark.slow
def test_runtime_is_confined_and_its_containers_are_valid():
    spec = KSERVE["serving-runtime"]["spec"]
    [container] = spec["containers"]
    check(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "a"},
            "spec": {"containers": [container], "volumes": spec["volumes"]},
        }
    )
    assert container["name"] == "kserve-container"
    chart = containers(dict(pods(render()))["bundle-main"])["torchserve"]
    assert chart["securityContext"].items() <= container["securityContext"].items()
    assert container["image"] == chart["image"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {
        m["mountPath"] for m in chart["volumeMounts"]
    }
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert int(environment(container)["BUNDLE_DRAIN_SECONDS"]) < 30  # Kubernetes' default of the grace period


def test_services_of_kserve_have_the_names_of_models():
    models = {folder.name for folder in (ROOT / "models").iterdir()}
    services = [found for found in KSERVE.values() if found["kind"] == "InferenceService"]
    assert len(services) == 3
    assert {found["metadata"]["name"] for found in services} <= models
    formats = {each["name"] for each in KSERVE["serving-runtime"]["spec"]["supportedModelFormats"]}
    assert {found["spec"]["predictor"]["model"]["modelFormat"]["name"] for found in services} == formats
