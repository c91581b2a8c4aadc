"""The chart's values: the schema has them all, and what they become is what the image's programs read."""

import re

import pytest
import typer
import yaml

from bundle.catalog import select
from bundle.cli.app import app
from bundle.cli.parameters import worker_count
from bundle.paths import ROOT
from bundle.server.fetch import Wanted
from bundle.server.settings import Settings
from handlers.core import tracing
from tests.helm import (
    CHART,
    DIGEST,
    MATRIX,
    RELEASE,
    SCHEMA,
    containers,
    environment,
    helm,
    many_models,
    needs_helm,
    of_kind,
    pods,
    render,
    resolved,
)
from tests.queries import metric_names
from tests.shipped import SHIPPED

pytestmark = needs_helm
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
COMMANDS = typer.main.get_command(app).commands


def only(values: str, name: str = "bundle-main") -> dict[str, dict]:
    """Return the containers of a Deployment."""
    return containers(dict(pods(render(values)))[name])


@pytest.mark.parametrize(
    ("values", "is_warned"),
    [
        ("", False),
        ("service: {type: LoadBalancer}", True),
        ("ingress: {enabled: true}", True),
        ("gateway: {enabled: true, parents: [{name: public}]}", True),
        ("service: {type: NodePort}\nnetworkPolicy: {enabled: false}", False),
        ("ingress: {enabled: true}\nnetworkPolicy: {clients: [{namespaceSelector: {}}]}", False),
    ],
)
def test_notes_warn_if_requests_from_outside_would_time_out(values: str, is_warned: bool):
    done = helm("install", RELEASE, str(CHART), "--dry-run=client", values=values)
    assert done.returncode == 0, done.stderr
    assert ("WARNING: networkPolicy.clients is empty" in done.stdout) is is_warned


def compare(values: dict, schema: dict) -> None:
    assert values.keys() == schema["properties"].keys() - {"global"}
    assert schema["additionalProperties"] is False
    for name, value in values.items():
        inside = resolved(schema["properties"][name])
        if value and "properties" in inside:
            compare(value, inside)


def test_schema_has_every_value_and_no_other():
    compare(VALUES, SCHEMA)
    group = SCHEMA["properties"]["groups"]["additionalProperties"]
    assert group["properties"].keys() == {"models", *VALUES["defaults"]}


def test_default_group_has_the_models_that_are_always_served():
    assert only("")["torchserve"]["args"] == ["run", *sorted(SHIPPED)]


# --- what the image's programs read ----------------------------------------------------------------------------------


