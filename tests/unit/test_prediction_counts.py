"""The metrics of predictions, and the reference with which they are compared."""

import hashlib
import json
import logging
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bundle.build import reference
from bundle.build.dryrun import DryRun
from bundle.catalog import ModelFolder
from bundle.cli.app import app
from bundle.errors import BundleError
from bundle.paths import MODELS
from handlers.core import predictions
from handlers.core.declared import is_current
from handlers.core.predictions import INTERVALS, OTHER, Reference, Series, counted, interval, printable
from handlers.detection import DetectionHandler
from handlers.mnist import MNISTHandler
from handlers.multimodal import MultimodalHandler
from handlers.segmentation import SegmentationHandler
from tests import programs
from tests.shipped import ON_REQUEST, SHIPPED
from tests.support import wait_for
from tests.unit.numbered import BATCH_SIZE, CLASSES, row, write_archive

LABELS = [f"n{index}" for index in range(CLASSES)]
LINE = re.compile(r"\[METRICS\](bundle_\w+)\.Count:([\d.]+)\|#ModelName:numbers,ModelVersion:1.0,\w+:([^|]+)\|")
REFERENCE = Reference(
    source="a test", examples=100, classes={"n3": 0.5, "n0": 0.3, "n6": 0.2}, confidence={"0.4": 0.25, "0.5": 0.75}
)


