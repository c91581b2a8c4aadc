"""Traces of requests and batches (OpenTelemetry), on if OTEL_EXPORTER_OTLP_ENDPOINT is set. docs/tracing.md shows one.

Here is what every traced request needs: its ids, and whether it is sampled. Spans are made after the answers of a
batch, and only for sampled requests: `spans.py`, the only module that imports OpenTelemetry. The bundle's commands
import this one to check the settings, so it imports nothing large.
"""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from handlers.core.headers import header, own_header

if TYPE_CHECKING:
    from handlers.core.slots import Sample, Slot

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
DISABLED = "OTEL_SDK_DISABLED"
EXPORTER = "OTEL_TRACES_EXPORTER"
SAMPLER, RATIO = "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"
PARENT_BASED = "parentbased_"  # the beginning of the names of samplers that decide as the client did
CHOICES = {
    DISABLED: ("true", "false"),
    EXPORTER: ("otlp", "none"),
    "OTEL_EXPORTER_OTLP_PROTOCOL": ("grpc",),
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": ("grpc",),
    "OTEL_EXPORTER_OTLP_COMPRESSION": ("gzip",),  # the SDK raises on "none", which the specification allows
    "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": ("gzip",),
    SAMPLER: tuple(
        before + each for before in ("", PARENT_BASED) for each in ("always_on", "always_off", "traceidratio")
    ),
}
NUMBERS = {  # the patterns of valid ones, and what they are
    RATIO: (r"0(\.\d+)?|1(\.0+)?", "a number from 0 to 1"),
    "OTEL_EXPORTER_OTLP_TIMEOUT": (r"[1-9]\d{0,5}(\.\d+)?", "a number of seconds"),
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": (r"[1-9]\d{0,5}(\.\d+)?", "a number of seconds"),
    "OTEL_BSP_SCHEDULE_DELAY": (r"[1-9]\d{0,8}", "a whole number of milliseconds"),
    "OTEL_BSP_EXPORT_TIMEOUT": (r"[1-9]\d{0,8}", "a whole number of milliseconds"),
    "OTEL_BSP_MAX_QUEUE_SIZE": (r"[1-9]\d{0,8}", "a whole number of requests and batches"),
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": (r"[1-9]\d{0,8}", "a whole number of requests and batches"),
}
FILES = ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")  # OTEL_EXPORTER_OTLP_CERTIFICATE, for example
RESOURCE = "OTEL_RESOURCE_ATTRIBUTES"
HEADERS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")
# a name that gRPC sends with a text, and a value that opentelemetry.util.re reads
HEADER = re.compile(r"[a-z0-9._-]+(?<!-bin)[ \t]*=(?=.*\S)([ !#-+\--:<-\[\]-~]*)", re.ASCII | re.IGNORECASE)
QUEUE, BATCH = "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"
# https://www.w3.org/TR/trace-context: a later version may have more at its end
TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:\Z|(?<!^00.{53})-)", re.ASCII
)
SPAN = re.compile(r"(?!0{16})[0-9a-f]{16}", re.ASCII)
RESPONSE = "traceresponse"
# not the system's own numbers, for which a batch would wait longer than for the rest; apart from `random`'s functions,
# whose seed a handler may set, the same one in every worker
random_ids = random.Random()
os.register_at_fork(after_in_child=random_ids.seed)
draw = random_ids.randbytes
ID_BYTES = 16 + 8  # of a trace and of a span
MAX_NAMED = 8  # trace ids in one line of the log


class Traced(NamedTuple):
    """The trace of one request. Ids are hexadecimal, as in headers.

    Attributes:
        trace: id of the trace.
        span: id of the request's span.
        parent: id of the client's span; "" if the trace begins here.
        sampled: whether the request's spans are exported.
        joined: whether the request came with the id of the trace.
    """

    trace: str
    span: str
    parent: str
    sampled: bool
    joined: bool = False


class Off:
    """No traces: nothing is done for a request."""

    def batch(
        self, slots: list[Slot], data: Sequence[Mapping], headers: list[Mapping], arrivals: list, stages: list
    ) -> AbstractContextManager[None]:
        """Trace a batch that is served in the block.

        Args:
            stages: in the end, (name, start, end, whether it succeeded) of each, in the time of `time.perf_counter`.
        """
        return nullcontext()

    def named(self, slots: Iterable[Slot]) -> str:
        """Return what a line of the log about these requests ends in: " (trace 0af7...)", or nothing."""
        return ""

    def named_of(self, samples: list[Sample]) -> str:
        """Return the same for the requests that have these samples."""
        return ""


