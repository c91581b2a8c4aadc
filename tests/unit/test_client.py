"""The client, against a real HTTP server that answers as TorchServe does, faults included."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import requests
from pytest_httpserver import HTTPServer
from werkzeug import Response

from bundle.catalog import ModelFolder, select
from bundle.errors import BundleError
from bundle.server.client import Client, WorkerCount, check_sample, curl_lines
from bundle.server.keys import Keys

REJECTED = {"code": 400, "type": "BadRequestException", "message": "the reason"}
[MNIST] = select(["mnist"])


@pytest.fixture
def client(httpserver: HTTPServer) -> Client:
    url = httpserver.url_for("").rstrip("/")
    return Client(url, url)


def asked(httpserver: HTTPServer) -> list[str]:
    """Return the requests so far, as method, path and query."""
    return [
        f"{request.method} {request.path}" + (f"?{request.query_string.decode()}" if request.query_string else "")
        for request, _ in httpserver.log
    ]


def described(statuses: list[str], minimum: int, version: str = "1.0") -> dict:
    workers = [{"id": str(9000 + i), "status": status} for i, status in enumerate(statuses)]
    return {"modelName": "mnist", "modelVersion": version, "minWorkers": minimum, "workers": workers}


# --- what is registered ------------------------------------------------------------------------------------------


def test_models_are_listed_in_one_page(httpserver: HTTPServer, client: Client):
    """TorchServe lists 100 by default."""
    names = [f"model{number}" for number in range(150)]
    body = {"models": [{"modelName": name, "modelUrl": f"{name}.mar"} for name in names]}
    httpserver.expect_request("/models", query_string={"limit": "1000"}).respond_with_json(body)
    assert client.models() == names


def test_versions_of_unknown_model_are_none(httpserver: HTTPServer, client: Client):
    httpserver.expect_request("/models/mnist/all").respond_with_json({"code": 404}, status=404)
    httpserver.expect_request("/models/mnist").respond_with_json({"code": 404}, status=404)
    assert client.versions("mnist") == []
    assert client.describe("mnist") is None
    assert client.workers("mnist") == WorkerCount(0, 1)


def test_describe_without_version_is_the_default_one(httpserver: HTTPServer, client: Client):
    httpserver.expect_request("/models/mnist").respond_with_json([described([], 1)])
    httpserver.expect_request("/models/mnist/2.0").respond_with_json([described([], 1, "2.0")])
    assert client.describe("mnist")["modelVersion"] == "1.0"
    assert client.describe("mnist", "2.0")["modelVersion"] == "2.0"


def test_failing_management_api_is_not_taken_for_an_unknown_model(httpserver: HTTPServer, client: Client):
    httpserver.expect_request("/models/mnist").respond_with_json({"code": 500}, status=500)
    with pytest.raises(requests.HTTPError):
        client.describe("mnist")


@pytest.mark.parametrize(
    ("statuses", "minimum", "count"),
    [
        (["READY", "READY"], 2, WorkerCount(2, 2)),
        (["READY", "UNLOADING"], 2, WorkerCount(1, 2)),
        ([], 0, WorkerCount(0, 1)),  # registered, and not scaled yet
    ],
)
def test_ready_workers_are_counted(httpserver: HTTPServer, client: Client, statuses, minimum, count):
    httpserver.expect_request("/models/mnist/1.0").respond_with_json([described(statuses, minimum)])
    assert client.workers("mnist", "1.0") == count


# --- management --------------------------------------------------------------------------------------------------


def test_register_leaves_workers_to_the_archive_by_default(httpserver: HTTPServer, client: Client):
    httpserver.expect_request("/models", method="POST").respond_with_json({"status": "registered"})
    client.register("new.mar", "mnist")
    client.register("new.mar", "mnist", workers=0)
    first, second = (request.args.to_dict() for request, _ in httpserver.log)
    assert first == {"url": "new.mar", "model_name": "mnist"}
    assert second == {"url": "new.mar", "model_name": "mnist", "initial_workers": "0"}


def test_default_and_removal_name_the_version(httpserver: HTTPServer, client: Client):
    httpserver.expect_request("/models/mnist/2.0/set-default", method="PUT").respond_with_json({})
    httpserver.expect_request("/models/mnist/1.0", method="DELETE").respond_with_json({})
    client.set_default("mnist", "2.0")
    client.unregister("mnist", "1.0")
    assert asked(httpserver) == ["PUT /models/mnist/2.0/set-default", "DELETE /models/mnist/1.0"]


def test_rejection_shows_torchserves_reason(httpserver: HTTPServer, client: Client):
    httpserver.expect_request("/models", method="POST").respond_with_json(REJECTED, status=400)
    with pytest.raises(BundleError, match="refused POST /models with 400") as caught:
        client.register("new.mar", "mnist")
    assert caught.value.details == "the reason"


@pytest.mark.parametrize("body", ["plain text", '["a list"]', '{"code": 502}'])
def test_rejection_without_a_message_shows_the_whole_body(httpserver: HTTPServer, client: Client, body: str):
    httpserver.expect_request("/models", method="POST").respond_with_data(body, status=502)
    with pytest.raises(BundleError) as caught:
        client.register("new.mar", "mnist")
    assert caught.value.details == body


def test_scale_asks_once_when_rejected(httpserver: HTTPServer, client: Client):
    httpserver.expect_request("/models/mnist/1.0", method="PUT").respond_with_json(REJECTED, status=400)
    with pytest.raises(BundleError):
        client.scale("mnist", "1.0", 2, 3)
    assert len(httpserver.log) == 1


# --- predictions -------------------------------------------------------------------------------------------------


def test_predict_sends_the_raw_body_to_the_version(httpserver: HTTPServer, client: Client):
    httpserver.expect_request("/predictions/mnist", data=b"digit").respond_with_data("default")
    httpserver.expect_request("/predictions/mnist/2.0", data=b"digit").respond_with_data("2.0")
    assert client.predict("mnist", b"digit").text == "default"
    assert client.predict("mnist", b"digit", "2.0").text == "2.0"


def test_requests_ignore_a_proxy(httpserver: HTTPServer, client: Client, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    httpserver.expect_request("/predictions/mnist").respond_with_data("answer")
    httpserver.expect_request("/models").respond_with_json({"models": []})
    assert client.predict("mnist", b"digit").text == "answer"
    assert client.models() == []


def test_expected_answer_to_the_sample_is_returned(httpserver: HTTPServer, client: Client):
    sample = MNIST.sample_file.read_bytes()
    answer = {"top_3_classes": [3, 5, 8], "top_3_probabilities": [0.9, 0.05, 0.01]}
    httpserver.expect_request("/predictions/mnist", data=sample).respond_with_json(answer)
    assert check_sample(client, MNIST) == "3"


def test_wrong_answer_to_the_sample_is_shown(httpserver: HTTPServer, client: Client):
    answer = {"top_3_classes": [5, 3, 8], "top_3_probabilities": [0.9, 0.05, 0.01]}
    httpserver.expect_request("/predictions/mnist/2.0").respond_with_json(answer)
    with pytest.raises(BundleError, match=r"answered its own sample .* with '5'.* expects '3'") as caught:
        check_sample(client, MNIST, "2.0")
    assert json.loads(caught.value.details) == answer


def test_failed_answer_to_the_sample_is_shown(httpserver: HTTPServer, client: Client):
    httpserver.expect_request("/predictions/mnist").respond_with_data("out of memory", status=507)
    with pytest.raises(BundleError, match="answered its own sample .* with 507") as caught:
        check_sample(client, MNIST)
    assert caught.value.details == "out of memory"


def test_answer_to_the_sample_that_is_not_json_is_no_ranking(httpserver: HTTPServer, client: Client, tmp_path: Path):
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "sample.txt").write_text("21")
    config = "bundle: {handler: ./handler.py, sample: sample.txt}\n"
    (folder / "model-config.yaml").write_text(config)
    httpserver.expect_request("/predictions/plain").respond_with_data("forty-two")
    assert check_sample(client, ModelFolder(folder)) is None
    (folder / "model-config.yaml").write_text(config.replace("sample.txt}", "sample.txt, expect: cat}"))
    with pytest.raises(BundleError, match="an answer that is not a ranking") as caught:
        check_sample(client, ModelFolder(folder))
    assert caught.value.details == "forty-two"


def test_model_without_a_sample_is_not_asked(httpserver: HTTPServer, client: Client, tmp_path: Path):
    (tmp_path / "model-config.yaml").write_text("bundle: {handler: mnist}")
    assert check_sample(client, ModelFolder(tmp_path)) is None
    assert asked(httpserver) == []


# --- keys --------------------------------------------------------------------------------------------------------


class TokenApi:
    """TorchServe's token API: writes keys to a file, and renews one when asked with the API's own key.

    Attributes:
        renewals: the APIs whose keys were renewed, in order.
    """

    def __init__(self, httpserver: HTTPServer, file: Path):
        self.file, self.renewals = file, []
        self.keys = {"API": {"key": "api-key"}}
        httpserver.expect_request("/token").respond_with_handler(self.renew)

    def issue(self, api: str, key: str, seconds: float) -> None:
        expires = datetime.now(UTC) + timedelta(seconds=seconds)
        self.keys[api] = {"key": key, "expiration time": expires.isoformat()}
        self.file.write_text(json.dumps(self.keys))

    def renew(self, request) -> Response:
        if request.headers.get("Authorization") != "Bearer api-key":
            return Response(status=400)
        self.renewals.append(request.args["type"])
        time.sleep(0.1)  # meanwhile other clients find the key expired, too
        self.issue(request.args["type"], f"renewed-{len(self.renewals)}", 60)
        return Response("{}")


@pytest.fixture
def tokens(httpserver: HTTPServer, tmp_path: Path) -> TokenApi:
    api = TokenApi(httpserver, tmp_path / "key_file.json")
    api.issue("inference", "inference-key", 60)
    api.issue("management", "management-key", 60)
    return api


@pytest.fixture
def keys(httpserver: HTTPServer, tokens: TokenApi) -> Keys:
    return Keys(tokens.file, httpserver.url_for("").rstrip("/"))


def test_valid_key_is_sent_and_not_renewed(httpserver: HTTPServer, tokens: TokenApi, keys: Keys):
    guarded = Client(keys.management, keys.management, keys)
    httpserver.expect_request("/models").respond_with_json({"models": []})
    httpserver.expect_request("/predictions/mnist").respond_with_data("answer")
    guarded.models()
    guarded.predict("mnist", b"digit")
    sent = [request.headers["Authorization"] for request, _ in httpserver.log]
    assert sent == ["Bearer management-key", "Bearer inference-key"]
    assert tokens.renewals == []


def test_expired_key_is_renewed_once(tokens: TokenApi, keys: Keys):
    tokens.issue("management", "management-key", -5)
    assert keys.header("management") == keys.header("management") == "Bearer renewed-1"
    assert keys.header("inference") == "Bearer inference-key"
    assert tokens.renewals == ["management"]


def test_key_that_is_about_to_expire_is_renewed_after_its_end(tokens: TokenApi, keys: Keys):
    """A renewal invalidates the old key at once, so that a request of another client in flight would fail."""
    start = time.monotonic()
    tokens.issue("inference", "inference-key", 0.4)
    assert keys.header("inference") == "Bearer renewed-1"
    assert time.monotonic() - start > 0.3


def test_key_file_that_is_being_written_is_awaited(tokens: TokenApi, keys: Keys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bundle.server.keys.READ_SECONDS", 30)
    complete = tokens.file.read_text()
    tokens.file.write_text(complete[:20])
    writer = threading.Timer(0.3, tokens.file.write_text, [complete])
    writer.start()
    assert keys.header("inference") == "Bearer inference-key"
    writer.join()


def test_expired_key_is_renewed_by_one_of_several_clients(tokens: TokenApi, keys: Keys):
    tokens.issue("inference", "inference-key", -5)
    with ThreadPoolExecutor(8) as clients:
        headers = set(clients.map(lambda _: keys.header("inference"), range(8)))
    assert headers == {"Bearer renewed-1"}
    assert tokens.renewals == ["inference"]


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"inference": {"key": "k"}}'])
def test_missing_or_invalid_key_file_is_named(keys: Keys, monkeypatch: pytest.MonkeyPatch, text: str | None):
    monkeypatch.setattr("bundle.server.keys.READ_SECONDS", 0.1)
    keys.file.unlink()
    if text is not None:
        keys.file.write_text(text)
    with pytest.raises(BundleError, match="key of the inference API is missing in .*key_file.json"):
        keys.header("inference")


def test_rejected_renewal_is_named(tokens: TokenApi, keys: Keys):
    tokens.keys["API"]["key"] = "of an earlier server"
    tokens.issue("inference", "inference-key", -5)
    with pytest.raises(BundleError, match="did not renew the key of its inference API: it answered 400"):
        keys.header("inference")


def test_curl_lines_keep_keys_off_the_command_line(tokens: TokenApi, keys: Keys):
    open_lines = curl_lines(Client("http://a", "http://b"), [MNIST])
    assert open_lines == ["curl -T models/mnist/sample.png http://a/predictions/mnist", "curl http://b/models"]
    guarded = curl_lines(Client("http://a", "http://b", keys), [MNIST])
    assert all("-key" not in line and str(keys.file) in line for line in guarded)
