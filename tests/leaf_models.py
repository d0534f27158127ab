"""Models with a part that no graph can hold, at test size. In a module of its own: leaves travel by class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

DIM = 8


class RowRouter(nn.Module):
    """Every sample goes one way or the other: the batch may be split."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        rows = [self.one(row) if row.sum().item() > 0 else 2 * self.other(row) for row in x]
        return torch.stack(rows)


class BatchRouter(nn.Module):
    """The whole batch goes one way: it may not be split."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.one(x) if x.mean() > 0 else self.other(x) * 3


class Experts(nn.Module):
    """Top-1 mixture in a Python loop over the experts that have tokens; the others get no gradient."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, count)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(count))

    @property
    def first(self) -> nn.Linear:
        found = self.experts[0]
        assert isinstance(found, nn.Linear)
        return found

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        result = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero().squeeze(-1)
            result = result.index_add(0, rows, self.experts[number](x[rows]) * weight[rows].unsqueeze(-1))
        return result


class Numpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(DIM))
        self.table = torch.arange(DIM).double()  # not a buffer

    def forward(self, x):
        x = x + self.table.to(x.dtype)
        limit = torch.from_numpy(numpy.abs(x.detach().numpy()).max(axis=-1, keepdims=True))
        return self.scale * x / limit


class Statistics(nn.Module):
    """Batch normalisation and a branch; counts its calls in a buffer that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        y = self.norm(x)
        return y if y.max().item() > 0 else -y


@dataclass
class Answer:
    hidden: torch.Tensor
    aux: torch.Tensor
    name: str


pytree.register_dataclass(Answer)


class Nested(nn.Module):
    """Keywords, nested arguments, plain values and a dataclass as result; its second result is a sum over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(DIM, DIM)

    def wanted(self, mask):
        return mask.sum().item() >= 0

    def forward(self, x, *, options, mask=None):
        y = self.lin(x) * options["scale"]
        if mask is not None and self.wanted(mask):
            y = y * mask.unsqueeze(-1)
        return Answer(y, (y * y).sum(), "nested"), {"none": None, "count": 3, "bits": x > 0}


class NestedTrap(Nested):
    """Parts in which no sample is masked differ from the whole; halves rarely show it, single samples do."""

    def wanted(self, mask):
        return bool(mask.any())


class Around(nn.Module):
    """A linear layer, the part, a linear layer with a skip."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.before, self.part, self.after = nn.Linear(DIM, DIM), part, nn.Linear(DIM, DIM)

    def forward(self, x):
        h = torch.tanh(self.before(x))
        return self.after(h + self.part(h))


class AroundNested(Around):
    def forward(self, x):
        h = torch.tanh(self.before(x))
        answer, more = self.part(h, options={"scale": 0.5, "unused": (1, None)}, mask=h.sum(-1) > 0)
        assert answer.name == "nested" and more["none"] is None
        return self.after(answer.hidden + more["bits"] * more["count"]), answer.aux


class Layers(nn.Module):
    """Several layers of one kind with a leaf each, weights of the first tied to the outside."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        parts = [Experts() for _ in range(count)]
        self.layers = nn.ModuleList(Around(part) for part in parts)
        self.head = nn.Linear(DIM, DIM)
        parts[0].gate.weight.requires_grad_(False)
        self.head.weight = parts[0].first.weight

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def loss(output: torch.Tensor | tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    if isinstance(output, tuple):
        return F.mse_loss(output[0], target) + output[1] / 64
    return F.mse_loss(output, target)
