"""Message passing over edge lists: the batch is a batch of graphs of one size, edges are numbered within a graph."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import BATCH, Case
from tests.zoo.registry import entries

NODES, EDGES, FEATURES = 6, 16, 8


def _graphs() -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(BATCH, NODES, FEATURES),
        "edges": torch.randint(0, NODES, (BATCH, 2, EDGES)),
        "target": torch.randint(0, 4, (BATCH,)),
    }


def _flat(x: torch.Tensor, edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The graphs of a batch as one graph: [batch * nodes, features], and sources and targets of all edges."""
    offset = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1), (edges[:, 0] + offset).flatten(), (edges[:, 1] + offset).flatten()


class GraphConvolution(nn.Module):
    """Kipf and Welling: neighbours are summed with symmetric normalisation by degrees, all graphs as one."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inner, outer, bias=False)
        self.bias = nn.Parameter(torch.zeros(outer))

    def forward(self, x: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """x: [nodes, inner]; source, target: [edges] -> [nodes, outer]."""
        x = self.linear(x)
        degree = x.new_ones(x.shape[0]).index_add(0, target, x.new_ones(target.shape))
        norm = degree.rsqrt()
        messages = x[source] * (norm[source] * norm[target])[:, None]
        return x / degree[:, None] + torch.zeros_like(x).index_add(0, target, messages) + self.bias


class GCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GraphConvolution(FEATURES, 32), GraphConvolution(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """x: [batch, nodes, features]; edges: [batch, 2, edges] int64 -> [batch, 4]."""
        batch = x.shape[0]
        h, source, target = _flat(x, edges)
        h = F.relu(self.first(h, source, target))
        h = F.relu(self.second(h, source, target))
        return self.head(h.unflatten(0, (batch, -1)).mean(1))


def gcn() -> Case:
    """Graphs of the batch joined into one, `index_add` over all edges."""
    return Case(GCN(), _graphs(), F.cross_entropy)


class GraphAttention(nn.Module):
    """Attention over incoming edges; softmax by scatter maximum and scatter sum, within each graph."""

    def __init__(self, inner: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear = nn.Linear(inner, heads * width, bias=False)
        self.source = nn.Parameter(torch.randn(heads, width) / width)
        self.target = nn.Parameter(torch.randn(heads, width) / width)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """x: [batch, nodes, inner]; edges: [batch, 2, edges] -> [batch, nodes, heads * width]."""
        x = self.linear(x).unflatten(-1, (self.heads, -1))
        source, target = (e[..., None].expand(-1, -1, self.heads) for e in edges.unbind(1))
        scores = (x * self.source).sum(-1).gather(1, source) + (x * self.target).sum(-1).gather(1, target)
        scores = F.leaky_relu(scores, 0.2)
        highest = torch.full_like(x[..., 0], -1e9).scatter_reduce(1, target, scores.detach(), "amax")
        weights = (scores - highest.gather(1, target)).exp()
        total = torch.zeros_like(x[..., 0]).scatter_add(1, target, weights)
        weights = weights / total.gather(1, target).clamp(min=1e-9)
        wide = source[..., None].expand(-1, -1, -1, x.shape[-1])
        messages = x.gather(1, wide) * weights[..., None]
        return torch.zeros_like(x).scatter_add(1, target[..., None].expand_as(wide), messages).flatten(2)


class GAT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GraphAttention(FEATURES, 8, 4), GraphAttention(32, 8, 4)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """x: [batch, nodes, features]; edges: [batch, 2, edges] int64 -> [batch, 4]."""
        h = F.elu(self.first(x, edges))
        return self.head(self.second(h, edges).amax(1))


def gat() -> Case:
    """Per-graph gather and scatter."""
    return Case(GAT(), _graphs(), F.cross_entropy)


class MessagePassing(nn.Module):
    """Neural message passing: an mlp on every edge, a gated recurrent update of every node, a set readout."""

    def __init__(self, width: int = 32, rounds: int = 2) -> None:
        super().__init__()
        self.rounds = rounds
        self.embed, self.edge = nn.Linear(FEATURES, width), nn.Linear(4, width)
        self.message = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.update = nn.GRUCell(width, width)
        self.gate, self.read = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor, edges: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """x: [batch, nodes, features]; edges: [batch, 2, edges]; features: [batch, edges, 4] -> [batch]."""
        batch, nodes = x.shape[:2]
        flat, source, target = _flat(x, edges)
        first = h = torch.tanh(self.embed(flat))
        e = self.edge(features.flatten(0, 1))
        for _ in range(self.rounds):
            messages = self.message(torch.cat([h[source], h[target], e], -1))
            h = self.update(torch.zeros_like(h).index_add_(0, target, messages), h)
        read = torch.sigmoid(self.gate(torch.cat([h, first], -1))) * torch.tanh(self.read(h))
        graph = torch.arange(batch).repeat_interleave(nodes)
        return self.head(torch.zeros(batch, h.shape[-1], dtype=h.dtype).index_add(0, graph, read)).squeeze(-1)


def message_passing() -> Case:
    """Regression on molecules: edge features, gated updates, pooling by graph number."""
    batch = _graphs() | {"features": torch.randn(BATCH, EDGES, 4), "target": torch.randn(BATCH)}
    return Case(MessagePassing(), batch, F.l1_loss)


class DenseGraph(nn.Module):
    """Graph isomorphism network on dense adjacency matrices with batch normalisation."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(n, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))
            for n in (FEATURES, width)
        )
        self.head = nn.Linear(FEATURES + 2 * width, 4)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        """x: [batch, nodes, features]; adjacency: [batch, nodes, nodes] -> [batch, 4]."""
        found = [x.sum(1)]
        for index, mlp in enumerate(self.mlps):
            x = torch.bmm(adjacency, x) + (1 + self.eps[index]) * x
            x = mlp(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            found.append(x.sum(1))
        return self.head(torch.cat(found, -1))


def gin() -> Case:
    """Dense adjacency, normalised over all nodes of all graphs."""
    batch = {
        "x": torch.randn(BATCH, NODES, FEATURES),
        "adjacency": (torch.rand(BATCH, NODES, NODES) < 0.3).float(),
        "target": torch.randint(0, 4, (BATCH,)),
    }
    return Case(DenseGraph(), batch, F.cross_entropy)


class PointNet(nn.Module):
    """Points grouped with their nearest neighbours (distances, top-k, gathers), edges convolved, pooled by maximum."""

    def __init__(self, width: int = 32, neighbours: int = 4) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.first = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width))
        self.second = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, 4)

    def around(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, points, width] -> [batch, points, neighbours, 2 * width]."""
        nearest = torch.cdist(x.detach(), x.detach()).topk(self.neighbours, largest=False).indices
        near = x.gather(1, nearest.flatten(1)[..., None].expand(-1, -1, x.shape[-1])).unflatten(1, nearest.shape[1:])
        centre = x[:, :, None].expand_as(near)
        return torch.cat([centre, near - centre], -1)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """points: [batch, points, 3] -> [batch, 4]."""
        x = self.first(self.around(points)).amax(2)
        x = self.second(self.around(x)).amax(2)
        return self.head(x.amax(1))


def point_cloud() -> Case:
    """Nearest neighbours by distance and top-k, edge convolutions, maxima."""
    batch = {"points": torch.randn(BATCH, 12, 3), "target": torch.randint(0, 4, (BATCH,))}
    return Case(PointNet(), batch, F.cross_entropy)


ENTRIES = entries(
    "graphs",
    gcn,
    gat,
    message_passing,
    gin,
    point_cloud,
)
