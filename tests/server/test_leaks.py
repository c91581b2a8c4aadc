"""Error answers and logs hold no inputs, secrets or internals, and workers get no secrets."""

import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from bundle import mar
from bundle.paths import ROOT
from bundle.server.process import GUARDS
from bundle.signing import UNSEALED, make_keys, seal
from tests.server.place import Place, new_place, serving
from tests.support import wait_for

MARKER = "m4rker-of-somebodys-input"
VALUE = "v4lue-of-a-secret"
SECRETS = (
    "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "aws_secret_access_key", "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_CONNECTION_STRING", "DATABASE_URL", "DB_PASS", "DB_PASSWORD", "DOCKER_AUTH_CONFIG", "ENCRYPTION_KEY",
    "GITHUB_PAT", "GITHUB_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MYSQL_PWD",
    "OPENAI_API_KEY", "OPENAI_KEY", "PGPASSWORD", "PIP_EXTRA_INDEX_URL", "REDIS_URL", "SENTRY_DSN", "SESSION_COOKIE",
    "SIGNING_KEY", "SLACK_WEBHOOK_URL", "SSH_AUTH_SOCK", "SSH_PASSPHRASE", "TOKEN", "TS_KEYSTORE_PASS", "WANDB_API_KEY",
)  # fmt: skip
KEPT = {"TOKENIZERS_PARALLELISM": "false", "KEYBOARD": "de"}
JSON = {"Content-Type": "application/json"}
# Paths, stack traces, and names of Java packages. TorchServe's `type`, such as ModelNotFoundException, is allowed.
INTERNALS = re.compile(
    r"Traceback|File \"|\.py\b|\.java\b|\bat [\w.$]+\(|\b(org|io|java|com)\.\w+\.|/(home|opt|tmp|usr|root|var)/"
)


