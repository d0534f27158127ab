"""From a model and a batch to a Trace and a Plan: what `plan`, `auto_parallel` and the command line share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from shardplan.batch import Batch, Inputs
from shardplan.errors import NotSupported, UsageError
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import Leaf
from shardplan.planner.costs.roofline import flops
from shardplan.planner.costs.tables import LinkTables
from shardplan.planner.placement import Mesh
from shardplan.planner.plan import Plan
from shardplan.planner.precision import compute_dtype
from shardplan.planner.rules import local_call
from shardplan.planner.schedules import KINDS
from shardplan.planner.trace import Trace, infos, resolve
from shardplan.planner.wire import Wire, said
from shardplan.progress import Say, live

SCHEDULES = ("auto", *KINDS)


@dataclass(frozen=True, slots=True)
class Request:
    """What to plan for; the fields are the parameters of `auto_parallel`. Checked here, before anything is traced."""

    loss_fn: Callable[..., Any] | None = None
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    constraints: tuple[Any, ...] = ()
    precision: str | None = None
    microbatches: int | str = "auto"
    schedule: str = "auto"
    rematerialize: bool | str = "auto"
    objective: str = "train"
    memory_limit: int | str | Sequence[int | str | None] | None = None
    solver: str = "highs"
    time_limit: float = 60.0
    gap: float = 0.01
    cache: bool = True
    verbose: bool | None = None
    batch_norm: str = "global"
    zero: int | str = "auto"
    reduction: str = "exact"
    average_every: int | None = None
    offload: str | None = None

    def __post_init__(self) -> None:
        compute_dtype(self.precision)
        if self.objective not in ("train", "infer"):
            raise UsageError(f"objective={self.objective!r}", hints=['"train" or "infer"'])
        if self.schedule not in SCHEDULES:
            raise NotSupported(f"schedule={self.schedule!r}", hints=[f"one of {', '.join(SCHEDULES)}"])
        count = self.microbatches
        if count != "auto" and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise UsageError(f"microbatches={count!r}", hints=['"auto" or a number of at least 1'])
        if self.rematerialize not in ("auto", True, False):
            raise UsageError(f"rematerialize={self.rematerialize!r}", hints=['"auto", True or False'])
        wire = Wire.parse(self.reduction)
        every = self.average_every
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise UsageError(f"average_every={every!r}", hints=["None, or the optimizer steps between two averages"])
        if every is not None and not wire.exact:
            raise UsageError(f"average_every={every} and reduction={self.reduction!r}: gradients are not summed")
        if self.zero != "auto" and (isinstance(self.zero, bool) or self.zero not in (0, 1, 2, 3)):
            raise UsageError(f"zero={self.zero!r}", hints=['"auto", 0, 1, 2 or 3'])
        if self.whole and self.zero not in ("auto", 0):
            given = "average_every" if every is not None else "reduction"
            raise UsageError(f"{given}= and zero={self.zero}: every replica has to have everything", hints=["zero=0"])
        if self.offload not in (None, "optimizer"):
            raise UsageError(f"offload={self.offload!r}", hints=['"optimizer": its state stays in memory of the host'])
        if self.batch_norm not in ("global", "replica"):
            raise UsageError(
                f"batch_norm={self.batch_norm!r}",
                hints=['"global": statistics of the whole batch; "replica": of each replica and microbatch'],
            )
        if not self.time_limit > 0 or not 0 <= self.gap < 1:
            raise UsageError(f"time_limit={self.time_limit}, gap={self.gap}", hints=["time_limit > 0, 0 <= gap < 1"])
        if self.optimizer is not None and not callable(self.optimizer):
            raise UsageError(
                f"optimizer is {type(self.optimizer).__name__}, not a function that makes one",
                hints=["optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4)"],
            )

    @property
    def whole(self) -> bool:
        """Whether every replica has to hold all that replicas have in common."""
        return self.average_every is not None or Wire.parse(self.reduction).rank > 0


def resolve_model(model: Any) -> nn.Module:
    """The model, made if it is given as a factory. Raises UsageError."""
    if not isinstance(model, nn.Module) and callable(model):
        model = model()
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is {type(model).__name__}, not an nn.Module or a function that makes one")
    return model


def resolve_cluster(devices: Any, request: Request) -> Cluster:
    """The cluster that ``devices=`` means, with the memory limits of the request."""
    cluster = Cluster.parse(devices)
    return cluster.with_memory(request.memory_limit) if request.memory_limit is not None else cluster


def make_trace(model: nn.Module, batch: Batch, request: Request) -> tuple[Trace, Inputs]:
    """Raises NotTraceable."""
    from shardplan.planner.export import trace_model

    trace = trace_model(
        model,
        batch.args,
        batch.kwargs,
        loss_fn=request.loss_fn,
        target=batch.target,
        training=request.objective == "train",
        leaves=[constraint.name for constraint in request.constraints if isinstance(constraint, Leaf)],
        precision=request.precision,
    )
    trace.batch_norm = request.batch_norm
    return trace, Inputs(trace, batch.on_meta(), batch.target)


def check_plan(plan: Plan, trace: Trace, inputs: Inputs, cluster: Cluster) -> Plan:
    """Raises PlanMismatch where a plan was made for something else."""
    plan.check(trace.fingerprint, inputs.texts(), len(cluster))
    return plan


def load_plan(plan: Plan | str | os.PathLike[str]) -> Plan:
    """A plan, read if it is given as a path. Raises PlanFileError."""
    return plan if isinstance(plan, Plan) else Plan.load(plan)


def optimizer_factor(factory: Callable[..., torch.optim.Optimizer] | None) -> float:
    """Bytes of optimizer state per byte of parameters (AdamW 2, SGD 0, with momentum 1), by a step on a small
    parameter. Raises UsageError where the factory fails."""
    if factory is None:
        return 0.0
    parameter = nn.Parameter(torch.zeros(8, 16))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = factory([parameter])
        optimizer.step()
    except Exception as error:
        raise UsageError(
            f"the optimizer factory failed on a parameter: {type(error).__name__}: {error}",
            hints=["optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4)"],
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"the optimizer factory returned {type(optimizer).__name__}, not a torch.optim.Optimizer")
    state = [v for held in optimizer.state.values() for v in held.values() if isinstance(v, torch.Tensor)]
    whole = sum(v.numel() * v.element_size() for v in state if v.numel() > 1)
    return whole / (parameter.numel() * parameter.element_size())


def measures_links(cluster: Cluster) -> bool:
    """Whether links are to be measured: they are here, and nobody described them."""
    return cluster.is_local and len(cluster) > 1 and cluster.links_assumed


class LinkCache:
    """Measured link tables of a cluster, kept in the store."""

    def __init__(self, cluster: Cluster, backend: str, cache: bool) -> None:
        from shardplan.runtime.measure_links import cache_key, plan_groups

        self._key = cache_key(cluster, plan_groups(len(cluster)), backend)
        self._cache = cache

    def find(self) -> LinkTables | None:
        from shardplan.planner.costs.store import Store

        text = Store.open().get_text(self._key) if self._cache else None
        return LinkTables.from_json(text) if text is not None else None

    def keep(self, tables: LinkTables) -> None:
        from shardplan.planner.costs.store import Store

        if self._cache:
            Store.open().put_text(self._key, tables.to_json())


_TRACED = frozenset({"loss_fn", "precision", "objective"})
"""Settings that another trace would have to be made for."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What `Plan.with_` solves again: a traced job with its prices. It stays in the process that made it: a copy in
    another one is None."""

    trace: Trace
    cluster: Cluster
    request: Request
    tables: LinkTables | None
    say: Say

    def __call__(self, constraints: tuple[Any, ...], settings: dict[str, Any]) -> Plan:
        names = {f.name for f in fields(Request)} - {"constraints"}
        if unknown := sorted(settings.keys() - names):
            raise UsageError(f"with_ does not take {', '.join(unknown)}", hints=[f"one of {', '.join(sorted(names))}"])
        fixed = sorted(name for name in settings.keys() & _TRACED if settings[name] != getattr(self.request, name))
        fixed += sorted(str(c) for c in constraints if isinstance(c, Leaf))
        if fixed:
            raise NotSupported(f"with_: {', '.join(fixed)} needs another trace", hints=["call plan with it"])
        request = replace(self.request, constraints=(*self.request.constraints, *constraints), **settings)
        cluster = self.cluster
        if "memory_limit" in settings:
            limit = request.memory_limit
            cluster = replace(cluster, limits=()) if limit is None else cluster.with_memory(limit)
        if request.batch_norm != self.trace.batch_norm:
            raise NotSupported("with_: batch_norm needs another trace", hints=["call plan with it"])
        return find_plan(self.trace, cluster, request, self.tables, self.say)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def find_plan(trace: Trace, cluster: Cluster, request: Request, tables: LinkTables | None, say: Say) -> Plan:
    """Price and solve. Raises NoFeasiblePlan, ConflictingConstraints, SolverTimeout and what else planning raises."""
    from shardplan.planner.costs.host import AWAY, HostOptimizer
    from shardplan.planner.costs.links import LinkModel
    from shardplan.planner.costs.model import CostModel
    from shardplan.planner.costs.store import Store
    from shardplan.planner.search import SolveOptions, solve

    started = time.perf_counter()
    away = request.offload is not None and not any(device.local == "cpu" for device in cluster.devices)
    kept = 0.0 if away else optimizer_factor(request.optimizer)
    kept += Wire.parse(request.reduction).rank > 0  # what factors leave out of gradients
    options = SolveOptions(
        constraints=request.constraints,
        microbatches=request.microbatches,
        schedule=request.schedule,
        rematerialize=request.rematerialize,
        zero=0 if request.whole else request.zero,
        solver=request.solver,
        time_limit=request.time_limit,
        gap=request.gap,
        objective=request.objective,
        optimizer_factor=kept,
        reduction=request.reduction,
        average_every=request.average_every or 1,
        progress=say,
    )
    store = Store.open() if request.cache else None
    costs = CostModel(
        cluster,
        LinkModel(cluster, tables),
        store,
        measure=cluster.is_local,
        progress=say,
        model=trace.fingerprint,
        optimizer=request.optimizer,
    )
    say(f"planning {trace.model_name} on {cluster}")
    with one_thread(cluster), live(say):
        priced: Any = HostOptimizer(costs) if away else costs
        plan = solve(trace, cluster, priced, options)
    say(f"plan: {plan.degrees()}, found in {time.perf_counter() - started:.1f} s")
    work, dtype = model_flops(trace)
    average_every = request.average_every or 0
    return replace(
        plan,
        reduction=request.reduction,
        average_every=average_every,
        offload=request.offload or "",
        notes=(*plan.notes, *said(request.reduction, average_every), *((AWAY,) if away else ())),
        trace_seconds=trace.seconds,
        profile_seconds=costs.profile_seconds,
        flops=work,
        peak_flops=sum(device.kind.peak_flops(dtype) for device in cluster.devices),
        again=Problem(trace, cluster, request, tables, say),
    )


def model_flops(trace: Trace) -> tuple[float, torch.dtype]:
    """Operations of a step on the global batch (backward counts twice), and the dtype that most of them are in."""
    mesh = Mesh(("dp", "tp"), (1, 1))
    by_dtype: dict[torch.dtype, float] = {}
    for node in trace.nodes():
        if node.op == "call_function" and resolve(node)[0] is node and infos(node):
            call = local_call(node, {}, mesh)
            again = 2.0 if trace.training and any(value.needs_grad for value in call.outputs) else 0.0
            dtype = next((value.dtype for value in call.inputs if value.dtype.is_floating_point), torch.float32)
            by_dtype[dtype] = by_dtype.get(dtype, 0.0) + (1.0 + again) * flops(call)
    most = max(by_dtype, key=lambda dtype: by_dtype[dtype], default=torch.float32)
    return sum(by_dtype.values()), most


@contextmanager
def one_thread(cluster: Cluster) -> Iterator[None]:
    """CPU ops are measured as a rank will run them."""
    before = torch.get_num_threads()
    if any(device.local == "cpu" for device in cluster.devices):
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        yield
    finally:
        torch.set_num_threads(before)
