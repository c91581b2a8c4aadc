"""A user's own models behind a real TorchServe: two kinds in a models folder, and plain archives made by hand."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
import yaml
from torch import nn

from bundle.paths import ROOT
from tests.server.place import Place, new_place
from tests.support import batches
from tests.unit.inputs import white_box

HOUSE = {"rooms": 3, "area": 70.5, "age": 12}
PRICE = pytest.approx(10 * 3 + 2 * 70.5 - 12 + 5, rel=1e-3)
BOX = (2, 4, 6, 12)  # in sixteenths of an image's sides
CLIENTS = 16

PLAIN_HANDLER = """
import torch
from ts.torch_handler.base_handler import BaseHandler


class PlainHandler(BaseHandler):
    def preprocess(self, requests):
        return torch.tensor([request["body"]["values"] for request in requests]).to(self.device)

    def postprocess(self, outputs):
        return outputs.squeeze(1).tolist()
"""
PLAIN_MODEL = """
from torch import nn


class Plain(nn.Linear):
    def __init__(self):
        super().__init__(2, 1)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server of the models in tests/models, with a sample for the detector."""
    folder = tmp_path_factory.mktemp("own")
    models = folder / "models"
    shutil.copytree(ROOT / "tests" / "models", models, ignore=shutil.ignore_patterns("__pycache__"))
    (models / "boxes" / "sample.png").write_bytes(white_box(64, 64, BOX))
    file = models / "boxes" / "model-config.yaml"
    config = yaml.safe_load(file.read_text())
    config["bundle"]["sample"] = "sample.png"
    file.write_text(yaml.safe_dump(config))
    place = new_place(folder / "run")
    place.environment["TS_MODEL_STORE"] = str(folder / "store")
    try:
        started = place.bundle("--models-dir", str(models), "serve")
        assert started.returncode == 0, started.stdout + started.stderr
        place.environment["BUNDLE_MODELS"] = str(models)
        yield place
    finally:
        stopped = place.bundle("stop")
        assert stopped.returncode == 0, stopped.stderr


def post(place: Place, model: str, **content: object) -> requests.Response:
    return requests.post(f"{place.url('inference_address')}/predictions/{model}", **content, timeout=60)


def send_together(place: Place, model: str, contents: list[dict]) -> list[requests.Response]:
    """Send requests at the same time, and check that they shared batches."""
    batches_before, requests_before = batches(place.url("metrics_address"), model)
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda content: post(place, model, **content), contents))
    batches_after, requests_after = batches(place.url("metrics_address"), model, requests_before + len(answers))
    assert requests_after - requests_before == len(answers)
    assert batches_after - batches_before < len(answers), "no requests shared a batch"
    return answers


def test_status_lists_every_model_of_the_folder(own: Place):
    shown = own.bundle("status", "--json")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    models = {model["name"]: model["workers"]["ready"] for model in json.loads(shown.stdout)["models"]}
    assert models == {"boxes": 1, "price": 1}


def test_boxes_are_in_the_pixels_of_each_original_image_beside_poisoned_neighbours(own: Place):
    sizes = [(64, 64), (640, 320), (100, 400), (1024, 1024)] * 8
    good = [{"data": white_box(*size, BOX)} for size in sizes]
    answers = send_together(own, "boxes", [each for content in good for each in (content, {"data": b"not an image"})])
    for (width, height), answer, poisoned in zip(sizes, answers[::2], answers[1::2], strict=True):
        assert poisoned.status_code == 400, poisoned.text
        assert answer.status_code == 200, answer.text
        [found] = answer.json()["detections"]
        expected = [share * side / 16 for share, side in zip(BOX, (width, height) * 2, strict=True)]
        assert found["box"] == pytest.approx(expected, abs=max(width, height) / 32)


def test_a_price_is_answered_beside_poisoned_neighbours(own: Place):
    contents = [{"json": {"data": HOUSE | {"age": age}}} for age in range(32)]
    poison = {"json": {"data": {"rooms": 0, "area": 1}}}
    answers = send_together(own, "price", [each for content in contents for each in (content, poison)])
    for age, answer, poisoned in zip(range(32), answers[::2], answers[1::2], strict=True):
        assert poisoned.status_code == 400, poisoned.text
        assert answer.json() == {"price": pytest.approx(10 * 3 + 2 * 70.5 - age + 5, rel=1e-3)}


@pytest.mark.parametrize("protocol", [[], ["--grpc"]])
def test_predict_sends_a_sample_that_is_json(own: Place, protocol: list[str]):
    shown = own.bundle("predict", "price", *protocol)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert json.loads(shown.stdout) == {"price": PRICE}


def loadtest(place: Place, results: Path, *arguments: str) -> subprocess.CompletedProcess:
    """What `make loadtest` runs, on the server of RUN_DIR with the models of BUNDLE_MODELS."""
    return subprocess.run(
        [sys.executable, "-m", "loadtest", "run", *arguments, "--results", str(results)],
        cwd=ROOT, env=place.environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_load_test_counts_answers_that_are_no_ranking_as_right(own: Place, tmp_path: Path):
    lenient = tmp_path / "thresholds.yaml"
    lenient.write_text("defaults: {failures: 0, wrong: 0}\n")
    limits = ("--thresholds", str(lenient))
    run = loadtest(own, tmp_path / "run", "price", "boxes", "--users", "4", "--duration", "5s", *limits)
    assert run.returncode == 0, run.stdout + run.stderr
    with (tmp_path / "run" / "run_stats.csv").open() as file:
        counts = {row["Name"].removeprefix("/predictions/"): row for row in csv.DictReader(file)}
    for model in ("price", "boxes"):
        assert int(counts[model]["Request Count"]) > 0
        assert counts[model]["Failure Count"] == "0"


@pytest.mark.parametrize("is_eager", [True, False])
def test_a_plain_archive_made_by_hand_is_served_beside_them(own: Place, tmp_path: Path, is_eager: bool):
    """As a user of stock TorchServe does: torch-model-archiver, a file in the store, a POST to the management API."""
    model = nn.Linear(2, 1)
    model.load_state_dict({"weight": torch.tensor([[2.0, 3.0]]), "bias": torch.tensor([1.0])})
    if is_eager:
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        (tmp_path / "model.py").write_text(PLAIN_MODEL)
    else:
        torch.jit.script(model).save(tmp_path / "weights.pt")
    (tmp_path / "plain_handler.py").write_text(PLAIN_HANDLER)
    name = "eager" if is_eager else "scripted"
    archiver = Path(sys.executable).parent / "torch-model-archiver"
    files = ["--serialized-file", "weights.pt", *(["--model-file", "model.py"] if is_eager else [])]
    command = [archiver, "--model-name", name, "--version", "1.0", "--handler", "plain_handler.py", *files]
    subprocess.run([*command, "--export-path", own.environment["TS_MODEL_STORE"]], cwd=tmp_path, check=True)

    parameters = {"url": f"{name}.mar", "initial_workers": 1, "synchronous": "true", "batch_size": 4}
    registered = requests.post(f"{own.url('management_address')}/models", params=parameters, timeout=120)
    try:
        assert registered.status_code == 200, registered.text
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda x: post(own, name, json={"values": [x, 1.0]}), [0.0, 1.0, 2.0, 3.0]))
        assert [answer.json() for answer in answers] == [4.0, 6.0, 8.0, 10.0]
        (tmp_path / "input.json").write_text('{"values": [1.0, 1.0]}')
        shown = own.bundle("predict", name, str(tmp_path / "input.json"))
        assert (shown.returncode, shown.stdout) == (0, "6.0\n"), shown.stderr
        shown = json.loads(own.bundle("status", "--json").stdout)
        assert {model["name"] for model in shown["models"]} == {"boxes", "price", name}
        assert post(own, "price", json={"data": HOUSE}).json() == {"price": PRICE}
    finally:
        requests.delete(f"{own.url('management_address')}/models/{name}", timeout=60)
