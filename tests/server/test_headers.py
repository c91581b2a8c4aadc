"""Headers that clients cannot forge: TorchServe's `describe` and `explain`, and a proxy's X-Request-Start."""

import re
import time
from http.client import HTTPConnection
from urllib.parse import urlsplit

import grpc
import pytest
import requests

from bundle.catalog import select
from bundle.server import grpc_client
from tests.server.place import Place, serving
from tests.support import repeated, wait_for

[MNIST] = select(["mnist"])
DIGIT = MNIST.sample_file.read_bytes()
FORM = "application/x-www-form-urlencoded"
DESCRIBE_MODEL = "/org.pytorch.serve.grpc.management.ManagementAPIsService/DescribeModel"
PREDICTIONS = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
NAMES = ("describe", "Describe", "DESCRIBE", "explain", "Explain", "EXPLAIN")
VALUES = ("True", "true", "False", "1", "")
ROUTES = (
    "/predictions/mnist",
    "/predictions/mnist/1.0",
    "/v1/models/mnist:predict",
    "/models/mnist/invoke",
    "/mnist/predict",
    "/mnist/1.0/predict",
)


def send(url: str, path: str, headers: list[tuple[str, str]], body: bytes, method: str = "POST") -> tuple[int, str]:
    """Send repeated headers, and send names in the given case. Client libraries do neither."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in [*headers, ("Content-Length", str(len(body)))]:
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def assert_undescribed(answer: str) -> None:
    assert not re.search("settings|precision|labels|Handler", answer), answer


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", NAMES)
def test_prediction_with_a_describe_or_explain_header_stays_a_prediction(served, name, value):
    status, answer = send(served.client.inference, "/predictions/mnist", [(name, value)], DIGIT)
    assert (status, '"top_3_classes": [3' in answer) == (200, True), answer


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_with_a_describe_header_predicts(served, path):
    sent = [("Describe", "True"), ("describe", "True"), ("Explain", "True")]
    status, answer = send(served.client.inference, path, sent, DIGIT)
    assert (status, '"top_3_classes": [3' in answer) == (200, True), answer


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "content_type",
    [
        [("Content-Type", FORM)],
        [("content-type", "multipart/form-data; boundary=b")],
        # of several, the frontend reads the first; the worker gets the last of each spelling
        [("Content-Type", FORM), ("Content-Type", "")],
        [("Content-Type", FORM), ("Content-Type", "application/json")],
        [("CONTENT-TYPE", FORM), ("Content-Type", "text/plain")],
    ],
    ids=str,
)
def test_form_without_fields_is_rejected_and_not_described(served, path, content_type):
    """Its row is empty, like the row of TorchServe's own request for a description."""
    body = b"--b--\r\n" if "multipart" in content_type[0][1] else b""
    status, answer = send(served.client.inference, path, [("describe", "True"), *content_type], body)
    assert status == 400, answer
    assert_undescribed(answer)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_empty_body_is_rejected_and_not_described(served, method):
    status, answer = send(served.client.inference, "/predictions/mnist", [("describe", "True")], b"", method)
    assert (status, "EmptyInput" in answer) == (400, True), answer
    assert_undescribed(answer)


@pytest.mark.parametrize("headers", [{}, {"Explain": "False"}, {"explain": "False", "Describe": "True"}], ids=str)
def test_explanation_with_any_client_headers_stays_an_explanation(served, headers):
    url = f"{served.client.inference}/explanations/mnist"
    answer = repeated(lambda: requests.post(url, data=DIGIT, headers=headers, timeout=60))
    assert (answer.status_code, answer.json()["target"]["label"]) == (200, "3"), answer.text


@pytest.mark.parametrize("path", ["/models/mnist", "/models/mnist/1.0"])
@pytest.mark.parametrize("headers", [{}, {"describe": "False", "Describe": "False", "explain": "True"}], ids=str)
def test_description_with_any_client_headers_stays_a_description(served, path, headers):
    url = f"{served.client.management}{path}"
    [described] = requests.get(url, params={"customized": "true"}, headers=headers, timeout=30).json()
    assert described["customizedMetadata"].keys() >= {"handler", "settings", "labels"}


def call_grpc(port: int, method: str, message: bytes, metadata: tuple[tuple[str, str], ...] = ()) -> bytes:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        return channel.unary_unary(method)(message, timeout=30, metadata=metadata)


def test_description_over_grpc_has_the_settings(served):
    message = b"\x0a\x05mnist\x18\x01"  # model_name, customized
    assert b'"settings"' in call_grpc(served.ports["grpc_management_port"], DESCRIBE_MODEL, message)


def test_grpc_prediction_with_describe_in_metadata_or_inputs_stays_a_prediction(served):
    """Metadata never reaches a worker. The name of an input does, as the name of a field."""
    messages, _ = grpc_client._stubs()
    port, method = served.ports["grpc_inference_port"], PREDICTIONS
    request = messages.PredictionsRequest(model_name="mnist", input={"data": DIGIT}).SerializeToString()
    assert b'"top_3_classes": [3' in call_grpc(port, method, request, (("describe", "True"), ("explain", "True")))
    for inputs in ({"describe": b"True"}, {"data": DIGIT, "describe": b"True"}, {}):
        request = messages.PredictionsRequest(model_name="mnist", input=inputs).SerializeToString()
        assert_undescribed(call_grpc(port, method, request, (("describe", "True"),)).decode("latin-1"))


# --- X-Request-Start -------------------------------------------------------------------------------------------------


def queue_seconds(place: Place) -> float | None:
    """Return the total measured waiting time of all batches, or None if none was measured."""
    text = requests.get(f"{place.url('metrics_address')}/metrics", timeout=30).text
    found = re.search(r'^bundle_queue_seconds_sum{.*ModelName="mnist".*} (\S+)', text, re.MULTILINE)
    return float(found[1]) if found else None


def predict_late(place: Place) -> int:
    sent = {"X-Request-Start": f"t={time.time() - 600:.3f}"}
    return requests.post(
        f"{place.client.inference}/predictions/mnist", data=DIGIT, headers=sent, timeout=30
    ).status_code


def test_request_start_without_a_proxy_is_ignored(served):
    assert predict_late(served) == 200
    wait_for(
        lambda: "bundle_requests_total" in requests.get(f"{served.url('metrics_address')}/metrics", timeout=30).text
    )
    assert queue_seconds(served) is None


def test_request_start_behind_a_proxy_is_measured(place):
    place.environment["BUNDLE_BEHIND_PROXY"] = "true"
    with serving(place, "mnist"):
        predict_late(place)
        wait_for(lambda: (queue_seconds(place) or 0) > 599)


def test_serve_with_an_invalid_proxy_setting_leaves_the_server_running(served):
    failed = served.bundle("serve", BUNDLE_BEHIND_PROXY="nginx")
    assert failed.returncode == 1
    assert "BUNDLE_BEHIND_PROXY is 'nginx', and must be true or false." in failed.stderr
    assert "mnist" in served.client.models()
