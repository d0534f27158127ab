"""Stages of unequal devices: the program over suffixes by thresholds, cut until the best choice is proven.

Boxes. With U0 <= max u <= U1, c' = t + once * max(u - U0, 0) and C0 <= max c',

    sum t + (m - 1) max t + max u + sends  >=  DP(c', U1) + (m - 1) C0 + U0,

since once <= 1 / (S + m - 1) and so max u - U0 >= once * (sum (u_s - U0)+ + (m - 1) max (u_s - U0)+). Where the columns
are complete a box is T0 <= max t <= T1 and U0 <= max u <= U1, of cells with t <= T1 and u <= U1: they part the choices,
and with one value of each c' = t and the bound is what the choice costs. Otherwise t and u of a cell are not known
apart, and a box is C0 <= max c <= C1 with U0 = 0. Boxes are taken by their bound and cut in two, by what takes more of
the objective's seconds, until the best is within the gap or the time is spent. C0, T0 and U0 are at least the least
maximum that the devices allow, by the same program with the maximum in place of the sum.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shardplan.planner.search.mixed_dp import WHOLE, Programs, Range
from shardplan.planner.search.mixed_problem import MixedChoice, MixedProblem, MixedStage, fits, objective
from shardplan.planner.search.mixed_suffix import Step

_NEARLY = 1.1
_ROUNDS = 40


@dataclass(frozen=True, slots=True, order=True)
class _Box:
    """cost: of the slowest stage, as in the module's docstring T where columns are complete, else C; once: U."""

    bound: float
    number: int
    stages: int
    cost: Range
    once: Range


def solve_mixed(
    problem: MixedProblem, gap: float, best: float = math.inf, left: Callable[[], float] = lambda: math.inf
) -> tuple[MixedChoice | None, float]:
    """(the cheapest choice found that costs less than `best`, None where there is none; a bound on all choices, inf
    where nothing can fit). gap: relative; left: seconds that are left."""
    return _Solver(problem, gap, best, left).solve()


class _Solver:
    def __init__(self, problem: MixedProblem, gap: float, best: float, left: Callable[[], float]) -> None:
        self.problem, self.gap, self.best, self.left = problem, gap, best, left
        self.pace = problem.microbatches - 1
        self.programs = Programs(problem, best / self.pace if self.pace else math.inf)
        self.least = 0.0 if self.programs.exact else self.programs.least_slowest(self.programs.low)
        self.found: list[MixedStage] | None = None
        self.number = 0

    def solve(self) -> tuple[MixedChoice | None, float]:
        queue: list[_Box] = []
        wanted = sorted(self.problem.stages) if self.problem.stages else [0]
        if self.problem.pinned and not self.problem.stages:
            least = max(stage for _, stage in self.problem.pinned) + 1
            wanted = list(range(least, self.problem.most_stages + 1))
        for stages in wanted:
            if math.isinf(self.best):
                self._first_try(stages)
            box = self._box(stages, WHOLE, WHOLE, 0.0)
            if box is not None:
                if not self.programs.settled:
                    self._first_try(stages)
                heapq.heappush(queue, box)
        closed = math.inf
        while queue:
            box = queue[0]
            if box.bound >= self.best * (1 - self.gap) or self.left() <= 0:
                closed = min(closed, box.bound)
                break
            heapq.heappop(queue)
            parts = self._cut(box)
            if not parts:
                closed = min(closed, box.bound)
                continue
            for cost, once in parts:
                made = self._box(box.stages, cost, once, box.bound)
                if made is not None:
                    heapq.heappush(queue, made)
        bound = min(closed, self.best)
        if self.found is None:
            return None, closed
        return MixedChoice(tuple(self.found), self.best, bound), bound

    def _first_try(self, stages: int) -> None:
        """A choice that is nearly as even as can be, so that all that is worse need not be looked at."""
        slowest = self.programs.least_slowest(self.programs.real)
        if self.pace and math.isfinite(slowest):
            self._seek(slowest, slowest * _NEARLY, stages, WHOLE)

    def _seek(self, slowest: float, most: float, stages: int, once: Range) -> None:
        """Try the best path by what is known of costs, settle its cells, and again until all of a path are settled.
        slowest: no stage can be faster."""
        programs = self.programs
        for _ in range(_ROUNDS):
            real = programs.boxed(programs.real, most, once)
            _, path = programs.solve(real, stages, self.best - self.pace * slowest - once[0])
            fresh = programs.settle(path)
            self._try(path, most, once)
            if not fresh or self.left() <= 0:
                return

    def _box(self, stages: int, cost: Range, once: Range, known: float) -> _Box | None:
        """The box with its bound, its limits at least what the devices allow; the choice it leads to is tried.
        None: it is empty, or cannot win."""
        programs = self.programs
        if self.pace:  # a slower one could not win even if nothing else took any time
            cost = cost[0], min(cost[1], (self.best - once[0]) / self.pace)
        if programs.exact:
            least, least_once = map(programs.least_slowest, programs.apart(cost[1], once[1]))
            cost, once = (max(cost[0], least), cost[1]), (max(once[0], least_once), once[1])
        low = programs.boxed(programs.low, cost[1], once)
        if programs.exact:
            slowest = max(cost[0], programs.least_slowest(low))
        else:  # a limit on cells leaves the least slowest stage as it is, or nothing
            slowest = max(cost[0], self.least)
            cost = slowest, cost[1]
        if cost[0] > cost[1] or once[0] > once[1] or math.isinf(slowest):
            return None
        below = self.best - self.pace * slowest - once[0]
        total, path = programs.solve(low, stages, below)
        bound = max(known, total + self.pace * slowest + once[0])
        if math.isinf(bound) or bound >= self.best:
            return None
        if programs.settled:
            self._try(path, cost[1], once)
        else:
            self._seek(slowest, cost[1], stages, once)
        self.number += 1
        most = min(cost[1], (self.best - total - once[0]) / self.pace) if self.pace else cost[1]
        return _Box(bound, self.number, stages, (cost[0], most), once)

    def _try(self, path: list[Step], most: float, once: Range) -> None:
        if not path or not self.programs.possible(path):
            return
        made = self.programs.choice(path, most, once)
        value = objective(self.problem, made)
        if value < self.best and fits(self.problem, made):
            self.best, self.found = value, made

    def _cut(self, box: _Box) -> list[tuple[Range, Range]]:
        """The box in two by the seconds of the slowest stage, or by those of once a step. Empty: it cannot be cut."""
        once = np.zeros(0)
        if self.programs.exact:
            seconds, once = self.programs.within(box.cost[1], box.once[1])
        else:
            tables = self.programs.boxed(self.programs.low, box.cost[1])
            seconds = np.unique(np.concatenate([t[np.isfinite(t)] for t in tables]))
        seconds, once = seconds[seconds >= box.cost[0]], once[once >= box.once[0]]
        of_seconds = self.pace * np.ptp(seconds) if len(seconds) else 0.0
        of_once = np.ptp(once) if len(once) else 0.0
        if max(of_seconds, of_once) == 0:
            return []
        if of_seconds >= of_once:
            return [(cost, box.once) for cost in _halves(seconds)]
        return [(box.cost, part) for part in _halves(once)]


def _halves(values: np.ndarray) -> tuple[Range, Range]:
    """Ascending values, parted in the middle between the ends: the ends of both parts."""
    low, high = float(values[0]), float(values[-1])
    middle = int(np.searchsorted(values, (low + high) / 2, side="right")) - 1
    middle = min(max(middle, 0), len(values) - 2)
    return (low, float(values[middle])), (float(values[middle + 1]), high)
