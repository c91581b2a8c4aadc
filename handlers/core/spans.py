"""Make the spans of a batch, and export them in the background. Imported only if traces are on.

All spans of a batch are ended at once, after the answers, from times that were taken: that costs less than spans that
are open meanwhile. They become messages of OTLP when they are sent, which takes 3 us for a span. OpenTelemetry's own
spans take as long, and 26 us more to be encoded, in a thread that holds Python's lock meanwhile. Queue and exporter are
OpenTelemetry's, with the variables that they read (OTEL_BSP_..., OTEL_EXPORTER_...).
"""

import functools
import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opentelemetry.exporter.otlp.proto.grpc import trace_exporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1.trace_pb2 import Span, SpanFlags, Status
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.exception_attributes import EXCEPTION_MESSAGE, EXCEPTION_TYPE
from opentelemetry.semconv.attributes.http_attributes import HTTP_RESPONSE_STATUS_CODE
from opentelemetry.trace import SpanContext, TraceFlags, TraceState

from handlers.core.headers import header, own_header, requested_verb
from handlers.core.slots import Slot
from handlers.core.tracing import Traced, draw

logger = logging.getLogger(__name__)

SCOPE = InstrumentationScope(name="handlers.core.spans")
SAMPLED = SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
LOCAL = SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
REMOTE = LOCAL | SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
FAILED = Status(code=Status.STATUS_CODE_ERROR)
# as OpenTelemetry names a header of an answer; of an HTTP server, this is the request's id in all logs
REQUEST_ID = "http.response.header.x-request-id"
SDK_QUEUE = logging.getLogger("opentelemetry.sdk._shared_internal")
SDK_LOGGERS = (logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter"), SDK_QUEUE)
QUIET_SECONDS = 60  # between two messages about failed exports
MAX_STATE = 512  # characters of a tracestate; a longer one is dropped, as W3C allows and nginx.conf does
logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)  # its warnings quote a client's tracestate


class Identity(NamedTuple):
    """Which span it is.

    Attributes:
        state: `tracestate`, in which systems of tracing pass on what belongs to them.
    """

    trace: bytes
    span: bytes
    state: str


class Part(NamedTuple):
    """What was done within a span: a span without children and attributes.

    Attributes:
        name: of the span.
        start, end: in nanoseconds since the epoch.
        status: None if it succeeded.
    """

    name: str
    start: int
    end: int
    status: Status | None = None


class Ended(NamedTuple):
    """A span that has ended, and the spans within it. They become messages when they are sent: many take half the time.

    Attributes:
        common: from `encoded`.
        own: its identity.
        parent: id of the parent span; empty for the first one of a trace.
        times: when it began and ended, in nanoseconds since the epoch.
        parts: the spans within it.
        flags: whether the parent is of another process.
        links: identities of other spans.
        request_id: None for the span of a batch.
        others: further fields of the message.
        context: for OpenTelemetry's processor, which looks whether it is sampled.
    """

    common: bytes
    own: Identity
    parent: bytes
    times: tuple[int, int]
    parts: Sequence[Part] = ()
    flags: int = LOCAL
    links: Sequence[Identity] = ()
    request_id: str | None = None
    others: Mapping[str, Any] | None = None
    context: SpanContext = SAMPLED

    def write(self, messages: Any) -> None:
        """Add the message of the span, and those of the spans within it, to the repeated field of a message."""
        message = messages.add()
        message.MergeFromString(self.common)
        message.trace_id, message.span_id, message.trace_state = self.own
        message.parent_span_id, message.flags = self.parent, self.flags
        message.start_time_unix_nano, message.end_time_unix_nano = self.times
        for trace, span, state in self.links:
            message.links.add(trace_id=trace, span_id=span, trace_state=state, flags=LOCAL)
        if self.request_id is not None:
            message.attributes.add(key=REQUEST_ID).value.array_value.values.add(string_value=self.request_id)
        if self.others:
            message.MergeFrom(Span(**self.others))
        trace, span, state = self.own
        for name, start, end, status in self.parts:
            messages.add(
                trace_id=trace, span_id=draw(8), trace_state=state, parent_span_id=span, flags=LOCAL, name=name,
                kind=Span.SPAN_KIND_INTERNAL, start_time_unix_nano=start, end_time_unix_nano=end, status=status,
            )  # fmt: skip


