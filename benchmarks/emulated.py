"""Plans of a job, predicted and then measured side by side on the ranks of an emulated cluster.

Costs are profiled on the spot: links by the ranks themselves under the links of the moment, ops by rank 0 on its own
core, once a job. All plans of a job are loaded at once and timed by `benchmarks.protocol`; plans that are the same
program are measured once. Models are traced once on every rank, links measured once under each name.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import track

from benchmarks import jobs
from benchmarks.cluster import EmulatedCluster, Links
from benchmarks.protocol import interleaved
from shardplan.batch import Batch, Inputs, example_batch
from shardplan.errors import ShardplanError
from shardplan.parallel_model import ParallelModel, Planned, Settings
from shardplan.planner.cluster import Cluster, Device
from shardplan.planner.constraints import Constraint, degrees, pin
from shardplan.planner.costs.base import OpCost
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.costs.store import Store
from shardplan.planner.costs.tables import LinkTables
from shardplan.planner.plan import Plan
from shardplan.planner.search import SolveOptions, solve
from shardplan.planner.trace import Trace
from shardplan.planning import Request, make_trace, optimizer_factor
from shardplan.ranks import InPlace
from shardplan.runtime import rank_calls
from shardplan.runtime.launch import HEARTBEAT_SECONDS, TIMEOUT_SECONDS
from shardplan.runtime.measure_links import measure_links, plan_groups

_SOLVE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A plan to be made. degrees {}: the planner chooses. microbatches None: likewise, and the schedule; else it is
    1F1B. zero: likewise if "auto".

    cut: share of the trace's segments in the first of two stages; None: the planner chooses. order: device of each of
    the plan's ranks; (): as they are numbered.
    """

    name: str
    degrees: dict[str, int] = field(default_factory=dict)
    microbatches: int | None = None
    zero: int | str = 0
    cut: float | None = None
    order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Conditions:
    """Of a measurement. shares: of a core, that each rank gets; limit_nbytes: what plans of the planner may hold on a
    rank, None for no limit. repeats, give_up: see `protocol.interleaved`; memory: whether peaks are measured, too,
    which takes several more steps a plan. most: plans that are predicted to take this many times as long as the best
    are not measured. link_seconds: about what measuring the links may take.
    """

    shares: tuple[float, ...]
    limit_nbytes: int | None = None
    repeats: int = 9
    give_up: float = float("inf")
    memory: bool = True
    most: float = float("inf")
    link_seconds: float = 8.0


@dataclass(frozen=True, slots=True)
class Measured:
    """predicted_seconds, seconds: of a step; samples: the single steps, () where only predicted. predicted_nbytes,
    nbytes: peak by rank. planning_seconds: of the processor, profiling included. error: why there is no plan or no
    measurement, else empty."""

    name: str
    degrees: str = ""
    predicted_seconds: float = 0.0
    seconds: float = 0.0
    samples: tuple[float, ...] = ()
    predicted_nbytes: tuple[int, ...] = ()
    nbytes: tuple[int, ...] = ()
    outcome: str = ""
    error: str = ""
    stages: str = ""
    planning_seconds: float = 0.0


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4)


class Slowed:
    """Prices of ops on devices that get `shares` of a core's time. Implements `planner.costs.base.Costs`."""

    def __init__(self, costs: CostModel, shares: Sequence[float]) -> None:
        self._costs, self._factors = costs, [1.0 / share for share in shares]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._costs, name)

    def op(self, call: Any, device: int) -> OpCost:
        found, factor = self._costs.op(call, device), self._factors[device]
        seconds = found.forward_seconds * factor, found.backward_seconds * factor
        return replace(found, forward_seconds=seconds[0], backward_seconds=seconds[1])

    def copy(self, nbytes: int, device: int) -> float:
        return self._costs.copy(nbytes, device) * self._factors[device]

    def optimizer(self, nbytes: int, device: int) -> float:
        return self._costs.optimizer(nbytes, device) * self._factors[device]


def measure(
    cluster: EmulatedCluster,
    links: Links,
    job: str,
    wanted: Sequence[Wanted],
    folder: str,
    conditions: Conditions,
    timeout_seconds: float = 400.0,
) -> list[Measured]:
    """Results in the order of `wanted`. folder: of the store that keeps measured ops between jobs."""
    if cluster.links != links:
        cluster.change(links)
        time.sleep(0.2)
    return cluster.run(_on_rank, links.name, job, list(wanted), folder, conditions, timeout_seconds=timeout_seconds)[0]


