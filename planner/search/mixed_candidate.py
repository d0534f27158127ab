"""What the search for unequal devices found: a choice with what it was made from."""

from __future__ import annotations

from dataclasses import dataclass, field

from shardplan.planner.placement import Placement
from shardplan.planner.search.columns import Columns, SegmentColumns
from shardplan.planner.search.mixed_groups import Group
from shardplan.planner.search.mixed_problem import MixedProblem, MixedStage


@dataclass(slots=True)
class MixedCandidate:
    """A choice with what it was made from. ranks, groups, columns, segments: per stage; every, makers, made: per
    way."""

    microbatches: int
    problem: MixedProblem
    stages: tuple[MixedStage, ...]
    ranks: tuple[tuple[int, ...], ...]
    groups: list[Group]
    columns: list[Columns]
    segments: list[list[SegmentColumns]]
    forced: dict[str, Placement]
    objective: float
    every: list[Group]
    makers: list[Columns]
    made: list[list[SegmentColumns]]
    label: str = ""
    sharing: Sharing | None = None


@dataclass(frozen=True, slots=True)
class Sharing:
    """Of replicas that run microbatches of their own (`mixed_shares`). microbatches: of each. scale: what all
    microbatches one after another would take on the device whose columns are given, times this is what the slowest
    replica takes. once: seconds once a step, gradients summed."""

    microbatches: tuple[int, ...]
    scale: float
    once: float


@dataclass(slots=True)
class Priced:
    """The ways of one number of microbatches."""

    groups: list[Group] = field(default_factory=list)
    columns: list[Columns] = field(default_factory=list)
