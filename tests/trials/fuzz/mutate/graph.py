"""Mutate graphs in JSON: {"nodes": [type, ...], "edges": [[from, to], ...]}."""

import json
from random import Random

from tests.trials.fuzz.mutate import generic, tree
from tests.trials.fuzz.mutate.tree import Verbatim

NUMBERS = (-1, -0.0, 0.5, 1.0, 36, 37, 2**31 - 1, 2**31, 2**63, 10**400, *map(Verbatim, ("NaN", "1e999", "-Infinity")))
ENTRIES = (*NUMBERS, None, True, "0", "C", [], [0], [[0]], {}, {"type": 0})
EDGES = ([], [0], [0, 0, 0], [[0, 0]], {"from": 0, "to": 0}, "00", None, 0, [None, 0], ["0", "0"], [False, False])
FEATURES = (None, [], [[]], [[1.0]], [[1.0]] * 100, [Verbatim("NaN")], [["1"]], "1", {}, 1.0)
NAMES = ("nodes", "edges", "edge_attr", "Nodes", "node", "", "edge_index", "x", "data", "instances")
SIZES = (0, 1, 2_000, 2_001, 10_000, 10_001, 50_001, 1_000_000)
CHANGES = ("node", "edge", "edge", "past", "number", "features", "remove", "rename", "nodes", "edges", "tree")


def mutated(content: bytes, random: Random) -> bytes:
    try:
        return changed(json.loads(content), random)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # a former change left no graph
        return generic.mutated(content, [content], random)


def changed(graph: dict, random: Random) -> bytes:
    nodes, edges = list(graph["nodes"]), list(graph.get("edges", []))
    change = random.choice(CHANGES)
    if change == "node":
        nodes = replaced(nodes, random.choice(ENTRIES), random)
    elif change == "edge":
        edges = replaced(edges, random.choice(EDGES), random)
    elif change == "past":
        edge = [random.choice((0, len(nodes) - 1)), len(nodes) + random.choice((-1, 0, 1, 1000))]
        edges = replaced(edges, random.sample(edge, 2), random)
    elif change == "number":
        edges = replaced(edges, random.sample([0, random.choice(NUMBERS)], 2), random)
    graph |= {"nodes": nodes, "edges": edges}
    if change == "features":
        graph["edge_attr"] = random.choice(FEATURES)
    elif change == "remove":
        del graph[random.choice(list(graph))]
    elif change == "rename":
        graph[random.choice(NAMES)] = graph.pop(random.choice(list(graph)))
    elif change == "nodes":
        graph["nodes"] = many(random.choice(("0", "-1", "36", "0.5")), random)
    elif change == "edges":
        graph["edges"] = many(random.choice(("[0,0]", "[0,1]", "[0]", "1")), random)
    node = tree.build(graph)
    return tree.write(tree.mutated(node, random) if change == "tree" else node).encode("utf-8", "surrogatepass")


def replaced(items: list, item: object, random: Random) -> list:
    """Put the item at a random position, sometimes in place of another."""
    at = random.randint(0, len(items))
    return [*items[:at], item, *items[at + random.randint(0, 1) :]]


def many(item: str, random: Random) -> Verbatim:
    """Return a list of one item repeated; the longest has a million entries, and about two million bytes."""
    count = min(random.choice(SIZES), 2_000_000 // (len(item) + 1))
    return Verbatim(f"[{','.join([item] * count)}]")
