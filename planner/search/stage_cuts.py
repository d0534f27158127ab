"""The cut program: which runs of segments form the stages, given what every run costs on every stage.

    min  sum_s C[s, run_s, a_s, b_s] + send + (m - 1) max_s C,    runs in order, together all segments

exactly, by dynamic programming over the stages with the runs' cost held under a threshold T: the least T for which
there is a solution, then larger ones, as long as the smaller sum that they might allow could still pay for (m - 1) T.
Stage s of S begins at segment s + x and ends before s + 1 + y with 0 <= x <= y <= n - S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shardplan.planner.search.stage_ilp import StageProblem
from shardplan.planner.search.stage_words import Numbers, Words

_HIDDEN = 0.1
"""Share of the gap that the steps between thresholds may hide."""
Cell = tuple[int, int, int, int]
"""(first segment, behind the last, layout that enters, layout that leaves)."""


@dataclass(frozen=True, slots=True)
class Path:
    """value: of the program, from below (to the share of the gap that steps hide); cells: of the stages."""

    value: float
    cells: tuple[Cell, ...]


class Cuts:
    """groups: which table of costs a stage has."""

    def __init__(self, problem: StageProblem, words: Words, groups: list[int], gap: float) -> None:
        self.problem, self.words, self.groups, self.gap = problem, words, groups, gap
        self.weight = problem.microbatches - 1
        span = words.count - problem.stages
        self.lengths = np.arange(1, min(words.most, span + 1) + 1)
        self.starts = np.arange(span + 1)[:, None] - self.lengths[None, :] + 1  # [y, length] -> x
        self.numbers = self._numbers()

    def _numbers(self) -> list[Numbers]:
        """Per stage [y, length]: the word that ends there; where that may not form the stage, one that costs inf."""
        problem, none = self.problem, len(self.words)
        found = []
        for s in range(problem.stages):
            i = s + self.starts
            j = i + self.lengths[None, :]
            allowed = self.starts >= 0
            if s == 0:
                allowed = allowed & (i == 0)
            if s == problem.stages - 1:
                allowed = allowed & (j == self.words.count)
            for segment, stage in problem.pinned:
                inside = (i <= segment) & (segment < j)
                allowed = allowed & (inside if stage == s else ~inside)
            for group in problem.together:
                low, high = min(group), max(group)
                touched = np.zeros_like(allowed)
                for member in group:
                    touched |= (i <= member) & (member < j)
                allowed = allowed & (~touched | ((i <= low) & (high < j)))
            numbers = self.words.number[np.maximum(i, 0), self.lengths[None, :]]
            found.append(np.where(allowed & (numbers >= 0), numbers, none))
        return found

    def solve(self, costs: Numbers, ceiling: float = math.inf) -> Path | None:
        """costs: [group, word, a, b]. ceiling: only cells that cost less are looked at. None: there is no way."""
        costs = np.where(costs < ceiling, costs, math.inf)
        tables = self._tables(costs, len(self.lengths))
        if self.weight == 0:
            found = self._least(tables, math.inf)
            return None if found is None else Path(found[0], tuple(found[2]))
        threshold = self._least_maximum(tables)
        if not math.isfinite(threshold):
            return None
        found = self._least(tables, threshold)
        assert found is not None
        best = found[0] + self.weight * found[1], found[2]
        # No solution with a larger cell than this is better, as all cells together cost at least so much.
        least = float(np.min([t.min() for t in tables])) * self.problem.stages
        tables = self._tables(costs, self._longest(costs, max((best[0] - least) / self.weight, threshold)))
        every = self._least(tables, math.inf)
        assert every is not None
        if every[1] <= threshold:
            value = every[0] + self.weight * every[1]
            return Path(value, tuple(every[2])) if value < best[0] else Path(best[0], tuple(best[1]))
        value = every[0] + self.weight * every[1]
        if value < best[0]:
            best = value, every[2]
        while True:
            highest = (best[0] - every[0]) / self.weight
            above = [t[(t > threshold) & (t < highest)] for t in tables]
            following = min((float(a.min()) for a in above if a.size), default=math.inf)
            # In steps that cannot hide more than a fraction of the gap.
            threshold = max(following, threshold + _HIDDEN * self.gap * best[0] / self.weight)
            if following >= highest or every[0] + self.weight * threshold >= best[0] * (1 - 1e-12):
                break
            found = self._least(tables, threshold)
            assert found is not None
            value = found[0] + self.weight * found[1]
            if value < best[0]:
                best = value, found[2]
        return Path(best[0] * (1 - _HIDDEN * self.gap), tuple(best[1]))

    def _longest(self, costs: Numbers, ceiling: float) -> int:
        """Length of the longest word that costs at most so much somewhere."""
        cheapest = costs.min((0, 2, 3))
        starts = self.words.starts
        return int(max(n for n in self.lengths if cheapest[starts[n] : starts[n + 1]].min() <= ceiling))

    def _tables(self, costs: Numbers, lengths: int) -> list[Numbers]:
        """Per stage [y, b, length x a]."""
        width = self.words.width
        ended = np.concatenate([costs, np.full((costs.shape[0], 1, width, width), math.inf)], 1)
        found = []
        for group, numbers in zip(self.groups, self.numbers, strict=True):
            table = ended[group][numbers[:, :lengths]]  # [y, length, a, b]
            found.append(np.ascontiguousarray(table.transpose(0, 3, 1, 2)).reshape(len(table), width, -1))
        return found

    def _entering(self, reached: Numbers, s: int, lengths: int) -> Numbers:
        """[x, a] -> [y, 1, length x a]: with the message that brings a stage its input."""
        if s:
            reached = reached + self.words.send[s : s + len(reached)]
        return reached[self.starts[:, :lengths]].reshape(len(reached), 1, -1)  # starts < 0 cost inf by themselves

    def _first(self) -> Numbers:
        reached = np.full((len(self.starts), self.words.width), math.inf)
        reached[0, 0] = 0.0
        return reached

    def _least(self, tables: list[Numbers], threshold: float) -> tuple[float, float, list[Cell]] | None:
        """(least sum of cells not above the threshold and of messages, its maximum, its cells)."""
        width, lengths = self.words.width, tables[0].shape[2] // self.words.width
        reached, back = self._first(), []
        for s, table in enumerate(tables):
            total = table + self._entering(reached, s, lengths)
            if threshold < math.inf:
                total[table > threshold] = math.inf
            choice = total.argmin(2)
            reached = np.take_along_axis(total, choice[:, :, None], 2)[:, :, 0]
            back.append(choice)
        y, b = len(self.starts) - 1, 0
        if not math.isfinite(reached[y, b]):
            return None
        value, largest, cells = float(reached[y, b]), -math.inf, []
        for s in reversed(range(len(tables))):
            number, a = divmod(int(back[s][y, b]), width)
            largest = max(largest, float(tables[s][y, b, number * width + a]))
            x = int(self.starts[y, number])
            cells.append((s + x, s + 1 + y, a, b))
            y, b = x, a
        cells.reverse()
        return value, largest, cells

    def _least_maximum(self, tables: list[Numbers]) -> float:
        lengths = tables[0].shape[2] // self.words.width
        reached = self._first()
        for s, table in enumerate(tables):
            entering = self._entering(reached, s, lengths)
            if s:  # a message costs nothing here, but an impossible one stays impossible
                open_ends = np.where(np.isfinite(self.words.send[s : s + len(reached)]), reached, math.inf)
                entering = open_ends[self.starts[:, :lengths]].reshape(len(reached), 1, -1)
            reached = np.maximum(entering, table).min(2)
        return float(reached[-1, 0])
