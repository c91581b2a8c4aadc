"""Which requests are traced, with which ids and spans. test_tracing_settings.py has the settings."""

import logging
import subprocess
import sys
import threading
import time

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans, SpanFlags
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from bundle.build.dryrun import DryRun
from bundle.paths import ROOT
from bundle.server.ports import free_ports
from handlers.core import tracing
from handlers.core.slots import Sample, Slot
from tests.receiver import Receiver, span
from tests.unit.numbered import row

TRACE, SPAN, OWN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "b7ad6b7169203331"
NEW = "0af7651916cd43dd8448eb211c80319c"
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
ROW = row(1)


@pytest.fixture
def exported(worker: DryRun, monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """The spans of the worker, which is behind a proxy."""
    from handlers.core.spans import Spans

    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    monkeypatch.setattr(worker.handler, "behind_proxy", True)
    spans, exporter = Spans(ENDPOINT["OTEL_EXPORTER_OTLP_ENDPOINT"]), InMemorySpanExporter()
    spans.processor.shutdown()
    spans.processor = SimpleSpanProcessor(exporter)
    monkeypatch.setattr(worker.handler, "tracing", tracing.Tracing(worker.handler, spans))
    return exporter


def headers(parent: str = SPAN, flags: str = "01", **others: str) -> dict[str, str]:
    return {"traceparent": f"00-{TRACE}-{parent}-{flags}", "bundle-span": OWN, "X-Request-Id": "id", **others}


def messages(exported: InMemorySpanExporter) -> list[Message]:
    """Return the spans as they are sent."""
    sent = ScopeSpans()
    for each in exported.get_finished_spans():
        each.write(sent.spans)
    return list(sent.spans)


def test_request_behind_the_proxy_has_its_span_and_the_time_in_the_queue(worker: DryRun, exported):
    arrival = time.time() - 5
    worker.predict([ROW], [headers(**{"X-Request-Start": f"t={arrival:.3f}"})])
    spans = {message.name: span(message, {}) for message in messages(exported)}
    assert spans.keys() == {"request", "queue", "batch", "decode", "inference", "encode"}
    request, queue = spans["request"], spans["queue"]
    assert (request.id, request.parent, request.server) == (OWN, SPAN, True)
    assert request.start == queue.start == pytest.approx(arrival * 1e9, abs=1e6)
    assert (queue.trace, queue.parent) == (request.trace, request.id)
    assert queue.end == spans["batch"].start
    assert request.attributes["http.response.header.x-request-id"] == ["id"]


def test_span_tells_whether_its_parent_is_of_another_process(worker: DryRun, exported):
    worker.predict([ROW], [headers()])
    known, remote = SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK, SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
    assert {message.name for message in messages(exported) if message.flags & remote} == {"request"}
    assert all(message.flags & known for message in messages(exported))


def test_trace_that_the_proxy_began_begins_with_the_request(worker: DryRun, exported):
    worker.predict([ROW], [headers(parent=OWN)])
    [request] = [span(message, {}) for message in messages(exported) if message.name == "request"]
    assert (request.id, request.parent) == (OWN, "")


def test_batch_that_failed_as_a_whole_is_an_error(worker: DryRun, exported, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(worker.handler, "predict", lambda _: 1 / 0)
    [(status, _)] = worker.predict([ROW], [headers()])
    described = {message.name for message in messages(exported) if message.status.message}
    failed = {message.name: span(message, {}).failed for message in messages(exported)}
    assert (status, described) == (500, {"request"})
    assert failed == {"request": True, "batch": True, "decode": False, "inference": True}
    assert f"a bug failed a batch of numbers (trace {TRACE})" in caplog.text


def test_bug_in_the_tracing_fails_no_request(worker: DryRun, exported, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(worker.handler.tracing.spans, "end", lambda *_, **__: 1 / 0)
    assert worker.predict([ROW], [headers()])[0][0] == 200
    assert "a bug lost the trace of a batch of numbers" in caplog.text


def test_unsampled_requests_have_no_spans(worker: DryRun, exported):
    worker.predict([ROW, ROW], [headers(flags="00"), {}])
    assert exported.get_finished_spans() == ()


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        (f"00-{TRACE}-{SPAN}-01", (TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-02", (TRACE, SPAN, False)),
        (f"cc-{TRACE}-{SPAN}-01-later", (TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-01-later", None),
        (f"00-{TRACE}-{SPAN}-01\n", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        ("", None),
    ],
)
def test_traceparent(worker: DryRun, exported, sent: str, found: tuple[str, str, bool] | None):
    traced = worker.handler.tracing.trace(sent, {}, tracing.Traced(NEW, OWN, "", False))
    if found:
        assert (traced.trace, traced.parent, traced.sampled) == found
    else:
        assert traced == tracing.Traced(NEW, OWN, "", False)


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ("vendor=1", "vendor=1"),
        (state := f"vendor={'x' * 248},other={'y' * 250}", state),  # 512 characters
        (state + "y", ""),
        ("Not A Member", ""),
        (",".join(f"k{index}=secret" for index in range(33)), ""),
    ],
)
def test_tracestate(worker: DryRun, exported, caplog, state: str, kept: str):
    """A client's invalid one is not in the log."""
    with caplog.at_level(logging.INFO):
        worker.predict([ROW], [headers(tracestate=state)])
    assert {message.trace_state for message in messages(exported)} == {kept}
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


def test_tracestate_of_a_proxy_that_begins_the_trace_is_kept(worker: DryRun, exported):
    worker.predict([ROW], [headers(parent=OWN, tracestate="ot=th:8")])
    assert {message.trace_state for message in messages(exported)} == {"ot=th:8"}


@pytest.mark.parametrize("parent", [{}, {"traceparent": "invalid"}], ids=["missing", "invalid"])
def test_tracestate_without_a_trace_is_dropped(worker: DryRun, exported, monkeypatch, parent: dict[str, str]):
    monkeypatch.setattr(worker.handler.tracing, "bound", 2**64)
    worker.predict([ROW], [{"tracestate": "vendor=1", **parent}])
    assert {message.trace_state for message in messages(exported)} == {""}


@pytest.mark.parametrize("name", ["traceparent", "bundle-span", "X-Request-Id", "tracestate"])
def test_input_with_the_name_of_a_header_harms_no_request(worker: DryRun, exported, name: str):
    """TorchServe describes each input in the headers, under its name."""
    others = {sent: value for sent, value in headers().items() if sent != name}
    answers = worker.predict([ROW, {**ROW, name: b"x"}], [headers(), others])
    assert answers[0][0] == 200
    assert answers[1][0] < 500
    found = [span(message, {}) for message in messages(exported) if message.name == "request"]
    assert {request.attributes["http.response.header.x-request-id"][0] for request in found} <= {"id", ""}


def test_batch_that_took_too_much_memory_is_not_kept(worker: DryRun, exported, monkeypatch: pytest.MonkeyPatch):
    def fail(_: object) -> None:
        raise MemoryError

    before = dict(vars(worker.handler.tracing))
    monkeypatch.setattr(worker.handler, "decode", fail)
    assert worker.predict([ROW], [headers()])[0][0] == 507
    assert vars(worker.handler.tracing) == before


def test_attempt_that_is_repeated_is_no_loss(worker: DryRun, exported, monkeypatch: pytest.MonkeyPatch, caplog):
    """The collector starts after the first attempt."""
    from handlers.core.spans import Exporter

    worker.predict([ROW], [headers()])
    receiver = Receiver(port=free_ports(1)[0])
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    exporter = Exporter(receiver.url, Resource({}))
    late = threading.Timer(0.3, receiver.start)
    late.start()
    try:
        assert exporter.export(exported.get_finished_spans()) is SpanExportResult.SUCCESS
        assert receiver.spans
        assert not caplog.records
    finally:
        late.join()
        receiver.stop()
        exporter.shutdown()


def test_attempt_that_is_repeated_sends_the_same_spans(worker: DryRun, exported, monkeypatch: pytest.MonkeyPatch):
    """A backend knows by its id that it has a span already."""
    from handlers.core.spans import Exporter

    worker.predict([ROW], [headers(**{"X-Request-Start": f"t={time.time() - 1:.3f}"})])
    receiver = Receiver(refusals=1)
    receiver.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    exporter = Exporter(receiver.url, Resource({}))
    try:
        assert exporter.export(exported.get_finished_spans()) is SpanExportResult.SUCCESS
        assert receiver.refusals == 0
        assert len(receiver.spans) == 2 * len({each.id for each in receiver.spans}) == 12
    finally:
        receiver.stop()
        exporter.shutdown()


def test_spans_that_a_full_queue_drops_are_reported_once(monkeypatch: pytest.MonkeyPatch, caplog):
    """The SDK would log every one, and a worker has thousands in a second."""
    from handlers.core.spans import SDK_QUEUE, Ended, Identity, Spans

    receiver = Receiver()
    receiver.start()
    receiver.answers.clear()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    spans = Spans(receiver.url)
    try:
        for _ in range(20):
            spans.processor.on_end(Ended(b"", Identity(b"1" * 16, b"2" * 8, ""), b"", (1, 2)))
        assert not SDK_QUEUE.isEnabledFor(logging.WARNING)
        receiver.answers.set()
        assert spans.processor.force_flush()
        assert SDK_QUEUE.isEnabledFor(logging.WARNING)
        lost, sent = [record.getMessage() for record in caplog.records]
        assert lost.startswith(f"Traces cannot be sent to {receiver.url}, and are dropped: Queue full")
        assert sent == f"Traces are sent to {receiver.url} again."
    finally:
        spans.processor.shutdown()
        receiver.stop()


def test_name_of_a_field_that_is_no_text_harms_no_span(worker: DryRun, exported, caplog):
    answers = worker.predict([{"body": {"\ud800": 1}}, ROW], [headers(), headers()])
    assert [status for status, _ in answers] == [400, 200]
    refused, _ = [span(message, {}) for message in messages(exported) if message.name == "request"]
    [(_, event)] = refused.events
    assert "\\ud800" in event["exception.message"]
    assert "a bug" not in caplog.text


def test_bug_in_one_span_loses_no_other(monkeypatch: pytest.MonkeyPatch, caplog):
    from handlers.core.spans import Ended, Exporter, Identity

    receiver = Receiver()
    receiver.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    exporter = Exporter(receiver.url, Resource({}))
    identity = Identity(bytes.fromhex(TRACE), bytes.fromhex(SPAN), "")
    try:
        good, bad = (Ended(common, identity, b"", (1, 2)) for common in (b"", b"no message"))
        assert exporter.export([good, bad, good]) is SpanExportResult.SUCCESS
        assert [each.id for each in receiver.spans] == [SPAN, SPAN]
        assert [record.getMessage() for record in caplog.records] == ["a bug lost a span"]
    finally:
        exporter.shutdown()
        receiver.stop()


@pytest.mark.parametrize(
    ("attributes", "name"),
    [
        ("", "torchserve"),
        ("peer.service.name=x", "torchserve"),
        ("service.name=", "torchserve"),
        (" service.name = mine", "mine"),
    ],
)
def test_name_of_the_service(monkeypatch: pytest.MonkeyPatch, attributes: str, name: str):
    from handlers.core.spans import Spans

    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", attributes)
    spans = Spans(ENDPOINT["OTEL_EXPORTER_OTLP_ENDPOINT"])
    exporter = spans.processor.span_exporter
    spans.processor.shutdown()
    assert {each.key: each.value.string_value for each in exporter.resource.attributes}["service.name"] == name


def test_log_names_some_traces_of_a_large_batch(worker: DryRun, exported):
    slots = [Slot(trace=tracing.Traced(f"{index:032x}", SPAN, "", False)) for index in range(30)]
    slots[3].samples = [sample := Sample(None)]
    worker.handler.tracing.slots = slots
    assert worker.handler.tracing.named(slots).endswith(f"{7:032x} and 22 more)")
    assert worker.handler.tracing.named_of([sample]) == f" (trace {3:032x})"
    assert tracing.Off().named(slots) == tracing.Off().named_of([sample]) == ""


def test_neither_a_seed_nor_a_fork_repeats_ids():
    code = """
import os, random
from handlers.core.tracing import draw

drawn = []
for _ in range(2):
    random.seed(1)
    drawn.append(draw(8))
here, there = os.pipe()
if os.fork() == 0:
    os.write(there, draw(8))
    os._exit(0)
drawn += [draw(8), os.read(here, 8)]
assert len(set(drawn)) == 4, drawn
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