class Lines(logging.Handler):
    """The metrics of predictions that are printed while a test runs: {metric: {last dimension: values}}."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, dict[str, list[float]]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        for name, value, dimension in LINE.findall(record.getMessage()):
            self.found.setdefault(name, {}).setdefault(dimension, []).append(float(value))

    def total(self, name: str) -> dict[str, float]:
        """Return what a counter shows: the sum of its lines."""
        return {dimension: sum(values) for dimension, values in self.found.get(name, {}).items()}


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    monkeypatch.setattr(predictions, "SECONDS", 0.05)
    handler, core = Lines(), logging.getLogger("handlers.core")
    level = core.level
    core.addHandler(handler)
    core.setLevel(logging.INFO)
    yield handler
    core.removeHandler(handler)
    core.setLevel(level)


# --- names and intervals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confidence", "bound"),
    [(0.0, "0.1"), (0.1, "0.1"), (0.1000001, "0.2"), (0.7, "0.7"), (0.95, "1.0"), (1.0, "1.0"), (1.0000002, "1.0")],
)
def test_interval_of_a_confidence_is_named_by_its_upper_bound(confidence: float, bound: str):
    assert INTERVALS[interval(confidence)] == bound


@pytest.mark.parametrize(
    ("label", "printed"),
    [("hot dog", "hot dog"), ("tench, Tinca: fish|x", "tench Tinca fish x"), ("a\nb", "a b"), ("C#", "C#"), (",", "_")],
)
def test_label_is_printed_without_what_separates_parts_of_a_line(label: str, printed: str):
    assert printable(label) == printed


def test_classes_within_the_limit_are_all_counted():
    assert counted(LABELS, CLASSES, None) == LABELS
    assert counted(["a", "a", "b"], 2, None) == ["a", "a", "b"]


def test_classes_above_the_limit_are_those_of_the_reference_and_other():
    assert counted(LABELS, 2, REFERENCE) == ["n0", OTHER, OTHER, "n3", OTHER, OTHER, OTHER]
    assert counted(LABELS, 2, None) == [OTHER] * CLASSES


def test_share_of_other_is_that_of_all_classes_without_a_counter():
    names = counted(LABELS, 2, REFERENCE)
    assert REFERENCE.share(LABELS, names) == pytest.approx({"n0": 0.3, OTHER: 0.2, "n3": 0.5})
    assert REFERENCE.share(["n3", "n3"], ["n3", "n3"]) == {"n3": 0.5}


# --- counting --------------------------------------------------------------------------------------------------------


def test_series_prints_zeros_first_and_then_what_has_grown():
    series = Series(metric=None, names=["a", OTHER, OTHER])

    def printed() -> list[tuple[int, str]]:
        return series.lines(lambda _, value, name: (value, name))

    assert printed() == [(0, "a"), (0, OTHER)]
    assert printed() == []
    series.counts[1] += 2
    series.counts[2] += 1
    assert printed() == [(3, OTHER)]
    series.counts[0] += 1
    assert printed() == [(1, "a")]


def test_series_loses_no_count_while_another_thread_prints():
    series, printed, ended = Series(metric=None, names=["a", "b"]), Counter(), threading.Event()

    def printing() -> None:
        while not ended.is_set():
            for value, name in series.lines(lambda _, value, name: (value, name)):
                printed[name] += value

    thread = threading.Thread(target=printing)
    thread.start()
    for _ in range(100_000):
        series.counts[1] += 1
    ended.set()
    thread.join()
    for value, name in series.lines(lambda _, value, name: (value, name)):
        printed[name] += value
    assert printed == {"a": 0, "b": 100_000}


def test_predictions_are_counted_by_class_and_confidence(tmp_path: Path, lines: Lines):
    """Rejected requests and descriptions are not predictions; each instance is one."""
    with DryRun(write_archive(tmp_path), BATCH_SIZE) as worker:
        assert lines.total("bundle_predictions_total") == dict.fromkeys(LABELS, 0)
        assert lines.total("bundle_confidence_total") == dict.fromkeys(INTERVALS, 0)
        assert "bundle_predictions_reference" not in lines.found
        answers = worker.predict([row(index) for index in range(4)] + [{"body": b"no numbers"}])
        answers += worker.predict([{"instances": [f"{index},1,0,2".encode() for index in range(5)]}])
        assert worker.predict([{}], [{"describe": "True"}])[0][0] == 200
        assert worker.predict([row(0)], [{"explain": "True"}])[0][0] == 400
        first = [body["top_k"][0] for status, body in answers[:4] if status == 200]
        first += [each["top_k"][0] for each in answers[5][1]["predictions"]]
        wait_for(lambda: sum(lines.total("bundle_predictions_total").values()) >= 9)
    classes = Counter(each["label"] for each in first)
    confidence = Counter(INTERVALS[interval(each["probability"])] for each in first)
    assert len(classes) > 1
    assert lines.total("bundle_predictions_total") == dict.fromkeys(LABELS, 0) | classes
    assert lines.total("bundle_confidence_total") == dict.fromkeys(INTERVALS, 0) | confidence


def test_worker_prints_many_predictions_at_once(tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(predictions, "SECONDS", 60)
    with DryRun(write_archive(tmp_path), BATCH_SIZE) as worker:
        for _ in range(20):
            worker.predict([row(1)] * BATCH_SIZE)
        assert sum(lines.total("bundle_predictions_total").values()) == 0
        worker.handler.metrics.predictions.emit()
    [values] = [each for each in lines.found["bundle_predictions_total"].values() if sum(each)]
    assert values == [0, 20 * BATCH_SIZE]


def test_worker_prints_the_reference_at_its_start(tmp_path: Path, lines: Lines):
    mar = write_archive(tmp_path, reference=reference.text(REFERENCE))
    with DryRun(mar, BATCH_SIZE, settings={"counted_classes": 2}):
        assert lines.found["bundle_predictions_reference"] == {"n0": [0.3], OTHER: [0.2], "n3": [0.5]}
        shares = dict.fromkeys(INTERVALS, [0.0]) | {"0.4": [0.25], "0.5": [0.75]}
        assert lines.found["bundle_confidence_reference"] == shares
        assert lines.total("bundle_predictions_total") == {"n0": 0, OTHER: 0, "n3": 0}


def test_setting_turns_the_metrics_off(tmp_path: Path, lines: Lines):
    mar = write_archive(tmp_path, reference=reference.text(REFERENCE))
    with DryRun(mar, BATCH_SIZE, settings={"counted_classes": 0}) as worker:
        assert worker.predict([row(0)])[0][0] == 200
        assert worker.handler.metrics.predictions is None
    assert set(lines.found) == {"bundle_requests_total"}


def test_bug_in_first_is_logged_and_fails_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with DryRun(write_archive(tmp_path), BATCH_SIZE) as worker:
        monkeypatch.setattr(worker.handler, "encode", lambda *_: {"score": 1})
        assert worker.predict([row(0), row(1)]) == [(200, {"score": 1})] * 2
        [record] = [each for each in caplog.records if "a bug in `first`" in each.getMessage()]
        assert record.exc_info
        assert worker.handler.metrics.predictions is None


# --- what comes first ------------------------------------------------------------------------------------------------


def test_first_of_a_detector_is_the_best_detection_or_none():
    handler = DetectionHandler()
    handler.labels = ["RBC", "WBC"]
    assert handler.outcomes() == ["RBC", "WBC", "none"]
    found = [{"label": "WBC", "class": 1, "score": 0.9}, {"label": "RBC", "class": 0, "score": 0.4}]
    assert handler.first({"detections": found}) == (1, 0.9)
    assert handler.first({"detections": []}) == (2, None)


def test_first_of_mnist_is_read_from_its_own_names():
    answer = {"top_3_classes": [3, 9, 7], "top_3_probabilities": [0.98, 0.01, 0.005]}
    assert MNISTHandler().first(answer) == (3, 0.98)


@pytest.mark.parametrize(
    ("handler", "counts"),
    [(MNISTHandler, True), (MultimodalHandler, True), (DetectionHandler, True), (SegmentationHandler, False)],
)
def test_handler_is_counted_if_its_first_fits_its_answers(handler: type, counts: bool):
    class Other(handler):
        def encode(self, row, info, options):
            return "something else"

    assert is_current(handler(), "first", "encode") is counts
    assert not is_current(Other(), "first", "encode")


# --- the reference ---------------------------------------------------------------------------------------------------


def named(rows: list[dict]) -> list[reference.Example]:
    return [reference.Example(f"input {index}", each, {}) for index, each in enumerate(rows)]


def test_recorded_reference_has_the_shares_of_the_answers(tmp_path: Path):
    mar = write_archive(tmp_path)
    rows = [row(index) for index in range(10 * CLASSES)]
    recorded = reference.record(mar, named(rows), "a test")
    with DryRun(mar, BATCH_SIZE) as worker:
        first = [worker.predict([each])[0][1]["top_k"][0]["label"] for each in rows]
    assert recorded.examples == len(rows)
    shares = {label: count / len(rows) for label, count in Counter(first).items()}
    assert recorded.classes == pytest.approx(shares, abs=1e-6)
    assert sum(recorded.confidence.values()) == pytest.approx(1, abs=1e-5)
    assert Reference.model_validate_json(reference.text(recorded)) == recorded


def test_reference_of_too_few_examples_is_rejected(tmp_path: Path):
    rows = [row(index) for index in range(10 * CLASSES - 1)]
    with pytest.raises(BundleError, match="needs 70 examples; there are 69"):
        reference.record(write_archive(tmp_path), named(rows), "a test")


def test_reference_of_an_invalid_example_is_rejected(tmp_path: Path):
    rows = [row(index) for index in range(10 * CLASSES)] + [{"body": b"no numbers"}]
    with pytest.raises(BundleError, match="rejects input 70.*Four numbers"):
        reference.record(write_archive(tmp_path), named(rows), "a test")


def test_reference_with_an_unknown_class_or_another_form_is_rejected(tmp_path: Path):
    file = tmp_path / "reference.json"
    file.write_text(reference.text(REFERENCE))
    reference.check(file, MNISTHandler(), LABELS)
    with pytest.raises(BundleError, match="the class 'n6', which is not a label"):
        reference.check(file, MNISTHandler(), LABELS[:6])
    file.write_text(json.dumps({"classes": {}}))
    with pytest.raises(BundleError, match="is invalid. Record it again"):
        reference.check(file, MNISTHandler(), LABELS)


def test_shipped_references_have_enough_examples_and_whole_shares():
    for model in SHIPPED + ON_REQUEST:
        file = MODELS / model / "reference.json"
        if model == "membrane":  # a segmenter has no first class
            assert not file.exists()
            continue
        recorded = Reference.model_validate_json(file.read_bytes())
        folder = ModelFolder(file.parent)
        labels = folder.labels()
        assert recorded.weights == reference.weights(folder), f"{model} has been trained since"
        assert recorded.examples >= 10 * min(len(labels), 32), model
        assert sum(recorded.classes.values()) == pytest.approx(1, abs=1e-4), model
        assert sum(recorded.confidence.values()) == pytest.approx(1, abs=1e-4), model
        assert set(recorded.classes) <= {*labels, "none"}, model
        assert set(recorded.confidence) <= set(INTERVALS), model


@pytest.mark.slow
def test_command_records_the_reference_of_a_folder_of_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BUNDLE_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path / "store"))
    folder = shutil.copytree(MODELS / "mnist", tmp_path / "models" / "mnist")
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for index in range(100):
        shutil.copy(folder / "sample.png", inputs / f"{index}.png")
    ended = programs.run(app, "reference", "mnist", str(inputs))
    assert ended.status == 0, ended.stderr
    assert "100 inputs, 1 classes" in ended.stdout
    recorded = Reference.model_validate_json((folder / "reference.json").read_bytes())
    assert (recorded.classes, recorded.confidence) == ({"3": 1.0}, {"1.0": 1.0})
    assert recorded.weights == hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    (inputs / "0.png").write_bytes(b"no picture")
    ended = programs.run(app, "reference", "mnist", str(inputs))
    assert ended.status == 1
    assert "0.png. Remove or replace it" in " ".join(ended.stderr.split())
