"""The model of molecules: its features against a count with plain tuples, and its weights."""

import random
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn import WLConv

from models.molecule import train
from models.molecule.model import NODE_TYPES, RADIUS, MoleculeNet


@pytest.fixture(scope="module")
def graphs() -> list[Data]:
    """Return small graphs of two types of nodes, which have many subtrees in common."""
    chance, made = random.Random(0), []
    for index in range(24):
        count = chance.randint(1, 9)
        pairs = {(chance.randrange(node), node) for node in range(1, count)} | {(0, count - 1)} - {(0, 0)}
        edges = torch.tensor(sorted(pairs), dtype=torch.int64).reshape(-1, 2).T
        types = torch.tensor([chance.randrange(2) for _ in range(count)])
        both = torch.cat([edges, edges.flip(0)], dim=1)
        made.append(Data(x=torch.eye(NODE_TYPES)[types], edge_index=both, y=torch.tensor([index % 2])))
    return made


def counted(graph: Data) -> set[tuple]:
    """Return the features of a graph as tuples: (subtree, k), once for each k up to the number of its occurrences."""
    neighbours = [graph.edge_index[0][graph.edge_index[1] == node].tolist() for node in range(graph.num_nodes)]
    subtrees: list = [(each,) for each in graph.x.argmax(dim=1).tolist()]
    found = Counter(subtrees)
    for _ in range(RADIUS):
        subtrees = [(subtrees[i], *sorted(subtrees[j] for j in near)) for i, near in enumerate(neighbours)]
        found.update(subtrees)
    return {(subtree, k) for subtree, times in found.items() for k in range(times)}


def common(sets: list[set]) -> Tensor:
    return torch.tensor([[float(len(one & other)) for other in sets] for one in sets])


def test_graphs_share_as_many_features_as_subtrees(graphs: list[Data]):
    [(nodes, edges, sizes, _)] = train.Graphs(graphs, len(graphs))
    features, owners = MoleculeNet().features(nodes, edges, sizes)
    found = [set(features[owners == index].tolist()) for index in range(len(graphs))]
    assert [len(each) for each in found] == [graph.num_nodes * (RADIUS + 1) for graph in graphs]
    expected = common([counted(graph) for graph in graphs])
    assert len(expected.unique()) > 10
    torch.testing.assert_close(common(found), expected)


def test_nodes_have_equal_subtrees_where_pytorch_geometrics_convolution_says_so(graphs: list[Data]):
    [(nodes, edges, *_)] = train.Graphs(graphs, len(graphs))
    colours, model = nodes, MoleculeNet()
    for subtrees in model.subtrees_of(nodes, edges):
        assert torch.equal(subtrees[:, None] == subtrees, colours[:, None] == colours)
        colours = WLConv()(colours, edges)
    assert len(subtrees.unique()) > 20


def test_fitted_subtrees_score_graphs_as_kernel_regression_does(graphs: list[Data]):
    model = MoleculeNet()
    fit = train.fit(model, train.Graphs(graphs, 10), ridge=0.1)
    sizes = torch.tensor([float(graph.num_nodes) for graph in graphs])
    kernel = common([counted(graph) for graph in graphs]) / (sizes[:, None] * sizes).sqrt() / (RADIUS + 1)
    targets = torch.tensor([1.0 if graph.y.item() else -1.0 for graph in graphs])
    coefficients = torch.linalg.solve(kernel + 0.1 * torch.eye(len(graphs)), targets - targets.mean())
    expected = (kernel @ coefficients + targets.mean()) * fit["sharpness"]
    [(*inputs, _)] = train.Graphs(graphs, len(graphs))
    inactive, active = model(*inputs).unbind(dim=1)
    torch.testing.assert_close(active - inactive, expected, rtol=1e-3, atol=1e-2)


def test_graph_of_unknown_subtrees_gets_the_intercept():
    model = MoleculeNet()
    model.bias.fill_(0.5)
    logits = model(torch.tensor([36, 36]), torch.tensor([[0, 1], [1, 0]]), torch.tensor([2]))
    assert logits.tolist() == [[-0.25, 0.25]]
