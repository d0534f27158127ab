"""Hand-written mixtures of experts: dense and sorted dispatch, routing by the experts, and soft mixing."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import BATCH, Case, ragged_labels, tokens
from tests.zoo.registry import entries

WORDS, LENGTH, WIDTH, EXPERTS = 96, 8, 32, 4


class Experts(nn.Module):
    """Feed-forward weights of all experts, batched."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 64) / 6)
        self.down = nn.Parameter(torch.randn(EXPERTS, 64, WIDTH) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [experts, slots, width] -> the same shape."""
        return torch.bmm(F.gelu(torch.bmm(x, self.up)), self.down)


def balance(probabilities: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Switch transformer's load balancing loss. probabilities: [tokens, experts]; chosen: one-hot of that shape."""
    return EXPERTS * (probabilities.mean(0) * chosen.mean(0)).sum()


class DenseDispatch(nn.Module):
    """GShard: one-hot dispatch and combine tensors with a capacity, contracted by einsum."""

    def __init__(self, capacity: int = 6) -> None:
        super().__init__()
        self.capacity = capacity
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS, bias=False), Experts()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [batch, seq, width] -> (the same shape, auxiliary loss). The capacity is per sample."""
        probabilities = self.router(x).softmax(-1)
        weight, index = probabilities.topk(2, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        chosen = F.one_hot(index, EXPERTS).to(x.dtype)  # batch, seq, 2, experts
        flat = chosen.transpose(1, 2).flatten(1, 2)  # first choices before second ones
        place = (flat.cumsum(1) - flat) * flat
        kept = flat * (place < self.capacity)
        slots = kept[..., None] * F.one_hot(place.long().clamp(max=self.capacity - 1), self.capacity).to(x.dtype)
        slots = slots.unflatten(1, (2, -1)).transpose(1, 2)  # batch, seq, 2, experts, capacity
        combine = torch.einsum("bsk,bskec->bsec", weight, slots)
        dispatch = slots.sum(2)
        given = torch.einsum("bsec,bsd->ebcd", dispatch, x)
        made = self.experts(given.flatten(1, 2)).unflatten(1, given.shape[1:3])
        out = torch.einsum("bsec,ebcd->bsd", combine, made)
        return out, balance(probabilities.flatten(0, 1), chosen[:, :, 0].flatten(0, 1))


class SortedDispatch(nn.Module):
    """Tokens sorted by expert, equal groups by a fixed capacity over the whole batch, results put back by index."""

    def __init__(self, capacity: int = 24) -> None:
        super().__init__()
        self.capacity = capacity
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS, bias=False), Experts()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [batch, seq, width] -> (the same shape, auxiliary loss)."""
        flat = x.flatten(0, 1)
        probabilities = self.router(flat).softmax(-1)
        weight, expert = probabilities.max(-1)
        order = expert.argsort(stable=True)
        ordered = expert[order]
        counts = F.one_hot(expert, EXPERTS).sum(0)
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(flat)) - starts[ordered]
        slot = torch.where(place < self.capacity, ordered * self.capacity + place, EXPERTS * self.capacity)
        buffer = flat.new_zeros(EXPERTS * self.capacity + 1, WIDTH).index_copy(0, slot, flat[order])
        made = self.experts(buffer[:-1].unflatten(0, (EXPERTS, -1))).flatten(0, 1)
        made = torch.cat([made, made.new_zeros(1, WIDTH)])[slot] * weight[order, None]
        out = torch.zeros_like(flat).index_copy(0, order, made).view_as(x)
        return out, balance(probabilities, F.one_hot(expert, EXPERTS).to(x.dtype))


class ExpertChoice(nn.Module):
    """Every expert takes its best tokens of a sample: top-k over the sequence, gather, scatter-add."""

    def __init__(self, taken: int = 4) -> None:
        super().__init__()
        self.taken = taken
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS, bias=False), Experts()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [batch, seq, width] -> (the same shape, auxiliary loss)."""
        logits = self.router(x)
        weight, index = logits.softmax(-1).mT.topk(self.taken, -1)  # batch, experts, taken
        wide = index.flatten(1)[..., None].expand(-1, -1, WIDTH)
        given = x.gather(1, wide).unflatten(1, (EXPERTS, -1)).transpose(0, 1)
        made = self.experts(given.flatten(1, 2)).unflatten(1, given.shape[1:3]).transpose(0, 1)
        made = (made * weight[..., None]).flatten(1, 2)
        return torch.zeros_like(x).scatter_add(1, wide, made), 1e-3 * logits.logsumexp(-1).square().mean()


class SoftExperts(nn.Module):
    """Soft mixture: slots are weighted means of tokens; softmax over tokens to dispatch, over slots to combine."""

    def __init__(self, slots: int = 2) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(WIDTH, EXPERTS, slots) / 6)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [batch, seq, width] -> (the same shape, no auxiliary loss)."""
        logits = torch.einsum("bsd,dep->bsep", x, self.slots)
        given = torch.einsum("bsd,bsep->ebpd", x, logits.softmax(1))
        made = self.experts(given.flatten(1, 2)).unflatten(1, given.shape[1:3])
        return torch.einsum("ebpd,bsep->bsd", made, logits.flatten(2).softmax(-1).view_as(logits)), x.new_zeros(())


class LoopedExperts(nn.Module):
    """Every expert computes every token; a mask of the gates decides (shapes stay static)."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 64), nn.SiLU(), nn.Linear(64, WIDTH)) for _ in range(EXPERTS)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [batch, seq, width] -> (the same shape, auxiliary loss)."""
        logits = self.router(x)
        kept = torch.full_like(logits, float("-inf")).scatter(-1, logits.topk(2, -1).indices, 0.0)
        gates = (logits + kept).softmax(-1)
        out = sum(expert(x) * gates[..., i : i + 1] for i, expert in enumerate(self.experts))
        importance = gates.sum((0, 1))
        return out, importance.var() / importance.mean().square()


class RoutedModel(nn.Module):
    """Embedding, two layers of attention and experts, a head; the loss adds the auxiliary losses."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.attention = nn.ModuleList(nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in layers)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2 * len(layers)))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """ids, labels: [batch, seq] int64 -> {"loss", "logits", "auxiliary"}."""
        x = self.embed(ids)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        auxiliary = x.new_zeros(())
        for index, (attention, layer) in enumerate(zip(self.attention, self.layers, strict=True)):
            y = self.norms[2 * index](x)
            x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
            made, loss = layer(self.norms[2 * index + 1](x))
            x, auxiliary = x + made, auxiliary + loss
        logits = self.head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss + 0.01 * auxiliary, "logits": logits, "auxiliary": auxiliary}


def _routed(kind: type[nn.Module]) -> Case:
    ids = tokens(WORDS, BATCH, LENGTH)
    return Case(RoutedModel([kind(), kind()]), {"ids": ids, "labels": ragged_labels(ids)})


def dense_dispatch() -> Case:
    """One-hot dispatch by einsum with a capacity per sample and a balance loss over the batch."""
    return _routed(DenseDispatch)


def sorted_dispatch() -> Case:
    """Tokens of the whole batch sorted by expert, with a capacity over the batch."""
    return _routed(SortedDispatch)


def expert_choice() -> Case:
    """Experts choose tokens within a sample."""
    return _routed(ExpertChoice)


def soft_experts() -> Case:
    """Soft mixing of tokens into slots."""
    return _routed(SoftExperts)


def looped_experts() -> Case:
    """Every expert on every token, gated."""
    return _routed(LoopedExperts)


ENTRIES = entries("routing", dense_dispatch, sorted_dispatch, expert_choice, soft_experts, looped_experts)
