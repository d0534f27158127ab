"""Plans made by hand or at random, without a search: any legal choice of strategies has to compute the same."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from math import lcm

from torch import fx

from shardplan.planner import schedules
from shardplan.planner.describe import describe_nodes
from shardplan.planner.placement import Mesh, Placement, R, fits
from shardplan.planner.plan import DeviceSummary, Memory, Plan, StagePlan, Status, input_texts
from shardplan.planner.propagate import follow_batch
from shardplan.planner.rules import Strategy, groups_fit, strategies
from shardplan.planner.stages import split_stages
from shardplan.planner.trace import Trace, info, infos, is_tensor, mutated, resolve, tensor_args


def even_bounds(trace: Trace, pp: int) -> tuple[int, ...]:
    """Segment indices that split the segments into pp runs of about the same number of nodes."""
    sizes = [len(s.nodes) for s in trace.segments]
    total, bounds, done = sum(sizes), [0], 0
    for index, size in enumerate(sizes):
        if len(bounds) < pp and index > bounds[-1] and done >= total * len(bounds) / pp:
            bounds.append(index)
        done += size
    while len(bounds) < pp:
        bounds.append(bounds[-1] + 1)
    return tuple(bounds)


def tp_options(node: fx.Node, others: dict[str, Strategy], mesh: Mesh) -> list[Strategy]:
    """Strategies of a node on the last axis that fit together with those chosen on the other axes."""
    found = []
    arguments = [a for a in tensor_args(node)] if node.op == "call_function" else []
    for strategy in strategies(node):
        chosen = {**others, mesh.axes[-1]: strategy}
        good = groups_fit(chosen, mesh)
        for position, argument in enumerate(arguments):
            if is_tensor(argument):
                layout = tuple(chosen[a].inputs[position] if a in chosen else R for a in mesh.axes)
                good = good and fits(info(argument).shape, layout, mesh)
        for position, result in enumerate(infos(node)):
            layout = tuple(chosen[a].outputs[position] if a in chosen else R for a in mesh.axes)
            good = good and fits(result.shape, layout, mesh)
        if good:
            found.append(strategy)
    return found


def random_plan(
    trace: Trace,
    *,
    dp: int = 1,
    tp: int = 1,
    pp: int = 1,
    microbatches: int = 1,
    seed: int = 0,
    split_bias: float = 0.7,
    bounds: tuple[int, ...] | None = None,
    rematerialize: Iterable[str] = (),
    meshes: Sequence[tuple[int, int]] = (),
    schedule: str = "1f1b",
    chunks: int = 1,
) -> Plan:
    """A plan with random strategies on tp, the batch followed on dp and mb, and even stages.

    meshes: (dp, tp) of every stage, where they differ. chunks: stages of a position, whose meshes have equal widths.
    """
    rng = random.Random(seed)
    degrees = list(meshes) or [(dp, tp)] * pp
    pp, positions = len(degrees), len(degrees) // chunks
    # What several stages hold has to divide on each of them.
    whole = Mesh(("mb", "dp", "tp"), (microbatches, lcm(*(d for d, _ in degrees)), lcm(*(t for _, t in degrees))))
    bounds = bounds or even_bounds(trace, pp)
    split_ = split_stages(trace, bounds)
    splits: dict[str, dict[str, str]] = {}
    chosen: dict[str, dict[str, Strategy]] = {}
    for axis, result in follow_batch(trace, whole).items():
        if result.reason:
            raise ValueError(f"{axis}: {result.reason}")
        for name, strategy in result.strategies.items():
            chosen.setdefault(name, {})[axis] = strategy
            splits.setdefault(axis, {})[name] = str(strategy)
    if whole.size("tp") > 1:
        lying: dict[fx.Node, Placement] = {}  # a buffer that an op writes to lies as the op reads it
        for node in trace.nodes():
            if node.op == "output" or resolve(node)[0] is not node or not infos(node):
                continue
            stage = split_.stage_of.get(node.name)
            shared = stage is None or bool(mutated(node))  # a buffer may be read on other stages
            mesh = whole if stage is None or shared else Mesh(whole.axes, (microbatches, *degrees[stage]))
            options = tp_options(node, chosen.get(node.name, {}), mesh)
            written = {tensor_args(node).index(buffer): buffer for buffer in mutated(node)}
            options = [s for s in options if all(lying.get(b, s.inputs[i]) == s.inputs[i] for i, b in written.items())]
            split = [s for s in options if any(p.kind != "R" for p in (*s.inputs, *s.outputs))]
            pool = split if split and rng.random() < split_bias else options
            strategy = rng.choice(pool)
            splits.setdefault("tp", {})[node.name] = str(strategy)
            lying |= {buffer: strategy.inputs[position] for position, buffer in written.items()}
        for buffer, placement in lying.items():
            splits["tp"][buffer.name] = str(Strategy("-", (), (placement,)))
    ends = [*bounds[1:], len(trace.segments)]
    starts = [sum(d * t for d, t in degrees[:position]) for position in range(positions)]
    at = [schedules.position_of(schedule, stage, positions) for stage in range(pp)]
    stages = tuple(
        StagePlan(
            first,
            last,
            tuple(s.name for s in trace.segments[first:last]),
            tuple(starts[at[stage]] + i for i in range(degrees[stage][0] * degrees[stage][1])),
            Mesh(("dp", "tp"), degrees[stage]),
            0.0,
            0.0,
            0.0,
            Memory(),
            tuple(s.name for s in trace.segments[first:last] if s.name in set(rematerialize)),
        )
        for stage, (first, last) in enumerate(zip(bounds, ends, strict=True))
    )
    inputs = input_texts(
        (s.name, info(trace.node(n)).shape, str(info(trace.node(n)).dtype).removeprefix("torch."))
        for n, s in trace.sources.items()
        if s.kind == "input"
    )
    return Plan(
        model=trace.model_name,
        fingerprint=trace.fingerprint,
        batch_size=trace.batch_size,
        inputs=inputs,
        devices=tuple(DeviceSummary("cpu", 0, 1 << 40) for _ in {rank for stage in stages for rank in stage.ranks}),
        stages=stages,
        microbatches=microbatches,
        schedule=schedule,
        instructions=schedules.build(
            schedule, pp, microbatches, split_.edges(), grad_edges=split_.grad_edges(), chunks=chunks
        ),
        splits=splits,
        step_seconds=0.0,
        status=Status("given", 0.0, 0.0, "none", 0.0),
        nodes=describe_nodes(trace, split_),
    )
