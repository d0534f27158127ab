"""What the outer search carries from a case to a plan."""

from __future__ import annotations

from dataclasses import dataclass

from shardplan.planner.placement import Placement
from shardplan.planner.search.columns import Case, Columns, SegmentColumns
from shardplan.planner.search.stage_ilp import StageChoice, StageProblem


@dataclass(slots=True)
class Candidate:
    """A case with its problem and the choice that was made in it."""

    case: Case
    columns: Columns
    segments: list[SegmentColumns]
    problem: StageProblem
    choice: StageChoice
    schedule: str
    forced: dict[str, Placement]
    label: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A case's columns for one placement of the tied parameters."""

    case: Case
    columns: Columns
    segments: list[SegmentColumns]
    forced: dict[str, Placement]
