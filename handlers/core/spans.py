"""Make the spans of a batch, and export them in the background. Imported only if traces are on.

All spans are made at once, after the answers, from times that were taken: that costs less than spans that are open
meanwhile. OpenTelemetry reads its variables (OTEL_...) itself.
"""

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc import trace_exporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.exception_attributes import EXCEPTION_MESSAGE, EXCEPTION_TYPE
from opentelemetry.semconv.attributes.http_attributes import HTTP_RESPONSE_STATUS_CODE
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from handlers.core.headers import header, own_header, requested_verb
from handlers.core.slots import Slot
from handlers.core.tracing import Traced

logger = logging.getLogger(__name__)

SCOPE = InstrumentationScope("handlers.core.spans")
SAMPLED = TraceFlags(TraceFlags.SAMPLED)
# as OpenTelemetry names a header of an answer; of an HTTP server, this is the request's id in all logs
REQUEST_ID = "http.response.header.x-request-id"
SDK_LOGGERS = ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk._shared_internal")
BEGINNING = Context()  # without a parent
QUIET_SECONDS = 60  # between two messages about failed exports
MAX_STATE = 512  # characters of a tracestate; a longer one is dropped, as W3C allows and nginx.conf does
logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)  # its warnings quote a client's tracestate


class Spans:
    """The spans of one worker.

    Args:
        endpoint: where they are sent to, for the log.
    """

    def __init__(self, endpoint: str):
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if named else {SERVICE_NAME: "torchserve"})
        # it reads OTEL_TRACES_SAMPLER; nothing is flushed at the worker's end, because TorchServe does not wait for it
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.resource, self.sampler = provider.resource, provider.sampler
        self.processor = BatchSpanProcessor(Exporter(endpoint))
        self.started = self.clock = 0

    def samples(self, trace: str) -> bool:
        """Return whether a trace that begins here is sampled."""
        return self.sampler.should_sample(BEGINNING, int(trace, 16), "request").decision.is_sampled()

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
        model = {"bundle.model": context.model_name, "bundle.version": version_of(context)}
        sampled = [index for index, slot in enumerate(slots) if slot.trace.sampled]
        own = {
            index: span_context(slots[index].trace, slots[index].trace.span, header(headers[index], "tracestate"))
            for index in sampled
        }
        first = own[sampled[0]]
        batch = child_of(first)
        times = [(stage, self.at(start), self.at(end), fine) for stage, start, end, fine in stages]
        explained = [index for index, slot in enumerate(slots) if slot.samples and slot.explained]
        explanations = dict(zip(explained, (each for each in times if each[0] == "explain"), strict=False))
        for index in sampled:
            slot, error, arrival = slots[index], slots[index].error, arrivals[index]
            arrived = min(int(arrival * 1e9), self.started) if arrival else self.started
            attributes = {
                **model,
                "bundle.verb": requested_verb(data[index], headers[index]).value,
                "bundle.protocol": "open_inference" if slot.open_inference else "torchserve",
                "bundle.samples": len(slot.samples),
                HTTP_RESPONSE_STATUS_CODE: error.code if error else 200,
                REQUEST_ID: (request_id(handler, index, headers[index]),),
            }
            events: tuple[Event, ...] = ()
            status = None
            if error:
                attributes[ERROR_TYPE] = type(error).__name__
                # what the client gets, not the text of a bug's exception, which may quote the input
                said = {EXCEPTION_TYPE: type(error).__name__, EXCEPTION_MESSAGE: str(error)}
                events = (Event("exception", said, timestamp=ended),)
                status = Status(StatusCode.ERROR, str(error)) if error.code >= 500 else None
            elif slot.key and not slot.samples:
                attributes["bundle.cached"] = True
            parent = client_span(slot.trace, own[index]) if slot.trace.parent else None
            self.add(
                "request", own[index], parent, (arrived, ended), attributes, SpanKind.SERVER, (batch,), events, status
            )
            if arrival:
                self.add("queue", child_of(own[index]), own[index], (arrived, self.started))
            if index in explanations:
                _, start, end, _ = explanations[index]
                self.add("explain", child_of(own[index]), own[index], (start, end), status=status)
        attributes = {
            **model,
            "bundle.batch.requests": len(slots),
            "bundle.batch.samples": sum(len(slot.samples) for slot in slots),
            "bundle.device": str(handler.device),
            "bundle.precision": getattr(handler, "precision", ""),
        }
        failed = None if all(fine for *_, fine in times) else Status(StatusCode.ERROR)
        self.add("batch", batch, first, (self.started, ended), attributes, links=tuple(own.values()), status=failed)
        computes = any(stage == "inference" for stage, *_ in times)
        for stage, start, end, fine in times:
            if stage == "decode" or stage == "inference" or (stage == "encode" and computes):
                self.add(stage, child_of(batch), batch, (start, end), status=None if fine else failed)

    def at(self, seconds: float) -> int:
        """Return a time of `time.perf_counter` in nanoseconds since the epoch."""
        return int(seconds * 1e9) + self.clock

    def add(
        self,
        name: str,
        own: SpanContext,
        parent: SpanContext | None,
        times: tuple[int, int],
        attributes: Mapping[str, Any] | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        links: Sequence[SpanContext] = (),
        events: Sequence[Event] = (),
        status: Status | None = None,
    ) -> None:
        span = ReadableSpan(
            name, own, parent, self.resource, attributes or {}, events, tuple(map(Link, links)), kind,
            status=status or Status(), start_time=times[0], end_time=times[1], instrumentation_scope=SCOPE,
        )  # fmt: skip
        self.processor.on_end(span)


