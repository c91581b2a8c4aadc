"""Renders the chart with the real Helm, and finds objects in the result."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bundle.paths import ROOT

CHART = ROOT / "kubernetes" / "chart"
HELM = shutil.which("helm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
needs_helm = pytest.mark.skipif(HELM is None, reason="Helm is missing: make helm")
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
RELEASE, NAMESPACE = "bundle", "models"
DIGEST = "a" * 64
PEM = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAn0\n-----END PUBLIC KEY-----\n"
MATRIX = {
    "defaults": "",
    "two groups, canary, routes": """
groups:
  main: null
  vision:
    replicas: 2
    models: {mnist: {workers: 1}, image: {}}
    canary: {weight: 10, image: {tag: 0.3.0}, models: {mnist: {workers: 3}}}
  words: {models: {text: {}}}
ingress: {enabled: true, tlsSecret: certificate, annotations: {a: b}}
gateway: {enabled: true, parents: [{name: public, namespace: gateways}], hosts: [models.example.com]}
networkPolicy: {clients: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ingress-nginx}}}]}
""",
    "one group, canary, routes": """
groups: {main: {canary: {weight: 0, image: {tag: 0.3.0}}}}
ingress: {enabled: true}
gateway: {enabled: true, parents: [{name: public}]}
""",
    "gpu": """
defaults:
  gpu: {count: 1}
  nodeSelector: {cloud.google.com/gke-accelerator: nvidia-l4}
  tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
  affinity: {nodeAffinity: {}}
  strategy: {maxSurge: 0, maxUnavailable: 1}
  disruption: {maxUnavailable: 25%}
  spread: []
  priorityClassName: high
  podLabels: {team: vision}
  podAnnotations: {a: b}
  settings: {job_queue_size: 200, limit_max_image_pixels: false}
  env: {BUNDLE_FRONTEND_OFF: gather}
pullSecrets: [registry]
networkPolicy: {enabled: false}
service: {type: LoadBalancer, port: 8080, annotations: {a: b}}
""",
    "names and numbers that YAML could read as something else": """
groups:
  main: null
  "on":
    models: {mnist: {}}
    settings: {max_response_size: 33554432}
    env: {"NO": 1000000}
    serviceAccountName: "123"
    priorityClassName: "1"
    canary: {weight: 5}
pullSecrets: ["123"]
proxy: {burst: 1000000}
archives: {source: claim, claim: "0"}
trustedKey: {secret: "2024"}
ingress: {enabled: true, className: "nginx", tlsSecret: "1"}
""",
    "autoscaling by cpu": "groups: {main: {autoscaling: {enabled: true}}}",
    "autoscaling by queue": "groups: {main: {autoscaling: {enabled: true, by: queue}}}",
    "scale to zero": """
groups: {main: {autoscaling: {enabled: true, by: queue, min: 0, activation: 'sum(rate(requests{service="a"}[1m]))'}}}
""",
    "archives from a claim": """
archives: {source: claim, claim: archives, claimHasFolders: true}
trustedKey: {secret: signing-key}
""",
    "traces": """
tracing: {endpoint: "http://otel-collector.monitoring:4317", ratio: 0.05, clients: false, headersSecret: otlp}
""",
    "archives by url": f"""
groups:
  main: null
  digits: {{models: {{mnist: {{url: "https://models.example/mnist.mar?signature=a=b", sha256: {DIGEST}}}}}}}
archives: {{source: url, netrcSecret: passwords}}
trustedKey: {{pem: {json.dumps(PEM)}}}
networkPolicy: {{egress: [{{to: [{{ipBlock: {{cidr: 10.0.0.0/8}}}}]}}]}}
""",
    "archives from S3": f"""
groups:
  main: null
  digits: {{models: {{mnist: {{url: "s3://models/digits/mnist.mar", sha256: {DIGEST}}}}}, serviceAccountName: reader}}
archives:
  source: url
  caSecret: authorities
  s3: {{region: eu-central-1, endpoint: "https://minio.storage:9000", credentialsSecret: bucket}}
""",
    "archives by another program": f"""
groups:
  main: null
  digits: {{models: {{mnist: {{sha256: {DIGEST}}}}}, serviceAccountName: reader}}
archives:
  source: url
  downloader:
    image: amazon/aws-cli:2.31.0
    args: [s3, cp, --recursive, "s3://models/", /opt/bundle/fetched/]
    env: {{AWS_REGION: eu-central-1}}
""",
    "monitoring": """
monitoring: {podMonitor: true, rules: true, dashboard: true, labels: {release: prometheus}}
configProperties: "enable_envvars_config=true\\nvmargs=-Xmx4g\\n"
proxy: {corsOrigins: ["https://app.example.com"], trustedProxies: [10.0.0.0/8]}
""",
}


def helm(*arguments: str, values: str | None = None) -> subprocess.CompletedProcess:
    """Run Helm; values (YAML) are its standard input."""
    given = [] if values is None else ["--values", "-"]
    return subprocess.run([str(HELM), *arguments, *given], input=values, capture_output=True, text=True, timeout=60)


@functools.cache
def render(values: str = "") -> tuple[dict, ...]:
    """Return the objects that the chart makes of values (YAML). All callers share them: do not change them."""
    done = helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, values=values)
    assert done.returncode == 0, done.stderr
    return tuple(filter(None, yaml.safe_load_all(done.stdout)))


def resolved(schema: dict) -> dict:
    """Return a part of the schema with what it refers to."""
    if "$ref" not in schema:
        return schema
    target = SCHEMA
    for step in schema["$ref"].removeprefix("#/").split("/"):
        target = target[step]
    whole = {**(target := resolved(target)), **schema}
    if "properties" in schema and "properties" in target:
        own = schema["properties"]
        whole["properties"] = {name: {**part, **own.get(name, {})} for name, part in target["properties"].items()}
    return whole


def many_models(number: int) -> str:
    """Return the models of a group, as YAML."""
    return ", ".join(f"m{i}: {{}}" for i in range(number))


def of_kind(objects: tuple[dict, ...], kind: str) -> dict[str, dict]:
    """Return the objects of a kind by name."""
    return {found["metadata"]["name"]: found for found in objects if found["kind"] == kind}


def pods(objects: tuple[dict, ...]) -> Iterator[tuple[str, dict]]:
    """Yield the name, and the metadata and spec, of each pod: those of Deployments, and the tests."""
    for found in objects:
        if found["kind"] == "Deployment":
            yield found["metadata"]["name"], found["spec"]["template"]
        elif found["kind"] == "Pod":
            yield found["metadata"]["name"], found


def containers(pod: dict) -> dict[str, dict]:
    """Return all containers of a pod by name, in the order in which they start."""
    spec = pod["spec"]
    return {container["name"]: container for container in (*spec.get("initContainers", ()), *spec["containers"])}


def environment(container: dict) -> dict[str, str]:
    names = [variable["name"] for variable in container.get("env", ())]
    assert len(names) == len(set(names)), names
    return {variable["name"]: variable.get("value", "of a Secret") for variable in container.get("env", ())}
