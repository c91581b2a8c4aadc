"""Runs a pod of the chart with the Docker engine, field for field, as Kubernetes' kubelet would.

CI has no cluster, which `tests/cluster` needs. This shows that the image, the arguments, the variables, the mounts, the
users, the probes and the order of the end fit together. It does not show what Kubernetes itself does: Services,
scheduling, rollouts, network policies. A field that is not known here is an error.
"""

import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import requests

from tests.docker.stack import docker
from tests.support import wait_for

POD_FIELDS = {
    "securityContext", "initContainers", "containers", "volumes", "terminationGracePeriodSeconds",
    # of the cluster
    "automountServiceAccountToken", "serviceAccountName", "enableServiceLinks", "topologySpreadConstraints",
}  # fmt: skip
CONTAINER_FIELDS = {
    "name", "image", "command", "args", "env", "securityContext", "resources", "volumeMounts", "restartPolicy",
    "startupProbe", "readinessProbe", "livenessProbe", "lifecycle",
    "imagePullPolicy", "ports",  # of the cluster: images are here, and ports are for names
}  # fmt: skip
POD_SECURITY = {"runAsNonRoot", "fsGroup", "fsGroupChangePolicy", "seccompProfile"}
SECURITY = {"runAsUser", "runAsGroup", "readOnlyRootFilesystem", "allowPrivilegeEscalation", "capabilities"}
PROBE_FIELDS = {"httpGet", "tcpSocket", "periodSeconds", "timeoutSeconds", "failureThreshold"}
MIB = {"Mi": 2**20, "Gi": 2**30}
GRACEFUL = "SIGQUIT"  # the stop signal of nginx's own image; a local stand-in for it has none

http = requests.Session()
http.trust_env = False  # a proxy in the environment cannot reach the pod
http.headers["Connection"] = "close"  # a proxy that ends closes kept connections, perhaps as a request comes


def known(fields: dict, names: set[str]) -> dict:
    """Return an object, all of whose fields are known here."""
    assert fields.keys() <= names, fields.keys() - names
    return fields


