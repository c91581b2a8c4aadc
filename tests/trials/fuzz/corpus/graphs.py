"""Generate graphs in JSON, as clients of a model of molecules send them."""

import json
from random import Random

CARBON, TYPES = 2, 37
MOST_NODES, MOST_EDGES = 2_000, 10_000  # the limits in the model's settings


def molecules() -> dict[str, bytes]:
    """Return rings with tails, and graphs at random."""
    found = {}
    for size in (5, 6, 7, 12):
        ring = [[index, (index + 1) % size] for index in range(size)]
        found[f"ring of {size}"] = body([CARBON] * size + [0, 1], [*ring, [0, size], [size, size + 1]])
    for seed in range(6):
        random = Random(seed)
        nodes = random.choices(range(TYPES), k=random.randint(4, 40))
        edges = [[random.randrange(index), index] for index in range(1, len(nodes))]
        found[f"tree {seed}"] = body(nodes, edges)
    return found


def graphs() -> dict[str, bytes]:
    """Return molecules, and graphs at the limits of what is accepted and past them."""
    ends = [[0, MOST_NODES - 1]]
    return molecules() | {
        "one node": body([0], []),
        "no edges": json.dumps({"data": {"nodes": [1, 2, 3]}}).encode(),
        "edges to themselves": body([1, 2], [[0, 0], [1, 1], [0, 1], [1, 0]]),
        "most nodes": body([TYPES - 1] * MOST_NODES, ends),
        "one node more": body([TYPES - 1] * (MOST_NODES + 1), ends),
        "most edges": body([0] * MOST_NODES, [[index % MOST_NODES, index // 7] for index in range(MOST_EDGES)]),
        "one edge more": body([0, 0], [[0, 1]] * (MOST_EDGES + 1)),
        "unknown type": body([TYPES], []),
        "features of edges": json.dumps({"data": {"nodes": [0, 1], "edges": [[0, 1]], "edge_attr": [[1.0]]}}).encode(),
    }


def body(nodes: list[int], edges: list[list[int]]) -> bytes:
    return json.dumps({"data": {"nodes": nodes, "edges": edges}}).encode()