class Tracing(Off):
    """Traces of the batches of one worker.

    Args:
        handler: the `BatchHandler`.
        spans: a `spans.Spans`.
    """

    def __init__(self, handler: Any, spans: Any):
        self.handler, self.spans = handler, spans
        self.trusted: bool = handler.behind_proxy
        self.follows_parent = os.environ.get(SAMPLER, PARENT_BASED).lower().startswith(PARENT_BASED)
        self.bound = sampling_bound(os.environ)
        self.slots: list[Slot] = []
        self.drawn = b""

    @contextmanager
    def batch(
        self, slots: list[Slot], data: Sequence[Mapping], headers: list[Mapping], arrivals: list, stages: list
    ) -> Iterator[None]:
        self.slots = slots
        try:
            self.begin(slots, headers)
            yield
            self.end(slots, data, headers, arrivals, stages)
        finally:
            self.slots, self.drawn = [], b""  # the slots refer to the inputs

    def begin(self, slots: list[Slot], headers: list[Mapping]) -> None:
        self.spans.begin()
        self.drawn = draw(ID_BYTES * len(slots))
        for index, (slot, own) in enumerate(zip(slots, headers, strict=True)):
            sent = own_header(own, "traceparent") if self.trusted else header(own, "traceparent")
            if sent or self.samples(self.trace_id(index)):
                slot.trace = self.trace(sent, own, self.new(index))
                if slot.trace.sampled:
                    self.answer_with_trace(index)

    def answer_with_trace(self, index: int) -> None:
        """Add the header with the trace to the answer to a request, unless the proxy does."""
        if not self.trusted:
            traced = self.traced(index)
            sent = f"00-{traced.trace}-{traced.span}-{'01' if traced.sampled else '00'}"
            self.handler.context.set_response_header(index, RESPONSE, sent)

    def traced(self, index: int) -> Traced:
        """Return the trace of a request of this batch; one without a trace yet would not be sampled."""
        return self.slots[index].trace or self.new(index)

    def new(self, index: int) -> Traced:
        """Return the trace that a request of this batch begins, with the ids that were drawn for it."""
        trace, span = self.trace_id(index), self.drawn[ID_BYTES * index + 16 : ID_BYTES * (index + 1)]
        return Traced(trace.hex(), span.hex(), "", self.samples(trace))

    def trace_id(self, index: int) -> bytes:
        """Return the id that was drawn for the trace of a request of this batch."""
        return self.drawn[ID_BYTES * index : ID_BYTES * index + 16]

    def trace(self, sent: str, headers: Mapping, new: Traced) -> Traced:
        """Return the trace of a request: the one that its client or the proxy began, or a new one.

        The proxy chooses the id of the request's span (`bundle-span`), so that it can answer with it. If it began the
        trace, too, the span is the trace's first one, and `traceparent` names it. A request through gRPC has neither.

        Args:
            sent: its `traceparent`; "" if it has none.
            headers: its headers.
            new: the trace that it begins if it is in none.
        """
        found = TRACEPARENT.match(sent)
        if found is None:
            return new
        trace, parent, sampled = found[2], found[3], bool(int(found[4], 16) & 1)
        span = own_header(headers, "bundle-span") if self.trusted else ""
        if not SPAN.fullmatch(span):
            span = new.span
        if span == parent:
            parent = ""
        if not self.follows_parent:
            sampled = self.samples(bytes.fromhex(trace))
        return Traced(trace, span, parent, sampled, joined=True)

    def samples(self, trace: bytes) -> bool:
        """Return whether the sampler takes a trace, by its id."""
        return int.from_bytes(trace[8:], "big") < self.bound

    def end(
        self, slots: list[Slot], data: Sequence[Mapping], headers: list[Mapping], arrivals: list, stages: list
    ) -> None:
        sampled = False
        for index, slot in enumerate(slots):
            if slot.trace and slot.trace.sampled:
                sampled = True
            elif slot.error:  # the log may name its trace; `begin` has answered the sampled ones
                self.answer_with_trace(index)
        if sampled:
            try:
                self.spans.record(self.handler, slots, data, headers, arrivals, stages)
            except Exception:
                logger.exception("a bug lost the trace of a batch of %s", self.handler.context.model_name)

    def named(self, slots: Iterable[Slot]) -> str:
        asked = set(map(id, slots))
        found = [index for index, slot in enumerate(self.slots) if id(slot) in asked]
        ids = list(dict.fromkeys(self.traced(index).trace for index in found))
        if not ids:
            return ""
        more = f" and {len(ids) - MAX_NAMED} more" if len(ids) > MAX_NAMED else ""
        return f" (trace {', '.join(ids[:MAX_NAMED])}{more})"

    def named_of(self, samples: list[Sample]) -> str:
        asked = set(map(id, samples))
        return self.named(slot for slot in self.slots if any(id(each) in asked for each in slot.samples))


