"""The facts of a report, computed once from the plan (and a measurement); every renderer shows the same."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from shardplan.planner.placement import MICROBATCH_AXIS, Placement
from shardplan.planner.plan import Alternative, Memory, Plan, StagePlan, Status
from shardplan.planner.reductions import times_of
from shardplan.planner.report.measured import Measured
from shardplan.planner.report.what_if import WhatIf
from shardplan.planner.report.words import (
    nbytes_text,
    numbers,
    pattern,
    plural,
    ranges,
    ratio_text,
    seconds_text,
    share_text,
)
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.simulate import Simulation, StageTimes, messages_of, simulate
from shardplan.planner.storage import Storage
from shardplan.planner.timeline import Timeline

SUMMED = "copies+sum"
"""In words: whole on every device of the axis, its gradient summed over the axis once a step."""

STORED = {
    1: ("state in parts", "optimizer state in parts, the updated parameter is all-gathered once a step"),
    2: ("grads in parts", "gradient and optimizer state in parts, the updated parameter is all-gathered once a step"),
    3: ("in parts", "the parameter itself in parts, all-gathered for every use"),
}
"""By level: how tables name it, and what it means."""

_TENSOR = re.compile(r"^(\w+)\[([\d,]*)\]$")


@dataclass(frozen=True, slots=True)
class StageFacts:
    """busy_seconds: a step's compute of the stage. measured_seconds: the same, measured."""

    stage: int
    plan: StagePlan
    devices: str
    busy_seconds: float
    measured_seconds: float | None


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """Devices of one stage that are of one kind and have one limit. measured_nbytes: the largest of their peaks."""

    stage: int
    ranks: tuple[int, ...]
    kind: str
    limit_nbytes: int
    memory: Memory
    measured_nbytes: int | None

    @property
    def name(self) -> str:
        return f"{self.kind} {ranges(self.ranks)}"


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """Parameters (and buffers) with one name pattern, shape and placement.

    names: of all of them. axes: axis -> what happens on it, in words; local_nbytes: of one of them on one device.
    """

    pattern: str
    names: tuple[str, ...]
    kind: str
    tensor: str
    axes: dict[str, str]
    local_nbytes: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """One predicted quantity and its measurement, both seconds or both bytes."""

    name: str
    unit: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return self.measured / self.predicted if self.predicted > 0 else None


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything a report says. axes: mesh axes wider than 1, with their sizes per stage."""

    plan: Plan
    verdict: str
    step_seconds: float
    samples_per_second: float | None
    tokens_per_second: float | None
    stages: tuple[StageFacts, ...]
    devices: tuple[DeviceFacts, ...]
    simulation: Simulation
    timelines: tuple[Timeline, ...]
    axes: dict[str, tuple[int, ...]]
    splits: tuple[SplitFacts, ...]
    binds: tuple[str, ...]
    baselines: tuple[Alternative, ...]
    runners_up: tuple[Alternative, ...]
    status: Status
    measured: Measured | None
    comparisons: tuple[Comparison, ...]
    assumptions: tuple[str, ...]
    what_if: tuple[WhatIf, ...] = ()


def facts(plan: Plan, measured: Measured | None = None, what_if: tuple[WhatIf, ...] = ()) -> Facts:
    """Raises ValueError where the measurement is of another number of stages or devices than the plan."""
    if measured and measured.stage_seconds and len(measured.stage_seconds) != len(plan.stages):
        raise ValueError(f"{len(measured.stage_seconds)} measured stages, {len(plan.stages)} planned")
    if measured and measured.peak_nbytes and len(measured.peak_nbytes) != len(plan.devices):
        raise ValueError(f"{len(measured.peak_nbytes)} measured devices, {len(plan.devices)} planned")
    simulation = simulate_plan(plan)
    stages = tuple(_stage(plan, index, measured) for index in range(len(plan.stages)))
    devices = tuple(_devices(plan, measured))
    timelines = (simulation.timeline(), *((measured.timeline,) if measured and measured.timeline else ()))
    seconds = plan.step_seconds
    tokens = _tokens(plan)
    return Facts(
        plan=plan,
        verdict=_verdict(plan, devices),
        step_seconds=seconds,
        samples_per_second=plan.batch_size / seconds if seconds > 0 else None,
        tokens_per_second=tokens / seconds if tokens and seconds > 0 else None,
        stages=stages,
        devices=devices,
        simulation=simulation,
        timelines=timelines,
        axes=axis_sizes(plan),
        splits=parameter_splits(plan),
        binds=plan.status.binds or _binds(simulation, devices),
        baselines=plan.baselines,
        runners_up=plan.runners_up,
        status=plan.status,
        measured=measured,
        comparisons=tuple(_comparisons(stages, devices, seconds, measured)),
        assumptions=tuple(_assumptions(plan, simulation)),
        what_if=what_if,
    )


def simulate_plan(plan: Plan) -> Simulation:
    """The plan's instruction list in virtual time."""
    return simulate(plan.instructions, stage_times(plan), messages_of(plan.links))