@pytest.fixture(scope="module")
def leaky(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server with secrets in its environment, the text model, and a model whose handler has a bug."""
    folder = tmp_path_factory.mktemp("leaky")
    store = shutil.copytree(archives, folder / "store")
    place = new_place(folder / "run", store)
    with_bug(store / "text.mar", store / "buggy.mar")
    private = folder / VALUE / "signing.key"
    public = shutil.copy(make_keys(private), folder / "trusted.pub")
    seal(store / "buggy.mar", private)
    keys = {"SIGNING_KEY": str(private), "TRUSTED_KEY": str(public)}
    place.environment.update(dict.fromkeys(SECRETS, VALUE), **KEPT)
    place.environment.update(keys)
    with serving(place, "text"):
        place.client.register("buggy.mar", "buggy")
        yield place


def with_bug(archive: Path, target: Path) -> None:
    """Write a copy whose handler raises an exception, without checksums."""
    handler = mar.manifest(archive)["handler"]
    bug = b"\n\ndef _broken(*_):\n    raise KeyError(__file__)\n\n\nTextHandler.decode = _broken\n"
    mar.rewrite(archive, target, {handler: mar.read(archive, handler) + bug} | UNSEALED)


def requests_that_fail() -> dict[str, tuple[str, str, dict]]:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    return {
        "wrong option": ("POST", "/predictions/text", {"json": {"data": MARKER, "top_k": MARKER}}),
        "wrong type": ("POST", "/predictions/text", {"json": {"data": {"text": MARKER}}}),
        "wrong instances": ("POST", "/predictions/text", {"json": {"instances": MARKER}}),
        "bad instance": ("POST", "/predictions/text", {"json": {"instances": [MARKER, 5]}}),
        "unknown field": ("POST", "/predictions/text", {"json": {"text": MARKER}}),
        "unknown form field": ("POST", "/predictions/text", {"files": {"text": MARKER}}),
        "invalid JSON": ("POST", "/predictions/text", {"data": f'{{"data": "{MARKER}', "headers": JSON}),
        "invalid UTF-8": ("POST", "/predictions/text", {"data": MARKER.encode() + b"\xff"}),
        "broken form": ("POST", "/predictions/text", {"data": f"%zz=1&data={MARKER}", "headers": form}),
        "too long": ("POST", "/predictions/text", {"data": MARKER * 1000}),
        "explanation": ("POST", "/explanations/text", {"json": {"data": MARKER, "method": MARKER}}),
        "bug": ("POST", "/predictions/buggy", {"data": MARKER}),
        "unknown model": ("POST", "/predictions/nonesuch", {"data": MARKER}),
        "unknown version": ("POST", "/predictions/text/9.9", {"data": MARKER}),
        "no path": ("POST", "/", {"data": MARKER}),
        "unknown path": ("PUT", "/nonesuch", {"data": MARKER}),
        "climbing path": ("POST", "/predictions/..%2f..%2f..%2fetc%2fpasswd", {"data": MARKER}),
        "invalid escape": ("POST", "/predictions/%2", {"data": MARKER}),
        "workflow": ("POST", "/wfpredict/nonesuch", {"data": MARKER}),
    }


CASES = requests_that_fail()


def assert_reveals_nothing(place: Place, answer: str) -> None:
    assert MARKER not in answer
    assert VALUE not in answer
    assert not INTERNALS.search(answer), answer
    for path in (str(ROOT), str(place.run_dir), str(place.store), "site-packages"):
        assert path not in answer


@pytest.mark.parametrize(("method", "path", "sent"), CASES.values(), ids=CASES)
def test_failing_prediction_reveals_nothing(leaky: Place, method, path, sent):
    answer = requests.request(method, leaky.client.inference + path, **sent, timeout=30)
    assert 400 <= answer.status_code < 600
    assert answer.json()["code"] == answer.status_code
    assert_reveals_nothing(leaky, answer.text + json.dumps(dict(answer.headers)))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/models"),
        ("POST", "/models?url=nonesuch.mar"),
        ("POST", "/models?url=../text.mar"),
        ("POST", "/models?url=http://127.0.0.1:1/a.mar"),
        ("POST", "/models?url=text.mar&runtime=cobol"),
        ("PUT", "/models/text?min_worker=9&max_worker=1"),
        ("PUT", "/models/text/9/set-default"),
        ("DELETE", "/models/nonesuch"),
        ("GET", "/models/text/9"),
        ("POST", "/workflows?url=nonesuch.war"),
        ("PATCH", "/models"),
    ],
)
def test_failing_management_request_reveals_nothing(leaky: Place, method, path):
    answer = requests.request(method, leaky.client.management + path, data=MARKER, timeout=30)
    assert 400 <= answer.status_code < 500
    assert_reveals_nothing(leaky, answer.text)


@pytest.mark.parametrize("address", ["inference_address", "management_address", "metrics_address"])
@pytest.mark.parametrize(
    "sent",
    [
        f"GARBAGE {MARKER}\r\n\r\n",
        f"POST /predictions/text HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{MARKER}\r\n\r\n",
        f"POST /predictions/text HTTP/1.1\r\n {MARKER}\r\n\r\n",
        f"GET / HTTP/1.1\r\nX-Long: {MARKER * 1000}\r\n\r\n",
        f"GET /{MARKER * 1000} HTTP/1.1\r\n\r\n",
        f"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n{MARKER}",
    ],
    ids=["garbage", "chunk", "header", "long header", "long path", "HTTP/2"],
)
def test_malformed_http_reveals_nothing(leaky: Place, address, sent):
    answer = b""
    with socket.create_connection(("127.0.0.1", leaky.ports[address]), timeout=60) as connection:
        connection.sendall(sent.encode())
        try:
            answer += connection.recv(65536)
            connection.settimeout(2)
            while received := connection.recv(65536):
                answer += received
        except OSError:  # the server closed the connection, or waits for more input
            pass
    assert answer.startswith(b"HTTP/1.1 ")
    assert_reveals_nothing(leaky, answer.decode("latin-1"))


@pytest.mark.parametrize(
    ("path", "sent", "echoed"),
    [
        ("/predictions/text", {"json": {"a-field": 1}}, 'Unknown field "a-field"'),
        ("/predictions/a-model", {"data": ""}, "Model not found: a-model"),
    ],
    ids=["name of a field", "name of a model"],
)
def test_error_message_repeats_names_to_their_sender(leaky: Place, path, sent, echoed):
    """Messages repeat names, but never values: SECURITY.md says so."""
    assert echoed in requests.post(leaky.client.inference + path, **sent, timeout=30).json()["message"]


def test_form_that_cannot_be_decoded_is_400_and_repeats_nothing(leaky: Place):
    for body, kind in (
        (f"--x\r\n\r\n{MARKER}", "multipart/form-data; boundary=x"),
        (f"%zz=1&data={MARKER}", "application/x-www-form-urlencoded"),
    ):
        sent = {"data": body, "headers": {"Content-Type": kind}}
        answer = requests.post(f"{leaky.client.inference}/predictions/text", **sent, timeout=30)
        assert answer.status_code == 400, answer.text
        assert_reveals_nothing(leaky, answer.text)


def test_logs_hold_no_inputs_and_no_secrets(leaky: Place):
    for method, path, sent in CASES.values():
        requests.request(method, leaky.client.inference + path, **sent, timeout=30)
    assert leaky.client.predict("text", MARKER.encode()).status_code == 200
    # TorchServe writes its logs in the background; the first one has the traceback of the bug
    wait_for(lambda: "KeyError" in (leaky.logs / "model_log.log").read_text())
    wait_for(lambda: '"POST /predictions/nonesuch HTTP/1.1" 404' in (leaky.logs / "access_log.log").read_text())
    texts = {file.name: file.read_text(errors="replace") for file in leaky.logs.rglob("*") if file.is_file()}
    assert {"ts_log.log", "model_log.log", "access_log.log"} <= texts.keys()
    for name, text in texts.items():
        assert MARKER not in text, name
        assert VALUE not in text, name


def test_secrets_are_not_in_the_environment_of_workers_or_torchserve(leaky: Place):
    java = psutil.Process(leaky.record()["pid"])
    workers = [psutil.Process(worker["pid"]) for worker in leaky.client.describe("text")["workers"]]
    for process in (java, *workers):
        environment = process.environ()
        settings = {"TS_KEYSTORE_PASS"} if process is java else set()  # TorchServe needs it
        assert {name for name, value in environment.items() if VALUE in value} == settings
        kept = {**KEPT, "TRUSTED_KEY": leaky.environment["TRUSTED_KEY"]}
        assert kept.items() <= environment.items()
        assert environment["PATH"].removeprefix(f"{GUARDS}:") == leaky.environment["PATH"]
