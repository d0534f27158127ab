"""Stages of plans for clusters that are not here, one at a time on the device that is: predicted and measured compute
and memory of the first rank of every stage that differs from those before it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.alone import Alone
from benchmarks.gpu.jobs import STAGED, Planned, Staged, adamw, degrees, planned, target_of
from shardplan.planner.schedules import Op


def rows(device: torch.device, kind: str, small: bool, repeats: int) -> Iterator[dict[str, Any]]:
    """A row a stage, as it is done. kind: of the described devices."""
    for held in STAGED:
        try:
            found = planned(
                target_of(held.job, small, on_meta=True),
                f"{held.devices}x{kind}",
                precision="bf16" if device.type == "cuda" else None,
                microbatches=held.microbatches,
                constraints=degrees(held),
            )
        except Exception as error:
            yield {"name": held.job.name, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
            continue
        seen: set[tuple[object, ...]] = set()
        for stage in range(len(found.plan.stages)):
            shape = _shape(found, stage)
            if shape in seen:
                continue
            seen.add(shape)
            try:
                yield _row(held, found, stage, device, repeats)
            except Exception as error:
                text = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
                yield {"name": held.job.name, "stage": stage, "error": text}
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def _shape(found: Planned, stage: int) -> tuple[object, ...]:
    """What makes a stage's compute and memory: its segments, and how many microbatches it keeps at a time."""
    plan = found.plan.stages[stage]
    kinds = (segment.kind for segment in found.trace.segments[plan.first : plan.last])
    return (*kinds, min(len(found.plan.stages) - stage, found.plan.microbatches))


def _row(held: Staged, found: Planned, stage: int, device: torch.device, repeats: int) -> dict[str, Any]:
    plan = found.plan.stages[stage]
    rank = plan.ranks[0]
    job = Alone(found.program, rank, device, adamw, found.batch)
    try:
        measured = job.measured(repeats)
    finally:
        job.close()
    ahead, back = plan.communication_seconds
    return {
        "name": held.job.name,
        "degrees": found.plan.degrees(),
        "stage": stage,
        "rank": rank,
        "predicted": {
            "forward": plan.forward_seconds - ahead,
            "backward": plan.backward_seconds - back,
            "optimizer": plan.optimizer_seconds,
        },
        "measured": {
            "forward": measured.seconds.get(Op.FORWARD, 0.0),
            "backward": measured.seconds.get(Op.BACKWARD, 0.0),
            "optimizer": measured.seconds.get(Op.OPTIMIZER_STEP, 0.0),
        },
        "predicted_nbytes": plan.memory.peak_nbytes - plan.memory.reserve,
        "nbytes": measured.peak_nbytes,
    }
