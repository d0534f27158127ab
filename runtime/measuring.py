"""Timed steps of an executor: by instruction, by class of ops, and how much memory they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from shardplan.planner.costs.profile import device_key
from shardplan.planner.instructions import Op
from shardplan.planner.timeline import Event, Timeline, Track
from shardplan.runtime.executor import Executor, Span
from shardplan.runtime.live_bytes import peak_of
from shardplan.runtime.op_timing import OpClock, is_collective, timed
from shardplan.runtime.stage_run import StageRun

_CATEGORIES = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward",
    Op.BACKWARD_WEIGHT: "weight",
    Op.REDUCE_GRADS: "reduce",
    Op.OPTIMIZER_STEP: "optimizer",
}
_LONG_WAIT_SECONDS = 1e-5
_TIMED_STEPS = 3
_OP_STEPS = 3


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """What the slowest rank of a stage took. Medians, in seconds.

    phases: "forward", "backward", "weight" per microbatch; "reduce", "optimizer", "wait" (for messages) and "rest"
    (besides instructions) per step; all by the clock. computing: the same in which its thread computed (CPU ranks with
    one thread; else equal to phases). ops: class -> forward, backward and forward again, per microbatch.
    """

    phases: dict[str, float]
    computing: dict[str, float]
    ops: dict[str, tuple[float, float, float]]


@dataclass(frozen=True, slots=True)
class Around:
    """What a step does besides running the program. number: of the step, for random ops; clear: drops gradients;
    optimize: the optimizer step, or None; idle: what ranks without a stage do meanwhile, or None; held: tensors that
    stay between steps."""

    number: int
    clear: Callable[[], None]
    optimize: Callable[[], None] | None
    idle: Callable[[], None] | None
    held: Callable[[], Iterable[torch.Tensor]]


def measure(
    executor: Executor,
    batch: Mapping[str, torch.Tensor],
    steps: int,
    around: Around,
) -> dict[str, Any]:
    """Collective. Runs a step to warm up, one in which memory is counted, `steps` by the clock, some with every
    instruction timed and some with every op timed.

    -> "step_seconds": median over steps of the slowest rank; "stages": their `StageSeconds`; "peak_nbytes": by rank (0
    where it cannot be known); "places": by rank, its device key; "timeline": of the last timed step, the first rank of
    each stage.
    """
    run = _Step(executor, batch, around)
    run.once()
    dist.barrier()
    around.clear()
    peak = peak_of(run.once, executor.device, [*around.held(), *executor.sums.standing()])
    seconds = [run.timed_once() for _ in range(steps)]
    spans: list[list[Span]] = []
    rests: list[tuple[float, float]] = []
    origin = 0.0
    for _ in range(_TIMED_STEPS):
        executor.spans = []
        computing = time.thread_time()
        whole = run.timed_once()
        computing = time.thread_time() - computing
        origin = run.origin
        mine = executor.spans or []
        spans.append(mine)
        rests.append((whole - sum(s.end - s.start for s in mine), computing - sum(s.computing for s in mine)))
    ops = _op_seconds(executor, run)
    executor.spans = None
    of_stages = {r.stage: StageSeconds(*_phases(executor, r.stage, spans, rests), ops[r.stage]) for r in executor.runs}
    everyone: list[Any] = [None] * dist.get_world_size()
    mine = executor.rank, of_stages, seconds, peak, events_of(spans[-1], origin), device_key(executor.device)
    dist.all_gather_object(everyone, mine)
    stages: dict[int, StageSeconds] = {}
    tracks: dict[tuple[int, ...], Track] = {}
    for rank, held, _, _, events, _ in everyone:
        for stage, found in held.items():
            stages[stage] = _slower(stages[stage], found) if stage in stages else found
        if held:
            tracks.setdefault(tuple(held), Track(f"stage {', '.join(map(str, held))} (rank {rank})", events))
    slowest = [max(values) for values in zip(*(item[2] for item in everyone), strict=True)]
    return {
        "step_seconds": _median(slowest),
        "stages": [stages[index] for index in sorted(stages)],
        "peak_nbytes": [item[3] for item in everyone],
        "places": [item[5] for item in everyone],
        "timeline": Timeline("measured", tuple(tracks[index] for index in sorted(tracks))),
    }


class _Step:
    """One step of training, as `Engine.train_step` runs it."""

    def __init__(self, executor: Executor, batch: Mapping[str, torch.Tensor], around: Around) -> None:
        self.executor, self.batch, self.around = executor, batch, around
        self.origin = 0.0

    def once(self) -> None:
        around = self.around
        around.clear()
        share, _ = self.executor.run(self.batch, around.optimize, around.number)
        if self.executor.stage < 0 and around.idle is not None:
            around.idle()
        self.executor.whole_loss(share)

    def timed_once(self) -> float:
        """Seconds of a step that all ranks begin together."""
        dist.barrier()
        self.origin = time.perf_counter()
        self.once()
        if self.executor.device.type == "cuda":
            torch.cuda.synchronize(self.executor.device)
        return time.perf_counter() - self.origin


def _op_seconds(executor: Executor, step: _Step) -> dict[int, dict[str, tuple[float, float, float]]]:
    """Per stage of the rank, one after another: every rank runs as many steps as the one of most stages."""
    found: dict[int, dict[str, tuple[float, float, float]]] = {}
    program = executor.program
    turns = max(len(program.stages_of(rank)) for placement in program.placement for rank in placement.ranks)
    for turn in range(turns):
        if turn < len(executor.runs):
            found[executor.runs[turn].stage] = _op_seconds_of(executor, executor.runs[turn], step)
            continue
        for _ in range(_OP_STEPS):
            dist.barrier()
            step.once()
    return found


def _op_seconds_of(executor: Executor, run: StageRun, step: _Step) -> dict[str, tuple[float, float, float]]:
    clock = OpClock(executor.device)
    clock.watch_parameters((*executor.tensors.values(), *executor.parts.values()))
    plain, executor.clock = run.function, clock
    run.function = timed(run.code.source, f"stage{run.stage}", executor.program.leaves, clock)
    executor.spans = []
    steps = []
    try:
        for _ in range(_OP_STEPS):
            dist.barrier()
            step.once()
            steps.append(clock.take())
    finally:
        run.function, executor.clock = plain, None
    found: dict[str, list[float]] = {}
    for name, side in sorted({key for taken in steps for key in taken}):
        seconds = _median([taken.get((name, side), 0.0) for taken in steps]) / executor.program.microbatches
        found.setdefault(name, [0.0, 0.0, 0.0])[_SIDES.index(side)] = seconds
    return {name: (values[0], values[1], values[2]) for name, values in found.items()}


_SIDES = ("forward", "backward", "again")


def _phases(
    executor: Executor, stage: int, steps: list[list[Span]], rests: list[tuple[float, float]]
) -> tuple[dict[str, float], dict[str, float]]:
    by_clock: dict[str, list[float]] = {}
    computing: dict[str, list[float]] = {}
    steps = [[span for span in step if span.instruction.stage == stage] for step in steps]
    for span in (span for step in steps for span in step):
        name = _CATEGORIES.get(span.instruction.op)
        if name is not None:
            by_clock.setdefault(name, []).append(span.end - span.ready)
            computing.setdefault(name, []).append(span.computing)
    phases = {name: _median(values) for name, values in by_clock.items()}
    phases["wait"] = _median([sum(span.ready - span.start for span in step) for step in steps])
    phases["rest"] = max(_median([rest for rest, _ in rests]), 0.0)
    if executor.device.type != "cpu" or torch.get_num_threads() > 1:
        return phases, phases
    found = {name: _median(values) for name, values in computing.items()}
    found["rest"] = max(_median([rest for _, rest in rests]), 0.0)
    # What one thread computes is known better; how long a sum takes, only the clock knows.
    found |= {name: phases[name] for name in ("reduce", "wait") if name in phases}
    return phases, found


def _slower(one: StageSeconds, other: StageSeconds) -> StageSeconds:
    """Phase by phase the longer; the rest of a step and a collective are as long as for the rank that comes last."""
    phases, computing = (_longer(a, b) for a, b in ((one.phases, other.phases), (one.computing, other.computing)))
    names = sorted({*one.ops, *other.ops})
    ops = {}
    for name in names:
        pairs = zip(one.ops.get(name, (0.0,) * 3), other.ops.get(name, (0.0,) * 3), strict=True)
        choose = min if is_collective(name) and name in one.ops and name in other.ops else max
        ahead, back, again = (choose(pair) for pair in pairs)
        ops[name] = ahead, back, again
    return StageSeconds(phases, computing, ops)


def _longer(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    found = {name: max(a.get(name, 0.0), b.get(name, 0.0)) for name in sorted({*a, *b})}
    found["rest"] = min(a["rest"], b["rest"])
    return found


def events_of(spans: list[Span], origin: float) -> tuple[Event, ...]:
    found = []
    for span in spans:
        if span.ready - span.start > _LONG_WAIT_SECONDS:
            found.append(Event("wait", "wait", span.start - origin, span.ready - origin))
        category = _CATEGORIES.get(span.instruction.op, "transfer")
        found.append(Event(str(span.instruction), category, span.ready - origin, span.end - origin))
    return tuple(found)


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0
