"""Bytes that a step sends, by kind and by pair of devices, worked out from the plan's placements.

Collectives are counted as rings: of a tensor of n bytes a rank of g sends n (g - 1) / g to its neighbour (twice that
for an all-reduce), in an all-to-all n / g to every other rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from shardplan.planner.instructions import Op
from shardplan.planner.placement import R, conversion
from shardplan.planner.plan import NodeSummary, Plan, StagePlan
from shardplan.planner.report.facts import itemsize, parse_tensor

_NAMES = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
}


@dataclass(frozen=True, slots=True)
class Sent:
    """What the devices of a stage send in a step for one purpose. nbytes: of one device. between_nodes: whether some
    of their groups reach over nodes. target: the stage that messages go to, -1 for collectives."""

    stage: int
    axis: str
    what: str
    nbytes: float
    between_nodes: bool
    target: int = -1


@dataclass(frozen=True, slots=True)
class Traffic:
    """sent: by purpose. inside: node -> bytes of a step that stay in it; between: (from, to) nodes -> bytes."""

    sent: tuple[Sent, ...]
    inside: dict[int, float]
    between: dict[tuple[int, int], float]


def traffic(plan: Plan) -> Traffic:
    """Of a whole step."""
    pairs: dict[tuple[int, int], float] = defaultdict(float)
    sent: list[Sent] = []
    for index, stage in enumerate(plan.stages):
        for (axis, kind), nbytes in sorted(_collectives(plan, index, stage).items()):
            groups = groups_of(stage, axis)
            each = _ring(kind, len(groups[0])) * nbytes
            crossing = False
            for ranks in groups:
                for pair, share in _edges(kind, ranks):
                    pairs[pair] += each * share
                crossing |= len({plan.devices[rank].node for rank in ranks}) > 1
            sent.append(Sent(index, axis, _NAMES[kind], each, crossing))
    for link in plan.links:
        for source, target, nbytes, what in (
            (link.source, link.target, link.nbytes, "activations"),
            (link.target, link.source, link.grad_nbytes, "gradients of activations"),
        ):
            if nbytes:
                ends = list(zip(plan.stages[source].ranks, plan.stages[target].ranks))
                for pair in ends:
                    pairs[pair] += nbytes * plan.microbatches
                crossing = any(plan.devices[a].node != plan.devices[b].node for a, b in ends)
                sent.append(Sent(source, "", what, float(nbytes * plan.microbatches), crossing, target))
    inside: dict[int, float] = defaultdict(float)
    between: dict[tuple[int, int], float] = defaultdict(float)
    for (a, b), nbytes in pairs.items():
        nodes = plan.devices[a].node, plan.devices[b].node
        if nodes[0] == nodes[1]:
            inside[nodes[0]] += nbytes
        else:
            between[nodes] += nbytes
    return Traffic(tuple(sent), dict(inside), dict(between))


def groups_of(stage: StagePlan, axis: str) -> list[tuple[int, ...]]:
    """Ranks of a stage that differ on one axis alone."""
    dp, tp = stage.mesh.size("dp"), stage.mesh.size("tp")
    if axis == "tp":
        return [stage.ranks[row * tp : (row + 1) * tp] for row in range(dp)]
    return [stage.ranks[column::tp] for column in range(tp)]


def _ring(kind: str, size: int) -> float:
    return (2.0 if kind == "all_reduce" else 1.0) * (size - 1) / size


def _edges(kind: str, ranks: tuple[int, ...]) -> Iterable[tuple[tuple[int, int], float]]:
    if kind == "all_to_all":
        yield from (((a, b), 1 / (len(ranks) - 1)) for a in ranks for b in ranks if a != b)
    else:
        yield from (((a, b), 1.0) for a, b in zip(ranks, (*ranks[1:], ranks[0]), strict=True))


def _collectives(plan: Plan, index: int, stage: StagePlan) -> dict[tuple[str, str], float]:
    """(axis, kind) -> bytes of the whole tensors (of one group) that go through it in a step."""
    trains = any(i.op is Op.OPTIMIZER_STEP for line in plan.instructions for i in line)
    found: dict[tuple[str, str], float] = defaultdict(float)
    tp, dp, m = stage.mesh.size("tp"), stage.mesh.size("dp"), plan.microbatches
    seen: set[tuple[str, str]] = set()
    for node, summary in plan.nodes.items():
        if index not in summary.stages:
            continue
        if summary.op == "param":
            if dp > 1:
                _stored(plan, node, summary, tp, m, trains, found)
        elif tp > 1 and summary.op not in ("buffer", "constant", "input"):
            for kind, nbytes in _converted(plan, node, summary, trains, seen):
                # The batch is cut into microbatches and over replicas: every group sends its part, m times a step.
                found["tp", kind] += nbytes / dp
    return {key: nbytes for key, nbytes in found.items() if nbytes}


def _stored(
    plan: Plan, node: str, summary: NodeSummary, tp: int, m: int, trains: bool, found: dict[tuple[str, str], float]
) -> None:
    strategy = plan.strategy("tp", node)
    nbytes = tensor_nbytes(summary.outputs[0])
    if strategy and strategy.outputs and strategy.outputs[0].is_shard:
        nbytes /= tp
    stored = plan.storage.get(summary.name)
    level = stored.level if stored else 0
    if level == 3:
        found["dp", "all_gather"] += nbytes * m * (2 if trains else 1)
    if not trains or not summary.differentiable:
        return
    if level == 0:
        found["dp", "all_reduce"] += nbytes
    else:
        found["dp", "reduce_scatter"] += nbytes * (m if level > 1 else 1)
        found["dp", "all_gather"] += nbytes * (level < 3)


def _converted(
    plan: Plan, node: str, summary: NodeSummary, trains: bool, seen: set[tuple[str, str]]
) -> Iterable[tuple[str, float]]:
    """A value is converted once to each placement that somebody reads it in."""
    strategy = plan.strategy("tp", node)
    wanted = strategy.inputs if strategy else (R,) * len(summary.inputs)
    for reference, placement in zip(summary.inputs, wanted):
        maker, _, place = reference.partition("#")
        producer, made_by = plan.nodes.get(maker), plan.strategy("tp", maker)
        position = int(place or 0)
        if producer is None or position >= len(producer.outputs) or (reference, str(placement)) in seen:
            continue
        seen.add((reference, str(placement)))
        given = made_by.outputs[position] if made_by and made_by.outputs else R
        done = conversion(given, placement, producer.differentiable)
        nbytes = tensor_nbytes(producer.outputs[position])
        kinds = [done.forward]
        if trains and producer.differentiable and producer.op != "param":
            kinds.append(done.backward)
        yield from ((kind, nbytes) for kind in kinds if kind in _NAMES)


def tensor_nbytes(text: str) -> float:
    """Bytes of a whole tensor, from the text of its type."""
    dtype, shape = parse_tensor(text)
    return float(itemsize(dtype) * math.prod(shape))
