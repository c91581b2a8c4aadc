"""A receiver of traces, as a collector is: OTLP over gRPC, with the messages of opentelemetry-proto.

python receiver.py PORT     prints READY, and then each span as a line of JSON; it needs nothing else of the tests

"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message

READY = "READY"


@dataclass(frozen=True)
class Span:
    """A span that was received. Ids are hexadecimal; `parent` is "" for the first span of a trace."""

    name: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    links: frozenset[str]
    events: list[tuple[str, dict[str, Any]]]
    failed: bool
    server: bool
    resource: dict[str, Any]


@dataclass
class Receiver:
    """Spans as they come in.

    Attributes:
        port: 0 until it was started once.
        answers: whether calls are answered; if not, they hang.
        refusals: the number of next calls whose spans are taken, and which fail nevertheless.
        headers: the metadata of the last call.
        printed: whether spans are printed, and not kept.
    """

    port: int = 0
    spans: list[Span] = field(default_factory=list)
    answers: threading.Event = field(default_factory=threading.Event)
    refusals: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    server: grpc.Server | None = None
    printed: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def of(self, trace: str, count: int = 1, seconds: float = 60) -> dict[str, list[Span]]:
        """Wait until a trace has `count` spans; return them by name."""
        deadline = time.monotonic() + seconds
        while len([span for span in self.spans if span.trace == trace]) < count:
            assert time.monotonic() < deadline, f"after {seconds:g} s, of {trace}: {self.spans}"
            time.sleep(0.05)
        found: dict[str, list[Span]] = {}
        for span in self.spans:
            if span.trace == trace:
                found.setdefault(span.name, []).append(span)
        return found

    def start(self, host: str = "127.0.0.1") -> None:
        receiver = self

        class Servicer(trace_service_pb2_grpc.TraceServiceServicer):
            def Export(self, request, context):
                receiver.answers.wait(60)
                receiver.headers = dict(context.invocation_metadata())
                receiver.take(request)
                if receiver.refusals:
                    receiver.refusals -= 1
                    context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
                return trace_service_pb2.ExportTraceServiceResponse()

        self.answers.set()
        self.server = grpc.server(futures.ThreadPoolExecutor(8))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Servicer(), self.server)
        self.port = self.server.add_insecure_port(f"{host}:{self.port}")
        self.server.start()

    def stop(self) -> None:
        self.answers.set()
        self.server.stop(0).wait()

    def take(self, call: trace_service_pb2.ExportTraceServiceRequest) -> None:
        for each in call.resource_spans:
            resource = values(each.resource.attributes)
            for scope in each.scope_spans:
                self.spans += [span(message, resource) for message in scope.spans]
        if self.printed:
            while self.spans:
                one = self.spans.pop()
                print(json.dumps(asdict(one) | {"links": sorted(one.links)}), flush=True)


def span(message: Message, resource: dict[str, Any]) -> Span:
    return Span(
        name=message.name,
        trace=message.trace_id.hex(),
        id=message.span_id.hex(),
        parent=message.parent_span_id.hex(),
        start=message.start_time_unix_nano,
        end=message.end_time_unix_nano,
        attributes=values(message.attributes),
        links=frozenset(link.span_id.hex() for link in message.links),
        events=[(event.name, values(event.attributes)) for event in message.events],
        failed=message.status.code == message.status.STATUS_CODE_ERROR,
        server=message.kind == message.SPAN_KIND_SERVER,
        resource=resource,
    )


def values(attributes: Any) -> dict[str, Any]:
    def value(each: Any) -> Any:
        kind = each.WhichOneof("value")
        return [value(one) for one in each.array_value.values] if kind == "array_value" else getattr(each, kind)

    return {each.key: value(each.value) for each in attributes}


@contextmanager
def receiving(host: str = "127.0.0.1") -> Iterator[Receiver]:
    """Receive traces on a free port while the block runs."""
    receiver = Receiver()
    receiver.start(host)
    try:
        yield receiver
    finally:
        receiver.stop()


if __name__ == "__main__":
    Receiver(int(sys.argv[1]), printed=True).start("0.0.0.0")
    print(READY, flush=True)
    threading.Event().wait()
