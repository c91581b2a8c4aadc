"""Batches in TorchServe's own worker code, with a small handler and model (fixture `worker`)."""

import builtins
import functools
import itertools
import logging
import math
import pickle
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.build.dryrun import DryRun
from handlers.core.cache import AnswerCache
from handlers.core.slots import Picture
from tests.unit.numbered import BATCH_SIZE, CLASSES, MAX_INSTANCES, approximately, row

ROOT = Path(__file__).resolve().parents[2]
HANDLERS = sorted((ROOT / "handlers").glob("*.py"))

# --- errors stay in their own slot --------------------------------------------------------------------------------

BAD = {
    "undecodable": ({"body": b"1,2"}, 400, "UndecodableInput"),
    "empty": ({"body": b""}, 400, "EmptyInput"),
    "unknown field": ({"file": b"1,2,3,4"}, 400, "UnknownField"),
    "option": ({"body": {"data": "1", "top_k": 0}}, 400, "InvalidOption"),
    "one bad instance": ({"instances": [b"1,2,3,4", b"1"]}, 400, "UndecodableInput"),
    "instances": ({"instances": [b"1,2,3,4"] * (MAX_INSTANCES + 1)}, 413, "TooManyInstances"),
    "not finite": ({"body": b"nan,0,0,0"}, 400, "UnsupportedInput"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("size", range(1, BATCH_SIZE + 1))
def test_bad_request_at_any_position_leaves_the_others_unchanged(worker: DryRun, size: int, kind: str):
    bad, status, error_type = BAD[kind]
    for position in range(size):
        rows = [bad if index == position else row(index) for index in range(size)]
        answers = worker.predict(rows)
        refused, body = answers.pop(position)
        assert (refused, body["code"], body["type"]) == (status, status, error_type)
        assert body["message"].endswith(".")
        alone = [worker.predict([row(index)])[0] for index in range(size) if index != position]
        assert answers == [(200, approximately(body)) for _, body in alone]


@given(st.lists(st.one_of(st.integers(0, 50).map(row), st.sampled_from([bad for bad, *_ in BAD.values()])), min_size=1))
def test_any_mixture_of_requests_is_answered_like_each_alone(worker: DryRun, rows: list[dict]):
    rows = rows[:BATCH_SIZE]
    for (status, body), one in zip(worker.predict(rows), rows, strict=True):
        status_alone, body_alone = worker.predict([one])[0]
        assert status == status_alone
        assert body == (approximately(body_alone) if status == 200 else body_alone)


@given(st.lists(st.integers(1, MAX_INSTANCES), min_size=1, max_size=BATCH_SIZE))
@settings(max_examples=20)
def test_instances_beyond_the_batch_size_are_split(worker: DryRun, counts: list[int]):
    """The model asserts that it never sees more than the batch size."""
    answers = worker.predict([{"instances": [row(index)["body"] for index in range(count)]} for count in counts])
    alone = [approximately(worker.predict([row(index)])[0][1]) for index in range(max(counts))]
    assert answers == [(200, {"predictions": alone[:count]}) for count in counts]


EXCEPTIONS = [
    *(
        exception
        for exception in vars(builtins).values()
        if isinstance(exception, type) and issubclass(exception, Exception)
        if not issubclass(exception, (MemoryError, ExceptionGroup))  # the first fails the batch: test_batch_faults.py
    ),
    struct.error,
    pickle.UnpicklingError,
]
UNICODE = {UnicodeDecodeError: ("utf-8", b"", 0, 1, "why"), UnicodeEncodeError: ("utf-8", "", 0, 1, "why")}
UNICODE[UnicodeTranslateError] = ("", 0, 1, "why")


@pytest.mark.parametrize("stage", ["read", "decode", "encode"])
@given(error=st.sampled_from(EXCEPTIONS), size=st.integers(1, BATCH_SIZE), position=st.integers(0, BATCH_SIZE - 1))
def test_any_exception_in_one_request_leaves_the_others_unchanged(
    worker: DryRun, stage: str, error: type[Exception], size: int, position: int
):
    position %= size
    rows = [row(index) for index in range(size)]
    alone = [approximately(worker.predict([one])[0][1]) for one in rows]
    whole, calls = getattr(worker.handler, stage), itertools.count()

    def fail(*arguments: object) -> object:
        if next(calls) == position:
            raise error(*UNICODE.get(error, ("secret",)))
        return whole(*arguments)

    with patch.object(worker.handler, stage, fail):
        answers = worker.predict(rows)
    status, body = answers.pop(position)
    assert (status, body["type"]) == (500, "InternalError")
    assert "secret" not in body["message"]
    del alone[position]
    assert answers == [(200, answer) for answer in alone]


def test_unexpected_exception_is_logged_and_counted(worker: DryRun, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        answers = worker.predict([row(0), {"body": b"bug"}])
    assert [status for status, _ in answers] == [200, 500]
    assert "a bug" not in answers[1][1]["message"]
    assert "ZeroDivisionError: a bug" in caplog.text
    counted = emitted(caplog, "bundle_requests_total")
    assert [line.split("Status:")[1].split("|")[0] for line in counted] == ["200", "500"]


@pytest.mark.parametrize("position", range(BATCH_SIZE))
def test_input_that_the_model_fails_on_leaves_the_others_unchanged(
    worker: DryRun, position: int, caplog: pytest.LogCaptureFixture
):
    rows = [row(index) for index in range(BATCH_SIZE)]
    expected = [(200, approximately(worker.predict([one])[0][1])) for one in rows]
    rows[position] = {"body": b"1e9,0,0,0"}
    answers = worker.predict(rows)
    status, body = answers.pop(position)
    assert (status, body["type"]) == (500, "InternalError")
    assert "a bug failed one input of numbers" in caplog.text
    del expected[position]
    assert answers == expected


@pytest.mark.parametrize("change", [-1, 1])
def test_reduce_with_a_wrong_number_of_rows_fails_and_logs_the_fix(
    worker: DryRun, change: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """With one row too many, a request would get the answer of another."""
    reduce = worker.handler.reduce
    monkeypatch.setattr(
        worker.handler, "reduce", lambda outputs: reduce(outputs).repeat(2, 1, 1)[: len(outputs) + change]
    )
    answers = worker.predict([row(0), row(1)])
    assert [(status, body["type"]) for status, body in answers] == [(500, "InternalError")] * 2
    assert f"NumbersHandler.reduce returned {1 + change} rows for 1 samples" in caplog.text
    assert "exactly one row per sample" in caplog.text


def test_sample_that_changes_the_number_of_rows_fails_alone(worker: DryRun, monkeypatch: pytest.MonkeyPatch):
    """As a model does that drops what it finds nothing in."""
    model = worker.handler.model
    monkeypatch.setattr(worker.handler, "model", lambda numbers: model(numbers[numbers[:, 0] < 5]))
    alone = [approximately(worker.predict([row(index)])[0][1]) for index in (1, 2)]
    answers = worker.predict([row(1), row(9), row(2)])
    assert [status for status, _ in answers] == [200, 500, 200]
    assert [answers[0][1], answers[2][1]] == alone


def test_predict_with_a_wrong_number_of_rows_fails_the_batch(
    worker: DryRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(worker.handler, "predict", lambda samples: [torch.zeros(1, 2)])
    assert [status for status, _ in worker.predict([row(0), row(1)])] == [500, 500]
    assert "predict returned 1 rows for 2 samples" in caplog.text


def test_request_that_was_rejected_keeps_its_error_when_its_batch_fails(
    worker: DryRun, monkeypatch: pytest.MonkeyPatch
):
    def predict(samples: list) -> list:
        raise ZeroDivisionError

    monkeypatch.setattr(worker.handler, "predict", predict)
    assert [status for status, _ in worker.predict([row(0), {"body": b""}])] == [500, 400]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("nested", [False, True])
def test_answer_with_a_non_finite_number_is_replaced_by_an_error(
    worker: DryRun, monkeypatch: pytest.MonkeyPatch, value: float, nested: bool
):
    """This holds for every implementation of `encode`."""
    scores = iter([value, 0.5])
    monkeypatch.setattr(worker.handler, "encode", lambda *_: {"boxes": [[next(scores)]]} if nested else next(scores))
    (status, body), (good, _) = worker.predict([row(0), row(1)])
    assert (status, body["type"], good) == (500, "NonFiniteOutput", 200)


def test_answer_that_is_not_json_fails_only_its_request(worker: DryRun, monkeypatch: pytest.MonkeyPatch):
    answers = iter([torch.zeros(1), {"value": 1}])
    monkeypatch.setattr(worker.handler, "encode", lambda *_: next(answers))
    (status, body), good = worker.predict([row(0), row(1)])
    assert (status, body["type"], good) == (500, "InternalError", (200, {"value": 1}))


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [1, 2, CLASSES, "5", b"5"])
def test_top_k_of_a_request_sets_the_length_of_the_ranking(worker: DryRun, asked: object):
    (status, default), (_, body), (_, all_of_them) = worker.predict(
        [row(1), {"data": row(1)["body"], "top_k": asked}, {"data": row(1)["body"], "top_k": CLASSES}]
    )
    assert (status, len(default["top_k"])) == (200, 3)
    assert body["top_k"] == all_of_them["top_k"][: int(asked)]
    assert all_of_them["top_k"][:3] == default["top_k"]
    assert sum(entry["probability"] for entry in all_of_them["top_k"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("asked", [0, -1, CLASSES + 1, 10**9, "three", True, 2.0, None, [], b"1e3"])
def test_invalid_top_k_is_rejected(worker: DryRun, asked: object):
    [(status, body)] = worker.predict([{"data": row(1)["body"], "top_k": asked}])
    assert (status, body["type"]) == (400, "InvalidOption")
    assert body["message"].startswith("top_k must be")


# --- kinds of request in a batch ---------------------------------------------------------------------------------


def test_requests_of_different_kinds_are_answered_in_one_batch(worker: DryRun):
    """TorchServe mixes predictions and explanations in one batch; the headers tell them apart."""
    headers = [{}, {"explain": "True"}, {"describe": "True"}, {"Content-Type": "application/json"}, {}]
    rows = [row(0), row(1), {}, {"body": b'{"data":'}, row(4)]
    answers = worker.predict(rows, headers)
    assert [status for status, _ in answers] == [200, 400, 200, 400, 200]
    assert [answers[index][1]["type"] for index in (1, 3)] == ["UnsupportedOperation", "InvalidJSON"]
    assert "/predictions" in answers[1][1]["message"]
    described = answers[2][1]
    assert (described["handler"], described["settings"]["top_k"]) == ("NumbersHandler", 3)
    assert described["labels"] == {str(index): f"n{index}" for index in range(CLASSES)}
    assert answers[4] == worker.predict([row(4)])[0]


def test_content_type_of_every_answer_is_json(worker: DryRun):
    worker.predict([row(0), {"body": b""}, {"body": b"nan,0,0,0"}, {}], [{}, {}, {}, {"describe": "True"}])
    assert [worker.service.context.get_response_content_type(index) for index in range(4)] == ["application/json"] * 4


def test_picture_is_answered_as_bytes_with_its_content_type(worker: DryRun, monkeypatch: pytest.MonkeyPatch):
    picture = b"\x89PNG\r\n\xff"
    encode = worker.handler.encode
    monkeypatch.setattr(
        worker.handler, "encode", lambda row, info, o: Picture(picture) if o.top_k == 1 else encode(row, info, o)
    )
    monkeypatch.setattr(worker.handler, "cache", AnswerCache(4))
    for _ in range(2):  # computed, then from the cache
        answers = worker.predict([row(0), {"data": b"1,1,1,-1", "top_k": b"1"}])
        assert (answers[0][0], len(answers[0][1]["top_k"])) == (200, 3)
        assert answers[1] == (200, picture)
        types = [worker.service.context.get_response_content_type(index) for index in range(2)]
        assert types == ["application/json", "image/png"]


def test_handler_knows_the_batch_size_of_its_worker(worker: DryRun):
    assert worker.handler.batch_size == BATCH_SIZE


# --- metrics -----------------------------------------------------------------------------------------------------


def emitted(caplog: pytest.LogCaptureFixture, start: str) -> list[str]:
    """Return the lines of metrics with this beginning, as the frontend reads them."""
    lines = [line for record in caplog.records for line in record.getMessage().splitlines()]
    return [line for line in lines if line.startswith(f"[METRICS]{start}")]


def test_metrics_of_a_batch_are_one_log_message(worker: DryRun, caplog: pytest.LogCaptureFixture):
    """Each line has the format of TorchServe's own metrics."""
    with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, "ts"):  # a program raises the level of `ts`
        worker.predict([row(0)])
        [message] = [
            record.getMessage() for record in caplog.records if "[METRICS]bundle_batch_size" in record.getMessage()
        ]
        caplog.clear()
        metrics = worker.handler.metrics
        metrics.batch_size.add_or_update(1, metrics.identity)
    [written_by_torchserve] = emitted(caplog, "bundle_batch_size")
    mine = message.splitlines()[0]
    assert re.sub(r"\d+$", "", mine) == re.sub(r"\d+$", "", written_by_torchserve)


def test_metrics_count_requests_errors_and_stages(worker: DryRun, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        worker.predict([row(0), {"body": b""}, {"body": b""}, {"body": b"1"}])
    lines = emitted(caplog, "bundle_")
    of_the_model = "|#ModelName:numbers,ModelVersion:1.0"
    assert sum(f"bundle_batch_size.Count:4{of_the_model}|#type:HISTOGRAM" in line for line in lines) == 1
    for stage in ("decode", "inference", "encode"):
        [line] = [line for line in lines if f"bundle_{stage}_seconds.Seconds:" in line]
        assert 0 <= float(line.split(":")[1].split("|")[0]) < 60
        assert f"{of_the_model}|#type:HISTOGRAM" in line
    rejected = [line.split("bundle_rejected_requests_total.Count:")[1] for line in lines if "rejected" in line]
    counted = [(line[0], line.split("ErrorType:")[1].split("|")[0]) for line in rejected]
    assert counted == [("2", "EmptyInput"), ("1", "UndecodableInput")]

    statuses = [line.split("bundle_requests_total.Count:")[1] for line in lines if "bundle_requests_total" in line]
    assert [(line[0], line.split("Status:")[1].split("|")[0]) for line in statuses] == [("1", "200"), ("3", "400")]
    assert not any("bundle_queue_seconds" in line or "bundle_request_seconds" in line for line in lines)


def test_queue_time_is_measured_from_the_proxys_header(
    worker: DryRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The longest wait of the batch is recorded once; invalid times are ignored."""
    monkeypatch.setattr(worker.handler, "behind_proxy", True)
    now = time.time()
    stamps = [f"t={now - 2:.3f}", f"t={now - 5:.3f}", f"t={now + 60:.3f}", "t=1.5", "nan", "t=", "-1"]
    headers = [{"X-Request-Start": stamp} for stamp in stamps] + [{}]
    with caplog.at_level(logging.INFO):
        worker.predict([row(0)] * len(headers), headers)
    for stage in ("queue", "request"):
        [line] = emitted(caplog, f"bundle_{stage}_seconds.Seconds:")
        assert 4.99 <= float(line.split("Seconds:")[1].split("|")[0]) < 60


def test_repeated_input_is_answered_from_the_cache(worker: DryRun, caplog: pytest.LogCaptureFixture):
    worker.handler.cache = AnswerCache(2)
    try:
        first = worker.predict([row(1), {"body": b"1,2"}])
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert worker.predict([row(1), {"body": b"1,2"}]) == first
        assert "bundle_inference_seconds" not in caplog.text
        [(_, other)] = worker.predict([{"data": b"1,1,1,-1", "top_k": b"1"}])
        assert len(other["top_k"]) == 1
    finally:
        worker.handler.cache = AnswerCache(0)


def test_rejected_instances_leave_nothing_in_the_cache(worker: DryRun):
    half_good = {"body": {"instances": ["1,1,1,-1", "1,2"]}}
    worker.handler.cache = AnswerCache(2)
    try:
        assert [worker.predict([half_good])[0][0] for _ in range(2)] == [400, 400]
    finally:
        worker.handler.cache = AnswerCache(0)


@pytest.mark.parametrize("body", [b"", {"instances": ["1,1,1,-1", "1,2"]}])
def test_batch_without_valid_requests_runs_no_inference(worker: DryRun, caplog: pytest.LogCaptureFixture, body: object):
    with caplog.at_level(logging.INFO):
        worker.predict([{"body": body}])
    assert "bundle_decode_seconds" in caplog.text
    assert "bundle_inference_seconds" not in caplog.text


# --- files of handlers ------------------------------------------------------------------------------------------


@functools.cache  # importing torch takes seconds
def python(code: str) -> str:
    """Run `code` in a new process that imports handlers as top-level modules, as a worker does."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'handlers')!r}]\n{code}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd="/")
    assert run.returncode == 0, run.stderr
    return run.stdout


MODULES = [path.stem for path in HANDLERS if path.stem != "__init__"]


@pytest.mark.slow
def test_handler_file_defines_one_class():
    """With a second class, even a dataclass, TorchServe's worker does not start."""
    found = python(
        "import importlib; from ts.utils.util import list_classes_from_module as classes\n"
        f"for name in {MODULES!r}: print(name, *(cls.__name__ for cls in classes(importlib.import_module(name))))"
    )
    defined = dict(line.split(" ", 1) for line in found.splitlines() if line.split(" ")[0] in MODULES)
    assert set(defined) == set(MODULES)
    assert all(names.endswith("Handler") and " " not in names for names in defined.values()), defined


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_handler_imports_no_heavy_library_that_it_does_not_need(module: str):
    """Libraries for training or for other inputs would cost memory and start-up time."""
    modalities = {
        "audio_mfcc": {"soundfile", "soxr"},
        "text": {"tokenizers"},
        "graph": set(),
        "mnist": {"PIL"},
        "image_topk": {"PIL"},
        "multimodal": {"PIL", "soundfile", "soxr"},
        "detection": {"PIL"},  # torchvision's operators, but none of its modules
        "segmentation": {"PIL"},
    }
    heavy = {"torchvision", "torchaudio", "scipy", "lightning", "pandas", "captum", "matplotlib"}
    heavy |= {*set().union(*modalities.values())}
    imported = python(f"import {module}\nprint(*sys.modules)").split()
    # TorchServe's base class imports some of them
    torchserves = python("import ts.torch_handler.base_handler\nprint(*sys.modules)").split()
    assert heavy & set(imported) - set(torchserves) <= modalities[module]
