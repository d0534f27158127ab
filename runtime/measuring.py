"""Timed steps of an executor, and how much memory they take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from shardplan.planner.instructions import Op
from shardplan.planner.timeline import Event, Timeline, Track
from shardplan.runtime.executor import Executor, Span

_CATEGORIES = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.REDUCE_GRADS: "reduce",
    Op.OPTIMIZER_STEP: "optimizer",
}
_TIMED_STEPS = 2


def measure(
    executor: Executor, batch: Mapping[str, torch.Tensor], steps: int, number: int, clear: Callable[[], None]
) -> dict[str, Any]:
    """Collective. Runs a warm-up step, `steps` steps by the clock and two with every instruction timed; no optimizer.

    number: of the step, for random ops; clear: drops gradients before each. -> "step_seconds": median over steps of
    the slowest rank; "stages": per stage the seconds without waiting of its slowest rank, "forward" and "backward" a
    microbatch, "reduce" a step, and the seconds of a step spent waiting for messages, "wait"; "peak_nbytes": by rank,
    above what the process held before a model was loaded (0 where it cannot be known); "timeline": of the last step,
    the first rank of each stage.
    """
    seconds = []
    spans: list[Span] = []
    origin = 0.0
    for index in range(1 + steps + _TIMED_STEPS):
        if index == 1:
            reset_peak(executor.device)
        clear()
        dist.barrier()
        timed = index > steps
        executor.spans = [] if timed else None
        origin = time.perf_counter()
        share, _ = executor.run(batch, None, number)
        executor.whole_loss(share)
        if executor.device.type == "cuda":
            torch.cuda.synchronize(executor.device)
        if timed:
            spans += executor.spans or []
        elif index:
            seconds.append(time.perf_counter() - origin)
    last = executor.spans or []
    executor.spans = None
    peak = peak_nbytes(executor.device)
    mine = executor.stage, executor.rank, _seconds(spans), seconds, peak, _events(last, origin)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    stages: dict[int, dict[str, float]] = {}
    tracks: dict[int, Track] = {}
    for stage, rank, kinds, _, _, events in everyone:
        if stage < 0:
            continue
        held = stages.setdefault(stage, {})
        for kind, value in kinds.items():
            held[kind] = max(held.get(kind, 0.0), value)
        tracks.setdefault(stage, Track(f"stage {stage} (rank {rank})", events))
    slowest = [max(values) for values in zip(*(item[3] for item in everyone), strict=True)]
    return {
        "step_seconds": _median(slowest),
        "stages": [stages[index] for index in sorted(stages)],
        "peak_nbytes": [item[4] for item in everyone],
        "timeline": Timeline("measured", tuple(tracks[index] for index in sorted(tracks))),
    }


def _seconds(spans: list[Span]) -> dict[str, float]:
    by_kind: dict[str, list[float]] = {}
    for span in spans:
        if span.instruction.op in _CATEGORIES:
            by_kind.setdefault(_CATEGORIES[span.instruction.op], []).append(span.end - span.ready)
    found = {kind: _median(values) for kind, values in by_kind.items()}
    found["wait"] = sum(span.ready - span.start for span in spans) / _TIMED_STEPS
    return found


def _events(spans: list[Span], origin: float) -> tuple[Event, ...]:
    found = []
    for span in spans:
        if span.ready - span.start > 1e-5:
            found.append(Event("wait", "wait", span.start - origin, span.ready - origin))
        category = _CATEGORIES.get(span.instruction.op, "transfer")
        found.append(Event(str(span.instruction), category, span.ready - origin, span.end - origin))
    return tuple(found)


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0


# -- memory ------------------------------------------------------------------------------------------------------------


def reset_peak(device: torch.device) -> None:
    """Start a new peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        global _resettable
        _resettable = False


def peak_nbytes(device: torch.device) -> int:
    """The peak since `reset_peak`: what the allocator of a GPU gave out, or what this process had resident above what
    it had when this module was loaded (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return max(_status("VmHWM") - _BEFORE_NBYTES, 0) if _resettable else 0


def _status(field: str) -> int:
    if not os.path.exists("/proc/self/status"):
        return 0
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) << 10 for line in file if line.startswith(field + ":")), 0)


_BEFORE_NBYTES = _status("VmRSS")
_resettable = _BEFORE_NBYTES > 0