def start(handler: Any) -> Off:
    """Return what traces the handler's batches: nothing, if traces are off or OpenTelemetry is not installed.

    Raises:
        ValueError: a variable of OpenTelemetry is invalid.
    """
    named = endpoint(os.environ)
    if not named:
        return Off()
    check(os.environ)
    for name in [name for name, value in os.environ.items() if name.startswith("OTEL_") and not value]:
        del os.environ[name]  # as the specification says; the SDK takes an empty text for a value
    try:
        from handlers.core.spans import Spans
    except ModuleNotFoundError as exc:
        logger.warning("No traces are sent to %s: %s. Install requirements/serve.txt.", named, exc)
        return Off()
    return Tracing(handler, Spans(named))


@contextmanager
def disabled() -> Iterator[None]:
    """Let a handler that is initialized in the block trace nothing."""
    before = os.environ.get(DISABLED)
    os.environ[DISABLED] = "true"
    try:
        yield
    finally:
        del os.environ[DISABLED]
        if before is not None:
            os.environ[DISABLED] = before


def endpoint(environment: Mapping[str, str]) -> str:
    """Return where traces are sent to; "" if traces are off."""
    if environment.get(DISABLED, "").lower() == "true" or environment.get(EXPORTER, "").lower() == "none":
        return ""
    return next((value for name in ENDPOINTS if (value := environment.get(name))), "")


def sampling_bound(environment: Mapping[str, str]) -> int:
    """Return what the last 64 bits of a trace's id are below if the trace is sampled.

    It is the rule of OpenTelemetry's sampler `TraceIdRatioBased`. The sampler itself takes ten times as long, and every
    request would wait for it.
    """
    name = environment.get(SAMPLER, "").lower().removeprefix(PARENT_BASED)
    ratio = float(environment.get(RATIO) or 1) if name == "traceidratio" else float(name != "always_off")
    return round(ratio * 2**64)


def check(environment: Mapping[str, str]) -> None:
    """Check the variables of OpenTelemetry, if traces are on. It would ignore most invalid values with a warning.

    Raises:
        ValueError: a value is invalid. The message does not contain the values of headers.
    """
    if not endpoint(environment):
        return

    def check_each(names: Iterable[str], valid: Callable[[str, str], bool], expected: Callable[[str], str]) -> None:
        for name in names:
            if (given := environment.get(name)) and not valid(name, given):
                shown = "" if name in HEADERS else f" is {given!r}, and"
                raise ValueError(f"{name}{shown} must be {expected(name)}.")

    check_each(ENDPOINTS, lambda _, given: is_address(given), lambda _: "like http://collector:4317 (OTLP over gRPC)")
    check_each(CHOICES, lambda name, given: given.lower() in CHOICES[name], lambda name: " or ".join(CHOICES[name]))
    check_each(NUMBERS, lambda name, given: bool(re.fullmatch(NUMBERS[name][0], given)), lambda name: NUMBERS[name][1])
    check_each([RESOURCE], lambda _, given: are_pairs(given), lambda _: "like name=value,other=value")
    check_each(HEADERS, lambda _, given: are_headers(given), lambda _: "like name=value,other=value")
    files = [name.replace("HEADERS", file) for name in HEADERS for file in FILES]
    check_each(files, lambda _, given: is_readable(Path(given)), lambda _: "a file that can be read")
    queue, batch = int(environment.get(QUEUE) or 2048), int(environment.get(BATCH) or 512)
    if batch > queue:
        raise ValueError(f"{BATCH} is {batch}, and must be at most {QUEUE}, which is {queue}.")


def is_readable(file: Path) -> bool:
    """Return whether there is a file that this user can read."""
    return file.is_file() and os.access(file, os.R_OK)


def is_address(text: str) -> bool:
    """Return whether a text is http://host:port or https://host:port."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname and parts.port) and parts.path in ("", "/")
    except ValueError:  # a port beyond 65535
        return False


def are_pairs(text: str) -> bool:
    """Return whether OpenTelemetry reads all of these attributes. It would drop the others with a warning."""
    return all(re.fullmatch(r"\s*[^=\s][^=]*=[^\udc80-\udcff]*", each) for each in text.split(","))


def are_headers(text: str) -> bool:
    """Return whether OpenTelemetry and gRPC accept these headers. OpenTelemetry would log the others, and drop them."""
    found = [HEADER.fullmatch(each.strip()) for each in text.split(",") if each.strip()]
    values = [unquote(each[1]) if each else "\n" for each in found]
    return all(value.isascii() and value.isprintable() for value in values)
