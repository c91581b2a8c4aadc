"""The model of molecules behind a real TorchServe."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from bundle.catalog import select
from tests.server.place import Place
from tests.support import batches
from tests.unit.test_graph import random_graph

CLIENTS = 16


def post(place: Place, graph: dict) -> requests.Response:
    return requests.post(f"{place.url('inference_address')}/predictions/molecule", json={"data": graph}, timeout=60)


@pytest.mark.parametrize("protocol", [[], ["--grpc"]])
def test_predict_sends_the_sample(served_on_request: Place, protocol: list[str]):
    [folder] = select(["molecule"])
    shown = served_on_request.bundle("predict", "molecule", *protocol)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert json.loads(shown.stdout)["top_k"][0]["label"] == folder.bundle.expect


def test_graphs_of_many_sizes_share_batches_beside_poisoned_neighbours(served_on_request: Place):
    graphs = [random_graph(seed) for seed in range(64)]
    alone = [post(served_on_request, graph).json()["top_k"][0] for graph in graphs]
    poison = {"nodes": [0], "edges": [[0, 1]]}
    contents = [each for graph in graphs for each in (graph, poison)]
    metrics = served_on_request.url("metrics_address")
    batches_before, requests_before = batches(metrics, "molecule")
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda graph: post(served_on_request, graph), contents))
    batches_after, requests_after = batches(metrics, "molecule", requests_before + len(contents))
    assert requests_after - requests_before == len(contents)
    assert batches_after - batches_before < len(contents), "no requests shared a batch"
    for expected, answer, poisoned in zip(alone, answers[::2], answers[1::2], strict=True):
        assert (poisoned.status_code, poisoned.json()["type"]) == (400, "InvalidGraph")
        [best, _] = answer.json()["top_k"]
        assert best["label"] == expected["label"]
        assert best["probability"] == pytest.approx(expected["probability"], abs=1e-4)


def test_graph_with_millions_of_faults_is_rejected_and_the_worker_survives(served_on_request: Place):
    before = [worker["pid"] for worker in served_on_request.client.describe("molecule")["workers"]]
    body = '{"data": {"nodes": [' + "-1," * 5_000_000 + "-1]}}"
    url = f"{served_on_request.url('inference_address')}/predictions/molecule"
    with ThreadPoolExecutor(2) as pool:
        headers = {"Content-Type": "application/json"}
        faulty = pool.submit(requests.post, url, data=body, headers=headers, timeout=120)
        answer = pool.submit(post, served_on_request, random_graph(0)).result()
    assert (faulty.result().status_code, faulty.result().json()["type"]) == (400, "UnsupportedInput")
    assert answer.status_code == 200, answer.text
    assert [worker["pid"] for worker in served_on_request.client.describe("molecule")["workers"]] == before
