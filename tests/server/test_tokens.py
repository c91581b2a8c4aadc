"""Token authorization: which key opens which API, and that the bundle's commands use the keys."""

import json
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
import requests

from bundle.catalog import select
from bundle.paths import ROOT
from bundle.server import grpc_client
from tests.server.place import Place, new_place, serving
from tests.server.supervised import Supervised
from tests.support import reversioned, wait_for

[MNIST] = select(["mnist"])
DIGIT = MNIST.sample_file.read_bytes()
ON = {"TS_DISABLE_TOKEN_AUTHORIZATION": "false"}
MINUTES = "TS_TOKEN_EXPIRATION_TIME_MIN"  # overrides token_expiration_min; the name is irregular
SHORT = 0.1  # minutes
LIST_MODELS = "/org.pytorch.serve.grpc.management.ManagementAPIsService/ListModels"
WRONG = {
    "missing": None,
    "wrong": "Bearer AAAAAAAA",
    "empty": "Bearer ",
    "another scheme": "Basic {key}",
    "without a scheme": "{key}",
    "two keys": "Bearer {key} {key}",
    "of the other API": "Bearer {other}",
    "of the token API": "Bearer {API}",
}
OTHER = {"inference": "management", "management": "inference"}


@pytest.fixture(scope="module")
def guarded(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server of MNIST that requires keys, which do not expire during the tests."""
    folder = tmp_path_factory.mktemp("guarded")
    place = new_place(folder / "run", shutil.copytree(archives, folder / "store"))
    place.environment.update(ON)
    with serving(place, "mnist"):
        yield place


def key_of(place: Place, api: str) -> str:
    found: dict[str, dict] = {}

    def read() -> bool:
        with suppress(ValueError):  # TorchServe may be writing it
            found.update(json.loads(place.keys.read_text()))
        return api in found

    wait_for(read)
    return found[api]["key"]


def headers(place: Place, api: str, pattern: str | None) -> dict[str, str]:
    if pattern is None:
        return {}
    values = {"key": key_of(place, api), "other": key_of(place, OTHER[api]), "API": key_of(place, "API")}
    return {"Authorization": pattern.format(**values)}


def grpc_code(place: Place, port: str, method: str, metadata: dict[str, str]) -> grpc.StatusCode:
    """Return the status of a call with an empty message."""
    with grpc.insecure_channel(f"127.0.0.1:{place.ports[port]}") as channel:
        call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
        try:
            call(b"", metadata=[(name.lower(), value) for name, value in metadata.items()], timeout=30)
        except grpc.RpcError as exc:
            return exc.code()
        return grpc.StatusCode.OK


def assert_refused(answer: requests.Response) -> None:
    assert (answer.status_code, answer.json()["type"]) == (400, "InvalidKeyException"), answer.text


def test_each_api_accepts_its_key(guarded: Place):
    assert guarded.client.predict("mnist", DIGIT).json()["top_3_classes"][0] == 3
    assert guarded.client.models() == ["mnist"]
    guarded.client.scale("mnist", "1.0", 2, 3)
    grpc_address = f"127.0.0.1:{guarded.ports['grpc_inference_port']}"
    authorization = guarded.client.keys.header("inference")
    assert b'"top_3_classes": [3' in grpc_client.predict(grpc_address, "mnist", DIGIT, authorization=authorization)
    management = headers(guarded, "management", "Bearer {key}")
    assert grpc_code(guarded, "grpc_management_port", LIST_MODELS, management) == grpc.StatusCode.OK


@pytest.mark.parametrize("pattern", WRONG.values(), ids=WRONG)
def test_predictions_without_their_key_are_refused(guarded: Place, pattern):
    sent = headers(guarded, "inference", pattern)
    for method, path in (
        ("POST", "/predictions/mnist"),
        ("POST", "/v1/models/mnist:predict"),
        ("GET", "/ping"),
        ("GET", "/openapi.json"),
    ):
        assert_refused(requests.request(method, guarded.client.inference + path, data=DIGIT, headers=sent, timeout=30))
    address = f"127.0.0.1:{guarded.ports['grpc_inference_port']}"
    with pytest.raises(grpc_client.GrpcError) as refused:
        grpc_client.predict(address, "mnist", DIGIT, authorization=sent.get("Authorization"))
    assert refused.value.code == grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("pattern", WRONG.values(), ids=WRONG)
def test_management_without_its_key_is_refused(guarded: Place, pattern):
    sent = headers(guarded, "management", pattern)
    for method, path in (
        ("GET", "/models"),
        ("GET", "/models/mnist"),
        ("POST", "/models?url=mnist.mar&model_name=intruder"),
        ("PUT", "/models/mnist?min_worker=0"),
        ("PUT", "/models/mnist/1.0/set-default"),
        ("DELETE", "/models/mnist"),
        ("POST", "/workflows?url=any.war"),
    ):
        assert_refused(requests.request(method, guarded.client.management + path, headers=sent, timeout=30))
    assert grpc_code(guarded, "grpc_management_port", LIST_MODELS, sent) == grpc.StatusCode.PERMISSION_DENIED
    assert guarded.client.models() == ["mnist"]


@pytest.mark.parametrize("api", ["management", "inference"])
def test_renewal_requires_the_api_key_and_the_old_key_is_refused(guarded: Place, api):
    url, params = f"{guarded.client.management}/token", {"type": api}
    old = json.loads(guarded.keys.read_text())
    for pattern in (None, "Bearer AAAAAAAA", "Bearer {key}", "Bearer {other}"):
        sent = headers(guarded, api, pattern)
        assert_refused(requests.get(url, params=params, headers=sent, timeout=30))
    assert json.loads(guarded.keys.read_text()) == old
    assert requests.get(url, params=params, headers=headers(guarded, api, "Bearer {API}"), timeout=30).ok
    new = json.loads(guarded.keys.read_text())
    assert {name for name in old if old[name] != new[name]} == {api}
    dead = {"Authorization": f"Bearer {old[api]['key']}"}
    if api == "inference":
        assert_refused(requests.post(f"{guarded.client.inference}/predictions/mnist", headers=dead, timeout=30))
    else:
        assert_refused(requests.get(f"{guarded.client.management}/models", headers=dead, timeout=30))
    assert guarded.client.models() == ["mnist"]
    assert guarded.client.predict("mnist", DIGIT).status_code == 200


def test_metrics_api_descriptions_and_root_are_open_without_a_key(guarded: Place):
    """SECURITY.md says so."""
    assert "ts_inference_requests_total" in requests.get(guarded.url("metrics_address") + "/metrics", timeout=30).text
    for address in (guarded.client.inference, guarded.client.management):
        assert "openapi" in requests.get(f"{address}/api-description", timeout=30).json()
        assert "openapi" in requests.options(f"{address}/", timeout=30).json()
    assert requests.get(f"{guarded.client.inference}/", timeout=30).json() == {"status": "alive"}


def test_commands_use_the_keys_and_never_show_them(guarded: Place, tmp_path: Path):
    new = reversioned(guarded.store / "mnist.mar", "1.1", tmp_path / "new.mar")
    shown = ""
    for arguments in (
        ["serve", "mnist"],
        ["status"],
        ["predict", "mnist"],
        ["predict", "mnist", "--grpc"],
        ["openapi", "--running"],
        ["rollout", "mnist", "--archive", str(new)],
        ["status"],
    ):
        ended = guarded.bundle(*arguments)
        assert ended.returncode == 0, (arguments, ended.stdout, ended.stderr)
        shown += ended.stdout + ended.stderr
    assert "nothing has changed" in shown
    assert [version["modelVersion"] for version in guarded.client.versions("mnist")] == ["1.1"]
    written = "".join(file.read_text(errors="replace") for file in guarded.logs.rglob("*") if file.is_file())
    written += (guarded.run_dir / "server.json").read_text()
    for api in ("inference", "management", "API"):
        assert key_of(guarded, api) not in shown + written


def test_curl_commands_that_serve_prints_work(guarded: Place):
    served = guarded.bundle("serve", "mnist")
    commands = [line.strip() for line in served.stdout.splitlines() if "curl" in line]
    assert len(commands) == 2
    for command, expected in zip(commands, ('"top_3_classes": [3', '"modelName": "mnist"'), strict=True):
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert expected in done.stdout, done.stderr


def test_key_file_is_readable_by_its_owner_only_and_ignored_by_git(guarded: Place):
    assert stat.S_IMODE(guarded.keys.stat().st_mode) == 0o600
    assert not (ROOT / "key_file.json").exists()
    for file in ("key_file.json", "build/run/key_file.json"):  # TorchServe writes the first if it is started by hand
        assert subprocess.run(["git", "check-ignore", "--quiet", file], cwd=ROOT).returncode == 0


def test_expired_keys_are_refused_and_the_commands_renew_them(place: Place):
    place.environment.update(ON, **{MINUTES: str(SHORT)})
    started = place.bundle("serve", "mnist")
    assert started.returncode == 0, started.stdout + started.stderr
    for api in ("inference", "management"):
        place.client.keys.header(api)
    old = json.loads(place.keys.read_text())
    expires = max(datetime.fromisoformat(old[api]["expiration time"]) for api in ("inference", "management"))
    time.sleep(max(0, (expires - datetime.now(UTC)).total_seconds()) + 0.1)
    dead = {api: {"Authorization": f"Bearer {old[api]['key']}"} for api in ("inference", "management")}
    assert_refused(requests.post(f"{place.client.inference}/predictions/mnist", headers=dead["inference"], timeout=30))
    assert_refused(requests.get(f"{place.client.management}/models", headers=dead["management"], timeout=30))
    assert (
        grpc_code(place, "grpc_management_port", LIST_MODELS, dead["management"]) == grpc.StatusCode.PERMISSION_DENIED
    )
    for arguments in (["status"], ["predict", "mnist"], ["predict", "mnist", "--grpc"]):
        ended = place.bundle(*arguments)
        assert ended.returncode == 0, (arguments, ended.stdout, ended.stderr)
        time.sleep(60 * SHORT)
    assert json.loads(place.keys.read_text())["API"] == old["API"]
    assert stat.S_IMODE(place.keys.stat().st_mode) == 0o600
    assert place.bundle("stop").returncode == 0
    assert not place.keys.exists()


def test_status_with_a_missing_key_file_names_it(place: Place):
    place.environment.update(ON)
    assert place.bundle("serve", "mnist").returncode == 0
    place.keys.unlink()
    shown = place.bundle("status")
    assert shown.returncode == 1
    assert shown.stderr.strip() == f"error: The key of the management API is missing in {place.keys}."
    assert place.bundle("stop").returncode == 0


def test_supervisor_renews_expired_keys(place: Place, tmp_path: Path):
    place.environment.update(ON, **{MINUTES: str(SHORT)})
    run = Supervised(place, tmp_path)
    try:
        run.start("--patience", "10")  # s; without a valid key, the supervisor would then end the server
        first = key_of(place, "management")
        wait_for(lambda: key_of(place, "management") != first)
        assert run.ready() == 200
        assert run.place.bundle("predict", "mnist").returncode == 0
        assert run.end() == 0
    finally:
        run.kill()
    output = run.output.read_text()
    assert "bundle: drained" in output
    assert "does not answer" not in output
