"""Classify a graph, such as a molecule: the k most probable classes."""

import torch
from torch import Tensor

from handlers.core import inputs
from handlers.core.batch import Sample
from handlers.core.classifier import ClassifierHandler
from handlers.core.graphs import Graph, GraphLimits, graph_tensors

TYPICAL_NODES = 30


class GraphHandler(ClassifierHandler):
    """Model: nodes int64 [V], edges int64 [2, E], sizes int64 [N] (nodes of each graph) -> logits [N, classes].

    The graphs of a batch are one graph with N unconnected parts, as PyTorch Geometric's `Batch` has them. With the
    setting `edge_features`, the module's fourth argument is float32 [E, edge_features].
    """

    class Settings(ClassifierHandler.Settings, GraphLimits):
        pass

    settings: Settings

    class Inputs(inputs.Inputs):
        data: Graph

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
