"""Explanations: the methods on functions with known attributions, and the shipped models through their archives."""

import io
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import ModelFolder, select
from handlers.core.admission import Deadline
from handlers.core.attribution import Run
from handlers.core.explain import ExplainedClassifier, ExplanationOptions
from handlers.core.images import ImageLimits, upright_size
from handlers.mnist import MNISTHandler
from tests.held_out import requests
from tests.shipped import DATA_DIR, SHIPPED, skip_without_data_set
from tests.trials.explanations import explained_sample, measure
from tests.unit.inputs import draw_digit, encode_image, encode_sound

EXPLAIN = {"explain": "True"}

# --- methods -----------------------------------------------------------------------------------------------------

WEIGHTS = torch.tensor([3.0, -2.0, 0.5, 1.0]), torch.tensor([[1.0, 4.0], [-1.0, 0.0]])
INPUTS = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[[1.0, -1.0], [2.0, 5.0]]])
BASELINES = torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.zeros(1, 2, 2)
GROUPS = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[[3, 3], [4, 5]]])
PARTS = tuple(w * (i - b) for w, i, b in zip(WEIGHTS, INPUTS, BASELINES, strict=True))


def linear(numbers: Tensor, matrix: Tensor) -> Tensor:
    assert len(numbers) == len(matrix) <= 8
    return (numbers * WEIGHTS[0]).sum(1) + (matrix * WEIGHTS[1]).sum((1, 2))


