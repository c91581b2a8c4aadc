"""The settings of traces: which are accepted, and what they mean. test_tracing.py has the spans."""

import subprocess
import sys

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider

from bundle.build.dryrun import DryRun
from bundle.errors import BundleError
from bundle.paths import ROOT
from bundle.server.settings import Settings
from handlers.core import tracing

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317", "like http://collector:4317 (OTLP over gRPC)"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector", "like http://collector:4317 (OTLP over gRPC)"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:99999", "like http://collector:4317 (OTLP over gRPC)"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318/v1/traces", "like http://collector:4317 (OTLP over gRPC)"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "grpc"),
        ("OTEL_TRACES_SAMPLER", "sometimes", "always_on or "),
        ("OTEL_TRACES_SAMPLER_ARG", "10%", "a number from 0 to 1"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "otlp or none"),
        ("OTEL_RESOURCE_ATTRIBUTES", "team=a,test", "like name=value,other=value"),
        ("OTEL_RESOURCE_ATTRIBUTES", "team=\udcff", "like name=value,other=value"),
        ("OTEL_SDK_DISABLED", "yes", "true or false"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "none", "gzip"),
        ("OTEL_BSP_SCHEDULE_DELAY", "soon", "a whole number of milliseconds"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4096", "at most OTEL_BSP_MAX_QUEUE_SIZE, which is 2048"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nonesuch.pem", "a file that can be read"),
    ],
)
def test_invalid_setting_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str):
    for each, given in {**ENDPOINT, name: value}.items():
        monkeypatch.setenv(each, given)
    with pytest.raises(BundleError) as caught:
        Settings().check()
    assert str(caught.value).startswith(f"{name} is ")
    assert f"must be {expected}" in str(caught.value)


@pytest.mark.parametrize(
    "sent",
    [
        *("a secret", "x-key=sécret", "x-key=se;cret", r"x-key=se\cret", 'x-key="secret"', "good=1,x!key=secret"),
        *("x-key=", "x-key=s%C3%A9cret", "x-key=secret%0A", "x-key-bin=secret"),  # which gRPC would refuse
    ],
)
def test_refused_headers_are_not_repeated(monkeypatch: pytest.MonkeyPatch, sent: str):
    for name, value in {**ENDPOINT, "OTEL_EXPORTER_OTLP_HEADERS": sent}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BundleError, match=r"^OTEL_EXPORTER_OTLP_HEADERS must be like name=value,other=value\.$"):
        Settings().check()


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, ""),
        (ENDPOINT, "http://127.0.0.1:9"),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b:1"}, "http://b:1"),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "true"}, ""),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, ""),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "None"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, ""),
        ({"OTEL_TRACES_SAMPLER": "sometimes"}, ""),
    ],
)
def test_traces_are_on_if_there_is_an_endpoint(environment: dict[str, str], endpoint: str):
    assert tracing.endpoint(environment) == endpoint
    tracing.check(environment)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name, values in tracing.CHOICES.items() for value in values),
        *((name, value.upper()) for name, values in tracing.CHOICES.items() for value in values),
        *((name, "1") for name in tracing.NUMBERS),
        ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
        ("OTEL_RESOURCE_ATTRIBUTES", "team=a b%2C, deployment.environment.name = test,empty="),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2.5"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", str(ROOT / "pyproject.toml")),
        *((name, value) for name in tracing.HEADERS for value in ("x-key=1", "X-Key = a b==,other=%20c+/'-.~!")),
        *((name, "") for name in (*tracing.ENDPOINTS, *tracing.CHOICES, *tracing.NUMBERS, *tracing.HEADERS)),
        *((f"OTEL_EXPORTER_OTLP_{each}", "") for each in (*tracing.FILES, "TRACES_CERTIFICATE", "TRACES_INSECURE")),
    ],
)
def test_accepted_setting_is_valid_for_the_sdk_too(
    worker: DryRun, monkeypatch: pytest.MonkeyPatch, caplog, name: str, value: str
):
    given = {**ENDPOINT, "OTEL_TRACES_SAMPLER_ARG": "0.5", name: value}
    if name == "OTEL_TRACES_SAMPLER_ARG" and value:
        given["OTEL_TRACES_SAMPLER"] = "traceidratio"
    if name == "OTEL_BSP_MAX_QUEUE_SIZE":
        given["OTEL_BSP_MAX_EXPORT_BATCH_SIZE"] = "1"
    for each, text in given.items():
        monkeypatch.setenv(each, text)
    started = tracing.start(worker.handler)
    assert isinstance(started, tracing.Tracing) == bool(tracing.endpoint(given))
    if isinstance(started, tracing.Tracing):
        started.spans.processor.shutdown()
    assert not caplog.records


@pytest.mark.parametrize("ratio", ["", "0", "0.1", "0.25", "1.0"])
@pytest.mark.parametrize("name", ["", *tracing.CHOICES[tracing.SAMPLER], "Always_Off"])
def test_sampler_decides_as_the_one_of_the_sdk(worker: DryRun, monkeypatch: pytest.MonkeyPatch, name: str, ratio: str):
    for each, value in {**ENDPOINT, tracing.SAMPLER: name, tracing.RATIO: ratio}.items():
        monkeypatch.setenv(each, value)
    started = tracing.start(worker.handler)  # it deletes empty variables
    assert isinstance(started, tracing.Tracing)
    started.spans.processor.shutdown()
    sampler = TracerProvider(shutdown_on_exit=False).sampler
    assert started.follows_parent == sampler.get_description().startswith("ParentBased")
    edges = [round(part * 2**64) + near for part in (0, 0.1, 0.25, 1) for near in (-1, 0)]
    for last in edges[1:-1]:  # 0 to 2**64 - 1
        trace = f"{TRACE[:16]}{last:016x}"
        expected = sampler.should_sample(Context(), int(trace, 16), "request").decision.is_sampled()
        assert started.samples(bytes.fromhex(trace)) == expected, f"{last:x}"


def test_settings_are_passed_to_workers_and_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch):
    before = Settings().fingerprint()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=1")
    assert Settings().passed_on()["OTEL_EXPORTER_OTLP_HEADERS"] == "x-key=1"
    assert Settings().fingerprint().keys() - before.keys() >= ENDPOINT.keys()


def test_handlers_do_not_import_opentelemetry():
    code = "import sys, handlers.core.batch; sys.exit(any('telemetry' in name for name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_without_opentelemetry_a_worker_serves_without_traces(worker: DryRun, monkeypatch: pytest.MonkeyPatch, caplog):
    """Some clusters set the endpoint in every container."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", ENDPOINT["OTEL_EXPORTER_OTLP_ENDPOINT"])
    monkeypatch.delitem(sys.modules, "handlers.core.spans", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc", None)  # as if it were not installed
    assert type(tracing.start(worker.handler)) is tracing.Off
    assert "No traces are sent to http://127.0.0.1:9" in caplog.text
