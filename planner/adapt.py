"""The same plan for another call of the same model: a smaller last batch, another sequence length, evaluation.

What stays is where parameters and buffers lie: the ranks hold them already. Degrees and stages stay with them. What is
found again, without a search:

* data parallelism where the batch divides by its degree; else every replica computes the whole batch, which is exact
  (each then has the whole gradient) and as slow as one replica;
* the fewest microbatches that are no larger than the planned ones (one, where the graph can not be cut in time);
* splits of the ops: the planned ones wherever the op is the one that was planned for, else what follows from the
  parameters with the least communication (`propagate.carry`).

Predicted seconds and bytes are not computed again: they stay those of the planned call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import lcm

from torch import fx

from shardplan.errors import InputMismatch
from shardplan.planner import schedules
from shardplan.planner.describe import describe_nodes
from shardplan.planner.instructions import Schedule
from shardplan.planner.placement import Mesh
from shardplan.planner.plan import NodeSummary, Plan, StagePlan, Status, input_texts
from shardplan.planner.propagate import carry, follow_batch, norm_notes
from shardplan.planner.rules import Strategy, strategies
from shardplan.planner.stages import StageSplit, split_stages
from shardplan.planner.trace import Segment, Trace, info


def adapt(plan: Plan, trace: Trace) -> Plan:
    """The plan for `trace`, another call of the planned model (other sizes, other inputs, other mode).

    Raises InputMismatch where the call reads parameters on stages that do not hold them.
    """
    trace.batch_norm = plan.batch_norm
    degrees = {axis: lcm(*(stage.mesh.size(axis) for stage in plan.stages)) for axis in ("dp", "tp")}
    dp = degrees["dp"] if trace.batch_size % degrees["dp"] == 0 else 1
    microbatches = _microbatches(plan, trace, dp)
    followed = follow_batch(trace, Mesh(("mb", "dp"), (microbatches, dp)))
    if "mb" in followed and followed["mb"].reason is not None:
        microbatches, followed = 1, follow_batch(trace, Mesh(("dp",), (dp,)))
    beside: dict[str, Mapping[str, Strategy]] = {axis: result.strategies for axis, result in followed.items()}
    bounds = _bounds(plan, trace)
    split = split_stages(trace, bounds)
    nodes = describe_nodes(trace, split)
    if degrees["tp"] > 1:
        # Stages may differ in their degrees: what divides by all of them divides by each.
        whole = Mesh(("mb", "dp", "tp"), (microbatches, degrees["dp"], degrees["tp"]))
        beside["tp"] = carry(trace, "tp", whole, lambda node: _planned(plan, nodes, node), dict(beside))
    _check_homes(plan, nodes)
    splits = {axis: {name: str(s) for name, s in sorted(of.items())} for axis, of in sorted(beside.items())}
    return replace(
        plan,
        fingerprint=trace.fingerprint,
        batch_size=trace.batch_size,
        inputs=input_texts(
            (source.name, info(trace.node(n)).shape, str(info(trace.node(n)).dtype).removeprefix("torch."))
            for n, source in trace.sources.items()
            if source.kind == "input"
        ),
        stages=_stages(plan, trace, bounds),
        microbatches=microbatches,
        instructions=_instructions(plan, trace, split, microbatches),
        splits=splits,
        status=Status("given", 0.0, 0.0, "none"),
        baselines=(),
        runners_up=(),
        links=(),
        nodes=nodes,
        notes=(*trace.notes, *norm_notes(splits)),
    )


def _microbatches(plan: Plan, trace: Trace, dp: int) -> int:
    """The fewest that are no larger than planned and divide a replica's batch."""
    planned = plan.batch_size // (lcm(*(stage.mesh.size("dp") for stage in plan.stages)) * plan.microbatches)
    batch = trace.batch_size // dp
    if plan.microbatches == 1:
        return 1
    return next(count for count in range(1, batch + 1) if batch % count == 0 and batch // count <= max(planned, 1))


def _planned(plan: Plan, nodes: Mapping[str, NodeSummary], node: fx.Node) -> Strategy | None:
    """The strategy on tp of the planned node that this one is: alike in name, op and where its arguments come from."""
    there, here = plan.nodes.get(node.name), nodes[node.name]
    if there is None or (there.op, there.name, there.inputs) != (here.op, here.name, here.inputs):
        return None
    return plan.strategy("tp", node.name) or strategies(node)[0]


def _homes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Parameter or buffer name -> the stages that hold it."""
    return {summary.name: summary.stages for summary in plan.nodes.values() if summary.op in ("param", "buffer")}


def _bounds(plan: Plan, trace: Trace) -> tuple[int, ...]:
    """First segment of every stage.

    Segments go to stages in order, every stage gets at least one, and each segment lies where its parameters are held;
    among such assignments the one that moves the fewest segments (known by name), found by dynamic programming.
    """
    count = len(plan.stages)
    if count == 1:
        return (0,)
    homes = _homes(plan)
    planned = {name: index for index, stage in enumerate(plan.stages) for name in stage.blocks}
    never = float("inf")
    moved: list[float] = [0.0] + [never] * count  # by stage of the segment before, shifted by one: none yet
    came: list[list[bool]] = []  # per segment and stage: whether the stage starts here
    for segment in trace.segments:
        allowed = _allowed(trace, segment, homes, count)
        best, starts = [never] * (count + 1), [False] * count
        for stage in allowed:
            starts[stage] = moved[stage] <= moved[stage + 1]
            here = planned.get(segment.name, stage) != stage
            best[stage + 1] = min(moved[stage], moved[stage + 1]) + here
        came.append(starts)
        moved = best
    if moved[count] == never:
        raise _elsewhere(f"its {len(trace.segments)} segments do not go to {count} stages that hold what they read")
    bounds, stage = [], count - 1
    for index in reversed(range(len(trace.segments))):
        if stage >= 0 and came[index][stage]:
            bounds.append(index)
            stage -= 1
    return tuple(reversed(bounds))


def _allowed(trace: Trace, segment: Segment, homes: Mapping[str, tuple[int, ...]], count: int) -> list[int]:
    found = set(range(count))
    for name in segment.nodes:
        for argument in trace.node(name).all_input_nodes:
            source = trace.sources.get(argument.name)
            if source is not None and source.kind in ("param", "buffer"):
                found &= set(homes.get(source.name, ()))
    return sorted(found)


def _check_homes(plan: Plan, nodes: Mapping[str, NodeSummary]) -> None:
    homes = _homes(plan)
    for summary in nodes.values():
        if summary.op in ("param", "buffer") and not set(summary.stages) <= set(homes.get(summary.name, ())):
            where = ", ".join(map(str, homes.get(summary.name, ()))) or "no stage"
            raise _elsewhere(
                f"{summary.name} is read on stage {', '.join(map(str, summary.stages))} and held on {where}"
            )


def _elsewhere(detail: str) -> InputMismatch:
    return InputMismatch(
        "the plan does not carry over to this call of the model",
        [detail],
        ["call auto_parallel with an example of this call"],
    )


def _stages(plan: Plan, trace: Trace, bounds: tuple[int, ...]) -> tuple[StagePlan, ...]:
    ends = [*bounds[1:], len(trace.segments)]
    names = [tuple(s.name for s in trace.segments[a:b]) for a, b in zip(bounds, ends, strict=True)]
    return tuple(
        replace(
            stage,
            first=first,
            last=last,
            blocks=blocks,
            rematerialized=tuple(name for name in blocks if name in set(stage.rematerialized)),
        )
        for stage, first, last, blocks in zip(plan.stages, bounds, ends, names, strict=True)
    )


def _instructions(plan: Plan, trace: Trace, split: StageSplit, microbatches: int) -> Schedule:
    return schedules.build(
        plan.schedule,
        len(plan.stages),
        microbatches,
        split.edges(),
        training=trace.training,
        grad_edges=split.grad_edges(),
        chunks=plan.chunks,
    )
