"""What the drawings of a report show: seconds by stage, memory over the step, who holds what, links, curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from shardplan.planner.plan import NodeSummary, Plan, StagePlan
from shardplan.planner.report.blocks import (
    Block,
    Curve,
    Curves,
    Map,
    Plot,
    Share,
    Shares,
    Table,
    Topology,
)
from shardplan.planner.report.facts import Facts, parse_tensor
from shardplan.planner.report.traffic import Sent, Traffic, tensor_nbytes, traffic
from shardplan.planner.report.words import (
    change_text,
    names_text,
    nbytes_text,
    numbers,
    pattern,
    ranges,
    seconds_text,
    share_text,
)

_MOST_CLASSES = 4
_COLOURS = ("forward", "backward", "weight", "optimizer")
"""Colours of the classes of ops, the costliest first."""

_SETTINGS = {
    "devices": "devices",
    "batch": "samples of the global batch",
    "memory": "GiB of memory a device",
    "links": "times the links' speed",
}
"""What a plot of each says at its foot."""
_MOST_DEVICES, _MOST_OF_STAGE = 32, 8
"""Columns of the map of devices."""


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
            parts.append((name.removesuffix(".default").removesuffix(".Tensor"), colour, seconds))
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
    """Samples a second over every setting that was varied, this plan among them."""
    mine = facts.samples_per_second
    if not mine:
        return ()
    plan = facts.plan
    limits = [device.limit_nbytes for device in plan.devices if device.limit_nbytes]
    here = {
        "devices": float(len(plan.devices)),
        "batch": float(plan.batch_size),
        "memory": min(limits, default=0) / (1 << 30),
        "links": 1.0,
    }
    found = []
    for setting, x_name in _SETTINGS.items():
        points = {here[setting]: (mine, f"this plan, {plan.degrees()}")}
        for other in facts.what_if:
            if other.setting == setting and other.number is not None and other.seconds:
                points.setdefault(other.number, (other.samples_per_second, other.degrees))
        if len(points) > 1:
            listed = tuple((x, y, f"{x:g}: {y:,.1f} samples/s, {text}") for x, (y, text) in sorted(points.items()))
            found.append(Plot(setting, x_name, "samples/s", listed, here[setting], setting == "devices"))
    return tuple(found)


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
    """Nodes with their devices and the bytes on links; nothing for a single device."""
    if len(plan.devices) < 2:
        return ()
    stage_of = {rank: index for index, stage in enumerate(plan.stages) for rank in stage.ranks}
    nodes: dict[int, list[tuple[int, str, int]]] = defaultdict(list)
    for rank, device in enumerate(plan.devices):
        nodes[device.node].append((rank, device.kind, stage_of.get(rank, -1)))
    found = traffic(plan)
    drawn = Topology(tuple((node, tuple(mine)) for node, mine in sorted(nodes.items())), found.inside, found.between)
    return (drawn, _sent(found)) if found.sent else (drawn,)


def _sent(found: Traffic) -> Block:
    """What a device of every stage sends in a step. Stages that send alike share a row."""
    groups: dict[tuple[str, str, float, bool], list[Sent]] = defaultdict(list)
    for sent in found.sent:
        groups[sent.axis, sent.what, sent.nbytes, sent.between_nodes].append(sent)
    rows = tuple(
        (
            ", ".join(f"{s.stage} > {s.target}" for s in mine[:4]) + (", ..." if len(mine) > 4 else "")
            if mine[0].target >= 0
            else ranges(s.stage for s in mine),
            f"{what} over {axis}" if axis else what,
            nbytes_text(nbytes),
            "between nodes" if far else "inside a node",
        )
        for (axis, what, nbytes, far), mine in groups.items()
    )
    columns = (("stage", False), ("what", False), ("a device sends a step", True), ("where", False))
    return Table(columns, rows)


def held(facts: Facts) -> tuple[Block, ...]:
    """Which part of every layer's parameters a device holds; layers that lie alike share a row."""
    plan = facts.plan
    ranks = range(len(plan.devices))
    note = ""
    if len(plan.devices) > _MOST_DEVICES:
        ranks = [rank for stage in plan.stages for rank in stage.ranks[:_MOST_OF_STAGE]][:_MOST_DEVICES]
        note = f"{len(ranks)} of {len(plan.devices)} devices: the first of every stage."
    place = {rank: (index, at) for index, stage in enumerate(plan.stages) for at, rank in enumerate(stage.ranks)}
    totals: dict[str, int] = {}
    local: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    starts: dict[tuple[str, int], set[float]] = defaultdict(set)
    for node, summary in sorted(plan.nodes.items(), key=lambda item: item[1].order):
        if summary.op != "param" or not summary.outputs:
            continue
        part, nbytes = part_of(summary.name), tensor_nbytes(summary.outputs[0])
        totals[part] = totals.get(part, 0) + int(nbytes)
        for rank in ranks:
            stage, at = place.get(rank, (-1, 0))
            if stage in summary.stages:
                start, share = _slice(plan, node, summary, plan.stages[stage], at)
                starts[part, rank].add(start)
                local[part, rank][0] = start
                local[part, rank][1] += nbytes * share
    if not totals or len(plan.devices) < 2:
        return ()
    groups: dict[tuple[str, int, tuple[tuple[float, float], ...]], list[str]] = defaultdict(list)
    for part, nbytes in totals.items():
        # Where its tensors lie in more than one way, how much is held is all that can be drawn.
        cells = tuple(
            (local[part, rank][0] * (len(starts[part, rank]) < 2), round(local[part, rank][1] / (nbytes or 1), 6))
            for rank in ranks
        )
        groups[pattern(part), nbytes, cells].append(part)
    rows = tuple((names_text(parts), key[1], key[2]) for key, parts in groups.items())
    columns = tuple((str(rank), place.get(rank, (-1, 0))[0]) for rank in ranks)
    return (Map(columns, rows, note),)


def part_of(name: str) -> str:
    """What a parameter belongs to, as a row of the map: its layer ("model.layers.3"), or its module."""
    words = name.split(".")
    for at, word in enumerate(words):
        if numbers(word):
            return ".".join(words[: at + 1])
    return ".".join(words[:-1]) or name


def _slice(plan: Plan, node: str, summary: NodeSummary, stage: StagePlan, at: int) -> tuple[float, float]:
    """(start, share) of a parameter that the device at position `at` of a stage keeps."""
    start, share = 0.0, 1.0
    tp = stage.mesh.size("tp")
    stored = plan.storage.get(summary.name)
    for axis, index in (("tp", at % tp), ("dp", at // tp)):
        strategy, size = plan.strategy(axis, node), stage.mesh.size(axis)
        split = bool(strategy and strategy.outputs and strategy.outputs[0].is_shard)
        if split or (stored is not None and stored.level == 3 and stored.axis == axis):
            share /= size
            start += index * share
    return start, share


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
