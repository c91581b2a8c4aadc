"""Headers that the handlers trust: those that TorchServe sets, and behind a proxy those that the proxy sets."""

import logging
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle.build.dryrun import DryRun
from bundle.errors import BundleError
from bundle.server.settings import Settings
from handlers.core.headers import BEHIND_PROXY, Verb, behind_proxy, proxy_arrival, request_headers, requested_verb
from tests.unit.numbered import BATCH_SIZE, row

# a worker of TorchServe 0.12.0 gets the client's headers unchanged, and those that TorchServe adds
OF_CURL = {"Host": "127.0.0.1:8080", "User-Agent": "curl/8.0", "Accept": "*/*"}
OF_PREDICTIONS = {**OF_CURL, "url_path": "", "explain": "False"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
VERB_NAMES = st.sampled_from(["describe", "explain"]).flatmap(
    lambda name: st.sampled_from([name, name.title(), name.upper(), name[:-1] + name[-1].upper()])
)


def test_verb_is_the_one_that_torchserve_set():
    assert requested_verb({"body": b"1"}, OF_PREDICTIONS) is Verb.PREDICT
    assert requested_verb({"data": b"1"}, {}) is Verb.PREDICT  # gRPC
    assert requested_verb({}, {}) is Verb.PREDICT  # gRPC without inputs
    assert requested_verb({"body": b"1"}, {**OF_PREDICTIONS, "explain": "True"}) is Verb.EXPLAIN
    assert requested_verb({}, {**OF_CURL, "describe": "True"}) is Verb.DESCRIBE
    assert requested_verb({}, {"describe": "True"}) is Verb.DESCRIBE  # gRPC


def test_verb_of_a_description_ignores_other_headers():
    sent = {**OF_CURL, "Describe": "False", "explain": "True", "Explain": "True", "describe": "True"}
    assert requested_verb({}, sent) is Verb.DESCRIBE


@given(
    claimed=st.dictionaries(VERB_NAMES, st.sampled_from(["True", "true", "False", "1", ""])),
    sent=st.one_of(
        st.tuples(st.sampled_from([{"body": b""}, {"body": b"1"}, {"data": b"1"}, {"describe": b"True"}]), st.just({})),
        # of several Content-Type headers, the frontend uses the first, and the worker gets the last of each spelling
        st.tuples(
            st.just({}),
            st.dictionaries(
                st.sampled_from(["Content-Type", "content-type", "CONTENT-TYPE"]),
                st.sampled_from([FORM["Content-Type"], "text/plain", ""]),
                min_size=1,
            ),
        ),
    ),
)
def test_verb_of_a_prediction_ignores_a_clients_headers(claimed: dict[str, str], sent: tuple[dict, dict]):
    content, types = sent
    assert requested_verb(content, {**OF_CURL, **types, **claimed, "explain": "False"}) is Verb.PREDICT


def test_verb_is_not_read_from_form_fields():
    """The names of form fields are keys of the worker's headers, with a mapping as value."""
    fields = {name: {"content-type": "True"} for name in ("describe", "explain")}
    assert requested_verb({"describe": b"True", "explain": b"True"}, fields) is Verb.PREDICT


def test_claimed_description_shows_no_settings(worker: DryRun):
    headers = [{"describe": "True"}, {"Describe": "True"}, {"DESCRIBE": "True"}, {"describe": "True", **FORM}]
    answers = worker.predict([row(0), row(1), {"body": b""}, {}], headers)
    assert [status for status, _ in answers] == [200, 200, 400, 400]
    assert [answer for _, answer in answers[:2]] == [answer for _, answer in worker.predict([row(0), row(1)])]
    assert not any({"settings", "labels", "handler"} & body.keys() for _, body in answers)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, ""),
        ({"content-TYPE": "Application/JSON; charset=utf-8"}, "application/json"),
        ({"content-type": {"content-type": "a field of this name"}, "Content-Type": "text/plain"}, "text/plain"),
    ],
)
def test_content_type_is_the_media_type_in_lower_case(headers: dict, expected: str):
    assert request_headers(headers).media_type == expected


# --- X-Request-Start -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["X-Request-Start", "x-request-start"])
def test_arrival_is_read_in_nginx_format(name: str):
    now = time.time()
    assert proxy_arrival({name: f"t={now - 2:.3f}"}) == pytest.approx(now - 2, abs=0.001)


@pytest.mark.parametrize("text", ["", "t=", "nan", "-1", "t=1.5", "t=1e9", "t=inf", "t=1 ", "t=1\n", "t=٣", "9" * 400])
def test_invalid_arrival_is_ignored(text: str):
    assert proxy_arrival({"X-Request-Start": text}) is None
    assert proxy_arrival({}) is None


def test_arrival_of_a_wrong_clock_is_ignored():
    now = time.time()
    assert proxy_arrival({"X-Request-Start": f"t={now + 60:.3f}"}) is None
    assert proxy_arrival({"X-Request-Start": f"t={now - 3601:.3f}"}) is None


def test_arrival_without_a_proxy_is_ignored(
    worker: DryRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Otherwise one client could set the queue time of a whole batch."""
    impatient = worker.handler.settings.model_copy(update={"max_wait_seconds": 1.0})
    monkeypatch.setattr(worker.handler, "settings", impatient)
    headers = [{"X-Request-Start": f"t={time.time() - 600:.3f}"}] * BATCH_SIZE
    with caplog.at_level(logging.INFO):
        answers = worker.predict([row(index) for index in range(BATCH_SIZE)], headers)
    assert [status for status, _ in answers] == [200] * BATCH_SIZE
    assert "bundle_queue_seconds" not in caplog.text
    assert "bundle_request_seconds" not in caplog.text


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("false", False), ("true", True), ("TRUE", True)])
def test_behind_proxy_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool):
    monkeypatch.delenv(BEHIND_PROXY, raising=False)
    if value is not None:
        monkeypatch.setenv(BEHIND_PROXY, value)
    assert behind_proxy() is expected
    Settings().check()


@pytest.mark.parametrize("value", ["", "1", "yes", "nginx"])
def test_invalid_behind_proxy_is_rejected(monkeypatch: pytest.MonkeyPatch, value: str):
    """The bundle's commands reject it before a worker starts, and the worker does, too."""
    monkeypatch.setenv(BEHIND_PROXY, value)
    message = f"BUNDLE_BEHIND_PROXY is '{value}', and must be true or false"
    with pytest.raises(ValueError, match=message):
        behind_proxy()
    with pytest.raises(BundleError, match=message):
        Settings().check()


def test_behind_proxy_is_passed_to_workers_and_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(BEHIND_PROXY, raising=False)
    before = Settings().fingerprint()
    monkeypatch.setenv(BEHIND_PROXY, "true")
    assert Settings().passed_on()[BEHIND_PROXY] == "true"
    assert Settings().fingerprint() != before