# -- on a rank ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Job:
    """What a rank keeps of a job."""

    model: torch.nn.Module
    batch: Batch
    trace: Trace
    inputs: Inputs
    request: Request


_tables: dict[str, LinkTables] = {}
_jobs: dict[str, _Job] = {}


def _on_rank(
    rank: int, links: str, name: str, wanted: list[Wanted], folder: str, conditions: Conditions
) -> list[Measured]:
    size = dist.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "SHARDPLAN_CACHE": folder}
    job = _jobs[name] if name in _jobs else _jobs.setdefault(name, _made(name))
    if links not in _tables:
        _tables[links] = measure_links(plan_groups(size), budget_seconds=conditions.link_seconds)
    made = _plans(rank, job, _tables[links], wanted, conditions)
    plans = [Plan.from_json(text) if text else None for text, _, _ in made]
    results = [
        Measured(want.name, error=error, planning_seconds=seconds)
        if plan is None
        else Measured(
            want.name,
            plan.degrees(),
            plan.step_seconds,
            predicted_nbytes=tuple(held.peak_nbytes for held in plan.memory()),
            outcome=plan.status.outcome,
            stages=_described(plan),
            planning_seconds=seconds,
        )
        for want, plan, (_, error, seconds) in zip(wanted, plans, made, strict=True)
    ]
    best = min((plan.step_seconds for plan in plans if plan is not None), default=0.0)
    alike: dict[str, int] = {}
    of: dict[int, int] = {}
    for index, plan in enumerate(plans):
        if plan is None:
            continue
        if plan.step_seconds > conditions.most * best:
            results[index] = replace(results[index], error=f"predicted {plan.step_seconds / best:.1f} x the best")
            continue
        of[index] = alike.setdefault(_program(plan), index)
    runs: dict[int, ParallelModel] = {}
    try:
        for index in sorted(set(of.values())):
            plan = plans[index]
            assert plan is not None
            runs[index] = _loaded(job, plan)
        given = job.batch
        steps = {
            str(index): (lambda pm=pm: pm.train_step(*given.args, target=given.target, **given.kwargs))
            for index, pm in runs.items()
        }
        samples = interleaved(steps, conditions.repeats, give_up=conditions.give_up)
        peaks = {
            index: pm.measure(*given.args, target=given.target, steps=1, **given.kwargs).peak_nbytes
            if conditions.memory
            else ()
            for index, pm in runs.items()
        }
        for index, source in of.items():
            seen = samples[str(source)]
            results[index] = replace(
                results[index], seconds=statistics.median(seen), samples=tuple(seen), nbytes=tuple(peaks[source])
            )
        return results
    finally:
        for pm in runs.values():
            pm.close()
        del runs
        gc.collect()


def _made(name: str) -> _Job:
    model, batch, loss_fn = jobs.make(name)
    given = example_batch(model, batch, loss_fn is not None)
    request = Request(loss_fn=loss_fn, optimizer=adamw)
    trace, inputs = make_trace(model, given, request)
    return _Job(model, given, trace, inputs, request)


def _loaded(job: _Job, plan: Plan) -> ParallelModel:
    """As `auto_parallel(model, ..., plan=plan)` loads it under torchrun, without tracing the model again."""
    session = rank_calls.join("cpu", TIMEOUT_SECONDS, HEARTBEAT_SECONDS)
    made = ParallelModel(
        job.model,
        Settings(job.request.loss_fn, adamw),
        lambda batch: Planned(plan, job.trace, job.inputs, InPlace(session)),
    )
    made._prepare(job.batch)
    return made


def _plans(
    rank: int, job: _Job, tables: LinkTables, wanted: list[Wanted], conditions: Conditions
) -> list[tuple[str, str, float]]:
    """(plan as JSON, why there is none, CPU seconds) of each. The first is planned by rank 0 alone, which measures the
    ops; then every rank plans its part of the others."""
    size = dist.get_world_size()
    mine: dict[int, tuple[str, str, float]] = {}
    for index, want in enumerate(wanted):
        if index == 1:
            dist.barrier()
        if (index - 1) % size == rank if index else rank == 0:
            started = time.process_time()
            text, error = _plan(job, tables, want, conditions)
            mine[index] = text, error, time.process_time() - started
    everyone: list[dict[int, tuple[str, str, float]]] = [{}] * size
    dist.all_gather_object(everyone, mine)
    found = {index: made for part in everyone for index, made in part.items()}
    return [found[index] for index in range(len(wanted))]


