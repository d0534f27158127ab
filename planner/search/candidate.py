"""What the outer search carries from a case to a plan."""

from __future__ import annotations

from dataclasses import dataclass

from shardplan.planner.placement import Placement
from shardplan.planner.schedules import position_of
from shardplan.planner.search.case import Case
from shardplan.planner.search.columns import Columns, SegmentColumns
from shardplan.planner.search.stage_ilp import StageChoice, StageProblem


@dataclass(slots=True)
class Candidate:
    """A case with its problem and the choice that was made in it. chunks: stages of a position (group of devices); the
    choice is of all stages then, the problem that of one stage a position."""

    case: Case
    columns: Columns
    segments: list[SegmentColumns]
    problem: StageProblem
    choice: StageChoice
    schedule: str
    forced: dict[str, Placement]
    label: str = ""
    chunks: int = 1

    @property
    def stages(self) -> int:
        return self.case.stages * self.chunks

    def position(self, stage: int) -> int:
        """Where a stage stands."""
        return position_of(self.schedule, stage, self.case.stages)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A case's columns for one placement of the tied parameters."""

    case: Case
    columns: Columns
    segments: list[SegmentColumns]
    forced: dict[str, Placement]
