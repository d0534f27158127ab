"""`auto_parallel` and `plan`."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardplan.batch import Batch, example_batch
from shardplan.errors import PlanMismatch, ShardplanError, UsageError, WorldSizeMismatch
from shardplan.parallel_model import ParallelModel, Planned, Settings
from shardplan.planner.cluster import Cluster
from shardplan.planner.plan import Plan
from shardplan.planner.trace import Trace
from shardplan.planning import (
    LinkCache,
    Request,
    check_plan,
    find_plan,
    load_plan,
    make_trace,
    measures_links,
    resolve_cluster,
    resolve_model,
)
from shardplan.progress import Say, say_nothing, say_on_stderr
from shardplan.ranks import InPlace, Spawned
from shardplan.runtime import rank_calls
from shardplan.runtime.launch import HEARTBEAT_SECONDS, TIMEOUT_SECONDS, Workers
from shardplan.runtime.worker import Session
from shardplan.values import Init, Weights

Optimizer = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a call may take, and how long a rank may be silent."""

    timeout_seconds: float
    heartbeat_seconds: float


def auto_parallel(
    model: Any,
    devices: Any,
    example_inputs: Any = None,
    loss_fn: Callable[..., Any] | None = None,
    optimizer: Optimizer | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    constraints: Sequence[Any] = (),
    precision: str | None = None,
    microbatches: int | str = "auto",
    schedule: str = "auto",
    rematerialize: bool | str = "auto",
    objective: str = "train",
    memory_limit: int | str | Sequence[int | str | None] | None = None,
    solver: str = "highs",
    time_limit: float = 60.0,
    gap: float = 0.01,
    cache: bool = True,
    verbose: bool | None = None,
    *,
    batch_norm: str = "global",
    zero: int | str = "auto",
    reduction: str = "exact",
    average_every: int | None = None,
    offload: str | None = None,
    weights: Weights | None = None,
    init: Init | None = None,
    clip_norm: float | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    compile: bool | str = False,
    seed: int = 0,
    timeout_seconds: float = TIMEOUT_SECONDS,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> ParallelModel:
    """Plan a model for devices and load it there.

    model: an nn.Module, or a function without arguments that makes one. One on the meta device (see `meta_model`) is
        never whole anywhere: every rank makes or reads its own part. devices: 2, ["cuda:0", "cuda:1"],
        ["cpu"] * 2, "8xh100", "cluster.toml", a Cluster, "auto".
    example_inputs: a global batch: a tensor, a tuple of positional inputs, or a dict by name; with a loss_fn the target
        is the tuple's last item or the dict's "target". None: plan at the first call.
    loss_fn: ``loss_fn(output, target)`` -> scalar; None: the model returns the loss, or an object with ``.loss``.
    optimizer: params -> torch.optim.Optimizer; called on every rank with its local parameters.
    plan: a Plan or the path of one: skips planning; refused (PlanMismatch) where it does not fit.
    constraints: `pin`, `split`, `replicate`, `together`, `leaf`, `degrees`, `within_node`, `memory`, `zero`.
    memory_limit: bytes or text ("20 GiB") per device, or a list with one per device.
    time_limit: seconds for the solver; gap: relative, where it may stop. cache: keep measurements on disk.
    batch_norm: "global": batch normalisation in training sees the whole batch, as on one device, which rules out
        microbatches; "replica": every replica and microbatch has statistics of its own, as under plain data parallelism
        and gradient accumulation, so results depend on the plan. Running statistics then move once per microbatch, by
        the mean of the replicas.
    reduction: "bf16" and "fp16" send sums of gradients over replicas rounded, "low_rank" (or "low_rank:8") sends
        those of matrices as factors of rank 4 (8). average_every: replicas take that many optimizer steps by themselves
        and then average their parameters (local SGD). None of it is what one device computes; the plan and its report
        say so (docs/training.md).
    offload: "optimizer" keeps the optimizer's state in the memory of the host, where it steps.
    zero: what is stored of parameters that replicas have in common (docs/zero.md): 0: everything on each; 1: parts of
        the optimizer state; 2: of gradients too; 3: of the parameters too; "auto": whatever is best for each of them.
    verbose: progress on stderr. clip_norm: largest global gradient norm. seed: of random ops, and of `init`.
    compile: stages go through `torch.compile` with their collectives inside (True: "inductor", or the name of a
        backend), each as one graph of static shapes; a stage that cannot be one runs as it is, with a warning.
    scheduler: optimizer -> torch learning-rate scheduler; every `train_step` moves it, and checkpoints have its state.
    weights: start from these: a safetensors file, a directory (one file, or several with an index), or a list of files;
        each rank reads its slices. Rounded to the model's dtypes. Raises CheckpointError unless they are its weights.
    init: ``init(module)`` initialises the parameters of one module of a model on the meta device; called for every
        module from the inside out, after ``reset_parameters()`` and ``_init_weights(module)`` where there are such.
    timeout_seconds: the longest that any one call may take. heartbeat_seconds: the longest that a rank may give no sign
        of life; then every rank and the caller get an error that names it and the place where it was.

    Under torchrun every process calls this with the same arguments and is one rank; parameters are those of rank 0.
    From a plain script it starts a worker per device. Where the devices are only described, it plans, and running
    raises NotRunnableHere. Raises the errors of `shardplan.errors`.
    """
    request = Request(
        loss_fn,
        optimizer,
        tuple(constraints),
        precision,
        microbatches,
        schedule,
        rematerialize,
        objective,
        memory_limit,
        solver,
        time_limit,
        gap,
        cache,
        verbose,
        batch_norm,
        zero,
        reduction,
        average_every,
        offload,
    )
    module = resolve_model(model)
    given = load_plan(plan) if plan is not None else None
    say = say_on_stderr if verbose else say_nothing
    limits = Limits(timeout_seconds, heartbeat_seconds)

    def prepare(batch: Batch) -> Planned:
        if under_torchrun():
            return _plan_in_place(module, devices, batch, request, given, limits, say)
        cluster = resolve_cluster(devices, request)
        if not cluster.is_local:
            trace, inputs = make_trace(module, batch, request)
            found = (
                check_plan(given, trace, inputs, cluster) if given else find_plan(trace, cluster, request, None, say)
            )
            return Planned(found, trace, inputs, None)
        return _plan_and_spawn(module, cluster, batch, request, given, limits, say)

    backend = "inductor" if compile is True else compile or None
    settings = Settings(loss_fn, optimizer, clip_norm, seed, weights, init, scheduler, backend, bool(verbose))
    made = ParallelModel(module, settings, prepare)
    if example_inputs is not None:
        made.prepare(example_inputs)
    else:
        resolve_cluster(devices, request)
    return made


def plan(
    model: Any,
    devices: Any,
    example_inputs: Any = None,
    loss_fn: Callable[..., Any] | None = None,
    optimizer: Optimizer | None = None,
    constraints: Sequence[Any] = (),
    precision: str | None = None,
    microbatches: int | str = "auto",
    schedule: str = "auto",
    rematerialize: bool | str = "auto",
    objective: str = "train",
    memory_limit: int | str | Sequence[int | str | None] | None = None,
    solver: str = "highs",
    time_limit: float = 60.0,
    gap: float = 0.01,
    cache: bool = True,
    verbose: bool | None = None,
    *,
    batch_norm: str = "global",
    zero: int | str = "auto",
    reduction: str = "exact",
    average_every: int | None = None,
    offload: str | None = None,
) -> Plan:
    """Only plan; the arguments are those of `auto_parallel`. Devices of this machine are measured, others modelled; no
    device and no process group has to be there."""
    request = Request(
        loss_fn,
        optimizer,
        tuple(constraints),
        precision,
        microbatches,
        schedule,
        rematerialize,
        objective,
        memory_limit,
        solver,
        time_limit,
        gap,
        cache,
        verbose,
        batch_norm,
        zero,
        reduction,
        average_every,
        offload,
    )
    if example_inputs is None:
        raise UsageError("plan needs example_inputs", hints=["a global batch; tensors on the meta device will do"])
    module = resolve_model(model)
    say = say_on_stderr if verbose else say_nothing
    return plan_with_trace(module, devices, example_batch(module, example_inputs, loss_fn is not None), request, say)


def plan_with_trace(model: torch.nn.Module, devices: Any, batch: Batch, request: Request, say: Say) -> Plan:
    """As `plan`, of a resolved request."""
    cluster = resolve_cluster(devices, request)
    trace, _ = make_trace(model, batch, request)
    return plan_traced(trace, cluster, request, say)


def plan_traced(trace: Trace, cluster: Cluster, request: Request, say: Say) -> Plan:
    """As `plan`, of a trace; links of this machine are measured where they were not before."""
    tables = None
    if measures_links(cluster):
        links = LinkCache(cluster, _backend(cluster), request.cache)
        tables = links.find()
        if tables is None:
            say("measuring links")
            with Workers(_names(cluster)) as workers:
                tables = workers.call(rank_calls.tables)[0]
            links.keep(tables)
    return find_plan(trace, cluster, request, tables, say)


def under_torchrun() -> bool:
    """Whether this process was started as one rank of several."""
    return all(os.environ.get(name, "").isdecimal() for name in ("RANK", "WORLD_SIZE"))


def _plan_and_spawn(
    model: torch.nn.Module,
    cluster: Cluster,
    batch: Batch,
    request: Request,
    given: Plan | None,
    limits: Limits,
    say: Say,
) -> Planned:
    """Workers import while this process traces."""
    workers = Workers(
        _names(cluster), timeout_seconds=limits.timeout_seconds, heartbeat_seconds=limits.heartbeat_seconds
    )
    try:
        trace, inputs = make_trace(model, batch, request)
        if given is not None:
            found = check_plan(given, trace, inputs, cluster)
        else:
            workers.wait_ready()  # they would disturb measurements while they start
            tables = None
            if measures_links(cluster):
                links = LinkCache(cluster, _backend(cluster), request.cache)
                tables = links.find()
                if tables is None:
                    say("measuring links")
                    tables = workers.call(rank_calls.tables)[0]
                    links.keep(tables)
            found = find_plan(trace, cluster, request, tables, say)
        return Planned(found, trace, inputs, Spawned(workers))
    except BaseException:
        workers.close(grace_seconds=0.0)
        raise


def _plan_in_place(
    model: torch.nn.Module,
    devices: Any,
    batch: Batch,
    request: Request,
    given: Plan | None,
    limits: Limits,
    say: Say,
) -> Planned:
    """Rank 0 plans; the others trace, take its plan and check that it is for the same graph."""
    cluster = resolve_cluster(devices, request)
    shape = given.degrees() if given is not None else str(cluster)
    _check_world(len(given.devices) if given is not None else len(cluster), shape)
    rank = int(os.environ["RANK"])
    device = cluster.devices[rank].local if rank < len(cluster) else ""
    session = rank_calls.join(device, limits.timeout_seconds, limits.heartbeat_seconds)
    _check_alike(session, given)
    trace, inputs = make_trace(model, batch, request)
    tables = None
    if given is None and measures_links(cluster):
        links = LinkCache(cluster, _backend(cluster), request.cache)
        tables = rank_calls.share(session, links.find() if session.rank == 0 else None)
        if tables is None:
            tables = rank_calls.tables(session)
            if session.rank == 0:
                links.keep(tables)
    text: str | ShardplanError = ""
    if session.rank == 0:
        try:
            found = (
                check_plan(given, trace, inputs, cluster) if given else find_plan(trace, cluster, request, tables, say)
            )
            text = found.to_json()
        except ShardplanError as error:
            text = error
    text = rank_calls.share(session, text)
    if isinstance(text, ShardplanError):
        raise text
    failure: ShardplanError | None = None
    planned = Plan.from_json(text)
    try:
        planned = check_plan(planned, trace, inputs, cluster)
    except ShardplanError as error:
        failure = error
    failures = rank_calls.gather(session, failure)
    for other, found in enumerate(failures):
        if found is not None:
            raise failure or PlanMismatch(f"the plan does not fit on rank {other}", [found.title, *found.details])
    return Planned(planned, trace, inputs, InPlace(session))


def _check_alike(session: Session, given: Plan | None) -> None:
    """All ranks run the same versions and were given the same plan; if not, all say so."""
    import shardplan

    plan = hashlib.sha256(given.to_json().encode()).hexdigest()[:12] if given is not None else "none"
    mine = {"shardplan": shardplan.__version__, "torch": str(torch.__version__), "plan=": plan}
    everyone = rank_calls.gather(session, mine)
    wrong = [
        f"{name}: {other[name]} on rank {rank}, {everyone[0][name]} on rank 0"
        for rank, other in enumerate(everyone)
        for name in mine
        if other[name] != everyone[0][name]
    ]
    if wrong:
        raise PlanMismatch("the ranks do not run the same job", wrong[:20])


def _check_world(needed: int, shape: str) -> None:
    """Before anything waits for anyone."""
    started = int(os.environ["WORLD_SIZE"])
    if started != needed:
        script = os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0].endswith(".py") else "train.py"
        raise WorldSizeMismatch(
            f"the plan needs {needed} ranks ({shape}), {started} were started",
            hints=[f"torchrun --nproc-per-node {needed} {script}"],
        )


def _names(cluster: Cluster) -> list[str]:
    return [device.local for device in cluster.devices]


def _backend(cluster: Cluster) -> str:
    return "nccl" if any(device.local.startswith("cuda") for device in cluster.devices) else "gloo"
