"""The stage program for unequal devices as plain data, and what a choice of it costs.

Sets       segments i = 0..n-1 in order; ways w: a set of devices, taken from units of like devices, with a mesh on it;
           columns c in C(w,i), each with a layout of the tensor that enters and of the one that leaves.
Choice     stages s = 0..S-1 (S is free), each a way and a run of segments; a column per segment.
Objective  sum_s t_s + (m - 1) max_s t_s + max_s u_s + sum of sends
           t_s = sum of its columns' seconds + seconds that every stage of the way takes
Subject to the runs follow one another and cover everything; layouts agree inside a stage, at a cut send[b][w,l][w',e]
           is finite; units are not overdrawn (devices may stay unused);
           sum (P + q A) + max W + q received + fixed <= limit of the way, q = min(m, stages from s to the last)
           (GPipe: m; forward only: 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from shardplan.planner.search.problem import Price
from shardplan.planner.search.stage_cells import Known
from shardplan.planner.search.stage_ilp import Column

LAYOUTS = 2
"""Layouts of a tensor at a cut: whole, and one slice."""
Take = tuple[tuple[int, int], ...]
"""(kind of unit, devices of one unit of that kind); several entries are several units."""


@dataclass(frozen=True, slots=True)
class Way:
    """A group of devices with a mesh.

    columns: per segment; equal segments share one tuple. received: [boundary in front of segment][layout] bytes that
    the stage keeps of what it receives. known: weightings for which the columns are the best there are; complete:
    whether they are all that could be of use. transients, recomputing: per segment, bytes that no column, and no
    recomputed one, can do without. label: for people.
    """

    takes: Take
    limit: float
    columns: tuple[tuple[Column, ...], ...]
    received: tuple[tuple[float, ...], ...]
    fixed: Price = field(default_factory=Price)
    known: Known = field(default_factory=Known)
    complete: bool = False
    transients: tuple[float, ...] = ()
    recomputing: tuple[float, ...] = ()
    label: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class MixedProblem:
    """units: per kind of unit the devices of each. sends: [boundary][way * LAYOUTS + leaves, way * LAYOUTS + enters]
    seconds of a microbatch, both directions (inf: cannot be); boundary b is in front of segment b. once: the share of
    once-a-step seconds that the weightings fold into a microbatch, at most 1 / (stages + m - 1). grows: whether
    microbatches in flight grow with the stages behind one (1F1B). stages: allowed numbers, empty for all."""

    ways: tuple[Way, ...]
    units: tuple[tuple[int, ...], ...]
    sends: tuple[np.ndarray, ...]
    microbatches: int
    most_stages: int
    once: float
    in_flight: tuple[int, ...]
    stages: frozenset[int] = frozenset()
    pinned: tuple[tuple[int, int], ...] = ()
    together: tuple[tuple[int, ...], ...] = ()

    @property
    def count(self) -> int:
        return len(self.ways[0].columns)

    def flight(self, behind: int) -> int:
        """Microbatches that the stage holds with which the last `behind` stages begin."""
        return self.in_flight[behind - 1]


@dataclass(frozen=True, slots=True)
class MixedStage:
    """Segments [first, last) on the devices of a way, each by a column (position in the way's list)."""

    way: int
    first: int
    last: int
    columns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MixedChoice:
    """stages: first to last. bound: proven on every choice."""

    stages: tuple[MixedStage, ...]
    objective: float
    bound: float


def prices_of(problem: MixedProblem, stage: MixedStage) -> list[Price]:
    columns = problem.ways[stage.way].columns
    return [columns[i][k].price for i, k in zip(range(stage.first, stage.last), stage.columns, strict=True)]


def objective(problem: MixedProblem, stages: Sequence[MixedStage]) -> float:
    """The objective of a choice, from the data alone."""
    seconds = [sum(p.seconds for p in prices_of(problem, s)) + problem.ways[s.way].fixed.seconds for s in stages]
    once = [sum(p.once_seconds for p in prices_of(problem, s)) for s in stages]
    sent = 0.0
    for left, right in pairwise(stages):
        leaves = problem.ways[left.way].columns[left.last - 1][left.columns[-1]].leaves
        enters = problem.ways[right.way].columns[right.first][right.columns[0]].enters
        sent += float(problem.sends[right.first][left.way * LAYOUTS + leaves, right.way * LAYOUTS + enters])
    return sum(seconds) + (problem.microbatches - 1) * max(seconds) + max(once) + sent


def memory(problem: MixedProblem, stages: Sequence[MixedStage]) -> list[float]:
    """Peak bytes of every stage of a choice, from the data alone."""
    found = []
    for number, stage in enumerate(stages):
        way, prices = problem.ways[stage.way], prices_of(problem, stage)
        flight = problem.flight(len(stages) - number)
        enters = way.columns[stage.first][stage.columns[0]].enters
        held = sum(p.activation_nbytes for p in prices) + way.received[stage.first][enters]
        held += way.fixed.activation_nbytes
        transient = max(p.transient_nbytes for p in prices)
        found.append(sum(p.parameter_nbytes for p in prices) + flight * held + transient)
    return found


def fits(problem: MixedProblem, stages: Sequence[MixedStage]) -> bool:
    """Whether a choice keeps all limits and constraints."""
    limits = [problem.ways[s.way].limit for s in stages]
    if any(n > limit * (1 + 1e-9) for n, limit in zip(memory(problem, stages), limits, strict=True)):
        return False
    if problem.stages and len(stages) not in problem.stages:
        return False
    home = {i: number for number, s in enumerate(stages) for i in range(s.first, s.last)}
    if any(home[i] != stage for i, stage in problem.pinned):
        return False
    return all(len({home[i] for i in group}) == 1 for group in problem.together) and math.isfinite(
        objective(problem, stages)
    )
