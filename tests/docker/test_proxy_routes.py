"""Requests that the proxy passes on, requests that it rejects, and /ping."""

import json
import re

import pytest
import requests

from bundle.server.ports import free_ports
from tests.docker.proxy import PREDICT, check_error, http

pytestmark = pytest.mark.usefixtures("fresh")


# -- routes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("path", ["/predictions/mnist", "/predictions/mnist/1.0", "/explanations/my-model_2/v1.2"])
def test_predictions_and_explanations_reach_torchserve(proxy, upstream, method, path):
    upstream.headers = {"Content-Type": "application/json"}
    answer = http.request(method, proxy.url + path, data=b"\x00input", timeout=10)
    assert (answer.status_code, answer.content) == (200, b'{"ok": true}')
    assert answer.headers["Content-Type"] == "application/json"
    [received] = upstream.received
    assert (received.method, received.path, received.body) == (method, path, b"\x00input")


@pytest.mark.parametrize(
    "target",
    [
        "/predictions/mnist#fragment",
        "//predictions//mnist",
        "/models/../predictions/mnist",
        "/models/%2e%2e/predictions/mnist",
        "/models%2f..%2fpredictions%2fmnist",
        "/%70redictions/mnist",
        "/predictions/./mnist",
        "http://elsewhere:8081/predictions/mnist",
    ],
)
def test_path_is_passed_on_in_the_form_that_was_checked(proxy, upstream, target):
    status, _, _ = proxy.raw(f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nConnection: close\r\n\r\na")
    assert status == 200
    assert [received.path for received in upstream.received] == ["/predictions/mnist"]


@pytest.mark.parametrize("path", ["/predictions/mnist", "/predictions/mnist/1.0", "/explanations/mnist"])
@pytest.mark.parametrize("query", ["?top_k=1", "?a=%2f..%2f%0d%0aX:%201&b=?#", "?a=1&a=2", "?%00", ""])
def test_query_is_passed_on_as_it_was_sent(proxy, upstream, path, query):
    target = path + query
    status, _, _ = proxy.raw(f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nConnection: close\r\n\r\na")
    assert status == 200
    assert [received.path for received in upstream.received] == [target.removesuffix("#")]


TRICKS = [
    "/models",
    "//models",
    "/models/mnist",
    "/predictions",
    "/predictions/",
    "/predictions/mnist/",
    "/predictions/mnist/1.0/2.0",
    "/predictions/../models",
    "/predictions/%2e%2e/models",
    "/predictions/..%2fmodels",
    "/predictions%2f..%2fmodels",
    "/predictions/mnist%2f..%2f..%2fmodels",
    "/predictions/..;/models",
    "/predictions/..%5cmodels",
    "/predictions/mnist%3fa",
    "/predictions/mnist%20HTTP/1.1",
    "/predictions/mnist%0d%0aX:1",
    "/predictions/mnist%0a",
    "/predictions/mnist%0A",
    "/predictions/mnist%0d",
    "/predictions/mnist%0d%0a",
    "/predictions/mnist%0a%0a",
    "/predictions/mnist/1.0%0a",
    "/explanations/mnist%0a",
    "/predictions/mnist%0a?x=1",
    "/predictions/mnist/%0a",
    "/predictions/mnist/../mnist%0a",
    "/predictions/%0a",
    "/predictions%0a/mnist",
    "/%0apredictions/mnist",
    "/ping%0a",
    "/openapi.json%0a",
    "/openapi.json/",
    "/openapixjson",
    "/dropped%0a",
    "/error%0a",
    "/predictions/a%252f..%252fmodels",
    "/predictions\\..\\models",
    "/PREDICTIONS/mnist",
    "/v1/models/mnist:predict/",
    "/v1/models/mnist:predict%0a",
    "/v1/models/mnist:regress",
    "/v1/models/a%2fb:predict",
    "/v1/models/..:predict/../../mnist",
    "/v1/models/:predict",
    "/v1/models/",
    "/v1/models%0a",
    "/v1/models/mnist/versions/1.0",
    "/v2/",
    "/v2%0a",
    "/v2/health",
    "/v2/health/well",
    "/v2/health/ready%0a",
    "/v2/models",
    "/v2/models/mnist/config",
    "/v2/models/mnist/versions",
    "/v2/models/mnist/infer/",
    "/v2/models/mnist/infer%0a",
    "/v2/models/mnist/1.0/infer",
    "/v2/models/a%2fb/infer",
    "/v2/models/mnist/versions/1.0/../../../../models",
    "/v2/repository/index",
    "/invocations/",
    "/invocations%0a",
    "/models/mnist/invoke",
    "/wf-predict/mnist",
    "/workflows",
    "/api-description",
    "/metrics",
    "/ready",
    "/ping/",
    "/page",
    "/page/",
    "/error",
    "/dropped",
    "/nginx_status",
    "/../models",
    "/predictions/mnist%00",
    "models",
    "*",
    "http://torchserve:8081/models",
    "http://127.0.0.1:8081/models?url=x",
    "http://predictions/models",
]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
@pytest.mark.parametrize("target", TRICKS)
def test_other_path_is_rejected_and_not_passed_on(proxy, upstream, supervisor, method, target):
    status, headers, body = proxy.raw(f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    assert status in (400, 404)
    assert json.loads(body).get("code", status) == status
    assert headers["Content-Type"] == "application/json"
    assert upstream.received == supervisor.received == []


def test_paths_that_the_error_names_are_passed_on(proxy):
    message = http.get(f"{proxy.url}/elsewhere", timeout=10).json()["message"]
    named = re.findall(r"(?<= )/\S*(?=,)", message)
    assert {PREDICT.replace("mnist", "NAME"), "/", "/v2", "/openapi.json"} < set(named)
    for path in named:
        url = proxy.url + path.replace("NAME", "mnist").replace("VERSION", "1.0")
        assert {http.request(method, url, timeout=10).status_code for method in ("GET", "POST")} == {200, 405}, path


@pytest.mark.parametrize(
    "request_",
    [
        "CONNECT torchserve:8081 HTTP/1.1\r\nHost: torchserve:8081\r\n\r\n",
        "CONNECT /predictions/mnist HTTP/1.1\r\nHost: x\r\n\r\n",
        "TRACE /predictions/mnist HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /predictions/mnist HTTP/3.0\r\nHost: x\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "nonsense\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        f"GET /{'a' * 9000} HTTP/1.1\r\nHost: x\r\n\r\n",
        f"GET /ping HTTP/1.1\r\nHost: x\r\nX-Long: {'a' * 9000}\r\n\r\n",
        # two lengths of one body, as in request smuggling
        "POST /predictions/mnist HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        "POST /predictions/mnist HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "POST /predictions/mnist HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: unheard-of\r\n\r\n",
    ],
)
def test_invalid_request_is_rejected_and_not_passed_on(proxy, upstream, supervisor, request_):
    status, headers, body = proxy.raw(request_)
    assert status in (400, 405, 414, 501, 505)
    assert json.loads(body)["code"] == status
    assert headers.get_all("X-Request-Id")
    assert upstream.received == supervisor.received == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "PATCH", "OPTIONS", "PROPFIND"])
def test_prediction_with_another_method_is_405(proxy, upstream, method):
    answer = http.request(method, proxy.url + PREDICT, timeout=10)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST, PUT")
    if method != "HEAD":
        check_error(answer, 405, "MethodNotAllowed")
    assert upstream.received == []


# -- routes of KServe and SageMaker ------------------------------------------------------------------------------------


def check_open_inference_error(answer: requests.Response, status: int, words: str) -> None:
    assert (answer.status_code, list(answer.json())) == (status, ["error"]), answer.text
    assert answer.headers["Content-Type"] == "application/json"
    assert words in answer.json()["error"]


@pytest.mark.parametrize(
    ("target", "passed"),
    [
        ("/v1/models/mnist:predict", "/v1/models/mnist:predict"),
        ("/v1/models/my-model_2.1:explain?top_k=1", "/v1/models/my-model_2.1:explain?top_k=1"),
        ("/v1/models/mnist%3Apredict", "/v1/models/mnist:predict"),
        ("/v2/models/mnist/infer", "/v2/models/mnist/infer"),
        (
            "/v2/models/my-model_2.1/versions/1.0-a/explain?top_k=1",
            "/v2/models/my-model_2.1/versions/1.0-a/explain?top_k=1",
        ),
        ("/models/../v2//models/mnist/%69nfer", "/v2/models/mnist/infer"),
        ("/invocations?top_k=1&model_name=mnist&a=b", "/invocations?top_k=1&model_name=mnist&a=b"),
        ("/invocations", "/invocations?model_name=&"),
        ("/invocations?my_model_name=x", "/invocations?model_name=&my_model_name=x"),
    ],
)
def test_inference_of_kserve_and_sagemaker_is_passed_on(proxy, upstream, target, passed):
    upstream.headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "2"}
    status, answered, body = proxy.raw(
        f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\nInference-Header-Content-Length: 18\r\n"
        'Connection: close\r\n\r\n{"instances": [1]}'
    )
    assert (status, body, answered["Inference-Header-Content-Length"]) == (200, b'{"ok": true}', "2")
    [received] = upstream.received
    assert (received.path, received.body) == (passed, b'{"instances": [1]}')
    assert received.headers["Inference-Header-Content-Length"] == "18"
    upstream.received.clear()
    refused = http.get(proxy.url + target, timeout=10)
    assert (refused.status_code, refused.headers["Allow"]) == (405, "POST, PUT")
    assert upstream.received == []


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "path",
    [
        *("/", "/v1/models", "/v1/models/mnist", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/mnist"),
        *("/v2/models/mnist/ready", "/v2/models/mnist/versions/1.0", "/v2/models/mnist/versions/1.0/ready"),
    ],
)
def test_question_about_models_is_passed_on_without_its_body(proxy, upstream, path, method):
    upstream.status = 503
    answer = http.request(method, f"{proxy.url}{path}?x=1", data=b"a body", timeout=10)
    assert (answer.status_code, answer.content) == (503, b'{"ok": true}' if method == "GET" else b"")
    assert [(each.method, each.path, each.body) for each in upstream.received] == [("GET", path, b"")]
    refused = proxy.post(path)
    assert (refused.status_code, refused.headers["Allow"]) == (405, "GET, HEAD")
    assert len(upstream.received) == 1