@dataclass
class Container:
    """A container of a pod.

    Attributes:
        address: of the pod.
        ended: when it had ended (s, monotonic).
        probed: the kind and the result of every probe.
    """

    spec: dict
    id: str
    address: str
    ended: float = 0.0
    probed: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.spec["name"]

    def state(self) -> dict:
        return json.loads(docker("inspect", "--format", "{{json .State}}", self.id))

    def logs(self) -> str:
        done = subprocess.run(["docker", "logs", self.id], capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def execute(self, *command: str) -> str:
        return docker("exec", self.id, *command)

    def probe(self, kind: str) -> bool:
        """Probe once, and note the result."""
        probe = known(self.spec[kind], PROBE_FIELDS)
        try:
            if "httpGet" in probe:
                port, path = probe["httpGet"]["port"], probe["httpGet"]["path"]
                url = f"http://{self.address}:{port}{path}"
                answer = http.get(url, timeout=probe["timeoutSeconds"])
                succeeded = 200 <= answer.status_code < 400
            else:
                socket.create_connection((self.address, probe["tcpSocket"]["port"]), probe["timeoutSeconds"]).close()
                succeeded = True
        except OSError:  # requests' errors are OSErrors, too
            succeeded = False
        self.probed.append((kind, succeeded))
        return succeeded

    def wait_for_probe(self, kind: str) -> None:
        """Probe until it succeeds, or fails as often as allowed."""
        probe = self.spec[kind]
        for _ in range(probe["failureThreshold"]):
            if self.probe(kind):
                return
            assert self.state()["Running"], self.logs()[-3000:]
            time.sleep(probe["periodSeconds"])
        raise AssertionError(f"{kind} of {self.name} failed {probe['failureThreshold']} times\n{self.logs()[-3000:]}")

    def pre_stop(self) -> None:
        if hook := self.spec.get("lifecycle", {}).get("preStop"):
            self.execute(*known(hook, {"exec"})["exec"]["command"])

    def end(self, seconds: float) -> None:
        """Stop the container as the kubelet does, and wait: its stop signal, and SIGKILL after these seconds."""
        docker("stop", "--time", str(round(seconds)), self.id)
        self.ended = time.monotonic()


class Pod:
    """A pod of one Deployment.

    Args:
        objects: of the chart.
        folder: where its volumes are made.
        images: local images by the chart's names.
    """

    def __init__(self, objects: tuple[dict, ...], name: str, folder: Path, images: dict[str, str]):
        [deployment] = [o for o in objects if o["kind"] == "Deployment" and o["metadata"]["name"] == name]
        self.spec = known(deployment["spec"]["template"]["spec"], POD_FIELDS)
        self.security = known(self.spec["securityContext"], POD_SECURITY)
        assert self.security["seccompProfile"] == {"type": "RuntimeDefault"}  # Docker's own, its default
        self.objects = {(o["kind"], o["metadata"]["name"]): o for o in objects}
        self.folder, self.images = folder, images
        self.id = f"bundle-test-pod-{uuid.uuid4().hex[:8]}"
        self.volumes = {volume["name"]: self.make_volume(volume) for volume in self.spec["volumes"]}
        self.containers: dict[str, Container] = {}

    def make_volume(self, volume: dict) -> Path:
        """Make a folder with what the volume contains, readable for the pod's group."""
        folder = self.folder / volume["name"]
        folder.mkdir(parents=True)
        if "configMap" in volume:
            contents = self.objects["ConfigMap", volume["configMap"]["name"]]["data"]
        elif "secret" in volume:
            contents = self.objects["Secret", volume["secret"]["secretName"]]["stringData"]
        else:
            assert volume.keys() == {"name", "emptyDir"}
            contents = {}
        mode = volume.get("secret", {}).get("defaultMode", 0o644)
        group = self.security["fsGroup"] if os.geteuid() == 0 else -1
        for name, text in contents.items():
            (folder / name).write_text(text)
            os.chown(folder / name, -1, group)
            (folder / name).chmod(mode)
        os.chown(folder, -1, group)
        folder.chmod(0o2777 if not contents else 0o2755)
        return folder

    def start(self) -> None:
        """Start the containers in the order of Kubernetes, each with its probes."""
        image = self.images[self.spec["containers"][0]["image"]]
        # holds the network that the containers share
        docker("run", "--detach", "--name", self.id, "--entrypoint", "sleep", image, "infinity")
        for container in self.spec.get("initContainers", ()):
            started = self.run(container)
            if container.get("restartPolicy") == "Always":
                started.wait_for_probe("startupProbe")
            else:
                wait_for(lambda started=started: not started.state()["Running"], 120)
                assert started.state()["ExitCode"] == 0, started.logs()
        for container in self.spec["containers"]:
            self.run(container)
        for container in self.staying():
            wait_for(lambda container=container: container.probe("readinessProbe"), 120)
            container.wait_for_probe("livenessProbe")

    @property
    def address(self) -> str:
        return address_of(self.id)

    def staying(self) -> list[Container]:
        return [found for found in self.containers.values() if "readinessProbe" in found.spec]

    def run(self, spec: dict) -> Container:
        """Start a container; one of the same name must have ended, and is replaced, as the kubelet restarts it."""
        known(spec, CONTAINER_FIELDS)
        security = known(spec["securityContext"], SECURITY)
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["runAsUser"] != 0
        assert security["capabilities"] == {"drop": ["ALL"]}
        image = self.images[spec["image"]]
        options = [f"--name={self.id}-{spec['name']}-{uuid.uuid4().hex[:4]}", f"--network=container:{self.id}"]
        options += [f"--user={security['runAsUser']}:{security['runAsGroup']}"]
        options += [f"--group-add={self.security['fsGroup']}", "--read-only"]
        options += ["--cap-drop=ALL", "--security-opt=no-new-privileges"]
        limits = spec["resources"]["limits"]
        assert limits.keys() == {"cpu", "memory", "ephemeral-storage"}
        cpus = min(float(limits["cpu"]), os.cpu_count() or 1)  # the engine refuses more than there are
        options += [f"--memory={in_bytes(limits['memory'])}", f"--cpus={cpus}"]
        options += [f"--env={variable['name']}={variable['value']}" for variable in spec.get("env", ())]
        for mount in spec["volumeMounts"]:
            known(mount, {"name", "mountPath", "readOnly", "subPath"})
            source = self.volumes[mount["name"]] / mount.get("subPath", "")
            options += [f"--volume={source}:{mount['mountPath']}" + (":ro" if mount.get("readOnly") else "")]
        command = list(spec.get("args", ()))
        if "command" in spec:
            entrypoint, *rest = spec["command"]
            options, command = [*options, f"--entrypoint={entrypoint}"], [*rest, *command]
        own = docker("image", "inspect", "--format", "{{.Config.StopSignal}}", image).strip()
        if spec["name"] == "proxy" and not own:
            options += [f"--stop-signal={GRACEFUL}"]
        started = docker("run", "--detach", *options, image, *command).strip()
        self.containers[spec["name"]] = Container(spec, started, self.address)
        return self.containers[spec["name"]]

    def restart(self, name: str) -> Container:
        """Replace a container that has ended, as the kubelet does."""
        assert not self.containers[name].state()["Running"]
        docker("rm", "--force", self.containers[name].id)
        return self.run(self.containers[name].spec)

    def delete(self, on_termination: Callable[[], object]) -> float:
        """End the pod as the kubelet does; return the seconds that it took.

        All preStop hooks begin at once. A container gets its signal after its hook; sidecars get theirs when the other
        containers have ended. All share the grace period.

        Args:
            on_termination: called when the pod begins to end: the pod's endpoint is removed.
        """
        grace, began = self.spec["terminationGracePeriodSeconds"], time.monotonic()
        on_termination()

        def end(container: Container, after: list[threading.Thread]) -> None:
            container.pre_stop()
            for earlier in after:
                earlier.join()
            container.end(max(1, grace - (time.monotonic() - began)))

        sidecars = {c["name"] for c in self.spec.get("initContainers", ()) if c.get("restartPolicy") == "Always"}
        running = [container for container in self.containers.values() if container.state()["Running"]]
        mains = [threading.Thread(target=end, args=(c, [])) for c in running if c.name not in sidecars]
        others = [threading.Thread(target=end, args=(c, mains)) for c in running if c.name in sidecars]
        for thread in (*mains, *others):
            thread.start()
        for thread in (*mains, *others):
            thread.join()
        return time.monotonic() - began

    def remove(self) -> None:
        for container in self.containers.values():
            docker("rm", "--force", "--volumes", container.id)
        docker("rm", "--force", "--volumes", self.id)


def address_of(container: str) -> str:
    """Return a container's address in the engine's own network, which the host reaches."""
    return docker("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container).strip()


def in_bytes(quantity: str) -> int:
    return int(quantity[:-2]) * MIB[quantity[-2:]]


@contextmanager
def running(objects: tuple[dict, ...], name: str, folder: Path, images: dict[str, str]) -> Iterator[Pod]:
    """Start a pod, and remove it."""
    pod = Pod(objects, name, folder, images)
    try:
        pod.start()
        yield pod
    finally:
        pod.remove()
