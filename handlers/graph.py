"""Classify a graph, such as a molecule: the k most probable classes."""

from typing import cast

import torch
from torch import Tensor

from handlers.core import answers, inputs
from handlers.core.batch import Sample
from handlers.core.errors import GraphTooLarge
from handlers.core.explain import Explainable, ExplainedClassifier
from handlers.core.graphs import Graph, GraphLimits, graph_tensors
from handlers.core.settings import PositiveInt

TYPICAL_NODES = 30


class GraphHandler(ExplainedClassifier):
    """Model: nodes int64 [V], edges int64 [2, E], sizes int64 [N] (nodes of each graph) -> logits [N, classes].

    The graphs of a batch are one graph with N unconnected parts, as PyTorch Geometric's `Batch` has them. With the
    setting `edge_features`, the module's fourth argument is float32 [E, edge_features].
    """

    class Settings(ExplainedClassifier.Settings, GraphLimits):
        max_explained_parts: PositiveInt = 500  # nodes and edges; an explanation runs the model several times for each

    settings: Settings

    class Inputs(inputs.Inputs):
        data: Graph

    ExplainAnswer = answers.GraphExplanation

    def decode(self, inputs: Inputs) -> Sample:
        return Sample(graph_tensors(inputs.data, self.settings))

    def collate(self, samples: list[Sample]) -> tuple[Tensor, ...]:
        """Put the graphs one after the other, and shift the indices of each graph's edges by the nodes before it."""
        nodes, edges, *features = zip(*(sample.tensors for sample in samples), strict=True)
        sizes = torch.tensor([len(each) for each in nodes])
        starts = (sizes.cumsum(0) - sizes).tolist()
        shifted = [each + start for each, start in zip(edges, starts, strict=True)]
        return torch.cat(nodes), torch.cat(shifted, dim=1), sizes, *map(torch.cat, features)

    def example(self) -> Sample:
        """Return a ring of nodes."""
        edges = [(index, (index + 1) % TYPICAL_NODES) for index in range(TYPICAL_NODES)]
        features = [[0.0] * self.settings.edge_features] * len(edges) if self.settings.edge_features else None
        ring = Graph(nodes=[0] * TYPICAL_NODES, edges=edges, edge_attr=features)
        return Sample(graph_tensors(ring, self.settings))

    def explainable(self, sample: Sample) -> Explainable:
        """Replace nodes by the graph's most frequent type, and remove edges: from 1, which keeps a part, to 0.

        Without a node, a graph would be of another kind, and its score would say little about the node.

        Raises:
            GraphTooLarge: it has more parts than the limit allows.
        """
        nodes, edges, *features = cast("tuple[Tensor, ...]", sample.tensors)
        pairs = edges[:, : edges.size(1) // 2]  # each edge once
        numbers = torch.arange(len(nodes) + pairs.size(1))
        if len(numbers) > self.settings.max_explained_parts:
            raise GraphTooLarge(
                f"The graph has {len(nodes)} nodes and {pairs.size(1)} edges; an explanation takes at most "
                f"{self.settings.max_explained_parts} together."
            )

        def arguments(kept_nodes: Tensor, kept_edges: Tensor) -> tuple[Tensor, ...]:
            device = kept_nodes.device
            types = torch.where(kept_nodes > 0.5, nodes.to(device), nodes.mode().values.to(device))
            graphs, columns = (kept_edges > 0.5).nonzero(as_tuple=True)
            ends = pairs.to(device)[:, columns] + graphs * len(nodes)
            of_edges = [each.to(device)[columns].repeat(2, 1) for each in features]
            sizes = torch.full((len(types),), len(nodes), device=device)
            return types.flatten(), torch.cat([ends, ends.flip(0)], dim=1), sizes, *of_edges

        def describe(of_nodes: Tensor, of_edges: Tensor) -> dict:
            scored = zip(pairs.T.tolist(), of_edges.tolist(), strict=True)
            edges = [{"edge": pair, "score": score} for pair, score in scored]
            return {"attributions": {"nodes": of_nodes.tolist(), "edges": edges}}

        def draw(of_nodes: Tensor, of_edges: Tensor, caption: str) -> bytes:
            from handlers.core import graphs_drawn  # imports Pillow, which predictions do not need

            return graphs_drawn.draw(nodes.numpy(), pairs.T.numpy(), (of_nodes.numpy(), of_edges.numpy()), caption)

        sizes = len(nodes), pairs.size(1)
        return Explainable(
            inputs=tuple(torch.ones(1, size) for size in sizes),
            baselines=tuple(torch.zeros(1, size) for size in sizes),
            groups=tuple(each[None] for each in numbers.split(sizes)),
            arguments=arguments,
            describe=describe,
            draw=draw,
            differentiable=False,
            preferred="feature_ablation",
        )