def test_limits_of_predictions_hold_for_the_routes_of_others(proxy, upstream):
    large = bytes(2**20 + 1)
    for path in ("/v1/models/mnist:predict", "/v1/models/mnist:explain", "/invocations?model_name=mnist"):
        check_error(proxy.post(path, data=large), 413, "BodyTooLarge")
    for path in ("/v2/models/mnist/infer", "/v2/models/mnist/versions/1.0/explain"):
        check_open_inference_error(proxy.post(path, data=large), 413, "1m")
    assert upstream.received == []


def test_errors_of_the_proxy_have_the_form_of_the_open_inference_protocol(proxy, upstream):
    check_open_inference_error(http.get(f"{proxy.url}/v2/models/mnist/infer", timeout=10), 405, ": POST, PUT.")
    check_open_inference_error(http.get(f"{proxy.url}/v2/repository/index?a=b", timeout=10), 404, "Valid paths")
    upstream.status = 500
    check_open_inference_error(proxy.post("/v2/models/mnist/infer"), 500, "in the log of the worker")
    upstream.status, upstream.body = 429, b'{"error": "of TorchServe"}'
    answer = proxy.post("/v2/models/mnist/infer")
    assert (answer.status_code, answer.headers["Retry-After"], answer.content) == (429, "1", upstream.body)


