"""What the ranks of a job are asked to do: functions of a `Session`, called in workers (`runtime.launch`) or in place
(under torchrun). Every function is collective: all ranks are asked at once, in the same order."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardplan.errors import UsageError
from shardplan.planner.costs.tables import LinkTables
from shardplan.rewrite.program import Program
from shardplan.runtime import checkpoint, optim
from shardplan.runtime.engine import Engine
from shardplan.runtime.inputs import Rows
from shardplan.runtime.loading import Drawn, Loader, Source
from shardplan.runtime.measure_links import measure_links, plan_groups
from shardplan.runtime.metering import StepRecord, detailed
from shardplan.runtime.rendezvous import attempt_store, from_environment
from shardplan.runtime.supply import Supply
from shardplan.runtime.watch import Watch
from shardplan.runtime.worker import Session

_ENGINE = "engine"
_LOADERS = "loaders"


@dataclass(frozen=True, slots=True)
class Job:
    """What a rank loads. See `Engine`."""

    programs: dict[str, Program]
    optimizer_factory: Callable[..., torch.optim.Optimizer] | None
    clip: float | None
    seed: int
    scheduler_factory: Callable[[torch.optim.Optimizer], Any] | None = None
    backend: str | None = None


def join(device: str, timeout_seconds: float, heartbeat_seconds: float) -> Session:
    """The session of this process under torchrun; starts the process group unless the script has. device: "" picks
    this process's GPU where there is one."""
    if not device:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        store, rank, world_size = from_environment(timeout_seconds)
        store, _ = attempt_store(rank, world_size, store, timeout_seconds)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=torch.device(device) if backend == "nccl" else None,
        )
    session = Session(dist.get_rank(), dist.get_world_size(), device)
    job = share(session, uuid.uuid4().hex)  # the store may have signs of life of an attempt before
    session.watch = Watch(session.rank, session.world_size, session.slot, heartbeat_seconds, job)
    return session


def share(session: Session, value: Any) -> Any:
    """Rank 0's value on every rank."""
    held = [value]
    device = torch.device(session.device)
    dist.broadcast_object_list(held, 0, device=device if device.type == "cuda" else None)
    return held[0]