def test_variables_of_the_server_are_read_by_it():
    known = {parameter.envvar for parameter in COMMANDS["run"].params} | {
        f"TS_{key.upper()}" for key in Settings().values
    }
    known |= {*tracing.ENDPOINTS, *tracing.HEADERS, *tracing.CHOICES, *tracing.NUMBERS}
    known |= {"BUNDLE_BEHIND_PROXY", "BUNDLE_MODELS", "TRUSTED_KEY", "NVIDIA_VISIBLE_DEVICES", "NETRC", "CA_FILE"}
    known |= {"AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}  # test_fetch_s3.py
    for values in MATRIX.values():
        for _, pod in pods(render(values)):
            for name in ("torchserve", "fetch", "samples"):
                assert environment(containers(pod).get(name, {})).keys() - {"BUNDLE_FRONTEND_OFF", "NO"} <= known


def test_traces_have_the_same_endpoint_and_ratio_in_the_proxy_and_the_server():
    found = only(MATRIX["traces"])
    server, proxy = environment(found["torchserve"]), environment(found["proxy"])
    tracing.check({**server, "OTEL_EXPORTER_OTLP_HEADERS": ""})
    assert tracing.endpoint(server) == proxy["TRACE_ENDPOINT"] == "http://otel-collector.monitoring:4317"
    assert server["OTEL_TRACES_SAMPLER_ARG"] == proxy["TRACE_RATIO"] == "0.05"
    assert (proxy["TRACE_CLIENTS"], server["OTEL_EXPORTER_OTLP_HEADERS"]) == ("false", "of a Secret")
    plain = only("")
    assert not [name for each in plain.values() for name in environment(each) if name.startswith(("OTEL", "TRACE"))]


@pytest.mark.parametrize("ratio", ["0", "0.0001", "0.1234", "1"])
def test_accepted_ratio_is_written_as_the_proxy_reads_it(ratio: str):
    endpoint = MATRIX["traces"].partition("ratio")[0]
    assert environment(only(f"{endpoint} ratio: {ratio}}}")["proxy"])["TRACE_RATIO"] == ratio


def test_large_integers_are_written_in_full():
    found = only(MATRIX["names and numbers that YAML could read as something else"], "bundle-on")
    given = environment(found["torchserve"]) | environment(found["proxy"])
    assert (given["TS_MAX_RESPONSE_SIZE"], given["NO"], given["BURST"]) == ("33554432", "1000000", "1000000")


def test_variable_with_the_name_of_a_setting_and_another_prefix_is_accepted():
    """TorchServe reads only TS_JOB_QUEUE_SIZE as the setting."""
    given = environment(only("defaults: {settings: {job_queue_size: 9}, env: {JOB_QUEUE_SIZE: 8}}")["torchserve"])
    assert (given["TS_JOB_QUEUE_SIZE"], given["JOB_QUEUE_SIZE"]) == ("9", "8")


def test_variables_of_the_proxy_are_read_by_it():
    script = (ROOT / "docker" / "nginx" / "start.sh").read_text()
    documented = set(re.findall(r"^#   ([A-Z_]+) ", script, re.MULTILINE))
    assert environment(only("")["proxy"]).keys() <= documented


def test_proxy_and_server_have_the_limits_of_the_stack():
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    defaults = {
        name: value.removeprefix(f"${{{name}:-").removesuffix("}")
        for name, value in compose["proxy"]["environment"].items()
        if value.startswith(f"${{{name}:-")
    }
    found = only("")
    given = environment(found["proxy"])
    assert {name: given[name] for name in given.keys() & defaults.keys()} == {
        name: defaults[name] for name in given.keys() & defaults.keys()
    }
    assert given.keys() & defaults.keys() >= {"MAX_BODY", "PROXY_RATE", "BURST", "UPSTREAM_TIMEOUT"}
    assert environment(found["torchserve"])["TS_MAX_REQUEST_SIZE"] == given["MAX_BODY"]
    assert given["TORCHSERVE_PORT"] == environment(found["torchserve"])["TS_INFERENCE_ADDRESS"].rpartition(":")[2]


def test_commands_of_the_image_accept_the_arguments():
    """`run` and `check` get models, and `fetch` what it parses."""
    used = set()
    for values in MATRIX.values():
        for _, pod in pods(render(values)):
            for name in containers(pod).keys() & {"torchserve", "fetch", "samples"}:
                command, *arguments = containers(pod)[name]["args"]
                used.add(command)
                parsed = COMMANDS[command].make_context(command, list(arguments)).params
                if command == "fetch":
                    assert [Wanted.parse(text).model for text in parsed["archives"]] == ["mnist"]
                else:
                    assert [folder.name for folder in select(parsed["models"])] == list(parsed["models"])
    assert used == {"run", "check", "fetch"}


def test_numbers_of_workers_are_those_of_the_track():
    found = {name: containers(pod) for name, pod in pods(render(MATRIX["two groups, canary, routes"]))}
    counts = {
        name: environment(inside["torchserve"]).get("BUNDLE_WORKERS")
        for name, inside in found.items()
        if "proxy" in inside
    }
    assert counts == {"bundle-vision": "mnist=1", "bundle-vision-canary": "mnist=3", "bundle-words": None}
    assert worker_count(counts["bundle-vision-canary"]) == ("mnist", 3)


def test_image_of_a_track():
    assert only("")["torchserve"]["image"] == "torchserve-bundle:0.2.0"
    assert only("image: {repository: registry/x, tag: a}")["torchserve"]["image"] == "registry/x:a"
    digest = f"sha256:{DIGEST}"
    assert only(f"image: {{digest: '{digest}'}}")["torchserve"]["image"] == f"torchserve-bundle@{digest}"
    # a tag of the canary replaces a digest that it would inherit
    canary = f"image: {{digest: '{digest}'}}\ngroups: {{main: {{canary: {{weight: 5, image: {{tag: next}}}}}}}}"
    assert only(canary)["torchserve"]["image"] == f"torchserve-bundle@{digest}"
    assert only(canary, "bundle-main-canary")["torchserve"]["image"] == "torchserve-bundle:next"
    assert only(canary, "bundle-main-canary-test")["samples"]["image"] == "torchserve-bundle:next"


def test_version_is_that_of_the_project():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert (chart["version"], chart["appVersion"]) == (version, version)


def test_gpu_is_requested_or_hidden():
    """NVIDIA's runtime gives a container without the request all GPUs, if the image's variable says `all`."""
    gpu = only(MATRIX["gpu"])["torchserve"]
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "NVIDIA_VISIBLE_DEVICES" not in environment(gpu)
    without = only("")["torchserve"]
    assert not [name for name in without["resources"]["limits"] if "gpu" in name]
    assert environment(without)["NVIDIA_VISIBLE_DEVICES"] == "void"


# --- routes and scaling ----------------------------------------------------------------------------------------------


def test_route_leads_each_model_to_its_group_with_the_weights_of_its_tracks():
    leads = {}
    for route in of_kind(render(MATRIX["two groups, canary, routes"]), "HTTPRoute").values():
        for rule in route["spec"]["rules"]:
            weights = {backend["name"]: backend["weight"] for backend in rule["backendRefs"]}
            leads |= {(match["path"]["type"], match["path"]["value"]): weights for match in rule["matches"]}
    vision = {"bundle-vision": 90, "bundle-vision-canary": 10}
    assert leads[("PathPrefix", "/predictions/mnist")] == leads[("Exact", "/v1/models/image:predict")] == vision
    assert leads[("PathPrefix", "/v2/models/text")] == {"bundle-words": 100}
    assert len(leads) == 3 * 6


def test_route_has_room_for_as_many_models_as_are_accepted():
    """The Gateway API allows 16 rules, and 128 paths in all of them."""
    gateway = "gateway: {enabled: true, parents: [{name: public}]}"
    values = f"groups: {{main: null, a: {{models: {{{many_models(21)}}}}}, b: {{models: {{x: {{}}}}}}}}\n{gateway}"
    rules = of_kind(render(values), "HTTPRoute")["bundle-a"]["spec"]["rules"]
    assert len(rules) == 16
    assert sum(len(rule["matches"]) for rule in rules) == 21 * 6


def test_one_group_gets_all_paths():
    [route] = of_kind(render(MATRIX["one group, canary, routes"]), "HTTPRoute").values()
    [rule] = route["spec"]["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/"}}]
    assert {backend["name"]: backend["weight"] for backend in rule["backendRefs"]} == {
        "bundle-main": 100,
        "bundle-main-canary": 0,
    }


