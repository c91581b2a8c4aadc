"""A graph network and a graph kernel that classify molecules together, in plain PyTorch.

A worker needs no graph library.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.weights import load_weights

FOLDER = Path(__file__).parent
NODE_TYPES = 37
CLASSES = 2
WIDTH = 64
LAYERS = 5
RADIUS = 4  # of the largest subtrees, in bonds
SUBTREES = 1 << 17  # room for those of the training graphs


class Convolution(nn.Module):
    """One layer of a graph isomorphism network (GIN): an MLP of a node's features plus the sum of its neighbours'.

    The source is Xu et al. 2019, "How Powerful are Graph Neural Networks?", equation 4.1, with a learned epsilon. It
    computes the same as PyTorch Geometric's `GINConv(mlp, train_eps=True)`.
    """

    def __init__(self):
        super().__init__()
        self.epsilon = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.BatchNorm1d(2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:
        """Compute features, float32 [V, WIDTH] -> float32 [V, WIDTH]; edges int64 [2, E] (from, to)."""
        neighbours = torch.zeros_like(features).index_add_(0, edges[1], features[edges[0]])
        return self.mlp((1 + self.epsilon) * features + neighbours)


class IsomorphismNet(nn.Module):
    """Classify molecules from the sums of their atoms' features after each layer ("jumping knowledge")."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(NODE_TYPES, WIDTH)
        self.convolutions = nn.ModuleList(Convolution() for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(LAYERS))
        self.hidden = nn.Linear((LAYERS + 1) * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)
        self.classify = nn.Linear(WIDTH, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor, sizes: Tensor) -> Tensor:
        """Compute the logits of N graphs, float32 [N, 2]; see `MoleculeNet`."""
        count, graph_of_node = sizes.size(0), graph_indices(nodes, sizes)
        features = self.embed(nodes)
        readouts = [self.pool(features, graph_of_node, count)]
        for convolution, norm in zip(self.convolutions, self.norms):  # noqa: B905 - TorchScript knows no `strict`
            features = torch.relu(norm(convolution(features, edges)))
            readouts.append(self.pool(features, graph_of_node, count))
        return self.classify(self.drop(torch.relu(self.hidden(torch.cat(readouts, dim=1)))))

    def pool(self, features: Tensor, graph_of_node: Tensor, count: int) -> Tensor:
        """Sum the features of each graph's nodes: float32 [V, WIDTH] -> float32 [N, WIDTH]."""
        return features.new_zeros(count, features.size(1)).index_add_(0, graph_of_node, features)


def graph_indices(nodes: Tensor, sizes: Tensor) -> Tensor:
    """Return the graph of each node, int64 [V]."""
    graphs = torch.arange(sizes.size(0), device=sizes.device)
    return graphs.repeat_interleave(sizes, output_size=nodes.size(0))


def scramble(numbers: Tensor) -> Tensor:
    """Map int64 one to one onto int64 that look random (the last steps of SplitMix64, Steele et al. 2014)."""
    numbers = (numbers ^ (numbers >> 30)) * -4658895280553007687
    numbers = (numbers ^ (numbers >> 27)) * -7723592293110705685
    return numbers ^ (numbers >> 31)


class Subtrees(nn.Module):
    """Score molecules by the subtrees around their nodes, up to `RADIUS` bonds deep.

    It is a linear model in the features of the Weisfeiler-Lehman optimal assignment kernel (Kriege et al. 2016). A
    feature is a subtree and a number k; a graph has it if it has the subtree at least k times. Subtrees are known by a
    hash of 64 bits.
    """

    keys: Tensor
    weights: Tensor
    bias: Tensor

    def __init__(self):
        super().__init__()
        self.radius = RADIUS  # TorchScript sees no global variables
        self.register_buffer("keys", torch.full((SUBTREES,), 2**63 - 1))  # features of the training graphs, ascending
        self.register_buffer("weights", torch.zeros(SUBTREES))
        self.register_buffer("bias", torch.zeros(()))

    def forward(self, nodes: Tensor, edges: Tensor, sizes: Tensor) -> Tensor:
        """Compute the logits of N graphs, float32 [N, 2]; see `MoleculeNet`."""
        features, graphs = self.features(nodes, edges, sizes)
        places = torch.searchsorted(self.keys, features).clamp_max(self.keys.size(0) - 1)
        weights = torch.where(self.keys[places] == features, self.weights[places], 0.0)
        sums = self.weights.new_zeros(sizes.size(0)).index_add_(0, graphs, weights)
        score = sums / sizes.sqrt() + self.bias
        return torch.stack([-score, score], dim=1) / 2

    def features(self, nodes: Tensor, edges: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of all graphs in any order, and their graphs: int64 [V * (RADIUS + 1)] each."""
        subtrees = [scramble(nodes + 1)]
        for _ in range(self.radius):
            roots = subtrees[-1]
            branches = torch.zeros_like(roots).index_add_(0, edges[1], roots[edges[0]])
            subtrees.append(scramble(scramble(roots) + branches))
        found = torch.cat(subtrees)
        graphs = graph_indices(nodes, sizes).repeat(self.radius + 1)
        mixed = scramble(found)
        groups, order = (mixed + graphs).sort()  # equal subtrees of a graph become neighbours
        earlier = torch.arange(len(groups), device=groups.device) - torch.searchsorted(groups, groups)
        return mixed[order] + earlier, graphs[order]


class MoleculeNet(nn.Module):
    """Classify molecules by the mean of the logits of a graph network and of a model of subtrees."""

    def __init__(self):
        super().__init__()
        self.network, self.subtrees = IsomorphismNet(), Subtrees()

    def forward(self, nodes: Tensor, edges: Tensor, sizes: Tensor) -> Tensor:
        """Compute the logits of N graphs, whose V nodes come one graph after the other.

        Args:
            nodes: int64 [V], the node types.
            edges: int64 [2, E], from and to, as indices into `nodes`; an undirected edge has both directions.
            sizes: int64 [N], the number of nodes of each graph.

        Returns:
            float32 [N, 2].
        """
        return (self.network(nodes, edges, sizes) + self.subtrees(nodes, edges, sizes)) / 2


def build() -> nn.Module:
    """Return the trained model, on the CPU, in evaluation mode."""
    return load_weights(MoleculeNet(), FOLDER / "weights.safetensors")


def example_inputs(batch_size: int) -> tuple[Tensor, ...]:
    """Return graphs of the served shape, to compare an export with the eager model: rings of 3 to 30 nodes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(3, 31, (batch_size,), generator=generator)
    nodes = torch.randint(0, NODE_TYPES, (int(sizes.sum()),), generator=generator)
    rings, start = [], 0
    for size in sizes.tolist():
        index = torch.arange(size)
        rings.append(torch.stack([index, (index + 1) % size]) + start)
        start += size
    edges = torch.cat(rings, dim=1)
    return nodes, torch.cat([edges, edges.flip(0)], dim=1), sizes
