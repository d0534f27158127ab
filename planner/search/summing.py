"""Which gradients of a plan are summed over ranks while backward goes on, and in buckets of which size: those of whole
parameters, and of those of which only the optimizer's state is in parts (level 1).

The search counts a step's sums in full (prices have to add up over parameters); what of them hides behind the last
backward is worked out for the plans that it found, from the same prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import fx

from shardplan.planner.plan import BUCKET_NBYTES, StagePlan
from shardplan.planner.reductions import bucket_nbytes, spread
from shardplan.planner.rules import Strategy
from shardplan.planner.search.runs import held_by, ops_of
from shardplan.planner.search.storing import scattering
from shardplan.planner.storage import Storage

if TYPE_CHECKING:
    from shardplan.planner.search.candidate import Candidate
    from shardplan.planner.search.search import Search


@dataclass(frozen=True, slots=True)
class Part:
    """A candidate with its strategies by node and the parameters that are stored in parts, as of one of its stages."""

    search: Search
    candidate: Candidate
    chosen: dict[str, Strategy]
    stored: dict[str, Storage]


@dataclass(slots=True)
class _Segment:
    backward_seconds: float
    summing_seconds: float = 0.0
    nbytes: float = 0.0


def with_sums(parts: Sequence[Part], stages: Sequence[StagePlan]) -> tuple[tuple[StagePlan, ...], int]:
    """The stages with their `StagePlan.reductions` and `reducing`, and `Plan.bucket_nbytes`. parts: of every stage."""
    groups: list[dict[tuple[int, ...], None]] = [{} for _ in parts]
    found = [_segments(part, stage, own) for part, stage, own in zip(parts, stages, groups, strict=True)]
    largest = [max(own, key=lambda ranks: (len(ranks), ranks), default=(0,)) for own in groups]
    slowest = max(range(len(parts)), key=lambda i: sum(s.summing_seconds for s in found[i]))
    costs, ranks = parts[slowest].search.costs, largest[slowest]
    if len(ranks) == 1:
        return tuple(stages), BUCKET_NBYTES
    held = [(sum(s.nbytes for s in one), sum(s.backward_seconds for s in one)) for one in found]
    size = bucket_nbytes(held, lambda nbytes: costs.collective("all_reduce", nbytes, ranks))
    made = []
    for part, stage, segments, own in zip(parts, stages, found, largest, strict=True):
        if len(own) > 1:
            reductions = spread([(s.backward_seconds, s.summing_seconds, s.nbytes) for s in segments], size)
            lost = max(part.search.costs.slowdown("all_reduce", own))
            stage = replace(stage, reductions=reductions, reducing=lost)
        made.append(stage)
    return tuple(made), size


def _segments(part: Part, stage: StagePlan, groups: dict[tuple[int, ...], None]) -> list[_Segment]:
    """The stage's segments; a parameter counts in the first that reads it, whose backward makes its gradient final.
    groups: takes up the ranks over which something is summed."""
    columns, trace, candidate = part.candidate.columns, part.search.trace, part.candidate
    found = []
    seen: set[fx.Node] = set()
    for index in range(stage.first, stage.last):
        price = candidate.segments[index].columns[candidate.choice.columns[index]].price
        segment = _Segment(price.backward_seconds)
        for node in held_by(trace, ops_of(trace, trace.segments[index])):
            source = trace.sources[node.name]
            kept = part.stored.get(node.name)
            if node in seen or source.kind != "param" or not source.trainable or (kept is not None and kept.level > 1):
                continue
            seen.add(node)
            tp = columns.placement(part.chosen, node)
            nbytes = columns.stored_nbytes(node, columns.local_nbytes(node, tp))
            seconds, ranks = columns.summing(node, tp)
            if kept is not None:
                seconds, ranks = scattering(columns, nbytes), columns.dp_ranks
            if len(ranks) > 1 and part.search.options.training:
                groups[ranks] = None
                segment.summing_seconds += seconds
                segment.nbytes += nbytes
        found.append(segment)
    return found
