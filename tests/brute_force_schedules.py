"""Schedules, cuts and orders of ranks of small random pipelines: the plan against all of them, simulated.

An instance is a chain of linear layers of random widths on two stages, with one or two replicas on nodes with a random
uplink. Without splits and recomputation all that is left to choose is the schedule, the cuts and the order, and every
combination is finished and simulated as the search does it.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace

import torch
from torch import nn

from shardplan.planner.cluster import Cluster, Device, DeviceKind, Link, Wiring
from shardplan.planner.constraints import degrees
from shardplan.planner.export import trace_model
from shardplan.planner.search import SolveOptions
from shardplan.planner.search.candidate import Candidate
from shardplan.planner.search.case import USUAL, Case
from shardplan.planner.search.finish import finish
from shardplan.planner.search.search import Search
from shardplan.planner.search.stage_ilp import StageChoice
from tests.prices import SimplePrices

ORDERS = (USUAL, ("tp", "pp", "dp"))
KINDS = (("gpipe", 1), ("1f1b", 1), ("zb", 1), ("interleaved", 2), ("zbv", 2))


@dataclass(frozen=True, slots=True)
class Compared:
    """seconds and bound of the plan; best: of all choices, in seconds that count sums in full; kind: of the best."""

    seconds: float
    bound: float
    best: float
    kind: str
    chosen: str


class Chain(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def instance(rng: random.Random) -> Search:
    widths = [rng.choice([8, 16, 64, 96]) for _ in range(rng.randint(5, 7))]
    dp, rows = rng.choice([1, 2]), 32
    kind = DeviceKind("small", "cpu", 1 << 30, 1e10, {"fp32": 2e10})
    inside, between = Link(1e10, 1e-6), Link(10 ** rng.uniform(5.0, 10.0), 2e-6)
    cluster = Cluster(tuple(Device(kind, i // 2) for i in range(2 * dp)), (Wiring(inside, between),) * dp)
    trace = trace_model(Chain(widths), (torch.randn(rows, widths[0]),), {})
    constraints = (degrees(pp=2, dp=dp, tp=1),)
    options = SolveOptions(
        constraints, microbatches=rng.choice([1, 2, 4, 8]), rematerialize=False, zero=0, optimizer_factor=0.0, gap=0.0
    )
    return Search(trace, cluster, SimplePrices(cluster), options)


def compare(seed: int) -> Compared:
    """The plan of the instance of that seed, beside the best of all choices."""
    search = instance(random.Random(seed))
    plan = search.solve()
    best, kind = math.inf, ""
    usual = next(case for case in search.cases() if case.order == USUAL)
    for order in ORDERS if usual.dp > 1 else ORDERS[:1]:
        case: Case = replace(usual, order=order)
        (prepared,) = search.work.prepare(case)
        problem = search.work.problem(prepared, "1f1b")
        columns = tuple(
            min(range(len(s.columns)), key=lambda c, s=s: s.columns[c].price.seconds) for s in prepared.segments
        )
        for name, chunks in KINDS:
            count = case.stages * chunks
            for inner in itertools.combinations(range(1, len(columns)), count - 1):
                choice = StageChoice((0, *inner), columns, 0.0, 0.0, True)
                made = Candidate(
                    case, prepared.columns, prepared.segments, problem, choice, name, prepared.forced, chunks=chunks
                )
                done = finish(search, made)
                if done.fits and done.seconds < best:
                    best, kind = done.seconds, f"{name} {'in '.join(order)}"
    return Compared(plan.step_seconds, plan.status.lower_bound, best, kind, plan.schedule)