class Exporter(trace_exporter.OTLPSpanExporter):
    """Export spans, and report lost ones once: an outage of the collector, or a full queue.

    Args:
        endpoint: for the log.
    """

    def __init__(self, endpoint: str):
        super().__init__()
        self.named, self.down, self.reported = endpoint, False, -math.inf
        for name in SDK_LOGGERS:
            logging.getLogger(name).addFilter(self.report)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        if result is SpanExportResult.SUCCESS and self.down:
            self.down = False
            logger.warning("Traces are sent to %s again.", self.named)
        return result

    def report(self, record: logging.LogRecord) -> bool:
        """Log the first loss of an outage, and drop the SDK's own messages, which also tell of repeated attempts."""
        message = record.getMessage()
        lost = record.levelno >= logging.ERROR or message.startswith("Queue full")
        if lost and not self.down and time.monotonic() - self.reported > QUIET_SECONDS:
            self.down, self.reported = True, time.monotonic()
            cause = f" {record.exc_info[1]}" if record.exc_info else ""
            logger.warning("Traces cannot be sent to %s, and are dropped: %s%s", self.named, message, cause)
        return False


def span_context(traced: Traced, span: str, state: str = "") -> SpanContext:
    """Return the context of a span of this trace.

    Args:
        state: the header `tracestate`, in which systems of tracing pass on what belongs to them.
    """
    states = TraceState.from_header([state]) if 0 < len(state) <= MAX_STATE else None
    return SpanContext(int(traced.trace, 16), int(span, 16), is_remote=False, trace_flags=SAMPLED, trace_state=states)


def child_of(parent: SpanContext) -> SpanContext:
    """Return the context of a new span in the same trace."""
    span = int.from_bytes(os.urandom(8)) or 1  # 0 is no id
    return SpanContext(parent.trace_id, span, is_remote=False, trace_flags=SAMPLED, trace_state=parent.trace_state)


def client_span(traced: Traced, own: SpanContext) -> SpanContext:
    span = int(traced.parent, 16)
    return SpanContext(own.trace_id, span, is_remote=True, trace_flags=SAMPLED, trace_state=own.trace_state)


def request_id(handler: Any, index: int, headers: Mapping) -> str:
    """Return the id that the client gets as X-Request-Id: the proxy's, or TorchServe's."""
    return own_header(headers, "X-Request-Id") if handler.behind_proxy else handler.context.get_request_id(index)


def version_of(context: Any) -> str:
    return str(context.manifest["model"].get("modelVersion", ""))