def _plan(job: _Job, tables: LinkTables, want: Wanted, conditions: Conditions) -> tuple[str, str]:
    """(plan as JSON, why there is none)."""
    # A plan by hand may be too large: whether it is, is measured.
    cluster = _cluster(conditions, limited=want.microbatches is None)
    if want.order:
        place = {device: rank for rank, device in enumerate(want.order)}
        tables = _renamed(tables, place)
    links = LinkModel(cluster, tables)
    costs: Any = CostModel(cluster, links, Store.open(), model=job.trace.fingerprint, optimizer=job.request.optimizer)
    if min(conditions.shares) < 1.0:
        costs = Slowed(costs, conditions.shares)
    constraints: list[Constraint] = [degrees(**want.degrees)] if want.degrees else []
    if want.cut is not None:
        constraints += _cut(job.trace, want.cut)
    options = SolveOptions(
        constraints=tuple(constraints),
        microbatches=want.microbatches or "auto",
        schedule="auto" if want.microbatches is None else "1f1b",
        zero=want.zero,
        optimizer_factor=optimizer_factor(job.request.optimizer),
        time_limit=_SOLVE_SECONDS,
        hints=False,
    )
    try:
        plan = solve(job.trace, cluster, costs, options)
    except ShardplanError as error:
        return "", error.title
    if want.order:
        stages = [replace(stage, ranks=tuple(want.order[rank] for rank in stage.ranks)) for stage in plan.stages]
        plan = replace(plan, stages=tuple(stages))
    return plan.to_json(), ""


def _cluster(conditions: Conditions, limited: bool) -> Cluster:
    """CPU ranks on this machine; those that get unequal shares of a core are of different kinds."""
    found = Cluster.parse(len(conditions.shares))
    if len(set(conditions.shares)) > 1:
        devices = tuple(
            Device(replace(device.kind, name=f"{device.kind.name} at {share:g}"), device.node, device.local)
            for device, share in zip(found.devices, conditions.shares, strict=True)
        )
        found = replace(found, devices=devices)
    return found.with_memory(conditions.limit_nbytes) if limited and conditions.limit_nbytes is not None else found


def _renamed(tables: LinkTables, place: dict[int, int]) -> LinkTables:
    """The tables of the same devices under other numbers."""

    def key(kind: str, ranks: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        moved = tuple(place[rank] for rank in ranks)
        return kind, moved if kind == "p2p" else tuple(sorted(moved))

    return replace(
        tables,
        entries={key(*at): points for at, points in tables.entries.items()},
        slowdowns={key(*at): shares for at, shares in tables.slowdowns.items()},
    )


def _cut(trace: Trace, share: float) -> list[Constraint]:
    """Two stages with this share of the segments in the first; a segment whose name others have, too, is left free."""
    names = [segment.name for segment in trace.segments]
    first = min(max(round(share * len(names)), 1), len(names) - 1)
    return [pin(name, int(at >= first)) for at, name in enumerate(names) if at in (first - 1, first)]


def _program(plan: Plan) -> str:
    """Equal for plans that are the same program."""
    stages = [(s.first, s.last, s.ranks, str(s.mesh), s.rematerialized) for s in plan.stages]
    parts = (stages, plan.microbatches, plan.schedule, plan.splits, plan.storage, plan.reduction, plan.bucket_nbytes)
    return repr(parts)


def _described(plan: Plan) -> str:
    """Segments and ranks of every stage, and what is stored in parts."""
    text = " | ".join(f"{s.first}-{s.last} on {','.join(map(str, s.ranks))}" for s in plan.stages)
    levels = sorted({stored.level for stored in plan.storage.values()})
    again = sum(len(stage.rematerialized) for stage in plan.stages)
    text += f", {again} recomputed" if again else ""
    return text + (f", ZeRO {'/'.join(map(str, levels))}" if levels else "")


def shown(items: Sequence[Any], quiet: bool) -> Any:
    """The items, with a progress bar on a terminal."""
    return items if quiet else track(items, description="measuring")
