"""The stage program by dynamic programming: seconds where the integer program takes minutes, with its own bound.

Data as in `stage_ilp`. Fold the once-a-step seconds: c = t + u / (S + m - 1). For a stage s of segments [i, j) whose
first tensor enters in layout a and whose last leaves in b, a *cell* is

    C[s,i,j,a,b] = min { sum c + fixed :  columns agree on layouts,  sum (P + q_s A) + W + q_s in[i,a] + F <= M_s }

and the program is: cut the segments into S cells at least sum C + send + (m - 1) max C (`stage_cuts`). With U >= u_s
folded this never exceeds the true objective, so it bounds it; the objective of the cells' columns, evaluated exactly,
is the incumbent.

Cells are bounded from below by Lagrangian relaxation of their memory row, for every number k of recomputed segments:

    L[k] = max over mu >= 0 of  D_mu[k] + fixed - mu (M_s - F - q_s in[i,a] - W_min[k]),      C >= min over k of L[k]

with D_mu[k] = min { sum c + mu (P + q_s A) : k segments recomputed }, by min-plus products over all runs of segments at
once (`stage_words`). To recompute one segment more is the large step in a cell's memory and time; with k fixed, what
the relaxation blurs is the small steps.

A segment's transient bytes are those of one op, at least w_i, and G_i that add up over it: parameters that are
gathered, activations that are computed again. As W >= w_i + G_i for every segment, W may stand for any mixture of them:
with shares r_i >= 0 of a sum R <= 1,

    W >= sum r_i (w_i + G_i) + (1 - R) W_min,

so G_i gets the price mu r_i in D. Tried are no shares at all, and those of one kind of segments at a time: what gathers
most are often all layers alike, or one segment. Each gives a bound, and the largest holds.

`stage_cells` has both. `certified` bounds the program over *all* columns: it uses only weightings for which the best
there is is among the given ones, and since D is concave in (mu, mu q), what lies between two weightings is bounded by
the line between them. `solve_quickly` starts from bounds of the given columns and replaces the cells on the best path
by what they cost (`stage_fronts`), until the path consists of such.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from shardplan.planner.search.stage_cells import Known, StageCells
from shardplan.planner.search.stage_cuts import Cell, Cuts
from shardplan.planner.search.stage_fronts import best_within
from shardplan.planner.search.stage_ilp import StageChoice, StageProblem, memory, objective

_ROUNDS = 40
_CLOSE = 0.02
"""Prices that differ less are one."""
_FURTHER = 3.0
"""How much lower or higher a price is tried next to the lowest or highest."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """bound: on the program over all columns (inf: nothing fits). prices: of a byte, whose columns may raise it."""

    bound: float
    prices: tuple[float, ...] = ()


def certified(
    problem: StageProblem, known: Known, gap: float, best: float = math.inf, asking: bool = True
) -> Certificate:
    """A bound on the program over *all* columns; it need not exceed `best`. asking: for prices that may raise it."""
    program = _Program(problem, gap, known, best)
    found = program.cuts.solve(program.bounds) if program.words is not None else None
    if found is None:
        return Certificate(best if program.capped else math.inf)
    prices = program.wanted(found.cells) if asking else ()
    return Certificate(min(found.value, best) if program.capped else found.value, prices)


def solve_quickly(problem: StageProblem, gap: float, best: float = math.inf) -> StageChoice | None:
    """A choice within `gap` of its bound, or the best found (not optimal then). None: nothing was found that fits and
    costs less than `best`. `StageChoice.bound` is that of the given columns."""
    return _Program(problem, gap, None, best).solve()


class _Program(StageCells):
    """known: see `certified`; None: every weighting is one of the given columns, exactly."""

    def __init__(self, problem: StageProblem, gap: float, known: Known | None, best: float) -> None:
        self.gap, self.capped, self.from_start = gap, False, problem.stages == 1
        super().__init__(problem, known, 1.0 / (problem.stages + problem.microbatches - 1), best)
        if self.words is not None:
            self.cuts = Cuts(problem, self.words, self.groups, gap)

    def _longest(self, best: float) -> int:
        """No stage of more segments than this can fit, or be part of a solution better than `best`."""
        problem = self.problem
        most = len(problem.columns) - problem.stages + 1
        vectors = [self.vectors[id(columns)] for columns in problem.columns]
        cost = np.array([v[:, 0].min() for v in vectors])
        if best < math.inf and problem.microbatches > 1:
            whole = float(cost.sum()) + problem.stages * problem.fixed.seconds
            ceiling = (best - whole) / (problem.microbatches - 1) - problem.fixed.seconds
            held = np.searchsorted(np.cumsum(np.sort(cost)), ceiling, side="right")
            self.capped = int(held) < most
            most = min(most, int(held))
        if self.known is None or self.known.leanest:
            leanest, limit = min(self.given), max(problem.limits)
            if leanest <= min(problem.in_flight):
                least = np.sort([(v[:, 1] + leanest * v[:, 2]).min() for v in vectors])
                most = min(most, int(np.searchsorted(np.cumsum(least), limit * (1 + 1e-6), side="right")))
        return max(most, 0)

    def wanted(self, cells: Sequence[Cell]) -> tuple[float, ...]:
        """Prices between the known ones that may raise the bounds of the given cells: around the best known of each."""
        assert self.words is not None and self.known is not None
        if not self.prices:
            return ()
        ordered = sorted(self.prices)
        by_group: dict[int, list[tuple[int, int, int]]] = {}
        for s, (i, j, a, b) in enumerate(cells):
            by_group.setdefault(self.groups[s], []).append((int(self.words.number[i, j - i]), a, b))
        looked: dict[int, dict[tuple[int, int, int, int], list[float]]] = {}
        for group in list(by_group)[:: max(len(by_group) // 8, 1)]:
            for word, a, b in by_group[group]:
                k = int(self.by_count[group, word, :, a, b].argmin())
                looked.setdefault(group, {})[word, k, a, b] = [-math.inf] * len(ordered)
        for shares in self.mixtures:
            budget = self._budget(shares)
            for price, group, held in self._products(1.0, ordered, shares):
                for (word, k, a, b), duals in looked.get(group, {}).items():
                    value = float(held[word, k, a, b] - price * budget[group, word, k, a, 0])
                    at = ordered.index(price)
                    duals[at] = max(duals[at], value)
        wanted: dict[float, None] = {}
        for (word, k, a, b), duals in (item for mine in looked.values() for item in mine.items()):
            at = duals.index(max(duals))
            if not math.isfinite(duals[at]) or duals[at] <= self.free[word, k, a, b]:
                continue
            below = ordered[at - 1] if at else ordered[0] / _FURTHER**2
            above = ordered[at + 1] if at + 1 < len(ordered) else ordered[-1] * _FURTHER**2
            for other in (below, above):
                middle = math.sqrt(ordered[at] * other)
                if abs(middle - ordered[at]) > _CLOSE * middle:
                    wanted[middle] = None
        return tuple(sorted(wanted))

    # -- the given columns ---------------------------------------------------------------------------------------------

    def solve(self) -> StageChoice | None:
        if self.words is None:
            return None
        best: StageChoice | None = None
        bound = 0.0
        done: dict[tuple[int, int, int], None] = {}
        for _ in range(_ROUNDS):
            found = self.cuts.solve(self.bounds)
            if found is None:
                bound = math.inf
                break
            bound = max(bound, found.value)
            fresh = [(s, cell) for s, cell in enumerate(found.cells) if self._settle(self.groups[s], cell, done)]
            best = self._better(best, found.cells)
            if not fresh or (best is not None and best.objective - bound <= 0.1 * self.gap * best.objective):
                break
        best = self._settled(best, done)
        if best is None:
            return None
        bound = min(bound, best.objective)
        optimal = best.objective - bound <= self.gap * best.objective
        return StageChoice(best.bounds, best.columns, best.objective, bound, optimal)

    def _settle(self, group: int, cell: Cell, done: dict[tuple[int, int, int], None]) -> bool:
        """Replace the bounds of the cell, and of a segment more and less, by what they cost. False: it was before."""
        assert self.words is not None
        i, j, a, _ = cell
        fresh = False
        for end in (j, j - 1, j + 1):
            length = end - i
            if not 1 <= length <= self.words.most or end > self.words.count:
                continue
            word = int(self.words.number[i, length])
            if (group, word, a) in done:
                continue
            done[group, word, a] = None
            fresh = fresh or end == j
            fronts = self.fronts.front(self.pairs[group][1], self._room(group, word, a), word, a)
            for b in range(self.words.width):
                cost = math.inf
                if b in fronts:
                    point = best_within(fronts[b], self._room(group, word, a))
                    cost = math.inf if point is None else float(fronts[b].cost[point]) + self.problem.fixed.seconds
                self.bounds[group, word, a, b] = max(self.bounds[group, word, a, b], cost)
        return fresh

    def _settled(self, best: StageChoice | None, done: Collection[tuple[int, int, int]]) -> StageChoice | None:
        """The best among cells whose cost is known."""
        costs = np.full_like(self.bounds, math.inf)
        for group, word, a in done:
            costs[group, word, a] = self.bounds[group, word, a]
        found = self.cuts.solve(costs) if done else None
        return best if found is None else self._better(best, found.cells)

    def _better(self, best: StageChoice | None, cells: Sequence[Cell]) -> StageChoice | None:
        assert self.words is not None
        columns: list[int] = []
        for s, (i, j, a, b) in enumerate(cells):
            group, word = self.groups[s], int(self.words.number[i, j - i])
            room, flight = self._room(group, word, a), self.pairs[group][1]
            front = self.fronts.front(flight, room, word, a).get(b)
            point = None if front is None else best_within(front, room)
            if point is None:
                return best
            columns += self.fronts.columns_of(flight, room, word, a, b, point)
        bounds = tuple(cell[0] for cell in cells)
        needed = memory(self.problem, bounds, columns)
        if any(n > limit * (1 + 1e-12) for n, limit in zip(needed, self.problem.limits, strict=True)):
            return best
        value = objective(self.problem, bounds, columns)
        if best is None or value < best.objective:
            return StageChoice(bounds, tuple(columns), value, 0.0, False)
        return best