def gather(session: Session, value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    found: list[Any] = [None] * session.world_size
    dist.all_gather_object(found, value)
    return found


def tables(session: Session) -> LinkTables:
    """Measured link tables of all ranks."""
    return measure_links(plan_groups(session.world_size), device=torch.device(session.device))


def same_values(session: Session, supply: Supply) -> Supply:
    """Overwrite whole tensors with rank 0's, in order of the mapping, and take its recipes."""
    with torch.no_grad():
        for tensor in supply.whole.values():
            moved = tensor.detach().to(session.device).contiguous()
            dist.broadcast(moved, 0)
            if session.rank:
                tensor.copy_(moved)
    return replace(supply, recipes=share(session, supply.recipes))


def load(session: Session, job: Job, supply: Supply) -> None:
    """Make this rank's engine; the supply has the parameters and buffers of its stage at least.

    Raises CheckpointError on every rank if any rank could not read what it needs.
    """
    unload(session)
    engine = Engine(
        job.programs,
        session.rank,
        session.world_size,
        session.device,
        optimizer_factory=job.optimizer_factory,
        clip=job.clip,
        seed=job.seed,
        scheduler_factory=job.scheduler_factory,
        backend=job.backend,
        place=session.slot.place,
    )
    session.values[_ENGINE] = engine
    load_weights(session, supply)


def load_weights(session: Session, supply: Supply) -> None:
    """Replace parameters and buffers. Raises as `load`."""
    if supply.stored:
        failure = checkpoint.attempt(lambda: engine_of(session).load_parts(supply))
        checkpoint.agree(failure, "the weights cannot be read")
    else:
        engine_of(session).load_parts(supply)


def unload(session: Session) -> None:
    """Drop the engine, if there is one."""
    for loader in session.values.pop(_LOADERS, {}).values():
        loader.close()
    engine = session.values.pop(_ENGINE, None)
    if engine is not None:
        engine.close()


def engine_of(session: Session) -> Engine:
    """The loaded engine. Raises UsageError where there is none."""
    if _ENGINE not in session.values:
        raise UsageError("nothing is loaded on this rank")
    return session.values[_ENGINE]


def use(session: Session, key: str, program: Program) -> None:
    engine_of(session).use(key, program)


def drop(session: Session, key: str) -> None:
    engine_of(session).drop(key)


Given = dict[str, torch.Tensor | Rows] | Drawn
"""A batch: its inputs by name, whole or the rows that this rank reads, or what to load it by."""


def train_step(session: Session, batch: Given, key: str) -> torch.Tensor:
    return engine_of(session).train_step(_loaded(session, batch, key), key)


def step(session: Session, batch: Given, key: str) -> torch.Tensor:
    return engine_of(session).step(_loaded(session, batch, key), key)


def metered(session: Session, name: str, batch: Given, key: str) -> tuple[torch.Tensor, StepRecord]:
    """The step of that name (`train_step` or `step`), in detail."""
    engine = engine_of(session)
    inputs = _loaded(session, batch, key)
    return detailed(engine.executor(key), lambda: getattr(engine, name)(inputs, key))


def add_source(session: Session, source: Source) -> None:
    """Batches will be drawn from it."""
    session.values.setdefault(_LOADERS, {})[source.number] = Loader(source)


def _loaded(session: Session, batch: Given, key: str) -> Any:
    if not isinstance(batch, Drawn):
        return batch
    return session.values[_LOADERS][batch.source].batch(batch, engine_of(session).rows(key))


def zero_grad(session: Session) -> None:
    engine_of(session).zero_grad()


def optimizer_step(session: Session) -> None:
    engine_of(session).optimizer_step()


def optimizer_groups(session: Session) -> list[dict[str, Any]] | None:
    """Settings of the optimizer's parameter groups, with the names and shapes of all parameters that ranks have in the
    group of that number; None without an optimizer."""
    found: list[dict[str, Any]] = []
    for groups in gather(session, engine_of(session).optimizer_groups()):
        for number, group in enumerate(groups):
            if number == len(found):
                found.append({"parameters": {}, "options": group["options"]})
            found[number]["parameters"] |= group["parameters"]
    return found or None


def set_options(session: Session, changes: list[dict[str, Any]]) -> None:
    """Other settings of the optimizer's parameter groups, by number."""
    optimizer = engine_of(session).optimizer
    for group, values in zip(optimizer.param_groups if optimizer is not None else (), changes, strict=False):
        optim.set_options(group, values)


def average_replicas(session: Session) -> None:
    engine_of(session).average_replicas()


def forward(session: Session, batch: dict[str, torch.Tensor], everywhere: bool, key: str) -> Any:
    """everywhere: give the outputs on all ranks, else on rank 0 only ({} elsewhere)."""
    return engine_of(session).forward(batch, everywhere=everywhere, key=key)


def full_state_dict(session: Session) -> dict[str, torch.Tensor]:
    return engine_of(session).full_state_dict()


def full_gradients(session: Session) -> dict[str, torch.Tensor]:
    return engine_of(session).full_gradients()


def save(session: Session, path: str, facts: dict[str, Any], wait: bool, keep: int) -> str:
    """See `Engine.save`."""
    return engine_of(session).save(path, facts, wait, keep)


def finish_saving(session: Session) -> None:
    """Wait for the checkpoint that is being written. Raises CheckpointError where it could not be."""
    engine_of(session).saver.wait()


def save_weights(session: Session, *arguments: Any) -> None:
    """See `Engine.save_weights`."""
    engine_of(session).save_weights(*arguments)


def restore(session: Session, path: str) -> tuple[int, dict[str, Any]]:
    """See `Engine.load`."""
    return engine_of(session).load(path)


def has_checkpoint(session: Session, path: str) -> bool:
    """Whether rank 0 sees a checkpoint, or a directory with some, whole or not."""
    return share(session, checkpoint.attempt(lambda: checkpoint.candidates(Path(path))) is None)


def measure(session: Session, batch: dict[str, torch.Tensor], steps: int, key: str) -> dict[str, Any]:
    return engine_of(session).measure(batch, steps, key)
