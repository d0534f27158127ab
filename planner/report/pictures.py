"""What the drawings of a report show: seconds by stage, memory over the step, who holds what and sends what to whom."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from shardplan.planner.plan import NodeSummary, Plan, StagePlan
from shardplan.planner.report.blocks import (
    Block,
    Curve,
    Curves,
    Flow,
    Map,
    Share,
    Shares,
    Topology,
)
from shardplan.planner.report.facts import Facts, itemsize, parse_tensor
from shardplan.planner.report.words import change_text, numbers, ranges, seconds_text, share_text

_MOST_CLASSES = 4
_COLOURS = ("forward", "backward", "weight", "optimizer")
"""Colours of the classes of ops, the costliest first."""

_SETTINGS = {"devices": "backward", "batch": "weight", "memory": "optimizer", "links": "reduce"}


def seconds_of_stages(facts: Facts) -> tuple[Block, ...]:
    """Every stage's step: its costliest ops, the others, what is done once, what is spent waiting."""
    step = facts.simulation.step_seconds
    if step <= 0:
        return ()
    totals: dict[str, float] = defaultdict(float)
    for stage in facts.plan.stages:
        for name, seconds in stage.op_seconds.items():
            totals[name] += sum(seconds)
    shown = sorted(totals, key=lambda name: (-totals[name], name))[:_MOST_CLASSES]
    return (Shares(tuple(_seconds(facts, at, stage, shown, step) for at, stage in enumerate(facts.plan.stages))),)


def _seconds(facts: Facts, index: int, stage: StagePlan, shown: list[str], step: float) -> Share:
    count = facts.plan.microbatches
    parts: list[tuple[str, str, float]] = []
    compute = count * (stage.forward_seconds + stage.backward_seconds)
    if shown:
        named = 0.0
        for colour, name in zip(_COLOURS, shown):
            seconds = count * sum(stage.op_seconds.get(name, (0.0, 0.0, 0.0)))
            parts.append((name.removesuffix(".default"), colour, seconds))
            named += seconds
        parts.append(("other ops and messages within the stage", "transfer", max(compute - named, 0.0)))
    else:
        parts.append(("forward", "forward", count * stage.forward_seconds))
        parts.append(("backward", "backward", count * stage.backward_seconds))
    parts.append(("once a step", "reduce", stage.once_seconds))
    busy = sum(seconds for _, _, seconds in parts)
    parts.append(("idle", "idle", max(step - busy, 0.0)))
    return Share(
        f"stage {index}", tuple(part for part in parts if part[2] > 0), f"busy {share_text(min(busy / step, 1.0))}"
    )


def costs(facts: Facts) -> tuple[Block, ...]:
    """The step of this plan, of every baseline that runs, and of the runners-up."""
    mine = facts.step_seconds
    rows = [Share("this plan", (("this plan", "forward", mine),), seconds_text(mine))]
    for kind, colour, found in (("baseline", "transfer", facts.baselines), ("runner-up", "backward", facts.runners_up)):
        for other in found:
            if other.seconds is not None:
                text = f"{seconds_text(other.seconds)}, {change_text(other.seconds, mine)}"
                rows.append(Share(other.name, ((kind, colour, other.seconds),), text))
    return (Shares(tuple(rows)),) if len(rows) > 1 else ()


def rates(facts: Facts) -> tuple[Block, ...]:
    """Seconds a sample of this plan and of every variant that has one."""
    if not facts.samples_per_second:
        return ()
    mine = 1 / facts.samples_per_second
    rows = [Share("this plan", (("this plan", "forward", mine),), f"{seconds_text(mine)} a sample")]
    for found in facts.what_if:
        if found.seconds and found.samples_per_second:
            name = f"{found.setting} {found.value}"
            each = 1 / found.samples_per_second
            rows.append(
                Share(
                    name,
                    ((found.setting, _SETTINGS.get(found.setting, "transfer"), each),),
                    f"{seconds_text(each)} a sample",
                )
            )
    return (Shares(tuple(rows)),) if len(rows) > 1 else ()


def memory_curves(facts: Facts) -> tuple[Block, ...]:
    """Bytes in use on a device of every stage."""
    memory = facts.simulation.memory
    if facts.simulation.step_seconds <= 0 or not memory:
        return ()
    limits = {device.stage: device.limit_nbytes for device in facts.devices}
    found = tuple(
        Curve(f"stage {stage}", points, limits.get(stage, 0)) for stage, points in sorted(memory.items()) if points
    )
    return (Curves(found, facts.simulation.step_seconds),) if any(c.peak[1] > 0 for c in found) else ()


