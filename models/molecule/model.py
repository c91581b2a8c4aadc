"""A graph kernel that classifies molecules, in plain PyTorch: a worker needs no graph library."""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.weights import load_weights

FOLDER = Path(__file__).parent
NODE_TYPES = 37
LABELS = ["inactive", "active"]
RADIUS = 4  # of the largest subtrees, in bonds
SUBTREES = 1 << 17  # room for those of the training graphs


def scramble(numbers: Tensor) -> Tensor:
    """Map int64 one to one onto int64 that look random (the last steps of SplitMix64, Steele et al. 2014)."""
    numbers = (numbers ^ (numbers >> 30)) * -4658895280553007687
    numbers = (numbers ^ (numbers >> 27)) * -7723592293110705685
    return numbers ^ (numbers >> 31)


class MoleculeNet(nn.Module):
    """Score molecules by the subtrees around their nodes, up to `RADIUS` bonds deep.

    It is a linear model in the features of the Weisfeiler-Lehman optimal assignment kernel (Kriege et al. 2016). A
    feature is a subtree and a number k; a graph has it if it has the subtree at least k times. A hash of 64 bits stands
    for a subtree.
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
        """Compute the logits of N graphs, whose V nodes come one graph after the other.

        Args:
            nodes: int64 [V], the node types.
            edges: int64 [2, E], from and to, as indices into `nodes`; an undirected edge has both directions.
            sizes: int64 [N], the number of nodes of each graph.

        Returns:
            float32 [N, 2].
        """
        features, graphs = self.features(nodes, edges, sizes)
        places = torch.searchsorted(self.keys, features).clamp_max(self.keys.size(0) - 1)
        weights = torch.where(self.keys[places] == features, self.weights[places], 0.0)
        sums = self.weights.new_zeros(sizes.size(0)).index_add_(0, graphs, weights)
        score = sums / sizes.sqrt() + self.bias
        return torch.stack([-score, score], dim=1) / 2

    def subtrees_of(self, nodes: Tensor, edges: Tensor) -> list[Tensor]:
        """Return the hash of each node's subtree, int64 [V], for each radius from 0."""
        subtrees = [scramble(nodes + 1)]
        for _ in range(self.radius):
            roots = subtrees[-1]
            branches = torch.zeros_like(roots).index_add_(0, edges[1], roots[edges[0]])
            subtrees.append(scramble(scramble(roots) + branches))
        return subtrees

    def features(self, nodes: Tensor, edges: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of all graphs in any order, and their graphs: int64 [V * (RADIUS + 1)] each."""
        found = torch.cat(self.subtrees_of(nodes, edges))
        indices = torch.arange(sizes.size(0), device=sizes.device)
        graphs = indices.repeat_interleave(sizes, output_size=nodes.size(0)).repeat(self.radius + 1)
        mixed = scramble(found)
        groups, order = (mixed + graphs).sort()  # equal subtrees of a graph become neighbours
        earlier = torch.arange(len(groups), device=groups.device) - torch.searchsorted(groups, groups)
        return mixed[order] + earlier, graphs[order]


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