class Spans:
    """The spans of one worker.

    Args:
        endpoint: where they are sent to, for the log.
    """

    def __init__(self, endpoint: str):
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # the SDK's default
            resource = resource.merge(Resource({SERVICE_NAME: "torchserve"}))
        # nothing is flushed at the worker's end, because TorchServe does not wait for it
        self.processor = BatchSpanProcessor(Exporter(endpoint, resource))
        self.started = self.clock = 0

    def begin(self) -> None:
        """Begin a batch."""
        self.started = time.time_ns()
        self.clock = self.started - int(time.perf_counter() * 1e9)

    def record(
        self,
        handler: Any,
        slots: Sequence[Slot],
        data: Sequence[Mapping],
        headers: Sequence[Mapping],
        arrivals: Sequence[float | None],
        stages: Sequence[tuple[str, float, float, bool]],
    ) -> None:
        """Export the spans of a batch that has a sampled request.

        The span of the batch is a child of the first sampled request, and linked with all of them: so the trace of a
        lone request is complete.
        """
        ended = time.time_ns()
        context = handler.context
        model = ("bundle.model", context.model_name), ("bundle.version", version_of(context))
        own = {
            index: identity(slot.trace, headers[index])
            for index, slot in enumerate(slots)
            if slot.trace and slot.trace.sampled
        }
        first = next(iter(own.values()))
        batch = Identity(first.trace, draw(8), first.state)
        parts = [
            Part(stage, self.at(start), self.at(end), None if fine else FAILED) for stage, start, end, fine in stages
        ]
        explained = [index for index, slot in enumerate(slots) if slot.samples and slot.explained]
        explanations = dict(zip(explained, (each for each in parts if each.name == "explain"), strict=False))
        for index, identified in own.items():
            slot, error, arrival = slots[index], slots[index].error, arrivals[index]
            arrived = min(int(arrival * 1e9), self.started) if arrival else self.started
            attributes = [
                *model,
                ("bundle.verb", requested_verb(data[index], headers[index]).value),
                ("bundle.protocol", "open_inference" if slot.open_inference else "torchserve"),
                ("bundle.samples", len(slot.samples)),
                (HTTP_RESPONSE_STATUS_CODE, error.code if error else 200),
            ]
            others: dict[str, Any] = {}
            if error:
                # what the client gets, not the text of a bug's exception, which may quote the input; escaped, because
                # the name of a field may be no valid text
                told = str(error).encode(errors="backslashreplace").decode()
                attributes.append((ERROR_TYPE, type(error).__name__))
                said = attribute(EXCEPTION_TYPE, type(error).__name__), attribute(EXCEPTION_MESSAGE, told)
                others["events"] = [Span.Event(name="exception", time_unix_nano=ended, attributes=said)]
                if error.code >= 500:
                    others["status"] = Status(code=Status.STATUS_CODE_ERROR, message=told)
            elif slot.key and not slot.samples:
                attributes.append(("bundle.cached", True))
            within = [Part("queue", arrived, self.started)] if arrival else []
            if index in explanations:
                within.append(explanations[index]._replace(status=others.get("status")))
            parent = bytes.fromhex(slot.trace.parent)
            self.end(
                encoded("request", Span.SPAN_KIND_SERVER, *attributes), identified, parent, (arrived, ended), within,
                links=(batch,), flags=REMOTE if parent else LOCAL,
                request_id=request_id(handler, index, headers[index]), others=others,
            )  # fmt: skip
        common = encoded(
            "batch",
            Span.SPAN_KIND_INTERNAL,
            *model,
            ("bundle.batch.requests", len(slots)),
            ("bundle.batch.samples", sum(len(slot.samples) for slot in slots)),
            ("bundle.device", str(handler.device)),
            ("bundle.precision", getattr(handler, "precision", "")),
        )
        computes = any(part.name == "inference" for part in parts)
        shown = {"decode", "inference", "encode"} if computes else {"decode"}
        stages_shown = [part for part in parts if part.name in shown]
        failed = {"status": FAILED} if any(part.status for part in parts) else None
        times = self.started, ended
        self.end(common, batch, first.span, times, stages_shown, links=tuple(own.values()), others=failed)

    def at(self, seconds: float) -> int:
        """Return a time of `time.perf_counter` in nanoseconds since the epoch."""
        return int(seconds * 1e9) + self.clock

    def end(self, *span: Any, **fields: Any) -> None:
        """Export a span.

        Args:
            span, fields: of an `Ended`.
        """
        ended: Any = Ended(*span, **fields)  # in place of a ReadableSpan
        self.processor.on_end(ended)