def stage_times(plan: Plan) -> list[StageTimes]:
    """What the simulator has to know of every stage. Its bytes of a microbatch are such that its peak is the plan's."""
    units = simulate(plan.instructions, [times_of(stage, 1) for stage in plan.stages], messages_of(plan.links)).memory
    found = []
    for index, stage in enumerate(plan.stages):
        alive = max((count for _, count in units.get(index, ())), default=1)
        held = stage.memory.activations // max(alive, 1)
        found.append(times_of(stage, held, stage.memory.peak_nbytes - stage.memory.activations))
    return found


def axis_sizes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Axes of more than one rank somewhere, in mesh order -> size on every stage."""
    found: dict[str, tuple[int, ...]] = {}
    for stage in plan.stages:
        for axis in stage.mesh.axes:
            sizes = tuple(s.mesh.size(axis) for s in plan.stages)
            if axis != MICROBATCH_AXIS and max(sizes) > 1:
                found[axis] = sizes
    return found


def parse_tensor(text: str) -> tuple[str, tuple[int, ...]]:
    """``"float32[8,16]"`` -> ("float32", (8, 16)). Raises ValueError."""
    found = _TENSOR.match(text)
    if not found:
        raise ValueError(f"not a tensor: {text!r}")
    return found[1], tuple(int(part) for part in found[2].split(",") if part)


def itemsize(dtype: str) -> int:
    """Bytes of an element, from the dtype's name."""
    digits = re.search(r"(\d+)", dtype.removeprefix("b"))
    return 1 if dtype == "bool" or not digits else max(int(digits[1]) // 8, 1)


def placement_words(placement: Placement, kind: str) -> str:
    """What a parameter's placement on one axis means."""
    if placement.is_shard:
        return f"dim {placement.dim}" + (f" in {len(placement.sections)} sections" if placement.sections else "")
    if placement.kind == "D" and kind == "param":
        return SUMMED
    return "copies"


def storage_words(stored: Storage) -> str:
    """What is split of a parameter whose use is not."""
    return f"{STORED[stored.level][0]}, dim {stored.dim}"


def parameter_splits(plan: Plan) -> tuple[SplitFacts, ...]:
    """One entry for all parameters and buffers that have name pattern, shape and placements in common."""
    axes = axis_sizes(plan)
    groups: dict[tuple[str, str, str, tuple[tuple[str, str], ...], int], list[str]] = defaultdict(list)
    for node, summary in sorted(plan.nodes.items(), key=lambda item: item[1].order):
        if summary.op not in ("param", "buffer") or not summary.outputs:
            continue
        dtype, shape = parse_tensor(summary.outputs[0])
        nbytes = itemsize(dtype)
        for extent in shape:
            nbytes *= extent
        words = []
        for axis in axes:
            strategy = plan.strategy(axis, node)
            size = max((axes[axis][stage] for stage in summary.stages), default=1)
            placement = _output(strategy)
            if placement and placement.is_shard:
                nbytes //= size
            text = placement_words(placement, summary.op) if placement else "copies"
            stored = plan.storage.get(summary.name)
            if stored is not None and stored.axis == axis and size > 1:
                text = storage_words(stored)
                nbytes = -(-nbytes // size) if stored.level == 3 else nbytes
            words.append((axis, text))
        groups[pattern(summary.name), summary.op, summary.outputs[0], tuple(words), nbytes].append(summary.name)
    return tuple(
        SplitFacts(text, tuple(sorted(names, key=lambda n: (numbers(n), n))), kind, tensor, dict(words), nbytes)
        for (text, kind, tensor, words, nbytes), names in groups.items()
    )


def _output(strategy: Strategy | None) -> Placement | None:
    return strategy.outputs[0] if strategy and strategy.outputs else None


def _stage(plan: Plan, index: int, measured: Measured | None) -> StageFacts:
    stage = plan.stages[index]
    kinds = sorted({plan.devices[rank].kind for rank in stage.ranks if rank < len(plan.devices)})
    busy = plan.microbatches * (stage.forward_seconds + stage.backward_seconds) + stage.once_seconds
    seconds = measured.stage_seconds[index] if measured and measured.stage_seconds else None
    return StageFacts(index, stage, f"{'/'.join(kinds)} {ranges(stage.ranks)}".strip(), busy, seconds)


def _devices(plan: Plan, measured: Measured | None) -> Iterable[DeviceFacts]:
    for index, stage in enumerate(plan.stages):
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        for rank in stage.ranks:
            device = plan.devices[rank]
            groups[device.kind, device.limit_nbytes or stage.memory.limit].append(rank)
        for (kind, limit), ranks in groups.items():
            peak = max(measured.peak_nbytes[r] for r in ranks) if measured and measured.peak_nbytes else None
            yield DeviceFacts(index, tuple(ranks), kind, limit, stage.memory, peak)


def _verdict(plan: Plan, devices: tuple[DeviceFacts, ...]) -> str:
    fullest = max(devices, key=lambda d: d.memory.peak_nbytes / d.limit_nbytes if d.limit_nbytes else 0.0, default=None)
    parts = [f"{plan.degrees()}: {seconds_text(plan.step_seconds)} a step"]
    runnable = [b for b in plan.baselines if b.seconds]
    if runnable and plan.step_seconds > 0:
        best = min(runnable, key=lambda b: b.seconds or 0.0)
        ratio = (best.seconds or 0.0) / plan.step_seconds
        if ratio > 1.005:
            parts.append(f"{ratio_text(ratio)} as fast as the best baseline ({best.name})")
        elif ratio >= 0.995:
            parts.append(f"as fast as the best baseline ({best.name})")
        else:
            parts.append(f"SLOWER than {best.name}, which takes {seconds_text(best.seconds)}")
    if fullest and fullest.limit_nbytes:
        peak, limit = fullest.memory.peak_nbytes, fullest.limit_nbytes
        fits = "fits" if peak <= limit else "DOES NOT FIT"
        parts.append(f"{fits}, {nbytes_text(peak)} of {nbytes_text(limit)} on the fullest device")
    if plan.status.outcome == "given":
        parts.append("as given, not searched")
    elif plan.status.lower_bound > 0:
        parts.append(f"proven within {share_text(max(plan.status.gap, 0.0))} of the best")
    # What is not what one device computes has to be seen first.
    parts += [note for note in plan.notes if note.startswith("INEXACT")]
    name = plan.model or "model"
    return (
        f"{name} on {plural(len(plan.devices), 'device')}: "
        + ", ".join(parts[:1])
        + "; "
        + "; ".join(parts[1:] or ["not compared with baselines"])
        + "."
    )


def _binds(simulation: Simulation, devices: tuple[DeviceFacts, ...]) -> tuple[str, ...]:
    """What limits a plan whose search did not say."""
    found = []
    if len(simulation.busy_seconds) > 1 and simulation.step_seconds > 0:
        slowest = max(range(len(simulation.busy_seconds)), key=lambda s: simulation.busy_seconds[s])
        share = simulation.busy_seconds[slowest] / simulation.step_seconds
        found.append(f"time of stage {slowest}: it computes {share_text(share)} of the step")
    for device in devices:
        if device.limit_nbytes and device.memory.peak_nbytes > 0.95 * device.limit_nbytes:
            found.append(f"memory of {device.name}: {share_text(device.memory.peak_nbytes / device.limit_nbytes)} full")
    return tuple(found)


def _tokens(plan: Plan) -> int:
    """Tokens of a batch: elements of the first two-dimensional integer input by name, 0 if there is none."""
    for _, text in sorted(plan.inputs.items()):
        found = _TENSOR.match(text)
        if found and found[1].startswith("int"):
            shape = parse_tensor(text)[1]
            if len(shape) == 2:
                return shape[0] * shape[1]
    return 0


def _comparisons(
    stages: tuple[StageFacts, ...], devices: tuple[DeviceFacts, ...], seconds: float, measured: Measured | None
) -> Iterable[Comparison]:
    if measured is None:
        return
    yield Comparison("step", "seconds", seconds, measured.step_seconds)
    for stage in stages:
        if stage.measured_seconds is not None:
            yield Comparison(f"stage {stage.stage} compute", "seconds", stage.busy_seconds, stage.measured_seconds)
    for device in devices:
        if device.measured_nbytes is not None:
            yield Comparison(f"peak of {device.name}", "bytes", device.memory.peak_nbytes, device.measured_nbytes)


def _assumptions(plan: Plan, simulation: Simulation) -> Iterable[str]:
    yield "Times are the cost model's; the timeline runs the plan's own instruction list, the one that is executed."
    if plan.calibrated_by:
        yield f"Predictions are corrected by {plural(plan.calibrated_by, 'measured job')} on these devices."
    if len(plan.stages) > 1:
        yield "Messages between stages overlap compute; a link carries one message at a time in each direction."
        if not plan.links:
            yield "The plan names no link between stages: the timeline counts messages as free."
    if plan.step_seconds > 0 and abs(simulation.step_seconds / plan.step_seconds - 1) > 0.01:
        yield (
            f"The timeline ends at {seconds_text(simulation.step_seconds)}, the plan says "
            f"{seconds_text(plan.step_seconds)}: it was scored with costs that the plan does not hold."
        )
    for source in ("measured", "interpolated", "modelled"):
        if share := plan.coverage.get(source):
            yield f"{share_text(share)} of the predicted op time is {source}."
