"""Recommendation: large embedding tables, bags, crossed features, and losses over the items of the batch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import BATCH, Case
from tests.zoo.registry import entries

ITEMS = 256


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DLRM(nn.Module):
    """Dense features by an mlp, categories by embedding bags, all pairs of their products, an mlp on top."""

    def __init__(self, width: int = 16, tables: int = 3) -> None:
        super().__init__()
        self.bottom = _mlp(8, 32, width)
        self.tables = nn.ModuleList(nn.EmbeddingBag(ITEMS, width, mode="sum") for _ in range(tables))
        pairs = (tables + 1) * tables // 2
        self.top = _mlp(width + pairs, 32, 1)
        self.register_buffer("pairs", torch.tril_indices(tables + 1, tables + 1, -1), persistent=False)

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        """dense: [batch, 8]; sparse: [batch, tables, bag] int64 -> logits [batch]."""
        x = self.bottom(dense)
        rows = [table(ids) for table, ids in zip(self.tables, sparse.unbind(1), strict=True)]
        features = torch.stack([x, *rows], 1)
        products = torch.bmm(features, features.mT)[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([x, products], 1)).squeeze(1)


def _clicks() -> torch.Tensor:
    return torch.randint(0, 2, (BATCH,)).float()


def dlrm() -> Case:
    """Embedding bags, products of all pairs of features, two mlps."""
    batch = {"dense": torch.randn(BATCH, 8), "sparse": torch.randint(0, ITEMS, (BATCH, 3, 4)), "target": _clicks()}
    return Case(DLRM(), batch, F.binary_cross_entropy_with_logits)


class WideAndDeep(nn.Module):
    """A linear model over hashed crosses beside an mlp over embeddings; weights per sample."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.wide = nn.Embedding(ITEMS, 1)
        self.deep = nn.ModuleList(nn.Embedding(n, width) for n in (64, 32, ITEMS))
        self.mlp = _mlp(3 * width + 4, 32, 1)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """ids: [batch, 3] int64; numbers: [batch, 4] -> logits [batch]."""
        crossed = (ids[:, :2] * torch.tensor([7919, 104729])).sum(1, keepdim=True) % ITEMS
        wide = self.wide(torch.cat([crossed, ids[:, 2:]], 1)).sum((1, 2))
        rows = [table(ids[:, i] % table.num_embeddings) for i, table in enumerate(self.deep)]
        return wide + self.mlp(torch.cat([*rows, numbers.log1p()], 1)).squeeze(1) + self.bias


def weighted_clicks(logits: torch.Tensor, target: dict[str, torch.Tensor]) -> torch.Tensor:
    """Binary cross entropy, every sample by its weight, over the sum of weights."""
    each = F.binary_cross_entropy_with_logits(logits, target["click"], reduction="none")
    return (each * target["weight"]).sum() / target["weight"].sum()


def wide_and_deep() -> Case:
    """Loss weighted per sample."""
    batch = {
        "ids": torch.randint(0, ITEMS, (BATCH, 3)),
        "numbers": torch.rand(BATCH, 4),
        "target": {"click": _clicks(), "weight": torch.rand(BATCH) + 0.1},
    }
    return Case(WideAndDeep(), batch, weighted_clicks)


class TwoTower(nn.Module):
    """Users by the mean of their history, items by id and category; every other item of the batch is a negative."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, width, padding_idx=0)
        self.categories = nn.Embedding(16, width)
        self.user, self.item = _mlp(width, 32, width), _mlp(2 * width, 32, width)
        self.temperature = nn.Parameter(torch.tensor(0.1))

    def forward(self, history: torch.Tensor, item: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """history: [batch, length] int64 (0 is padding); item, category: [batch] -> scalar loss."""
        kept = (history != 0).to(self.temperature.dtype)
        mean = (self.items(history) * kept[..., None]).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)
        users = F.normalize(self.user(mean), dim=-1)
        items = F.normalize(self.item(torch.cat([self.items(item), self.categories(category)], -1)), dim=-1)
        logits = users @ items.T / self.temperature
        twice = (item[:, None] == item[None]) & ~torch.eye(len(item), dtype=torch.bool)
        logits = logits.masked_fill(twice, -1e9)
        return F.cross_entropy(logits, torch.arange(len(item)))


def two_tower() -> Case:
    """Softmax over the items of the batch; own loss."""
    history = torch.randint(0, ITEMS, (BATCH, 6))
    history[::2, 4:] = 0
    batch = {
        "history": history,
        "item": torch.randint(1, ITEMS, (BATCH,)),
        "category": torch.randint(0, 16, (BATCH,)),
    }
    return Case(TwoTower(), batch)


class FactorizationMachine(nn.Module):
    """DeepFM: second-order products by the square of a sum, a table with offsets per field."""

    def __init__(self, fields: int = 4, rows: int = 64, width: int = 16) -> None:
        super().__init__()
        self.linear, self.table = nn.Embedding(fields * rows, 1), nn.Embedding(fields * rows, width)
        self.register_buffer("offsets", torch.arange(fields) * rows)
        self.deep = _mlp(fields * width, 32, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, fields] int64 -> probabilities [batch]."""
        ids = ids + self.offsets
        rows = self.table(ids)
        second = (rows.sum(1).square() - rows.square().sum(1)).sum(-1) / 2
        return torch.sigmoid(self.linear(ids).sum((1, 2)) + second + self.deep(rows.flatten(1)).squeeze(1))


def deepfm() -> Case:
    """Factorisation machine and an mlp over one table with offsets; probabilities."""
    batch = {"ids": torch.randint(0, 64, (BATCH, 4)), "target": _clicks()}
    return Case(FactorizationMachine(), batch, F.binary_cross_entropy)


class Ranker(nn.Module):
    """A pairwise ranking loss over the candidates of a query, sorted by relevance, with position discounts."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = _mlp(8, width, width, 1)

    def forward(self, candidates: torch.Tensor, relevance: torch.Tensor) -> dict[str, torch.Tensor]:
        """candidates: [batch, list, 8]; relevance: [batch, list] -> {"loss", "scores", "order"}."""
        scores = self.net(candidates).squeeze(-1)
        order = scores.argsort(-1, descending=True)
        ranks = order.argsort(-1)
        gains, ideal = torch.exp2(relevance) - 1, relevance.sort(-1, descending=True).values
        discount = 1 / torch.log2(ranks.to(scores.dtype) + 2)
        best = ((torch.exp2(ideal) - 1) / torch.log2(torch.arange(ideal.shape[-1], dtype=scores.dtype) + 2)).sum(-1)
        delta = (gains[:, :, None] - gains[:, None]).abs() * (discount[:, :, None] - discount[:, None]).abs()
        delta = delta / best.clamp(min=1e-6)[:, None, None]
        above = relevance[:, :, None] > relevance[:, None]
        pairs = F.softplus(-(scores[:, :, None] - scores[:, None])) * delta * above
        return {"loss": pairs.sum((1, 2)).mean(), "scores": scores, "order": order}


def lambda_rank() -> Case:
    """Sorting within lists; own loss, integer outputs."""
    batch = {"candidates": torch.randn(BATCH, 6, 8), "relevance": torch.randint(0, 4, (BATCH, 6)).float()}
    return Case(Ranker(), batch)


ENTRIES = entries(
    "recommendation",
    dlrm,
    wide_and_deep,
    two_tower,
    deepfm,
    lambda_rank,
)