def test_invocation_without_a_name_goes_to_the_model_of_the_setting(start, upstream):
    proxy = start(INVOCATIONS_MODEL="text")
    for query in ("", "?top_k=1", "?model_name=mnist"):
        assert proxy.post(f"/invocations{query}").status_code == 200
    assert [received.path for received in upstream.received] == [
        *("/invocations?model_name=text&", "/invocations?model_name=text&top_k=1", "/invocations?model_name=mnist"),
    ]


# -- readiness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_ping_is_answered_by_the_supervisor(proxy, upstream, supervisor, method):
    supervisor.body = b'{"status": "Ready"}'
    answer = http.request(method, f"{proxy.url}/ping?x=1", data=b"a body", timeout=10)
    assert (answer.status_code, answer.text) == (200, '{"status": "Ready"}' if method == "GET" else "")
    assert [(received.method, received.body) for received in supervisor.received] == [("GET", b"")]
    assert supervisor.received[0].path.startswith("/ready")
    assert upstream.received == []

    supervisor.status, supervisor.body, supervisor.headers = 503, b'{"status": "Draining"}', {"Retry-After": "77"}
    answer = http.request(method, f"{proxy.url}/ping", timeout=10)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "77")
    assert answer.text == ('{"status": "Draining"}' if method == "GET" else "")