def test_ingress_of_the_canary_has_its_weight_and_the_same_paths():
    ingresses = of_kind(render(MATRIX["two groups, canary, routes"]), "Ingress")
    prefix = "nginx.ingress.kubernetes.io/"
    canary, stable = ingresses["bundle-vision-canary"], ingresses["bundle-vision"]
    assert canary["metadata"]["annotations"][f"{prefix}canary-weight"] == "10"
    assert f"{prefix}canary" not in stable["metadata"]["annotations"]
    paths = [[path["path"] for path in found["spec"]["rules"][0]["http"]["paths"]] for found in (canary, stable)]
    assert paths[0] == paths[1]
    assert len(paths[0]) == 2 * 6


def test_routes_wait_longer_and_take_as_much_as_the_proxy():
    """Lower limits of an ingress would end requests that the proxy in the pod answers."""
    objects = render(MATRIX["two groups, canary, routes"] + "proxy: {maxBody: 32m, upstreamTimeout: 40}")
    prefix = "nginx.ingress.kubernetes.io/proxy-"
    for ingress in of_kind(objects, "Ingress").values():
        given = ingress["metadata"]["annotations"]
        assert (given[f"{prefix}body-size"], given[f"{prefix}read-timeout"]) == ("32m", "45")
    for route in of_kind(objects, "HTTPRoute").values():
        assert {rule["timeouts"]["request"] for rule in route["spec"]["rules"]} == {"45s"}
    proxy = environment(containers(dict(pods(objects))["bundle-vision"])["proxy"])
    assert (proxy["MAX_BODY"], proxy["UPSTREAM_TIMEOUT"]) == ("32m", "40")


