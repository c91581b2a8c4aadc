"""Predictions of the shipped models over HTTP and gRPC, with each way to send an input."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from bundle.catalog import ModelFolder, select
from bundle.samples import first
from bundle.server import grpc_client
from tests.shipped import SHIPPED
from tests.support import batches

MODELS = {folder.name: folder for folder in select(list(SHIPPED))}
pytestmark = pytest.mark.parametrize("model", MODELS)


def sample(folder: ModelFolder) -> bytes:
    return folder.sample_file.read_bytes()


def as_json(folder: ModelFolder) -> str:
    """Return the sample as a JSON value: a text unchanged, everything else as base64."""
    content = sample(folder)
    return content.decode() if folder.sample_file.suffix == ".txt" else base64.b64encode(content).decode()


def ways(folder: ModelFolder) -> dict[str, dict]:
    field = {"form field": {"files": {"data": (None, as_json(folder))}}} if folder.name == "text" else {}
    return field | {
        "raw body": {"data": sample(folder)},
        "form file": {"files": {"data": (folder.sample_file.name, sample(folder))}},
        "JSON": {"json": {"data": as_json(folder)}},
        "text": {"data": as_json(folder), "headers": {"Content-Type": "text/plain"}},
        "JSON with charset": {
            "data": json.dumps({"data": as_json(folder)}),
            "headers": {"Content-Type": "application/json; charset=utf-8"},
        },
    }


def test_every_way_to_send_the_sample_gives_the_expected_answer(served, model):
    folder = MODELS[model]
    answers = {}
    for way, arguments in ways(folder).items():
        response = requests.post(f"{served.client.inference}/predictions/{model}", **arguments, timeout=30)
        assert response.status_code == 200, (way, response.text)
        assert response.headers["content-type"] == "application/json", way
        answers[way] = first(response.json()).label
    assert set(answers.values()) == {folder.bundle.expect}, answers


def test_instances_are_answered_in_order(served, model):
    folder = MODELS[model]
    body = {"instances": [as_json(folder), {"data": as_json(folder)}, as_json(folder)]}
    response = requests.post(f"{served.client.inference}/predictions/{model}", json=body, timeout=30)
    assert response.status_code == 200, response.text
    predictions = response.json()["predictions"]
    assert [first(prediction).label for prediction in predictions] == [folder.bundle.expect] * 3


def test_top_k_of_the_request_sets_the_number_of_classes(served, model):
    if model == "mnist":
        pytest.skip("MNIST always answers its top 3")
    folder = MODELS[model]
    for k in (1, 2, len(folder.labels())):
        body = {"data": as_json(folder), "top_k": k}
        answer = requests.post(f"{served.client.inference}/predictions/{model}", json=body, timeout=30).json()
        ranked = answer["top_k"]
        assert len(ranked) == k
        probabilities = [entry["probability"] for entry in ranked]
        assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-4)


def test_grpc_prediction_gives_the_expected_answer(served, model):
    folder = MODELS[model]
    answer = grpc_client.predict(f"127.0.0.1:{served.ports['grpc_inference_port']}", model, sample(folder))
    assert first(json.loads(answer)).label == folder.bundle.expect


ROUNDING = 0.02  # of bfloat16: it depends on the batch size


def test_valid_requests_in_a_batch_with_invalid_ones_are_answered_as_alone(served, model):
    folder = MODELS[model]
    url = f"{served.client.inference}/predictions/{model}"

    def send(content: bytes) -> requests.Response:
        return requests.post(url, data=content, timeout=30)

    alone = send(sample(folder)).json()
    batches_before, requests_before = batches(served.url("metrics_address"), model)
    poison = b"\xfd\xfe\xff not an input \xff"
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(send, [sample(folder), poison] * 32))
    batches_after, requests_after = batches(served.url("metrics_address"), model, requests_before + len(answers))
    assert requests_after - requests_before == len(answers)
    assert batches_after - batches_before < len(answers), "no requests shared a batch"
    for good, bad in zip(answers[::2], answers[1::2], strict=True):
        assert bad.status_code == 400, bad.text
        assert good.status_code == 200
        assert probabilities_of(good.json()) == pytest.approx(probabilities_of(alone), abs=ROUNDING)


def probabilities_of(answer: dict) -> list[float]:
    return answer.get("top_3_probabilities") or [entry["probability"] for entry in answer["top_k"]]
