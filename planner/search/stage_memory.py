"""Predicted memory of every stage of a candidate: the fullest moment of its instruction list (`planner.memory_curve`),
from what is alive in its segments (`search.liveness`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from shardplan.planner.instructions import Op, Schedule
from shardplan.planner.memory_curve import Moment, StageBytes, curve, peak
from shardplan.planner.plan import Memory, StageLink, StagePlan
from shardplan.planner.rules import Strategy
from shardplan.planner.search.gathered import Gathered, gathered_by, with_gathered
from shardplan.planner.search.liveness import SegmentBytes, segment_bytes, stage_bytes
from shardplan.planner.search.runs import held_by, ops_of
from shardplan.planner.storage import Storage

if TYPE_CHECKING:
    from shardplan.planner.search.candidate import Candidate
    from shardplan.planner.search.search import Search

_ADAM_FACTOR = 2.0  # bytes of optimizer state per byte of parameters, from which on a step takes temporaries of Adam's


def with_memory(
    search: Search,
    candidate: Candidate,
    chosen: dict[str, Strategy],
    links: Sequence[StageLink],
    instructions: Schedule,
    stages: Sequence[StagePlan],
    stored: Mapping[str, Storage] | None = None,
) -> tuple[StagePlan, ...]:
    """The stages with the parts of their memory at the fullest moment. What parameters, gradients and optimizer state
    take is in them already. stored: how parameters are stored that are not stored as they are used, by node."""
    cuda = search.cluster.devices[0].kind.torch_device == "cuda"
    known: dict[tuple[int, int, int], SegmentBytes] = {}
    held = [
        _bytes(search, candidate, chosen, links, index, stage, known, cuda, stored or {})
        for index, stage in enumerate(stages)
    ]
    found = list(stages)
    for line in instructions:
        mine = sorted({i.stage for i in line})
        if not mine:
            continue
        if search.options.training and not any(i.op is Op.OPTIMIZER_STEP for i in line):
            line = (*line, replace(line[-1], op=Op.OPTIMIZER_STEP, stage=mine[0], microbatch=-1, peer=-1))
        fullest = peak(curve(line, {index: held[index] for index in mine}, cuda))
        for index in mine:
            found[index] = replace(found[index], memory=_memory(found[index].memory, fullest, search))
    return tuple(found)


def _memory(memory: Memory, moment: Moment, search: Search) -> Memory:
    reserve = (search.costs.overheads(0).memory - 1.0) * moment.nbytes
    return replace(
        memory,
        parameters=memory.parameters,
        gradients=round(moment.gradients),
        optimizer=round(moment.fixed) - memory.parameters,
        activations=round(moment.activations),
        buffers=round(moment.buffers),
        reserve=round(max(reserve, 0.0)),
    )


def _bytes(
    search: Search,
    candidate: Candidate,
    chosen: dict[str, Strategy],
    links: Sequence[StageLink],
    index: int,
    stage: StagePlan,
    known: dict[tuple[int, int, int], SegmentBytes],
    cuda: bool,
    stored: Mapping[str, Storage],
) -> StageBytes:
    columns = candidate.columns
    again = set(stage.rematerialized)
    parts: list[SegmentBytes] = []
    gathered: list[Gathered] = []
    largest = 0.0
    for i in range(stage.first, stage.last):
        segment = search.trace.segments[i]
        key = segment.kind, id(candidate.segments[i]), candidate.choice.columns[i]
        nodes = ops_of(search.trace, segment)
        if key not in known:
            known[key] = segment_bytes(columns, nodes, chosen, segment.name in again)
        parts.append(known[key])
        held = held_by(search.trace, nodes)
        gathered.append(gathered_by(columns, held, chosen, stored) if stored else Gathered())
        for node in held:
            largest = max(largest, columns.local_nbytes(node, columns.placement(chosen, node)))
    whole = stage_bytes(with_gathered(parts, gathered))
    gradients = float(stage.memory.gradients)
    standing = max(gradients - sum(g.apart for g in gathered), 0.0)
    sums = gradients > 0 and candidate.case.width > 1
    step = 0.0
    if search.options.optimizer_factor >= _ADAM_FACTOR:
        step = gradients if cuda else 2 * largest
    shared = candidate.problem.fixed.activation_nbytes / max(candidate.problem.in_flight)
    return StageBytes(
        parameters=float(stage.memory.parameters),
        optimizer=float(stage.memory.optimizer),
        gradients=gradients,
        kept=whole.kept + shared,
        forward=whole.forward + shared,
        first=whole.first + shared,
        later=whole.later + shared,
        step=step,
        standing=standing if sums else 0.0,
        received={link.source: float(link.nbytes) for link in links if link.target == index},
        returned={link.target: float(link.grad_nbytes) for link in links if link.source == index},
    )
