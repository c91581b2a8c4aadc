"""What a client is told of a failure, what the logs keep of a request, and what handlers see of the environment."""

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
from bundle.paths import MODEL_STORE, ROOT
from bundle.server.process import GUARDS
from bundle.signing import UNSEALED, make_keys, seal
from tests.server.conftest import Place, new_place, serving

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
# Paths, stack traces, and names of Java packages. TorchServe's `type` is a bare class name, ModelNotFoundException say.
TELLTALE = re.compile(
    r"Traceback|File \"|\.py\b|\.java\b|\bat [\w.$]+\(|\b(org|io|java|com)\.\w+\.|/(home|opt|tmp|usr|root|var)/"
)


@pytest.fixture(scope="module")
def leaky(served: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server full of secrets, with a text model and one whose handler has a bug."""
    folder = tmp_path_factory.mktemp("leaky")
    place = new_place(folder / "run")
    store = folder / "store"
    store.mkdir()
    for file in MODEL_STORE.glob("text.*"):
        shutil.copy(file, store)
    with_bug(MODEL_STORE / "text.mar", store / "buggy.mar")
    private = folder / VALUE / "signing.key"
    public = shutil.copy(make_keys(private), folder / "trusted.pub")
    seal(store / "buggy.mar", private)
    keys = {"SIGNING_KEY": str(private), "TRUSTED_KEY": str(public)}
    place.environment.update(dict.fromkeys(SECRETS, VALUE), **KEPT, TS_MODEL_STORE=str(store))
    place.environment.update(keys)
    with serving(place, "text"):
        place.client.register("buggy.mar", "buggy")
        yield place


def with_bug(archive: Path, target: Path) -> None:
    """Write a copy whose handler raises, not sealed."""
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
        "explanation": ("POST", "/explanations/text", {"data": MARKER}),
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


def assert_tells_nothing(place: Place, said: str) -> None:
    assert MARKER not in said
    assert VALUE not in said
    assert not TELLTALE.search(said), said
    for path in (str(ROOT), place.environment["RUN_DIR"], place.environment["TS_MODEL_STORE"], "site-packages"):
        assert path not in said


@pytest.mark.parametrize(("method", "path", "sent"), CASES.values(), ids=CASES)
def test_answers_to_failing_predictions(leaky: Place, method, path, sent):
    answer = requests.request(method, leaky.client.inference + path, **sent, timeout=30)
    assert 400 <= answer.status_code < 600
    assert answer.json()["code"] == answer.status_code
    assert_tells_nothing(leaky, answer.text + json.dumps(dict(answer.headers)))


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
def test_answers_to_failing_management(leaky: Place, method, path):
    answer = requests.request(method, leaky.client.management + path, data=MARKER, timeout=30)
    assert 400 <= answer.status_code < 500
    assert_tells_nothing(leaky, answer.text)


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
def test_answers_to_malformed_http(leaky: Place, address, sent):
    said = b""
    with socket.create_connection(("127.0.0.1", leaky.ports[address]), timeout=10) as connection:
        connection.sendall(sent.encode())
        connection.settimeout(2)
        try:
            while received := connection.recv(65536):
                said += received
        except OSError:  # it may close as it likes, or wait for more
            pass
    assert said.startswith(b"HTTP/1.1 ")
    assert_tells_nothing(leaky, said.decode("latin-1"))


@pytest.mark.parametrize(
    ("path", "sent", "echoed"),
    [
        ("/predictions/text", {"json": {"a-field": 1}}, 'Unknown field "a-field"'),
        ("/predictions/a-model", {"data": ""}, "Model not found: a-model"),
        (
            "/predictions/text",
            {"data": "%zz=1", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
            "Bad string: '%zz'",
        ),
    ],
    ids=["the name of a field", "the name of a model", "an escape that is none"],
)
def test_what_is_told_back_to_who_sent_it(leaky: Place, path, sent, echoed):
    """Names, never values: SECURITY.md says so."""
    assert echoed in requests.post(leaky.client.inference + path, **sent, timeout=30).json()["message"]


def test_a_part_without_a_name_is_answered_with_an_exception_of_java(leaky: Place):
    """TorchServe's own doing, on the bare port. It has names of Java classes, no path and nothing of the input."""
    sent = {"data": f"--x\r\n\r\n{MARKER}", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
    answer = requests.post(f"{leaky.client.inference}/predictions/text", **sent, timeout=30)
    assert answer.status_code == 500
    assert answer.json()["message"].startswith("java.lang.NullPointerException: ")
    assert MARKER not in answer.text


def test_logs_keep_no_inputs_and_no_secrets(leaky: Place):
    for method, path, sent in CASES.values():
        requests.request(method, leaky.client.inference + path, **sent, timeout=30)
    assert leaky.client.predict("text", MARKER.encode()).status_code == 200
    logs = Path(leaky.environment["RUN_DIR"]) / "logs"
    texts = {file.name: file.read_text(errors="replace") for file in logs.rglob("*") if file.is_file()}
    assert {"ts_log.log", "model_log.log", "access_log.log"} <= texts.keys()
    assert "KeyError" in texts["model_log.log"]  # the bug's traceback is there, and nowhere else
    assert '"POST /predictions/nonesuch HTTP/1.1" 404' in texts["access_log.log"]
    for name, text in texts.items():
        assert MARKER not in text, name
        assert VALUE not in text, name


def test_secrets_are_kept_from_workers_and_from_torchserve(leaky: Place):
    java = psutil.Process(json.loads((Path(leaky.environment["RUN_DIR"]) / "server.json").read_text())["pid"])
    workers = [psutil.Process(worker["pid"]) for worker in leaky.client.describe("text")["workers"]]
    for process in (java, *workers):
        environment = process.environ()
        own = {"TS_KEYSTORE_PASS"} if process is java else set()  # a setting of TorchServe's
        assert {name for name, value in environment.items() if VALUE in value} == own
        kept = {**KEPT, "TRUSTED_KEY": leaky.environment["TRUSTED_KEY"]}
        assert kept.items() <= environment.items()
        assert environment["PATH"].removeprefix(f"{GUARDS}:") == leaky.environment["PATH"]