class Exporter(trace_exporter.OTLPSpanExporter):
    """Export spans, and report lost ones once: an outage of the collector, or a full queue.

    Args:
        endpoint: for the log.
        resource: of all spans.
    """

    def __init__(self, endpoint: str, resource: Resource):
        super().__init__()
        attributes = [attribute(key, value) for key, value in resource.attributes.items()]
        self.resource = resource_pb2.Resource(attributes=attributes)
        self.request: ExportTraceServiceRequest | None = None
        self.named, self.down, self.quiet, self.reported = endpoint, False, False, -math.inf
        for each in SDK_LOGGERS:
            each.addFilter(self.report)

    def export(self, spans: Sequence[Any]) -> SpanExportResult:
        if self.quiet:
            self.quiet = False
            SDK_QUEUE.setLevel(logging.NOTSET)
        self.request = self.translated(spans)
        result = super().export(spans)
        self.request = None
        if result is SpanExportResult.SUCCESS and self.down:
            self.down = False
            logger.warning("Traces are sent to %s again.", self.named)
        return result

    def shutdown(self, timeout_millis: float = 30000, **others: Any) -> None:
        super().shutdown(timeout_millis, **others)
        for each in SDK_LOGGERS:
            each.removeFilter(self.report)

    def _translate_data(self, data: Sequence[Any]) -> ExportTraceServiceRequest:
        assert self.request is not None
        return self.request  # the same in each attempt: new ids would make the spans twice

    def translated(self, data: Sequence[Any]) -> ExportTraceServiceRequest:
        """Return the message of these spans. A bug in one loses no other."""
        request = ExportTraceServiceRequest()
        spans = request.resource_spans.add(resource=self.resource).scope_spans.add(scope=SCOPE).spans
        for span in data:
            before = len(spans)
            try:
                span.write(spans)  # into its place: a message that is put into another one is copied
            except Exception:
                del spans[before:]
                logger.exception("a bug lost a span")
        return request

    def report(self, record: logging.LogRecord) -> bool:
        """Log the first loss of an outage, and drop the SDK's own messages, which also tell of repeated attempts."""
        message = record.getMessage()
        full = message.startswith("Queue full")
        if full:
            self.quiet = True
            SDK_QUEUE.setLevel(logging.ERROR)  # until the next export: a message for each lost span takes 20 us
        lost = record.levelno >= logging.ERROR or full
        if lost and not self.down and time.monotonic() - self.reported > QUIET_SECONDS:
            self.down, self.reported = True, time.monotonic()
            cause = f" {record.exc_info[1]}" if record.exc_info else ""
            logger.warning("Traces cannot be sent to %s, and are dropped: %s%s", self.named, message, cause)
        return False


def identity(traced: Traced, headers: Mapping) -> Identity:
    """Return the identity of a request's span. A `tracestate` belongs to a valid `traceparent`."""
    state = header(headers, "tracestate") if traced.joined else ""
    states = TraceState.from_header([state]).to_header() if 0 < len(state) <= MAX_STATE else ""
    return Identity(bytes.fromhex(traced.trace), bytes.fromhex(traced.span), states)


@functools.lru_cache(maxsize=1024)
def encoded(
    name: str,
    kind: "Span.SpanKind.ValueType" = Span.SPAN_KIND_INTERNAL,
    *attributes: tuple[str, str | bool | int],
) -> bytes:
    """Return the part of a span that others have, too: to decode it takes a quarter of the time of building it."""
    return Span(name=name, kind=kind, attributes=itertools.starmap(attribute, attributes)).SerializeToString()


def attribute(key: str, value: Any) -> KeyValue:
    """Return an attribute: a text, a number, a truth value, or a tuple of texts."""
    match value:
        case bool():
            found = AnyValue(bool_value=value)
        case str():
            found = AnyValue(string_value=value)
        case int():
            found = AnyValue(int_value=value)
        case float():
            found = AnyValue(double_value=value)
        case _:
            found = AnyValue()
            for each in value:
                found.array_value.values.add(string_value=each)
    return KeyValue(key=key, value=found)


def request_id(handler: Any, index: int, headers: Mapping) -> str:
    """Return the id that the client gets as X-Request-Id: the proxy's, or TorchServe's."""
    return own_header(headers, "X-Request-Id") if handler.behind_proxy else handler.context.get_request_id(index)


def version_of(context: Any) -> str:
    return str(context.manifest["model"].get("modelVersion", ""))