def topology(plan: Plan) -> tuple[Block, ...]:
    """Nodes with their devices, and what stages send each other; nothing for a single device."""
    if len(plan.devices) < 2:
        return ()
    stage_of = {rank: index for index, stage in enumerate(plan.stages) for rank in stage.ranks}
    nodes: dict[int, list[tuple[int, str, int]]] = defaultdict(list)
    for rank, device in enumerate(plan.devices):
        nodes[device.node].append((rank, device.kind, stage_of.get(rank, -1)))
    flows = []
    for link in plan.links:
        for source, target, nbytes, seconds in (
            (link.source, link.target, link.nbytes, link.seconds),
            (link.target, link.source, link.grad_nbytes, link.grad_seconds),
        ):
            if nbytes:
                messages = plan.microbatches * min(len(plan.stages[s].ranks) for s in (source, target))
                flows.append(Flow(source, target, messages * nbytes, seconds))
    return (Topology(tuple((node, tuple(devices)) for node, devices in sorted(nodes.items())), tuple(flows)),)


def held(facts: Facts) -> tuple[Block, ...]:
    """The share of every layer's parameters that a device of every stage holds."""
    plan = facts.plan
    totals: dict[str, int] = {}
    local: dict[tuple[str, int], float] = defaultdict(float)
    for node, summary in sorted(plan.nodes.items(), key=lambda item: item[1].order):
        if summary.op != "param" or not summary.outputs:
            continue
        part = part_of(summary.name)
        dtype, shape = parse_tensor(summary.outputs[0])
        nbytes = itemsize(dtype) * math.prod(shape)
        totals[part] = totals.get(part, 0) + nbytes
        for stage in summary.stages:
            local[part, stage] += nbytes * _share(plan, node, summary, plan.stages[stage])
    if not totals or len(plan.devices) < 2:
        return ()
    columns = tuple((ranges(stage.ranks), index) for index, stage in enumerate(plan.stages))
    rows = tuple(
        (part, nbytes, tuple(local[part, stage] / nbytes if nbytes else 0.0 for stage in range(len(columns))))
        for part, nbytes in totals.items()
    )
    return (Map(columns, rows),)


def part_of(name: str) -> str:
    """What a parameter belongs to, as a row of the map: its layer ("model.layers.3"), or its module."""
    words = name.split(".")
    for at, word in enumerate(words):
        if numbers(word):
            return ".".join(words[: at + 1])
    return ".".join(words[:-1]) or name


def _share(plan: Plan, node: str, summary: NodeSummary, stage: StagePlan) -> float:
    """Of a parameter, what one device of a stage keeps."""
    share = 1.0
    for axis, size in zip(stage.mesh.axes, stage.mesh.sizes, strict=True):
        strategy = plan.strategy(axis, node)
        if strategy and strategy.outputs and strategy.outputs[0].is_shard:
            share /= size
    stored = plan.storage.get(summary.name)
    if stored is not None and stored.level == 3:
        share /= stage.mesh.size(stored.axis)
    return share


def slices(plan: Plan, node: str) -> Iterable[tuple[int, int, str]]:
    """(stage, device, its slice in words such as ``[0:128, :]``) of a parameter, buffer or op's result."""
    summary = plan.nodes[node]
    if not summary.outputs:
        return
    _, shape = parse_tensor(summary.outputs[0])
    for index in summary.stages:
        stage = plan.stages[index]
        for position, rank in enumerate(stage.ranks):
            yield index, rank, _slice_text(plan, node, shape, stage, position)


def _slice_text(plan: Plan, node: str, shape: tuple[int, ...], stage: StagePlan, position: int) -> str:
    coordinates: dict[str, int] = {}
    for axis, size in reversed(list(zip(stage.mesh.axes, stage.mesh.sizes, strict=True))):
        if axis != "mb":
            coordinates[axis] = position % size
            position //= size
    parts = [[(0, extent)] for extent in shape]
    words = []
    for axis in stage.mesh.axes:
        strategy = plan.strategy(axis, node)
        size = stage.mesh.size(axis)
        if not strategy or not strategy.outputs or size == 1 or axis not in coordinates:
            continue
        placement = strategy.outputs[0]
        if placement.is_shard:
            parts[placement.dim] = _cut(parts[placement.dim], placement.sections, size, coordinates[axis])
        elif placement.kind == "P":
            words.append(f"a partial sum over {axis}")
    inside = ", ".join(_range_text(part, extent) for part, extent in zip(parts, shape, strict=True))
    return " ".join([f"[{inside}]", *words])


def _cut(ranges_: list[tuple[int, int]], sections: tuple[int, ...], size: int, index: int) -> list[tuple[int, int]]:
    """Part `index` of `size` of the elements in the ranges; with sections, of every section."""
    if sections and len(ranges_) == 1:
        start = ranges_[0][0]
        found = []
        for length in sections:
            found += _cut([(start, start + length)], (), size, index)
            start += length
        return found
    total = sum(stop - start for start, stop in ranges_)
    low, high = total * index // size, total * (index + 1) // size
    found, seen = [], 0
    for start, stop in ranges_:
        a, b = max(low, seen), min(high, seen + stop - start)
        if a < b:
            found.append((start + a - seen, start + b - seen))
        seen += stop - start
    return found


def _range_text(part: list[tuple[int, int]], extent: int) -> str:
    if part == [(0, extent)]:
        return ":"
    return "+".join(f"{start}:{stop}" for start, stop in part)
