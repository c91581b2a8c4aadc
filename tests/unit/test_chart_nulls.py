"""The chart's values, each set to null, which removes it: it is as its empty default, or is refused by its name."""

import functools
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.helm import CHART, DIGEST, MATRIX, NAMESPACE, PEM, RELEASE, SCHEMA, helm, needs_helm, resolved
from tests.manifests import check_once

pytestmark = needs_helm
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
ARCHIVE = f"{{url: 's3://models/a.mar', sha256: {DIGEST}}}"
CONTEXTS = {
    "defaults": "",
    "everything on": f"""
groups:
  main: null
  vision:
    models: {{mnist: {ARCHIVE}}}
    canary: {{weight: 10, image: {{tag: 0.3.0}}, models: {{mnist: {ARCHIVE}}}, env: {{A: b}}}}
    autoscaling: {{enabled: true}}
    resources: {{limits: {{memory: 8Gi}}}}
  words: {{models: {{text: {ARCHIVE}}}, autoscaling: {{enabled: true, by: queue}}}}
defaults: {{gpu: {{count: 1}}}}
archives:
  source: url
  netrcSecret: passwords
  caSecret: authorities
  s3: {{region: eu-central-1, endpoint: "https://minio.storage:9000", credentialsSecret: bucket}}
trustedKey: {{pem: {json.dumps(PEM)}}}
configProperties: "enable_envvars_config=true"
ingress: {{enabled: true, tlsSecret: certificate}}
gateway: {{enabled: true, parents: [{{name: public}}], hosts: [models.example.com]}}
tracing: {{endpoint: "http://otel-collector.monitoring:4317", headersSecret: otlp}}
monitoring: {{podMonitor: true, rules: true, dashboard: true, labels: {{release: prometheus}}}}
""",
    "archives from a claim": MATRIX["archives from a claim"],
    "archives by another program": MATRIX["archives by another program"],
}
# What has a default and may still be removed: parts of maps that the user may make smaller, and lists of what is added.
REMOVABLE = {
    *(("groups", "main", "models", model) for model in VALUES["groups"]["main"]["models"]),
    *(("defaults", "resources", kind, "ephemeral-storage") for kind in ("requests", "limits")),
    *(
        (owner, "resources", kind, resource)
        for owner in ("proxy", "test")
        for kind in ("requests", "limits")
        for resource in ("cpu", "memory", "ephemeral-storage")
    ),
    ("defaults", "spread"),
    ("networkPolicy", "monitoring"),
    ("monitoring", "dashboardLabels"),
    ("monitoring", "dashboardLabels", "grafana_dashboard"),
}


# Its default, 0, is a number like others: without it, Kubernetes would take its own, 25 %.
NUMBER = ("defaults", "strategy", "maxUnavailable")


def paths(values: dict, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of each value."""
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


def value_at(values: dict, path: tuple[str, ...]) -> Any:
    """Return a value, or an empty map for one that is not there."""
    return functools.reduce(lambda inside, key: inside.get(key, {}), path, values)


KEYS = [path for path in paths(VALUES) if path != ("groups", "main")]  # `main: null` is in kubernetes/README.md
ACCEPTED = [path for path in KEYS if path in REMOVABLE or not (path == NUMBER or value_at(VALUES, path))]
GROUP = SCHEMA["properties"]["groups"]["additionalProperties"]


@functools.cache
def template(values: str) -> subprocess.CompletedProcess:
    return helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, values=values)


def changed(context: str, path: tuple[str, ...], value: object) -> str:
    """Return a context with a value, as YAML."""
    values = yaml.safe_load(CONTEXTS[context]) or {}
    place = values
    for key in path[:-1]:
        place = place.setdefault(key, {})
    place[path[-1]] = value
    return yaml.safe_dump(values)


def without(context: str, path: tuple[str, ...]) -> str:
    """Return a context without a value, as YAML: the chart's default applies."""
    values = yaml.safe_load(CONTEXTS[context]) or {}
    value_at(values, path[:-1]).pop(path[-1], None)
    return yaml.safe_dump(values)


def leftovers(found: object) -> list[object]:
    """Return what a missing value leaves in an object."""
    if isinstance(found, dict | list):
        return [left for inside in (found.values() if isinstance(found, dict) else found) for left in leftovers(inside)]
    marks = ("<nil>", "<no value>", "%!")
    return [found] if found is None or (isinstance(found, str) and any(mark in found for mark in marks)) else []


def check_refusal(said: str, path: tuple[str, ...]) -> None:
    """Check that a refusal names the value, and comes from the schema or from a check of the chart."""
    *above, key = path
    place = "".join(f"/{part}" for part in above)
    if "values don't meet the specifications" in said:
        assert f"at '{place}': missing property '{key}'" in said or f"at '{place}/{key}': got null, want " in said
    else:
        assert "Error: execution error at (" in said
        assert ".".join(path) in said.partition("execution error at")[2]


@functools.cache
def check_objects(rendered: str) -> None:
    for found in filter(None, yaml.safe_load_all(rendered)):
        assert leftovers(found) == [], found["kind"]
        check_once(json.dumps(found, sort_keys=True))


def check_null(context: str, path: tuple[str, ...]) -> None:
    """Check that null is accepted or refused as the empty default is."""
    removed = template(changed(context, path, None))
    if path in REMOVABLE:
        assert removed.returncode == 0, removed.stderr
    else:
        default = template(without(context, path))
        assert (removed.returncode, removed.stdout) == (default.returncode, default.stdout), removed.stderr
    if removed.returncode:
        check_refusal(removed.stderr, path)
    else:
        check_objects(removed.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in KEYS if path not in ACCEPTED], ids=".".join)
def test_null_is_refused_by_the_name_of_the_value(path: tuple[str, ...]):
    refused = template(changed("defaults", path, None))
    assert refused.returncode == 1
    check_refusal(refused.stderr, path)


@pytest.mark.slow
@pytest.mark.parametrize("path", ACCEPTED, ids=".".join)
def test_null_is_as_the_empty_default(path: tuple[str, ...]):
    check_null("defaults", path)
    if path[0] != "groups":
        check_null("everything on", path)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["archives from a claim", "archives by another program"])
@pytest.mark.parametrize("path", [path for path in ACCEPTED if path[0] in ("archives", "trustedKey")], ids=".".join)
def test_null_is_as_the_empty_default_for_each_source_of_archives(context: str, path: tuple[str, ...]):
    check_null(context, path)


@pytest.mark.parametrize("owner", [("groups", "digits"), ("groups", "digits", "canary")], ids=".".join)
def test_null_in_a_group_is_refused_by_the_name_of_the_value(owner: tuple[str, ...]):
    """A group has no defaults that null could remove."""
    known = resolved(GROUP["properties"]["canary"] if owner[-1] == "canary" else GROUP)["properties"]
    place = "/" + "/".join(owner)
    refused = template(changed("defaults", owner, dict.fromkeys(known))).stderr
    assert [key for key in known if f"at '{place}/{key}': got null, want " not in refused] == []
    maps = {key: inside["properties"] for key, part in known.items() if "properties" in (inside := resolved(part))}
    refused = template(changed("defaults", owner, {key: dict.fromkeys(inside) for key, inside in maps.items()})).stderr
    assert [key for inside in maps.values() for key in inside if f"/{key}': " not in refused] == []
    assert len(maps) > 1
