"""A release on a real cluster: it answers, and no change of it loses a request."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from bundle.catalog import select
from bundle.server.client import Client, check_sample
from bundle.signing import make_keys
from tests.cluster.release import DEPLOYMENT, RELEASE, Release
from tests.docker.stack import build_archive
from tests.support import wait_for

[MNIST] = select(["mnist"])


def test_models_answer_their_samples(release: Release):
    said = release.helm("test", RELEASE, "--logs")
    assert "mnist: sample.png is answered with '3'" in said
    with release.forwarded() as url:
        assert check_sample(Client(url, ""), MNIST) == MNIST.bundle.expect


def test_upgrade_and_rollback_lose_no_request(release: Release):
    before = release.ready()
    with release.load():
        release.upgrade(lifecycle={"patienceSeconds": 100})
        release.rolled_out()
        upgraded = release.ready()
        release.helm("rollback", RELEASE, "--wait", "--timeout=10m")
        release.rolled_out()
    assert len(before) == len(upgraded) == len(release.ready()) == 2
    assert not upgraded & before
    assert not upgraded & release.ready()


def test_deleted_pod_loses_no_request_and_is_replaced(release: Release):
    deleted = min(release.ready())
    with release.load():
        release.kubectl("delete", "pod", deleted)  # returns when the pod is gone
        release.rolled_out()
    assert len(release.ready() - {deleted}) == 2


def test_change_of_the_number_of_pods_loses_no_request(release: Release):
    with release.load():
        for number in (3, 1, 2):
            release.kubectl("scale", f"deployment/{DEPLOYMENT}", f"--replicas={number}")
            release.rolled_out()
            assert len(release.ready()) == number


def test_budget_lets_only_one_pod_be_evicted(release: Release):
    first, second = sorted(release.ready())
    wait_for(lambda: evict(release, first) == "")  # the budget may not yet know that both pods are ready
    assert "Cannot evict pod as it would violate the pod's disruption budget" in evict(release, second)
    release.rolled_out()
    assert second in release.ready()


def evict(release: Release, pod: str) -> str:
    """Ask for the eviction of a pod, as `kubectl drain` does, and return why it is refused."""
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": release.namespace},
    }
    path = f"/api/v1/namespaces/{release.namespace}/pods/{pod}/eviction"
    return release.kubectl("create", "--raw", path, "--filename=-", given=json.dumps(eviction), check=False).stderr


# --- archives --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fetching(release: Release, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Values with which pods fetch a signed archive from a server in the namespace."""
    folder = tmp_path_factory.mktemp("signed")
    public = make_keys(folder / "signing.key")
    build_archive("mnist", folder, SIGNING_KEY=str(folder / "signing.key"))
    content = (folder / "mnist.mar").read_bytes()
    release.run_pod("archives", "python3", "-m", "http.server", "--directory=/tmp", "8000")
    release.kubectl("expose", "pod", "archives", "--port=80", "--target-port=8000")
    release.kubectl("exec", "--stdin", "archives", "--", "sh", "-c", "cat >/tmp/mnist.mar", given=content)
    model = {"workers": 1, "url": "http://archives/mnist.mar", "sha256": hashlib.sha256(content).hexdigest()}
    return {
        "groups": {"main": None, "digits": {"replicas": 2, "models": {"mnist": model}}},
        "archives": {"source": "url"},
        "trustedKey": {"pem": public.read_text()},
        "networkPolicy": {"egress": [{"ports": [{"port": 8000, "protocol": "TCP"}]}]},  # policies see a pod's own port
    }


def test_signed_archive_is_fetched_and_served(release: Release, fetching: dict):
    release.upgrade(**fetching)
    release.rolled_out()
    pod = min(release.ready())
    assert "mnist.mar: downloaded, checked" in release.logs(pod, "fetch")
    with release.forwarded() as url:
        assert check_sample(Client(url, ""), MNIST) == MNIST.bundle.expect
    release.upgrade()
    release.rolled_out()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("sha256", f"has the SHA-256 [0-9a-f]+, and not {'f' * 64}"),
        ("key", "mnist.mar is refused: its signature was not made with the key of"),
    ],
    ids=["checksum", "signature"],
)
def test_wrong_archive_stops_an_upgrade_and_old_pods_answer(
    release: Release, fetching: dict, tmp_path: Path, wrong: str, reason: str
):
    before = release.ready()
    changed = json.loads(json.dumps(fetching))
    if wrong == "sha256":
        changed["groups"]["digits"]["models"]["mnist"]["sha256"] = "f" * 64
    else:
        changed["trustedKey"]["pem"] = make_keys(tmp_path / "other.key").read_text()
    with release.load():
        release.upgrade(wait=False, **changed)
        wait_for(lambda: release.pods().keys() - before)
        [new] = release.pods().keys() - before
        wait_for(lambda: re.search(reason, release.logs(new, "fetch")), 120)
        assert release.ready() == before
        release.helm("rollback", RELEASE, "--wait", "--timeout=10m")
        release.rolled_out()
    assert release.ready() == before
