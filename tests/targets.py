"""Command-line targets for the tests: factories of small models with a batch."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import shardplan as sp
from shardplan.batch import example_batch
from shardplan.planner.export import trace_model
from shardplan.planner.plan import Plan


def mlp(width: int = 16) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor], Any]:
    """Two layers, a batch of 8, cross entropy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 4))
    return model, (torch.randn(8, 8), torch.randint(4, (8,))), F.cross_entropy


def wider_mlp() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor], Any]:
    """As `mlp`, another graph."""
    return mlp(32)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if y.sum().item() > 0:
            return y.sum()
        return y.mean()


def branching() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """Cannot be one graph: it branches on data."""
    return Branching(), (torch.randn(8, 8),)


def broken() -> None:
    raise RuntimeError("on purpose")


def data_parallel_plan(factory: Any = mlp, ranks: int = 2) -> Plan:
    """A plan made by hand: the batch split over the ranks."""
    from tests.plans import random_plan

    model, example, loss_fn = factory()
    batch = example_batch(model, example, True)
    trace = trace_model(model, batch.args, batch.kwargs, loss_fn=loss_fn, target=batch.target)
    return random_plan(trace, dp=ranks)


class Failing(torch.optim.SGD):
    """Raises, or kills its process, in the second step of rank 1."""

    def __init__(self, parameters: Any, how: str) -> None:
        super().__init__(parameters, lr=0.1)
        self.how = how
        self.steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.steps += 1
        if self.steps == 2 and torch.distributed.get_rank() == 1:
            if self.how == "raise":
                raise ArithmeticError("the optimizer of rank 1 failed")
            os.kill(os.getpid(), signal.SIGKILL)


def train(plan: str, how: str, devices: Any) -> None:
    """Ten steps; rank 1 fails in the second unless how is "well"."""
    model, (x, y), loss_fn = mlp()
    optimizer = (lambda p: torch.optim.SGD(p, lr=0.1)) if how == "well" else (lambda p: Failing(p, how))
    with sp.auto_parallel(model, devices, (x, y), loss_fn, optimizer=optimizer, plan=plan) as pm:
        losses = [pm.train_step(x, target=y).item() for _ in range(10)]
    if os.environ.get("RANK", "0") == "0":
        print("LOSSES", *(f"{loss:.6f}" for loss in losses))
