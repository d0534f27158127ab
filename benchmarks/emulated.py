"""Plans of a job, predicted and then measured side by side on the ranks of an emulated cluster.

Costs are profiled on the spot: links by the ranks themselves under the links of the moment, ops by rank 0 on its own
core. All plans of a job are loaded at once and take their steps in turn, in an order that is drawn anew every round, so
that a drift of the machine meets all alike. A step is as long as its slowest rank's, from a barrier on.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import track

import shardplan as sp
from benchmarks import jobs
from benchmarks.cluster import EmulatedCluster, Links
from shardplan.batch import example_batch
from shardplan.errors import ShardplanError
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees
from shardplan.planner.costs.base import OpCost
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.costs.store import Store
from shardplan.planner.plan import Plan
from shardplan.planner.search import SolveOptions, solve
from shardplan.planner.trace import Trace
from shardplan.planning import Request, make_trace, optimizer_factor
from shardplan.runtime.measure_links import measure_links, plan_groups

_LINK_SECONDS = 8.0
_WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class Wanted:
    """A plan to be made. degrees {}: the planner chooses. microbatches None: likewise. zero: likewise if "auto"."""

    name: str
    degrees: dict[str, int] = field(default_factory=dict)
    microbatches: int | None = None
    zero: int | str = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """predicted_seconds, seconds: of a step; samples: the single steps. predicted_nbytes, nbytes: peak by rank. error:
    why there is no plan, else empty."""

    name: str
    degrees: str = ""
    predicted_seconds: float = 0.0
    seconds: float = 0.0
    samples: tuple[float, ...] = ()
    predicted_nbytes: tuple[int, ...] = ()
    nbytes: tuple[int, ...] = ()
    outcome: str = ""
    error: str = ""


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4)


class Slowed:
    """Prices of ops on devices that get `share` of a core's time. Implements `planner.costs.base.Costs`."""

    def __init__(self, costs: CostModel, share: float) -> None:
        self._costs, self._factor = costs, 1.0 / share

    def __getattr__(self, name: str) -> Any:
        return getattr(self._costs, name)

    def op(self, call: Any, device: int) -> OpCost:
        found = self._costs.op(call, device)
        return OpCost(found.forward_seconds * self._factor, found.backward_seconds * self._factor, found.source)

    def copy(self, nbytes: int, device: int) -> float:
        return self._costs.copy(nbytes, device) * self._factor

    def optimizer(self, nbytes: int, device: int) -> float:
        return self._costs.optimizer(nbytes, device) * self._factor


def measure(
    cluster: EmulatedCluster,
    links: Links,
    job: str,
    wanted: Sequence[Wanted],
    folder: str,
    repeats: int = 9,
    share: float = 1.0,
    memory: bool = True,
    timeout_seconds: float = 400.0,
) -> list[Measured]:
    """Results in the order of `wanted`. folder: of the store that keeps measured ops between jobs. share: of a core,
    that every rank gets. memory: whether to measure it too, which takes several more steps a plan."""
    if cluster.links != links:
        cluster.change(links)
        time.sleep(0.2)
    arguments = (links.name, job, list(wanted), folder, repeats, share, memory)
    return cluster.run(_on_rank, *arguments, timeout_seconds=timeout_seconds)[0]


# -- on a rank ---------------------------------------------------------------------------------------------------------

_tables: dict[str, Any] = {}
_traces: dict[str, tuple[Trace, Request]] = {}


def _on_rank(
    rank: int, links: str, job: str, wanted: list[Wanted], folder: str, repeats: int, share: float, memory: bool
) -> list[Measured]:
    size = dist.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "SHARDPLAN_CACHE": folder}
    model, batch, loss_fn = jobs.make(job)
    if job not in _traces:
        request = Request(loss_fn=loss_fn, optimizer=adamw)
        _traces[job] = make_trace(model, example_batch(model, batch, loss_fn is not None), request)[0], request
    if links not in _tables:
        _tables[links] = measure_links(plan_groups(size), budget_seconds=_LINK_SECONDS)
    texts = [_plans(job, links, size, wanted, share) if rank == 0 else None]
    dist.broadcast_object_list(texts, 0)
    assert texts[0] is not None
    plans = [Plan.from_json(text) if not error else None for text, error in texts[0]]
    found = [_Run(model, size, batch, loss_fn, plan) if plan is not None else None for plan in plans]
    try:
        _steps([run for run in found if run is not None], repeats)
        return [
            run.result(want.name, memory) if run is not None else Measured(want.name, error=error)
            for want, run, (_, error) in zip(wanted, found, texts[0], strict=True)
        ]
    finally:
        for run in found:
            if run is not None:
                run.close()
        del found
        gc.collect()


def _plans(job: str, links: str, size: int, wanted: list[Wanted], share: float) -> list[tuple[str, str]]:
    """(plan as JSON, why there is none) of each."""
    trace, request = _traces[job]
    cluster = Cluster.parse(size)
    costs: Any = CostModel(
        cluster, LinkModel(cluster, _tables[links]), Store.open(), model=trace.fingerprint, optimizer=request.optimizer
    )
    if share < 1.0:
        costs = Slowed(costs, share)
    found = []
    for want in wanted:
        options = SolveOptions(
            constraints=(degrees(**want.degrees),) if want.degrees else (),
            microbatches=want.microbatches or "auto",
            zero=want.zero,
            optimizer_factor=optimizer_factor(request.optimizer),
            time_limit=30.0,
            hints=False,
        )
        try:
            found.append((solve(trace, cluster, costs, options).to_json(), ""))
        except ShardplanError as error:
            found.append(("", error.title))
    return found


class _Run:
    """A plan that is loaded."""

    def __init__(self, model: torch.nn.Module, size: int, batch: Any, loss_fn: Any, plan: Plan) -> None:
        self.plan = plan
        self.pm = sp.auto_parallel(model, size, batch, loss_fn=loss_fn, optimizer=adamw, plan=plan)
        given = example_batch(model, batch, loss_fn is not None)
        self._args, self._kwargs, self._target = given.args, given.kwargs, given.target
        self.samples: list[float] = []

    def step(self) -> float:
        """Seconds of this rank's step."""
        dist.barrier()
        started = time.perf_counter()
        self.pm.train_step(*self._args, target=self._target, **self._kwargs)
        return time.perf_counter() - started

    def result(self, name: str, memory: bool) -> Measured:
        seen = self.pm.measure(*self._args, target=self._target, steps=1, **self._kwargs) if memory else None
        return Measured(
            name,
            self.plan.degrees(),
            self.plan.step_seconds,
            statistics.median(self.samples),
            tuple(self.samples),
            tuple(held.peak_nbytes for held in self.plan.memory()),
            seen.peak_nbytes if seen else (),
            self.plan.status.outcome,
        )

    def close(self) -> None:
        self.pm.close()


def _steps(runs: list[_Run], repeats: int) -> None:
    draw = random.Random(0)  # the same on every rank
    for _ in range(_WARM_UPS):
        for run in runs:
            run.step()
    for _ in range(repeats):
        order = list(runs)
        draw.shuffle(order)
        for run in order:
            slowest = torch.tensor(run.step(), dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            run.samples.append(float(slowest))


def shown(items: Sequence[Any], quiet: bool) -> Any:
    """The items, with a progress bar on a terminal."""
    return items if quiet else track(items, description="measuring")
