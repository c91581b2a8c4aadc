"""Traces of a real TorchServe, received by a real OTLP server. One server, which the proxy's headers reach, too."""

import json
import secrets
import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from bundle import mar
from bundle.catalog import select
from bundle.server.grpc_client import predict
from bundle.signing import UNSEALED
from tests.receiver import Receiver, Span, receiving
from tests.server.place import Place, new_place, serving
from tests.support import wait_for

DIGIT = select(["mnist"])[0].sample_file.read_bytes()
TREE = {"request", "batch", "decode", "inference", "encode"}
# the ratio is 0: what is sampled, its client or the proxy asks for
SETTINGS = {
    "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
    "OTEL_TRACES_SAMPLER_ARG": "0.0",
    "OTEL_BSP_SCHEDULE_DELAY": "200",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "6",
    "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=digits",
    "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
}
TOLD = "Traces cannot be sent to"
BUG = b"""

def _held(self, samples, predict=MNISTHandler.predict):
    import os, pathlib, time
    hold = pathlib.Path(os.environ["TS_MODEL_STORE"], "HOLD")
    while hold.exists():
        hold.with_name("HOLDING").touch()
        time.sleep(0.01)
    return predict(self, samples)

def _bug(self, inputs, decode=MNISTHandler.decode):
    if bytes(inputs.data)[:3] == b"bug":
        raise KeyError("quotes the input")
    return decode(self, inputs)

MNISTHandler.predict, MNISTHandler.decode = _held, _bug
"""


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def traced(archives: Path, tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Place]:
    """A traced server of MNIST, without a proxy, and of `held`, which has a bug, with one worker."""
    folder = tmp_path_factory.mktemp("traced")
    place = new_place(folder / "run", shutil.copytree(archives, folder / "store"))
    place.environment.update(SETTINGS, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    archive = place.store / "mnist.mar"
    handler = mar.manifest(archive)["handler"]
    config = mar.config(archive) | {"minWorkers": 1, "maxWorkers": 1}
    config["handler"] = {**(config.get("handler") or {}), "cache_entries": 10}
    name = mar.manifest(archive)["configFile"]
    changed = {handler: mar.read(archive, handler) + BUG, name: json.dumps(config).encode()}
    mar.rewrite(archive, place.store / "held.mar", changed | UNSEALED)
    with serving(place, "mnist"):
        place.client.register("held.mar", "held")
        yield place


def begun(sampled: bool = True) -> tuple[str, str, dict[str, str]]:
    """Begin a trace, as a client does: its id, the id of the client's span, and the header."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return trace, span, {"traceparent": f"00-{trace}-{span}-{'01' if sampled else '00'}"}


def post(place: Place, content: bytes, headers: dict[str, str], path: str = "predictions/mnist") -> requests.Response:
    return requests.post(f"{place.client.inference}/{path}", data=content, headers=headers, timeout=30)


def one(spans: dict[str, list[Span]], name: str) -> Span:
    [span] = spans[name]
    return span


def log(place: Place, after: int = 0) -> str:
    return (place.logs / "model_log.log").read_text()[after:]


def test_trace_of_a_lone_request_is_complete(traced: Place, receiver: Receiver):
    trace, client, headers = begun()
    before = time.time_ns()
    answer = post(traced, DIGIT, {**headers, "tracestate": "vendor=1"})
    spans = receiver.of(trace, 5)
    request, batch = one(spans, "request"), one(spans, "batch")
    assert spans.keys() == TREE
    assert (request.parent, batch.parent) == (client, request.id)
    assert request.server
    assert {one(spans, name).parent for name in ("decode", "inference", "encode")} == {batch.id}
    assert (request.links, batch.links) == ({batch.id}, {request.id})
    assert answer.headers["traceresponse"] == f"00-{trace}-{request.id}-01"
    assert request.attributes == {
        "bundle.model": "mnist",
        "bundle.version": "1.0",
        "bundle.verb": "predict",
        "bundle.protocol": "torchserve",
        "bundle.samples": 1,
        "http.response.status_code": 200,
        "http.response.header.x-request-id": [answer.headers["x-request-id"]],
    }
    assert batch.attributes.pop("bundle.precision")
    assert batch.attributes == {
        "bundle.model": "mnist",
        "bundle.version": "1.0",
        "bundle.batch.requests": 1,
        "bundle.batch.samples": 1,
        "bundle.device": "cpu",
    }
    stages = [one(spans, name) for name in ("decode", "inference", "encode")]
    times = [before, batch.start, *(time for each in stages for time in (each.start, each.end)), batch.end]
    assert times == sorted(times)
    assert not any(span.failed for each in spans.values() for span in each)
    assert request.resource["service.name"] == "torchserve"
    assert request.resource["deployment.environment.name"] == "test"
    assert receiver.headers["x-tenant"] == "digits"


def test_requests_of_a_batch_are_linked(traced: Place, receiver: Receiver):
    """While one batch is computed, four requests gather; one of them is not sampled."""
    hold, holding = traced.store / "HOLD", traced.store / "HOLDING"
    hold.touch()
    with ThreadPoolExecutor(8) as threads:
        try:
            first = threads.submit(post, traced, DIGIT + b"first", begun()[2], "predictions/held")
            wait_for(holding.exists)
            sent = [begun(sampled=index > 0) for index in range(4)]
            answers = [
                threads.submit(post, traced, DIGIT + bytes([index]), headers, "predictions/held")
                for index, (_, _, headers) in enumerate(sent)
            ]
            wait_for(lambda: traced.client.describe("held")["jobQueueStatus"]["pendingRequests"] == 4)
        finally:
            hold.unlink()
    assert {each.result().status_code for each in (first, *answers)} == {200}
    traces = {trace for trace, _, _ in sent}
    wait_for(lambda: sum(span.trace in traces for span in receiver.spans) >= 3 + 4)
    spans = [span for span in receiver.spans if span.trace in traces]
    [batch] = [span for span in spans if span.name == "batch"]
    requests_of_batch = {span.id: span for span in spans if span.name == "request"}
    assert batch.attributes["bundle.batch.requests"] == 4
    assert batch.links == requests_of_batch.keys()
    assert {frozenset(span.links) for span in requests_of_batch.values()} == {frozenset([batch.id])}
    assert requests_of_batch[batch.parent].trace == batch.trace
    assert sent[0][0] not in {span.trace for span in spans}


def test_bug_is_an_error_of_its_request_and_the_log_names_the_trace(traced: Place, receiver: Receiver):
    trace, _, headers = begun()
    assert post(traced, b"bug", headers, "predictions/held").status_code == 500
    request = one(receiver.of(trace, 3), "request")
    assert request.failed
    assert (request.attributes["http.response.status_code"], request.attributes["error.type"]) == (500, "InternalError")
    [(name, event)] = request.events
    assert (name, event["exception.type"]) == ("exception", "InternalError")
    assert "quotes the input" not in str(request)
    wait_for(lambda: f"a bug failed one request of held (trace {trace})" in log(traced))
    unsampled = post(traced, b"bug", begun(sampled=False)[2], "predictions/held").headers["traceresponse"].split("-")[1]
    wait_for(lambda: f"(trace {unsampled})" in log(traced))


def test_rejected_request_has_its_error_type(traced: Place, receiver: Receiver):
    trace, _, headers = begun()
    assert post(traced, b"no picture", headers).status_code == 400
    spans = receiver.of(trace, 3)
    request = one(spans, "request")
    assert spans.keys() == {"request", "batch", "decode"}
    assert not request.failed
    assert request.attributes["http.response.status_code"] == 400
    assert request.attributes["error.type"] == request.events[0][1]["exception.type"] == "UndecodableImage"


def test_cached_answer_and_explanation_have_their_spans(traced: Place, receiver: Receiver):
    post(traced, DIGIT + b"cached", {}, "predictions/held")
    trace, _, headers = begun()
    assert post(traced, DIGIT + b"cached", headers, "predictions/held").status_code == 200
    spans = receiver.of(trace, 3)
    assert spans.keys() == {"request", "batch", "decode"}
    assert one(spans, "request").attributes["bundle.cached"] is True
    trace, _, headers = begun()
    assert post(traced, DIGIT, headers, "explanations/mnist").status_code == 200
    spans = receiver.of(trace, 4)
    assert spans.keys() == {"request", "batch", "decode", "explain"}
    assert one(spans, "explain").parent == one(spans, "request").id
    assert one(spans, "request").attributes["bundle.verb"] == "explain"


@pytest.mark.parametrize(
    "headers",
    [{}, {"traceparent": "00-" + "0" * 32 + "-" + "1" * 16 + "-01"}, {"traceparent": "01"}, begun(sampled=False)[2]],
    ids=["none", "zero", "invalid", "unsampled"],
)
def test_what_is_not_sampled_exports_nothing(traced: Place, receiver: Receiver, headers: dict[str, str]):
    """Without a valid trace of the client, the ratio decides, which is 0."""
    assert "traceresponse" not in post(traced, DIGIT, headers).headers
    answered = post(traced, b"no picture", headers).headers["traceresponse"].split("-")  # the log may name it
    marker, _, marked = begun()
    post(traced, DIGIT, marked)
    receiver.of(marker, 5)
    assert answered[3] == "00"
    assert answered[1] not in {span.trace for span in receiver.spans}
    kept = headers.get("traceparent", "").endswith("-00")  # the only valid one
    assert (answered[1] in str(headers)) == kept


def test_headers_of_the_proxy_from_a_client_are_ignored(traced: Place, receiver: Receiver):
    trace, client, headers = begun()
    post(traced, DIGIT, {**headers, "bundle-span": client})
    request = one(receiver.of(trace, 5), "request")
    assert request.id != client
    assert request.parent == client


def test_grpc_is_served_and_begins_a_trace_of_its_own(traced: Place, receiver: Receiver):
    """No header of the client reaches a worker through gRPC, so the ratio decides, which is 0."""
    known = len(receiver.spans)
    content = predict(f"127.0.0.1:{traced.ports['grpc_inference_port']}", "mnist", {"data": DIGIT})
    assert b'"top_3_classes": [3' in content
    trace, _, headers = begun()
    post(traced, DIGIT, headers)
    receiver.of(trace, 5)
    assert len(receiver.spans) == known + 5


@pytest.mark.parametrize(("fault", "model"), [("hangs", "mnist"), ("is gone", "held")])
def test_fault_of_the_collector_harms_nothing(traced: Place, receiver: Receiver, fault: str, model: str):
    """Each worker reports it once, and not more than once in a minute, so each case has its own."""
    path, known = f"predictions/{model}", len(log(traced))

    def told() -> list[str]:
        return [line for line in log(traced, known).splitlines() if TOLD in line and f"-{model}_1.0-stdout" in line]

    if fault == "hangs":
        receiver.answers.clear()
    else:
        receiver.stop()
    try:
        seconds = []
        for _ in range(30):
            start = time.monotonic()
            assert post(traced, DIGIT, begun()[2], path).status_code == 200
            seconds.append(time.monotonic() - start)
        # an attempt takes 6 s if the collector hangs, and more than 0.8 s if it is gone
        assert max(seconds) < 5
        assert statistics.median(seconds) < 0.5
        wait_for(told)
        post(traced, DIGIT, begun()[2], path)
        time.sleep(7)  # another attempt fails meanwhile
        workers = [line.split("-stdout")[0].split()[-1] for line in told()]
        assert len(workers) == len(set(workers))
    finally:
        if fault == "hangs":
            receiver.answers.set()
        else:
            receiver.start()
    trace, _, headers = begun()
    post(traced, DIGIT, headers, path)
    receiver.of(trace, 3)
    wait_for(lambda: "Traces are sent to" in log(traced, known))


def test_worker_of_a_server_without_an_endpoint_does_not_load_opentelemetry(traced: Place, served: Place):
    def loaded(place: Place) -> set[bool]:
        workers = [each for each in place.processes() if any("model_service_worker" in part for part in each.cmdline())]
        maps = [Path(f"/proc/{each.pid}/maps").read_text() for each in workers]
        assert maps
        return {"grpc/_cython" in text for text in maps}

    assert loaded(traced) == {True}
    assert loaded(served) == {False}
    assert "traceresponse" not in post(served, DIGIT, begun()[2]).headers


def test_invalid_setting_is_refused_before_the_start(place: Place):
    failed = place.bundle("serve", "mnist", OTEL_EXPORTER_OTLP_ENDPOINT="collector:4317")
    assert failed.returncode == 1
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is 'collector:4317', and must be like http://collector:4317" in failed.stderr
