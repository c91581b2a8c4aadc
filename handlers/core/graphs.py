"""One graph of a request -> tensors, within limits."""

from typing import Annotated

import numpy
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from handlers.core.errors import GraphTooLarge, InvalidGraph
from handlers.core.settings import NaturalInt, PositiveInt

Index = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
LARGEST = float(numpy.finfo(numpy.float32).max)
Number = Annotated[float, Field(strict=True, ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
# Find only the first invalid entry: errors for each of a million entries take minutes and gigabytes
FIRST = Field(fail_fast=True)


class Graph(BaseModel):
    """A graph as clients send it. Its edges have no direction.

    Attributes:
        nodes: the type of each node.
        edges: pairs of indices into `nodes`. Repeated pairs, and edges from a node to itself, are ignored.
        edge_attr: the features of each edge, where the model takes them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    nodes: Annotated[list[Index], FIRST]
    edges: Annotated[list[tuple[Index, Index]], FIRST] = []
    edge_attr: Annotated[list[Annotated[list[Number], FIRST]], FIRST] | None = None

    @model_validator(mode="before")
    @classmethod
    def keep_one_unknown_field(cls, value: object) -> object:
        """Leave out all unknown fields but one, for the same reason as `FIRST`."""
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        unknown = next(name for name in value if name not in cls.model_fields)
        return {name: each for name, each in value.items() if name in cls.model_fields or name == unknown}


class GraphLimits(BaseModel):
    node_types: PositiveInt  # how many types of nodes the model knows: 0 to node_types - 1
    edge_features: NaturalInt = 0  # how many features of an edge the model takes
    max_nodes: PositiveInt = 10_000  # larger graphs are rejected
    max_edges: PositiveInt = 50_000


def graph_tensors(graph: Graph, limits: GraphLimits) -> tuple[Tensor, ...]:
    """Return the tensors of one graph.

    Returns:
        node types, int64 [V]; edges in both directions, int64 [2, E]; if the model takes them, the edges' features,
        float32 [E, edge_features].

    Raises:
        GraphTooLarge: it has more nodes or edges than the limits allow.
        InvalidGraph: it has no nodes, a node of an unknown type, an edge to a node that it does not have, or too few or
            too many features.
    """
    for name, given, accepted in (
        ("nodes", graph.nodes, limits.max_nodes),
        ("edges", graph.edges, limits.max_edges),
    ):
        if len(given) > accepted:
            raise GraphTooLarge(f"The graph has {len(given)} {name}; at most {accepted} are accepted.")
    if not graph.nodes:
        raise InvalidGraph("The graph has no nodes. Send at least one.")
    nodes = numpy.array(graph.nodes, dtype=numpy.int64)
    if (unknown := nodes >= limits.node_types).any():
        index = int(unknown.argmax())
        raise InvalidGraph(
            f"nodes[{index}] is {nodes[index]}, and the model knows the node types 0 to {limits.node_types - 1}."
        )
    edges = numpy.array(graph.edges, dtype=numpy.int64).reshape(-1, 2)
    if (outside := (edges >= len(nodes)).any(axis=1)).any():
        index = int(outside.argmax())
        raise InvalidGraph(
            f"edges[{index}] is {edges[index].tolist()}, and the graph has the nodes 0 to {len(nodes) - 1}."
        )
    check_features(graph, limits.edge_features)
    pairs, kept = distinct_edges(edges, len(nodes))
    tensors = [torch.from_numpy(nodes), torch.from_numpy(numpy.concatenate([pairs, pairs[:, ::-1]]).T.copy())]
    if limits.edge_features:
        features = numpy.array(graph.edge_attr or [], dtype=numpy.float32).reshape(-1, limits.edge_features)[kept]
        tensors.append(torch.from_numpy(numpy.concatenate([features, features])))
    return tuple(tensors)


def distinct_edges(edges: numpy.ndarray, nodes: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return each edge once, int64 [E, 2] with the lower index first, and the position where it came first."""
    low, high = edges.min(axis=1), edges.max(axis=1)
    _, first = numpy.unique(low * nodes + high, return_index=True)
    kept = first[low[first] != high[first]]
    return numpy.stack([low[kept], high[kept]], axis=1), kept


def check_features(graph: Graph, expected: int) -> None:
    """Check that each edge has the number of features that the model takes.

    Raises:
        InvalidGraph: an edge has more or fewer.
    """
    given = graph.edge_attr
    if not expected:
        if given is not None:
            raise InvalidGraph("This model takes no features of edges. Leave edge_attr out.")
        return
    if len(given or []) != len(graph.edges):
        raise InvalidGraph(f"edge_attr must have one entry for each of the {len(graph.edges)} edges.")
    for index, features in enumerate(given or []):
        if len(features) != expected:
            raise InvalidGraph(f"edge_attr[{index}] has {len(features)} numbers; the model takes {expected}.")