def shared_parts() -> tuple[Tensor, ...]:
    """Share the true attribution of a group evenly among its values."""
    values, numbers = (torch.cat([each.flatten() for each in pair]) for pair in (PARTS, GROUPS))
    sums = torch.zeros(6).scatter_add(0, numbers, values) / torch.bincount(numbers)
    return tuple(sums[group] for group in GROUPS)


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [("feature_ablation", 1e-5), ("shapley_value_sampling", 1e-5), ("kernel_shap", 1e-2), ("lime", 0.1)],
)
def test_method_that_removes_groups_finds_the_weights_of_a_linear_function(method: str, tolerance: float):
    torch.manual_seed(0)
    run = Run(linear, INPUTS, BASELINES, GROUPS, None, batch_size=8)
    for actual, expected in zip(getattr(run, method)(None), shared_parts(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_integrated_gradients_finds_the_weights_of_a_linear_function():
    run = Run(linear, INPUTS, BASELINES, GROUPS, None, batch_size=8)
    for actual, expected in zip(run.integrated_gradients(50), PARTS, strict=True):
        torch.testing.assert_close(actual.float(), expected, rtol=1e-4, atol=1e-4)


# --- the place of what the model sees ------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "y", "height"), [(0.5, 0.5, 0.7), (0.3, 0.6, 0.4), (0.75, 0.25, 0.3)])
@pytest.mark.parametrize("stroke", [0.02, 0.12])
def test_place_of_a_digit_in_a_larger_image_is_where_it_was_drawn(x: float, y: float, height: float, stroke: float):
    """The centre of the ink is the middle of the model's image."""
    image = draw_digit(3, 400, height, stroke, x, y)
    handler = MNISTHandler()
    handler.settings = handler.Settings()
    sample = handler.decode(handler.Inputs(data=encode_image(image, "PNG")))
    left, top, right, bottom = sample.info
    rows, columns = numpy.asarray(image).astype(float).nonzero()
    ink = numpy.asarray(image)[rows, columns]
    assert (left + right) / 2 == pytest.approx(numpy.average(columns, weights=ink) / 400, abs=0.04)
    assert (top + bottom) / 2 == pytest.approx(numpy.average(rows, weights=ink) / 400, abs=0.04)
    assert bottom - top == pytest.approx(height * 28 / 20, rel=0.15)


@pytest.mark.parametrize(("orientation", "size"), [(1, (40, 20)), (3, (40, 20)), (6, (20, 40)), (8, (20, 40))])
def test_upright_size_of_a_turned_photograph_is_as_a_person_sees_it(orientation: int, size: tuple[int, int]):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, "JPEG", exif=exif)
    assert upright_size(file.getvalue(), ImageLimits()) == size


@pytest.mark.parametrize(("target", "index"), [("20", 1), ("1", 2), ("0", 3), (1, 1), ("3", 3)])
def test_target_that_is_a_label_and_an_index_means_the_label(target: str | int, index: int):
    handler = MNISTHandler()
    handler.labels = ["10", "20", "1", "0"]
    of_json = ExplanationOptions.model_validate({"target": target})
    of_form = ExplanationOptions.model_validate_strings({"target": str(target)})
    assert handler.class_index(of_json.target) == index
    if isinstance(target, str):
        assert handler.class_index(of_form.target) == index


def test_handler_without_explainable_does_not_start():
    class Incomplete(ExplainedClassifier):
        pass

    with pytest.raises(TypeError, match="explainable"):
        Incomplete()


# --- the shipped models ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SHIPPED)
def folder(request: pytest.FixtureRequest) -> ModelFolder:
    [found] = select([request.param])
    return found


@pytest.fixture(scope="module")
def worker(folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    with DryRun(archive(folder, store=tmp_path_factory.mktemp("store")).path) as worker:
        unhurried = worker.handler.settings.model_copy(update={"max_explain_seconds": 300.0})
        worker.handler.settings = unhurried  # a test machine may be slow
        yield worker


def sample(folder: ModelFolder) -> bytes | str:
    content = folder.sample_file.read_bytes()
    return content.decode() if folder.sample_file.suffix == ".txt" else content


def explain(worker: DryRun, folder: ModelFolder, **options: object) -> tuple[int, object]:
    [answer] = worker.predict([{"data": sample(folder), **options}], [EXPLAIN])
    return answer


def total(attributions: list) -> float:
    """Add up attributions of any kind."""
    if isinstance(attributions, list):
        return sum(map(total, attributions))
    return attributions["score"] if isinstance(attributions, dict) else attributions


@pytest.mark.slow
def test_prediction_loads_nothing_for_explanations(worker: DryRun, folder: ModelFolder):
    """The first test of this worker."""
    assert worker.predict([{"data": sample(folder)}])[0][0] == 200
    assert "original" not in vars(worker.handler)


@pytest.mark.slow
def test_explanation_of_the_sample_adds_up_and_is_repeatable(worker: DryRun, folder: ModelFolder):
    status, body = explain(worker, folder)
    assert status == 200, body
    assert body["target"]["label"] == folder.bundle.expect
    difference = body["target"]["score"] - body["target"]["baseline_score"]
    assert abs(body["completeness_gap"]) <= 0.05 * abs(difference)
    assert total(body["attributions"]) == pytest.approx(difference + body["completeness_gap"], rel=0.01)
    assert explain(worker, folder) == (200, body)
    assert set(json.loads(json.dumps(body))) >= {"target", "method", "attributions", "completeness_gap"}


@pytest.mark.slow
def test_explanation_has_the_shape_of_its_kind(worker: DryRun, folder: ModelFolder):
    _, body = explain(worker, folder, method="feature_ablation")
    attributions = body["attributions"]
    if folder.name in ("mnist", "image"):
        side = {"mnist": 28, "image": 32}[folder.name]
        assert numpy.array(attributions).shape == (side, side)
        with Image.open(folder.sample_file) as image:
            assert body["image"] == {"width": image.width, "height": image.height}
        if folder.name == "image":
            assert body["crop"] == pytest.approx([40, 0, 280, 240], abs=2)
    elif folder.name == "audio":
        assert (len(attributions), body["start"], body["step"]) == (100, 0, 0.01)
    else:
        text = sample(folder)
        assert [text[each["start"] : each["end"]] for each in attributions] == [each["token"] for each in attributions]
        assert "".join(each["token"] for each in attributions) == "".join(text.split())


@pytest.mark.slow
def test_each_method_answers_json_and_a_picture(worker: DryRun, folder: ModelFolder):
    for method in worker.handler.methods():
        status, body = explain(worker, folder, method=method, n_samples=4)
        assert (status, body["method"]) == (200, method), body
        status, picture = explain(worker, folder, method=method, n_samples=4, format="png")
        assert status == 200, picture
        with Image.open(io.BytesIO(picture)) as image:
            image.load()
            assert image.format == "PNG"
            assert len(image.getcolors(1_000_000)) > 8


@pytest.mark.slow
def test_shapley_values_add_up_exactly(worker: DryRun, folder: ModelFolder):
    _, body = explain(worker, folder, method="shapley_value_sampling", n_samples=2)
    assert body["completeness_gap"] == pytest.approx(0, abs=1e-3)


@pytest.mark.slow
def test_target_is_an_index_or_a_label(worker: DryRun, folder: ModelFolder):
    label = folder.labels()[1]
    targets = [explain(worker, folder, target=each, n_steps=2, n_samples=2)[1]["target"] for each in (1, label, b"1")]
    assert targets[0] == targets[1] == targets[2]
    assert (targets[0]["class"], targets[0]["label"]) == (1, label)
    assert targets[0]["probability"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method must be one of .*shapley_value_sampling"),
        ({"target": "no such label"}, "target must be a class index from 0 to"),
        ({"target": 10**9}, "target must be a class index from 0 to"),
        ({"target": -1}, "target must be a class index from 0 to"),
        ({"n_steps": 0}, "n_steps must be a whole number from 1 to 400"),
        ({"n_samples": 10**6}, "n_samples must be a whole number from 1 to 1000"),
        ({"format": "gif"}, "format must be one of json, png"),
        ({"top_k": 1}, "Unknown field"),
    ],
)
def test_invalid_explanation_is_rejected_and_its_neighbours_are_not(
    worker: DryRun, folder: ModelFolder, options: dict, message: str
):
    good = {"data": sample(folder)}
    [alone] = worker.predict([good])
    answers = worker.predict([good, good | options, good, {"data": b"\xff\xfe"}], [{}, EXPLAIN, {}, EXPLAIN])
    assert [status for status, _ in answers] == [200, 400, 200, 400]
    assert answers[1][1]["type"] in ("InvalidOption", "UnknownField")
    assert re.match(message, answers[1][1]["message"]), answers[1][1]
    for _, body in (answers[0], answers[2]):
        assert first_probability(body) == pytest.approx(first_probability(alone[1]), abs=0.02)


def first_probability(answer: dict) -> float:
    return answer["top_3_probabilities"][0] if "top_3_probabilities" in answer else answer["top_k"][0]["probability"]


@pytest.mark.slow
def test_explanations_beyond_the_time_of_a_batch_are_answered_429(
    worker: DryRun, folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
):
    explain(worker, folder)
    impatient = worker.handler.settings.model_copy(update={"max_explain_seconds": 1e-6})
    monkeypatch.setattr(worker.handler, "settings", impatient)
    good = {"data": sample(folder)}
    answers = worker.predict([good, good, good], [EXPLAIN, {}, EXPLAIN])
    assert [status for status, _ in answers] == [429, 200, 429]
    assert "Explaining this batch took too long" in answers[0][1]["message"]


@pytest.mark.slow
def test_explanation_that_does_not_fit_the_device_is_answered_507(
    worker: DryRun, folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
):
    def exhaust(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(worker.handler, "attribute", exhaust)
    good = {"data": sample(folder)}
    answers = worker.predict([good, good], [EXPLAIN, {}])
    assert [status for status, _ in answers] == [507, 200]
    assert answers[0][1]["type"] == "InsufficientMemory"


@pytest.mark.slow
def test_explanations_of_instances_are_answered_in_order(worker: DryRun, folder: ModelFolder):
    if folder.name != "text":
        pytest.skip("one kind of input is enough")
    texts = ["what is my balance", "play some music"]
    [(status, body)] = worker.predict([{"body": {"instances": texts}}], [EXPLAIN])
    assert status == 200
    assert [each["attributions"][0]["token"] for each in body["predictions"]] == ["what", "play"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a\nb\tc\x01d", "שלום 你好 🙂 hello", "word " * 900, "x" * 9000, "\n" * 200 + "a"])
def test_any_text_can_be_drawn(worker: DryRun, folder: ModelFolder, text: str):
    if folder.name != "text":
        pytest.skip("only texts")
    [(status, body)] = worker.predict([{"data": text, "format": "png", "n_samples": 1}], [EXPLAIN])
    assert status == 200, body
    with Image.open(io.BytesIO(body)) as image:
        assert image.height < 3000


@pytest.mark.slow
@pytest.mark.parametrize("size", [(8, 8), (4000, 9), (9, 4000), (1200, 900)])
def test_image_of_any_shape_can_be_drawn(worker: DryRun, folder: ModelFolder, size: tuple[int, int]):
    if folder.name != "image":
        pytest.skip("only images")
    content = encode_image(Image.effect_noise(size, 80), "PNG")
    [(status, body)] = worker.predict([{"data": content, "format": "png", "n_steps": 2}], [EXPLAIN])
    assert status == 200, body
    with Image.open(io.BytesIO(body)) as image:
        assert max(image.size) < 900


@pytest.mark.slow
def test_time_of_an_explanation_begins_after_the_import_of_its_methods(
    worker: DryRun, folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
):
    if folder.name != "mnist":
        pytest.skip("the same for each model")

    class Slow:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name == "handlers.core.attribution":
                time.sleep(6)

    monkeypatch.delitem(sys.modules, "handlers.core.attribution")
    monkeypatch.setattr(sys, "meta_path", [Slow, *sys.meta_path])
    hurried = worker.handler.settings.model_copy(update={"max_explain_seconds": 5.0})
    monkeypatch.setattr(worker.handler, "settings", hurried)
    started = time.monotonic()
    [(status, body)] = worker.predict([{"data": sample(folder)}], [EXPLAIN])
    assert status == 200, body
    assert time.monotonic() - started > 6


@pytest.mark.slow
def test_integrated_gradients_take_hardly_longer_than_their_passes_in_a_loop(worker: DryRun, folder: ModelFolder):
    """They take turns, and the fastest of each counts, because other load makes both slower."""
    handler = worker.handler
    if "integrated_gradients" not in handler.methods():
        pytest.skip("the inputs are not continuous")
    explainable = handler.explainable(explained_sample(handler, {"data": sample(folder)}))

    def explained() -> None:
        handler.attribute(explainable, ExplanationOptions(n_steps=50), Deadline.after(300, "Explaining"))

    def looped() -> None:
        for _ in range(50):
            [leaf] = [each.clone().requires_grad_() for each in explainable.inputs]
            torch.autograd.grad(handler.scores(explainable, (leaf,))[0, 0], leaf)

    seconds: dict = {explained: [], looped: []}
    ratio = math.inf
    while len(seconds[looped]) < 5 or (ratio > 1.3 and len(seconds[looped]) < 20):
        for run, times in seconds.items():
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        ratio = min(seconds[explained]) / min(seconds[looped])
    print(f"{folder.name}: {ratio:.2f} x the passes in a loop")
    assert ratio <= 1.3


@pytest.mark.slow
def test_explanations_of_real_inputs_are_complete_and_name_what_matters(worker: DryRun, folder: ModelFolder):
    """`metrics.json` has the same figures of 200 inputs."""
    skip_without_data_set(folder.name)
    assert measure(worker.handler, requests(folder.name, DATA_DIR, 12)).good
    recorded = json.loads((Path(folder.path) / "metrics.json").read_text())["explanations"]
    assert recorded["relative_gap"] <= 0.05
    assert recorded["drop"] > 2 * recorded["random_drop"]


@pytest.mark.slow
def test_silence_whose_gradients_are_not_finite_is_explained_by_ablation(tmp_path: Path):
    [folder] = select(["audio"])
    silence = encode_sound(numpy.zeros(16_000), 16_000)
    with DryRun(archive(folder, tmp_path).path) as worker:
        worker.handler.settings = worker.handler.settings.model_copy(update={"max_explain_seconds": 300.0})
        default, named = worker.predict(
            [{"data": silence}, {"data": silence, "method": "integrated_gradients"}], [EXPLAIN] * 2
        )
    assert (default[0], default[1]["method"]) == (200, "feature_ablation")
    assert (named[0], named[1]["type"]) == (400, "UnsupportedOperation")
    assert "feature_ablation" in named[1]["message"]
