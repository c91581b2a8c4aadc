"""Graphs: limits and errors of one graph, and batches of graphs of many sizes."""

import random
import tracemalloc
from collections.abc import Iterator

import pytest

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import select
from handlers.core.errors import GraphTooLarge, InvalidGraph
from handlers.core.graphs import Graph, GraphLimits, graph_tensors
from handlers.graph import GraphHandler

LIMITS = GraphLimits(node_types=4, max_nodes=5, max_edges=6)
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def molecule(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    [folder] = select(["molecule"])
    with DryRun(archive(folder, tmp_path_factory.mktemp("store")).path) as worker:
        yield worker


def tensors(limits: GraphLimits = LIMITS, **graph: object) -> list[list]:
    return [each.tolist() for each in graph_tensors(Graph.model_validate(graph), limits)]


def random_graph(seed: int) -> dict:
    chance = random.Random(seed)
    nodes = [chance.randrange(37) for _ in range(chance.randint(1, 60))]
    edges = [[chance.randrange(len(nodes)), chance.randrange(len(nodes))] for _ in range(chance.randint(0, 80))]
    return {"nodes": nodes, "edges": edges}


def test_edges_are_kept_once_in_both_directions():
    nodes, edges = tensors(nodes=[3, 0, 1], edges=[[2, 0], [0, 2], [1, 1], [0, 1]])
    assert nodes == [3, 0, 1]
    assert edges == [[0, 0, 1, 2], [1, 2, 0, 0]]
    assert tensors(nodes=[3]) == [[3], [[], []]]


def test_features_of_edges_follow_their_edges():
    limits = LIMITS.model_copy(update={"edge_features": 2})
    given = {"nodes": [0, 0, 0], "edges": [[2, 1], [1, 0], [1, 2]], "edge_attr": [[1, 2], [3, 4], [5, 6]]}
    _, edges, features = tensors(limits, **given)
    assert edges == [[0, 1, 1, 2], [1, 2, 0, 1]]
    assert features == [[3, 4], [1, 2], [3, 4], [1, 2]]
    assert tensors(limits, nodes=[0])[2] == []
    for wrong, message in (
        ([[1, 2]], "edge_attr must have one entry for each of the 3 edges"),
        ([[1, 2], [3], [5, 6]], r"edge_attr\[1\] has 1 numbers; the model takes 2"),
        (None, "edge_attr must have one entry for each of the 3 edges"),
    ):
        with pytest.raises(InvalidGraph, match=message):
            tensors(limits, **given | {"edge_attr": wrong})
    with pytest.raises(InvalidGraph, match="Leave edge_attr out"):
        tensors(nodes=[0], edge_attr=[])


@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        ({"nodes": [0] * 6}, GraphTooLarge, "has 6 nodes; at most 5"),
        ({"nodes": [0], "edges": [[0, 0]] * 7}, GraphTooLarge, "has 7 edges; at most 6"),
        ({"nodes": []}, InvalidGraph, "has no nodes"),
        ({"nodes": [0, 4]}, InvalidGraph, r"nodes\[1\] is 4, and the model knows the node types 0 to 3"),
        ({"nodes": [0, 1], "edges": [[0, 1], [1, 2]]}, InvalidGraph, r"edges\[1\] is \[1, 2\]"),
    ],
)
def test_invalid_graph_is_rejected_with_its_fault(graph: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        tensors(**graph)


@pytest.mark.parametrize(
    ("graph", "named"),
    [
        ({"nodes": [0, 1], "edges": [[0, 1, 1]]}, "data.edges.0"),
        ({"nodes": [0, 1], "edges": [[0]]}, "data.edges.0.1"),
        ({"nodes": [0, 1], "edges": [[0, -1]]}, "data.edges.0.1"),
        ({"nodes": [0, 1], "edges": [[0, 10**30]]}, "data.edges.0.1"),
        ({"nodes": [True]}, "data.nodes.0"),
        ({"nodes": [1.0]}, "data.nodes.0"),
        ({"nodes": "C"}, "data.nodes"),
        ({"edges": []}, "data.nodes"),
        ({"nodes": [0], "atoms": []}, "data.atoms"),
        ([[0, 1]], "data"),
    ],
)
def test_malformed_graph_beside_a_valid_one_fails_alone(molecule: DryRun, graph: object, named: str):
    good = {"body": {"data": random_graph(0)}}
    bad, neighbour = molecule.predict([{"body": {"data": graph}}, good], [JSON, JSON])
    assert (bad[0], bad[1]["type"]) == (400, "UnsupportedInput")
    assert bad[1]["message"].startswith(f'"{named}" is invalid: ')
    assert neighbour == molecule.predict([good], [JSON])[0]


def test_a_million_nodes_are_rejected_by_their_number(molecule: DryRun):
    [(status, body)] = molecule.predict([{"body": {"data": {"nodes": [0] * 10**6}}}])
    assert (status, body["type"]) == (413, "GraphTooLarge")
    assert body["message"] == "The graph has 1000000 nodes; at most 2000 are accepted."


@pytest.mark.parametrize(
    ("graph", "named"),
    [
        ({"nodes": [-1] * 300_000}, "data.nodes.0"),
        ({"nodes": [0], "edges": [0] * 300_000}, "data.edges.0"),
        ({"nodes": [0], "edges": [[-1] * 300_000]}, "data.edges.0"),
        ({"nodes": [0], "edge_attr": [["1"] * 300_000]}, "data.edge_attr.0.0"),
        ({"nodes": [0], "edge_attr": [0] * 300_000}, "data.edge_attr.0"),
        ({"nodes": [0], "edge_attr": [[1e300]]}, "data.edge_attr.0.0"),
        ({"nodes": [0]} | {str(key): 0 for key in range(300_000)}, "data.0"),
    ],
    ids=[
        "nodes",
        "edges",
        "ends of an edge",
        "features",
        "lists of features",
        "too large for float32",
        "unknown fields",
    ],
)
def test_only_the_first_of_many_faults_is_described(molecule: DryRun, graph: dict, named: str):
    """Pydantic needs a kilobyte for each fault: a body of 16 MiB with faults only would take gigabytes and minutes."""
    tracemalloc.start()
    try:
        [(status, body)] = molecule.predict([{"body": {"data": graph}}])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (status, body["message"].startswith(f'"{named}" is invalid: ')) == (400, True), body
    assert peak < 10e6


def test_graphs_of_many_sizes_in_a_batch_are_answered_like_each_alone(molecule: DryRun):
    rows = [{"body": {"data": random_graph(seed)}} for seed in range(40)]
    together = molecule.predict(rows)
    instances = molecule.predict([{"body": {"instances": [random_graph(seed) for seed in range(32)]}}])
    for index, row in enumerate(rows):
        [(status, alone)] = molecule.predict([row])
        answers = [together[index][1], *([instances[0][1]["predictions"][index]] if index < 32 else [])]
        for answer in answers:
            assert status == together[index][0] == 200
            for one, other in zip(alone["top_k"], answer["top_k"], strict=True):
                assert one["label"] == other["label"]
                assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)


def test_answer_does_not_depend_on_the_order_of_nodes_and_edges(molecule: DryRun):
    graph = random_graph(1)
    order = list(range(len(graph["nodes"])))
    random.Random(2).shuffle(order)
    moved = {"nodes": [0] * len(order), "edges": [[order[b], order[a]] for a, b in reversed(graph["edges"])]}
    for old, new in enumerate(order):
        moved["nodes"][new] = graph["nodes"][old]
    (_, one), (_, other) = molecule.predict([{"body": {"data": graph}}, {"body": {"data": moved}}])
    assert one["top_k"][0]["probability"] == pytest.approx(other["top_k"][0]["probability"], abs=1e-4)


def test_features_of_edges_are_collated_beside_the_edges():
    handler = GraphHandler()
    handler.settings = handler.Settings(node_types=4, edge_features=1)
    one, ring = handler.decode(handler.Inputs(data={"nodes": [1]})), handler.example()
    nodes, edges, sizes, features = handler.collate([one, ring])
    assert sizes.tolist() == [1, 30]
    assert (nodes.shape, edges.shape, features.shape) == ((31,), (2, 60), (60, 1))
    assert edges.min() == 1