def test_pods_of_a_track_are_spread_over_zones_and_nodes():
    for name, pod in pods(render(MATRIX["two groups, canary, routes"])):
        if pod.get("kind") != "Pod":
            spread = pod["spec"]["topologySpreadConstraints"]
            assert [each["topologyKey"] for each in spread] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
            for each in spread:
                assert each["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items(), name
                assert each["matchLabelKeys"] == ["pod-template-hash"]
                assert each["whenUnsatisfiable"] == "ScheduleAnyway"


@pytest.mark.parametrize("values", [name for name in MATRIX if "ingress:" in MATRIX[name]])
def test_paths_have_only_characters_that_ingress_nginx_allows_for_their_type(values: str):
    """Its option strict-validate-path-type, which is on by default."""
    kinds = {}
    for found in of_kind(render(MATRIX[values]), "Ingress").values():
        kinds |= {path["path"]: path["pathType"] for path in found["spec"]["rules"][0]["http"]["paths"]}
    for path, kind in kinds.items():
        assert (kind == "ImplementationSpecific") == (re.fullmatch("/[A-Za-z0-9/_-]*", path) is None), path


@pytest.mark.parametrize(
    ("values", "kind"), [("autoscaling by cpu", "HorizontalPodAutoscaler"), ("autoscaling by queue", "ScaledObject")]
)
def test_scaled_deployment_has_no_number_of_its_own(values: str, kind: str):
    """Otherwise, each upgrade would set it back."""
    objects = render(MATRIX[values])
    assert of_kind(objects, kind).keys() == {"bundle-main"}
    assert "replicas" not in of_kind(objects, "Deployment")["bundle-main"]["spec"]


def test_queries_of_the_scaler_name_metrics_that_exist_and_the_pods_of_the_track():
    [scaled] = of_kind(render(MATRIX["scale to zero"]), "ScaledObject").values()
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    assert [metric_names(query) for query in queries] == [
        {"bundle_queue_seconds_bucket"},
        {"bundle_queue_pending"},
        {"requests"},
    ]
    assert scaled["spec"]["minReplicaCount"] == 0
    for query in queries[:2]:
        selected = re.search(r'namespace="(\w+)",pod=~"([^"]+)"', query)
        assert selected[1] == "models"
        assert re.fullmatch(selected[2], "bundle-main-7d4b9c8f5d-x2x4z")
        assert not re.fullmatch(selected[2], "bundle-main-canary-7d4b9c8f5d-x2x4z")


def test_query_of_the_scaler_selects_the_pods_of_the_longest_name():
    """Kubernetes cuts a pod's name, without its five random characters, to 58."""
    group = "g" * 39
    values = f"groups: {{main: null, {group}: {{models: {{mnist: {{}}}}, autoscaling: {{enabled: true, by: queue}}}}}}"
    [(name, scaled)] = of_kind(render(values), "ScaledObject").items()
    selected = re.search('pod=~"([^"]+)"', scaled["spec"]["triggers"][0]["metadata"]["query"])[1]
    assert re.fullmatch(selected, f"{name}-7d4b9c8f5d-"[:58] + "x2x4z")
