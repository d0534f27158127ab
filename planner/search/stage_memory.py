"""Predicted memory of every stage of a candidate: the fullest moment of its instruction list (`planner.memory_curve`),
from what is alive in its segments (`search.liveness`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from shardplan.planner.instructions import Op, Schedule
from shardplan.planner.memory_curve import Moment, StageBytes, block, curve, peak
from shardplan.planner.plan import BUCKET_NBYTES, Memory, StageLink, StagePlan
from shardplan.planner.receipts import receipts
from shardplan.planner.reductions import goes_alone
from shardplan.planner.rules import Strategy
from shardplan.planner.search.gathered import Gathered, gathered_by, with_gathered
from shardplan.planner.search.liveness import SegmentBytes, segment_bytes, stage_bytes
from shardplan.planner.search.put_off import SPLIT, waiting_nbytes
from shardplan.planner.search.runs import held_by, ops_of
from shardplan.planner.storage import Storage
from shardplan.planner.trace import is_tensor

if TYPE_CHECKING:
    from shardplan.planner.search.candidate import Candidate
    from shardplan.planner.search.columns import Columns
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
    bucket_nbytes: int = BUCKET_NBYTES,
) -> tuple[StagePlan, ...]:
    """The stages with the parts of their memory at the fullest moment. What parameters, gradients and optimizer state
    take is in them already. stored: how parameters are stored that are not stored as they are used, by node;
    bucket_nbytes: of gradients that are summed together."""
    cuda = search.cluster.devices[0].kind.torch_device == "cuda"
    known: dict[tuple[int, int, int, bool], SegmentBytes] = {}
    held = [
        _bytes(search, candidate, chosen, links, index, stage, known, cuda, stored or {}, bucket_nbytes)
        for index, stage in enumerate(stages)
    ]
    found = list(stages)
    bare = {(link.source, link.target) for link in links if not link.nbytes}
    for position, line in enumerate(instructions):
        mine = sorted({i.stage for i in line})
        if not mine:
            continue
        arrived = receipts(instructions, position, lambda i: (i.stage, i.peer) not in bare)
        if search.options.training and not any(i.op is Op.OPTIMIZER_STEP for i in line):
            line = (*line, replace(line[-1], op=Op.OPTIMIZER_STEP, stage=mine[0], microbatch=-1, peer=-1))
        fullest = peak(curve(line, {index: held[index] for index in mine}, cuda, arrived))
        for index in mine:
            part = _part_of(fullest, index, {i: held[i] for i in mine})
            reserve = (search.costs.overheads(0).memory - 1.0) * fullest.nbytes  # of the whole device
            found[index] = replace(found[index], memory=_memory(found[index].memory, part, reserve))
    return tuple(found)


def _part_of(moment: Moment, stage: int, held: Mapping[int, StageBytes]) -> Moment:
    """What one of several stages of a device has of its fullest moment: of gradients and activations in proportion to
    what it holds at most, of the rest of the moment what it runs itself."""
    if len(held) == 1:
        return moment
    mine = held[stage]
    gradients = sum(s.gradients for s in held.values())
    kept = sum(s.kept for s in held.values())
    return replace(
        moment,
        fixed=mine.fixed,
        gradients=moment.gradients * (mine.gradients / gradients if gradients else 0.0),
        activations=moment.activations * (mine.kept / kept if kept else 1.0 / len(held)),
        buffers=moment.buffers if moment.instruction.stage == stage else 0.0,
    )


def _memory(memory: Memory, moment: Moment, reserve: float) -> Memory:
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
    known: dict[tuple[int, int, int, bool], SegmentBytes],
    cuda: bool,
    stored: Mapping[str, Storage],
    bucket_nbytes: int,
) -> StageBytes:
    columns = candidate.columns
    again = set(stage.rematerialized)
    parts: list[SegmentBytes] = []
    gathered: list[Gathered] = []
    params: dict[fx.Node, None] = {}
    standing: dict[fx.Node, float] = {}
    inside = {n for i in range(stage.first, stage.last) for n in ops_of(search.trace, search.trace.segments[i])}
    leaving = 0.0
    for i in range(stage.first, stage.last):
        segment = search.trace.segments[i]
        arriving = i == stage.last - 1 and stage.last < len(search.trace.segments)
        key = segment.kind, id(candidate.segments[i]), candidate.choice.columns[i], arriving
        nodes = ops_of(search.trace, segment)
        held = held_by(search.trace, nodes)
        bucketed = _bucketed(search, columns, chosen, [n for n in held if n.name not in stored], bucket_nbytes)
        standing |= bucketed
        if key not in known:
            known[key] = segment_bytes(columns, nodes, chosen, segment.name in again, bucketed, arriving, cuda)
        part = known[key]
        elsewhere = 0.0 if segment.name in again else _kept_elsewhere(search, columns, chosen, nodes, inside)
        leaving += elsewhere
        parts.append(
            replace(part, kept=part.kept - elsewhere, first=part.first - elsewhere, later=part.later - elsewhere)
        )
        gathered.append(gathered_by(columns, held, chosen, stored) if stored else Gathered())
        params |= dict.fromkeys(held)
    whole = stage_bytes(with_gathered(parts, gathered))
    # Of blocks of the allocator, what parameters do not fill.
    sizes = [columns.local_nbytes(node, columns.placement(chosen, node)) for node in params]
    unused = sum(block(nbytes, cuda) - nbytes for nbytes in sizes)
    gradients = float(stage.memory.gradients)
    gradients += unused if gradients else 0.0
    step = 0.0
    if search.options.optimizer_factor >= _ADAM_FACTOR:
        step = gradients if cuda else 2 * max(sizes, default=0.0)
    shared = candidate.problem.fixed.activation_nbytes / max(candidate.problem.in_flight)
    return StageBytes(
        parameters=float(stage.memory.parameters),
        optimizer=stage.memory.optimizer + unused * (1 + search.options.optimizer_factor),
        gradients=gradients,
        kept=whole.kept + shared,
        forward=whole.forward + shared,
        first=whole.first + shared,
        later=whole.later + shared,
        step=step,
        standing=min(sum(standing.values()), gradients),
        received={link.source: float(link.nbytes) for link in links if link.target == index},
        returned={link.target: float(link.grad_nbytes) for link in links if link.source == index},
        sent={link.target: min(float(link.nbytes), leaving) for link in links if link.source == index},
        given={link.source: float(link.grad_nbytes) for link in links if link.target == index},
        waiting=waiting_nbytes(search, candidate, chosen, stored, index) if candidate.schedule in SPLIT else None,
    )


def _kept_elsewhere(
    search: Search, columns: Columns, chosen: dict[str, Strategy], nodes: Iterable[fx.Node], inside: Set[fx.Node]
) -> float:
    """Bytes of results that leave the stage because only later stages need them: for backward too, but as messages."""
    found = 0.0
    for node in nodes if search.options.training else ():
        keepers = columns.keeps.keepers(node, 0)
        if is_tensor(node) and keepers and not keepers & inside:
            found += columns.local_nbytes(node, columns.placement(chosen, node))
    return found


def _bucketed(
    search: Search, columns: Columns, chosen: dict[str, Strategy], held: Iterable[fx.Node], bucket_nbytes: int
) -> dict[fx.Node, float]:
    """The parameters whose gradients are summed in buckets with others, and bytes of these gradients."""
    found = {}
    for node in held if search.options.training else ():
        tp = columns.placement(chosen, node)
        if search.trace.sources[node.name].trainable and len(columns.summing(node, tp)[1]) > 1:
            nbytes = columns.stored_nbytes(node, columns.local_nbytes(node, tp))
            if not goes_alone(nbytes, bucket_nbytes):
                found[node] = nbytes
    return found
