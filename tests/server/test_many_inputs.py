"""A model of several optional inputs behind a real TorchServe: forms, JSON and gRPC."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from bundle.paths import MODELS as FOLDERS
from bundle.samples import first, grpc_fields
from bundle.server import grpc_client
from tests.server.place import Place
from tests.support import batches

NAME = "avdigits"
SAMPLE = FOLDERS / NAME / "sample.json"
FILES = grpc_fields(SAMPLE)
FIELDS = ("image", "text", "audio")
SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(FIELDS, size)]


@pytest.fixture
def place(served_on_request: Place) -> Place:
    return served_on_request


def form(subset: tuple[str, ...], **other: bytes) -> dict:
    """Return the fields of a form as curl -F sends them: files with names, a text without."""
    contents = {name: FILES[name] for name in subset} | other
    return {name: (None if name == "text" else f"{name}.bin", content) for name, content in contents.items()}


def post(place: Place, **content: object) -> requests.Response:
    return requests.post(f"{place.url('inference_address')}/predictions/{NAME}", **content, timeout=60)


def test_forms_of_all_subsets_share_batches_and_poisoned_ones_are_rejected_alone(place: Place):
    poisons = [form(("text", "audio"), image=b"no image"), form(("image", "text"), audio=b"no sound")]
    forms = [each for subset in SUBSETS * 4 for each in (form(subset), poisons[len(subset) % 2])]
    batches_before, requests_before = batches(place.url("metrics_address"), NAME)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda files: post(place, files=files), forms))
    batches_after, requests_after = batches(place.url("metrics_address"), NAME, requests_before + len(forms))
    assert requests_after - requests_before == len(forms)
    assert batches_after - batches_before < len(forms), "no requests shared a batch"
    for subset, good, bad in zip(SUBSETS * 4, answers[::2], answers[1::2], strict=True):
        assert (good.status_code, first(good.json()).label, good.json()["inputs"]) == (200, "7", list(subset))
        field = ("image", "audio")[len(subset) % 2]
        assert (bad.status_code, bad.json()["message"].startswith(f'In the field "{field}": ')) == (400, True)


def test_json_and_instances_are_answered_in_order(place: Place):
    sample = json.loads(SAMPLE.read_text())
    answer = post(place, json={"instances": [sample, {"text": "a two"}, {"image": sample["image"]}], "top_k": 1})
    assert answer.status_code == 200, answer.text
    found = [(first(each).label, each["inputs"]) for each in answer.json()["predictions"]]
    assert found == [("7", list(FIELDS)), ("2", ["text"]), ("7", ["image"])]


def test_request_without_inputs_is_rejected(place: Place):
    answer = post(place, json={"top_k": 1})
    assert (answer.status_code, "image, text and audio" in answer.json()["message"]) == (400, True)


def test_urlencoded_form_that_is_not_utf8_is_rejected_by_its_field_and_read_with_its_charset(place: Place):
    form = "application/x-www-form-urlencoded"
    rejected = post(place, data=b"text=caf\xe9+seven", headers={"Content-Type": form})
    assert (rejected.status_code, rejected.json()["type"]) == (400, "UndecodableText")
    assert rejected.json()["message"].startswith('In the field "text": The text is not valid UTF-8.')
    declared = {"Content-Type": f"{form}; charset=iso-8859-1"}
    assert first(post(place, data=b"text=caf\xe9+seven", headers=declared).json()).label == "7"


@pytest.mark.parametrize("subset", SUBSETS)
def test_grpc_prediction_of_a_subset_gives_the_expected_answer(place: Place, subset: tuple[str, ...]):
    address = f"127.0.0.1:{place.ports['grpc_inference_port']}"
    answer = json.loads(grpc_client.predict(address, NAME, {name: FILES[name] for name in subset}))
    assert (first(answer).label, answer["inputs"]) == ("7", list(subset))


@pytest.mark.parametrize("protocol", [[], ["--grpc"]])
def test_predict_sends_the_sample(place: Place, protocol: list[str]):
    shown = place.bundle("predict", NAME, *protocol)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert json.loads(shown.stdout)["inputs"] == list(FIELDS)