def test_ping_with_post_is_405(proxy, supervisor):
    answer = proxy.post("/ping")
    check_error(answer, 405, "MethodNotAllowed")
    assert answer.headers["Allow"] == "GET, HEAD"
    assert supervisor.received == []


def test_ping_without_a_supervisor_is_503(start):
    proxy = start(SUPERVISOR_PORT=str(free_ports(1)[0]))
    check_error(http.get(f"{proxy.url}/ping", timeout=10), 503, "ServerUnavailable", "5")


# -- the schema -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/openapi.json", "/openapi.json?x=1", "/models/%2e%2e/openapi.json"])
def test_schema_is_that_of_torchserve(proxy, upstream, target):
    status, _, body = proxy.raw(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (status, body) == (200, b'{"ok": true}')
    [received] = upstream.received
    assert received.path.partition("?")[0] == "/openapi.json"
    assert http.head(f"{proxy.url}/openapi.json", timeout=10).status_code == 200


@pytest.mark.parametrize("path", ["/", "/openapi.json", "/ping", "/v2", "/v2/models/mnist", "/v1/models"])
def test_question_with_another_method_or_a_long_body_is_rejected(proxy, upstream, path: str):
    posted = proxy.post(path)
    long = http.get(f"{proxy.url}{path}", data=bytes(2000), timeout=10)
    assert posted.headers["Allow"] == "GET, HEAD"
    for answer, status, error in ((posted, 405, "MethodNotAllowed"), (long, 413, "BodyTooLarge")):
        if path.startswith("/v2"):
            assert (answer.status_code, answer.json().keys()) == (status, {"error"})
        else:
            check_error(answer, status, error)
    assert upstream.received == []


def test_bug_of_torchserve_in_the_schema_is_hidden_and_other_errors_pass(proxy, upstream):
    upstream.headers = {"Content-Type": "application/json"}
    upstream.status, upstream.body = 500, b'{"code": 500, "type": "java.lang.Exception", "message": "inside"}'
    check_error(http.get(f"{proxy.url}/openapi.json", timeout=10), 500, "PredictionFailed")
    upstream.status, upstream.body = (
        400,
        b'{"code": 400, "type": "InvalidKeyException", "message": "The token of the request is missing."}',
    )
    check_error(http.get(f"{proxy.url}/openapi.json", timeout=10), 400, "InvalidKeyException")
