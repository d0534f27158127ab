"""A small job for tests of training state: a model with dropout, a dataset of its samples, plans made by hand."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import shardplan as sp
from shardplan.batch import example_batch
from shardplan.planner.export import trace_model
from shardplan.planner.plan import Plan
from shardplan.planner.trace import Trace
from tests.plans import random_plan

BATCH = 8


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.Dropout(0.1), nn.GELU(), nn.Linear(16, 4))


class Samples:
    """Samples (x, y) that follow from their index; `loaded` counts those that this process has asked for."""

    def __init__(self, total: int = 40) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(total, 8, generator=generator)
        self.y = torch.randint(4, (total,), generator=generator)
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.loaded.append(index)
        return self.x[index], self.y[index]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=5e-3)


def scheduler(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6, 24], 0.5)


@functools.lru_cache(maxsize=1)
def trace() -> Trace:
    held, samples = model(), Samples()
    batch = example_batch(held, (samples.x[:BATCH], samples.y[:BATCH]), True)
    return trace_model(held, batch.args, batch.kwargs, loss_fn=F.cross_entropy, target=batch.target)


@functools.lru_cache(maxsize=64)
def plan(dp: int = 1, tp: int = 1, pp: int = 1, microbatches: int = 1, seed: int = 0) -> Plan:
    bounds = tuple(range(pp))  # the last stage has what is left
    return random_plan(trace(), dp=dp, tp=tp, pp=pp, microbatches=microbatches, seed=seed, bounds=bounds)


def start(which: Plan | str, devices: Any = None, **settings: Any) -> sp.ParallelModel:
    """The job under a plan, in workers or (devices "auto") under torchrun."""
    samples = Samples()
    settings = {"optimizer": adamw, "scheduler": scheduler, "clip_norm": 1.0, "seed": 3, **settings}
    given = devices or ["cpu"] * len(which.devices if isinstance(which, Plan) else Plan.load(which).devices)
    return sp.auto_parallel(
        model(), given, (samples.x[:BATCH], samples.y[:BATCH]), F.cross_entropy, plan=which, **settings
    )


def train(
    pm: sp.ParallelModel, steps: int, sampler: Any = None, after: Callable[[int, float], None] | None = None
) -> list[float]:
    """So many steps on the batches that come next -> losses. after: called with every step's number and loss."""
    sampler = sampler or pm.sampler(Samples(), seed=5)
    losses: list[float] = []
    while len(losses) < steps:
        for batch in sampler:
            losses.append(pm.train_step(batch).item())
            if after is not None:
                after(len(losses), losses[-1])
            if len(losses) == steps:
                break
    return losses


def main(plan_file: str, directory: str, steps: int, every: int, log: str) -> None:
    """A training script as docs/resuming.md has it: goes on where the last checkpoint is."""
    with start(plan_file, "auto", timeout_seconds=60.0, heartbeat_seconds=10.0) as pm:
        sampler = pm.sampler(Samples(), seed=5)
        step = pm.resume(directory)
        while step < steps:
            for batch in sampler:
                loss = pm.train_step(batch).item()
                step += 1
                if os.environ.get("RANK", "0") == "0":
                    with open(log, "a") as file:
                        file.write(f"{step} {loss!r} {os.getpid()}\n")
                if step % every == 0:
                    pm.save(directory, keep=2, wait=False)
                if step == steps:
                    break
