"""A release of the chart in a namespace of its own, on the cluster of the current kubectl context."""

import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from bundle.errors import BundleError
from bundle.server.ports import free_ports
from tests import traffic
from tests.helm import CHART, HELM, RELEASE
from tests.support import wait_for

KUBECTL = shutil.which("kubectl")
DEPLOYMENT = f"{RELEASE}-digits"
START_SECONDS = 600
SAMPLE, EXPECTED = "/opt/bundle/models/mnist/sample.png", '"top_3_classes": [3'
CONFINED = {
    "runAsNonRoot": True,
    "runAsUser": 10001,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def image_to_test() -> str:
    """Return the name of the image.

    Raises:
        BundleError: it is not named by a tag, a program is missing, or no cluster answers.
    """
    image = os.environ.get("IMAGE", "")
    if not image:
        raise BundleError(
            "No image is named. Load it into the cluster's nodes (kubernetes/README.md), and name it: "
            "make test-cluster IMAGE=torchserve-bundle:latest"
        )
    _, colon, tag = image.rpartition("/")[2].partition(":")
    fault = "a digest" if "@" in image else "no tag" if not colon else "an empty tag" if not tag else ""
    if fault:
        raise BundleError(
            f"IMAGE={image} has {fault}. Name it by a tag: make test-cluster IMAGE=torchserve-bundle:latest"
        )
    if HELM is None:
        raise BundleError("Helm is missing: make helm")
    if KUBECTL is None:
        raise BundleError("kubectl is missing. Install it, and choose a cluster: kubectl config use-context NAME")
    asked = subprocess.run([KUBECTL, "get", "nodes", "--request-timeout=20s"], capture_output=True, text=True)
    if asked.returncode:
        raise BundleError(
            "No cluster answers. `kubectl get nodes` shows the reason.", asked.stderr.strip().rpartition("\n")[2]
        )
    return image


def run(*command: str, given: str | bytes | None = None, check: bool = True) -> subprocess.CompletedProcess:
    """Run a program.

    Args:
        given: its standard input.
    """
    content = given.encode() if isinstance(given, str) else given
    done = subprocess.run(command, input=content, capture_output=True, timeout=START_SECONDS + 100)
    text = subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())
    assert not check or text.returncode == 0, f"{' '.join(command[:6])}\n{text.stdout[-3000:]}{text.stderr[-3000:]}"
    return text


@dataclass(frozen=True)
class Release:
    """A release of the chart.

    Attributes:
        namespace: its namespace.
        image: the server's image.
        values: its values (YAML).
    """

    namespace: str
    image: str
    values: str

    def kubectl(
        self, *arguments: str, given: str | bytes | None = None, check: bool = True
    ) -> subprocess.CompletedProcess:
        return run(str(KUBECTL), "--namespace", self.namespace, *arguments, given=given, check=check)

    def helm(self, *arguments: str, given: str | None = None) -> str:
        return run(str(HELM), *arguments, "--namespace", self.namespace, given=given).stdout

    def upgrade(self, wait: bool = True, **changes: object) -> None:
        """Install or upgrade the release with its values, and these changes to them at the top."""
        values = yaml.safe_dump(yaml.safe_load(self.values) | changes)
        waiting = ["--wait", f"--timeout={START_SECONDS}s"] if wait else []
        self.helm("upgrade", "--install", RELEASE, str(CHART), *waiting, "--values", "-", given=values)

    def list_pods(self) -> list[dict]:
        selector = f"--selector=app.kubernetes.io/instance={RELEASE},bundle/group=digits"
        return json.loads(self.kubectl("get", "pods", selector, "--output=json").stdout)["items"]

    def pods(self) -> dict[str, dict]:
        """Return the pods that do not end, by name."""
        found = {pod["metadata"]["name"]: pod for pod in self.list_pods()}
        return {name: pod for name, pod in found.items() if "deletionTimestamp" not in pod["metadata"]}

    def ready(self) -> set[str]:
        """Return the names of the pods that get new requests."""

        def is_ready(pod: dict) -> bool:
            conditions = {found["type"]: found["status"] for found in pod["status"].get("conditions", ())}
            return conditions.get("Ready") == "True"

        return {name for name, pod in self.pods().items() if is_ready(pod)}

    def rolled_out(self) -> None:
        """Wait until the Deployment has its number of ready pods, and no others."""
        self.kubectl("rollout", "status", f"deployment/{DEPLOYMENT}", f"--timeout={START_SECONDS}s")
        wait_for(lambda: len(self.list_pods()) == len(self.ready()), START_SECONDS)

    def logs(self, pod: str, container: str) -> str:
        return self.kubectl("logs", pod, "--container", container, check=False).stdout

    def run_pod(self, name: str, *command: str) -> None:
        """Start a pod of the image, with a folder /tmp, and wait until it runs."""
        container = {"name": name, "image": self.image, "command": list(command), "securityContext": CONFINED}
        container["volumeMounts"] = [{"name": "temporary", "mountPath": "/tmp"}]
        container["resources"] = {"requests": {"cpu": "50m", "memory": "64Mi"}}
        container["imagePullPolicy"] = "IfNotPresent"
        spec = {
            "containers": [container],
            "volumes": [{"name": "temporary", "emptyDir": {}}],
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",  # a second start would count from zero
            "terminationGracePeriodSeconds": 1,
        }
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"run": name}}, "spec": spec}
        self.kubectl("apply", "--filename=-", given=json.dumps(pod))
        self.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=300s")

    @contextmanager
    def load(self) -> Iterator[None]:
        """Send requests to the Service from a pod until the block ends; none may fail."""
        program = Path(traffic.__file__).read_text()
        url = f"http://{DEPLOYMENT}/predictions/mnist"
        try:
            self.run_pod("load", "/opt/bundle/.venv/bin/python", "-c", program, url, SAMPLE, EXPECTED)
            wait_for(lambda: self.sent().get("200", 0) > 100)
            yield
            before = self.sent()["200"]
            wait_for(lambda: self.sent()["200"] > before + 100)
            print(said := self.kubectl("logs", "load", "--tail=1").stdout)
            assert set(json.loads(said)["counts"]) == {"200"}, said
        finally:
            self.kubectl("delete", "pod", "load", "--ignore-not-found")

    def sent(self) -> dict[str, int]:
        """Return the numbers of the outcomes so far."""
        said = self.kubectl("logs", "load", "--tail=1").stdout
        return json.loads(said)["counts"] if said else {}

    @contextmanager
    def forwarded(self) -> Iterator[str]:
        """Forward a port to the Service, and yield its URL."""
        [port] = free_ports(1)
        command = [str(KUBECTL), "--namespace", self.namespace, "port-forward", f"service/{DEPLOYMENT}", f"{port}:80"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forwarding:
            try:
                assert forwarding.stdout
                assert "Forwarding" in forwarding.stdout.readline()
                yield f"http://127.0.0.1:{port}"
            finally:
                forwarding.terminate()


@contextmanager
def installed(image: str, values: str) -> Iterator[Release]:
    """Install the chart in a new namespace in which Pod Security enforces `restricted`, and remove the namespace."""
    namespace = f"bundle-test-{uuid.uuid4().hex[:8]}"
    release = Release(namespace, image, values)
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    described = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}}
    run(str(KUBECTL), "create", "--filename=-", given=json.dumps(described))
    try:
        began = time.monotonic()
        release.upgrade()
        print(f"installed in {time.monotonic() - began:.0f} s")
        yield release
    finally:
        run(str(KUBECTL), "delete", "namespace", namespace, "--timeout=300s")
