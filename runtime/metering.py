"""What one step took, on all ranks: seconds by phase, waiting, bytes sent, memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from shardplan.planner.timeline import Event, Timeline, Track
from shardplan.runtime.executor import Executor, Span
from shardplan.runtime.groups import traffic
from shardplan.runtime.measuring import events_of


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step in detail. seconds: of its slowest rank.

    phases: "forward", "backward", "weight", "reduce", "optimizer", "transfer", "wait" (for messages): seconds, the mean
    over ranks. bubble: the share of the ranks' time in which they waited for messages or had nothing to do.
    message_nbytes, collective_nbytes: sent by all ranks. memory_nbytes: by rank, what it holds after the step:
    allocated on its GPU, or resident. timeline: every rank's instructions.
    """

    seconds: float
    phases: dict[str, float]
    bubble: float
    message_nbytes: int
    collective_nbytes: int
    memory_nbytes: tuple[int, ...]
    timeline: Timeline


def detailed(executor: Executor, step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, StepRecord]:
    """Run a step with every instruction timed (a GPU is synchronised for each). Collective."""
    spans: list[Span] = []
    executor.spans = spans
    messages, collectives = traffic.message_nbytes, traffic.collective_nbytes
    dist.barrier()
    origin = time.perf_counter()
    try:
        loss = step()
        if executor.device.type == "cuda":
            torch.cuda.synchronize(executor.device)
        seconds = time.perf_counter() - origin
    finally:
        executor.spans = None
    sent = traffic.message_nbytes - messages, traffic.collective_nbytes - collectives
    everyone: list[Any] = [None] * dist.get_world_size()
    mine = executor.rank, seconds, events_of(spans, origin), sent, memory_nbytes(executor.device)
    dist.all_gather_object(everyone, mine)
    return loss, _record(everyone)


def _record(everyone: list[Any]) -> StepRecord:
    whole = max(seconds for _, seconds, _, _, _ in everyone)
    phases: dict[str, float] = {}
    busy = 0.0
    for _, _, events, _, _ in everyone:
        for event in events:
            seconds = event.end_seconds - event.start_seconds
            phases[event.category] = phases.get(event.category, 0.0) + seconds / len(everyone)
            busy += seconds if _is_work(event) else 0.0
    tracks = tuple(Track(f"rank {rank}", events) for rank, _, events, _, _ in everyone)
    return StepRecord(
        whole,
        phases,
        max(1.0 - busy / (whole * len(everyone)), 0.0) if whole else 0.0,
        sum(sent[0] for *_, sent, _ in everyone),
        sum(sent[1] for *_, sent, _ in everyone),
        tuple(memory for *_, memory in everyone),
        Timeline("measured", tracks),
    )


def _is_work(event: Event) -> bool:
    return event.category != "wait"


def memory_nbytes(device: torch.device) -> int:
    """Allocated on the GPU, or resident in this process (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
