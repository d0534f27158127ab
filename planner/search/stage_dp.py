"""The stage program by dynamic programming: seconds where the integer program takes minutes, with its own bound.

Data as in `stage_ilp`. Fold the once-a-step seconds: c = t + u / (S + m - 1). For a stage s of segments [i, j) whose
first tensor enters in layout a and whose last leaves in b, a *cell* is

    C[s,i,j,a,b] = min { sum c + fixed :  columns agree on layouts,  sum (P + q_s A) + W + q_s in[i,a] + F <= M_s }

and the program is: cut the segments into S cells at least sum C + send + (m - 1) max C. With U >= u_s folded this never
exceeds the true objective, so it bounds it; the objective of the cells' columns, evaluated exactly, is the incumbent.

Cells are bounded from below by Lagrangian relaxation of their memory row, for prices mu >= 0 of a byte

    L_mu = min { sum c + mu (P + q_s A) } + fixed - mu (M_s - F - q_s in[i,a] - W_min),

by min-plus products over all intervals at once. The cut problem is solved exactly on these bounds (`_Cuts`), and where
its path runs through cells whose bound is not attained, those are solved for themselves: their best mu is found by
bisection and then applied to all cells of the stage. This repeats until the path's cells are exact or the gap closed.

A bound of the given columns is one of *all* columns where, for every price used, the best there is is among them.
`certified` uses only prices for which that is so (the search makes columns for the prices that the program asks for).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shardplan.planner.search.stage_ilp import Column, StageChoice, StageProblem, memory, objective

Numbers = np.ndarray
_ROUNDS = 24
_STEPS = 24
_HIDDEN = 0.1
"""Share of the gap that the steps of `_Cuts` may hide."""


@dataclass(slots=True)
class _Run:
    """Columns of the segments of one cell, with c and memory (transient included) of them together."""

    columns: list[int]
    cost: float
    nbytes: float


@dataclass(slots=True)
class _Cell:
    """A cell solved for itself: bound <= C <= run.cost; run None: nothing fits. price: the best mu of a byte."""

    bound: float
    run: _Run | None
    price: float = 0.0


@dataclass(slots=True)
class _Stage:
    """What stages of equal limits and microbatches in flight share: bounds of cells [i, j, a, b], by price."""

    limit: float
    flight: int
    bounds: Numbers
    prices: list[float] = field(default_factory=list)
    cells: dict[tuple[int, int, int, int], _Cell] = field(default_factory=dict)


def solve_quickly(problem: StageProblem, gap: float) -> StageChoice | None:
    """A choice within `gap` of its bound, or the best found (not optimal then). None: nothing was found that fits.

    `StageChoice.bound` is that of the given columns.
    """
    return _Program(problem, gap).solve()


def certified(problem: StageProblem, prices: Sequence[tuple[float, int]], leanest: bool, gap: float) -> float:
    """A bound on the program over *all* columns, where for every (price of a byte, microbatches in flight), and for no
    price, the given ones contain the best. leanest: they contain those of the fewest bytes as well. inf: proven that
    nothing fits."""
    program = _Program(problem, gap, masked=leanest, transients=False)  # others may need fewer
    for stage in {id(stage): stage for stage in program.stages}.values():
        for price, flight in prices:
            if flight == stage.flight:
                program.price(stage, price)
    found = _Cuts(program).solve()
    return math.inf if found is None else found[0]


class _Program:
    def __init__(self, problem: StageProblem, gap: float, masked: bool = True, transients: bool = True) -> None:
        self.problem = problem
        self.gap = gap
        self.masked = masked
        self.transients = transients
        self.count = len(problem.columns)
        self.kappa = 1.0 / (problem.stages + problem.microbatches - 1)
        self.width = 1 + max(max(c.enters, c.leaves) for columns in problem.columns for c in columns)
        self.fixed_nbytes = problem.fixed.activation_nbytes
        self.received = np.zeros((self.count + 1, self.width))
        self.send = np.full((self.count + 1, self.width), math.inf)
        self.send[0, 0] = 0.0
        for i, (seconds, nbytes) in enumerate(zip(problem.cut_seconds, problem.cut_nbytes, strict=True)):
            for layout, value in seconds.items():
                if layout < self.width:
                    self.send[i + 1, layout] = value
            for layout, value in nbytes.items():
                if layout < self.width:
                    self.received[i + 1, layout] = value
        self.kinds: dict[int, dict[tuple[int, int], list[tuple[int, float, float, float, float]]]] = {}
        self.least_transient = self._least_transient()
        self.stages = self._stages()

    # -- cells from below ----------------------------------------------------------------------------------------------

    def _least_transient(self) -> Numbers:
        """[i, j]: no run of segments [i, j) needs fewer transient bytes."""
        if self.transients:
            least = np.array([min(c.price.transient_nbytes for c in columns) for columns in self.problem.columns])
        else:
            least = np.array(self.problem.least_transients or (0.0,) * self.count)
        table = np.zeros((self.count, self.count + 1))
        for i in range(self.count):
            table[i, i + 1 :] = np.maximum.accumulate(least[i:])
        return table

    def _stages(self) -> list[_Stage]:
        found: dict[tuple[float, int], _Stage] = {}
        free = self._intervals(self._weighed(0.0, 1)) + self.problem.fixed.seconds
        stages = []
        for limit, flight in zip(self.problem.limits, self.problem.in_flight, strict=True):
            if (limit, flight) not in found:
                stage = found[limit, flight] = _Stage(limit, flight, free.copy(), [0.0])
                if self.masked:
                    least = self._intervals(self._weighed(1.0, flight, seconds=0.0))
                    stage.bounds[least > self._budget(stage) + 1e-6 * limit] = math.inf
            stages.append(found[limit, flight])
        return stages

    def _weighed(self, price: float, flight: int, seconds: float = 1.0) -> Numbers:
        """[segment, enters, leaves]: least seconds * c + price * (P + q A) over the columns."""
        table = np.full((self.count, self.width, self.width), math.inf)
        same: dict[int, int] = {}
        for i, columns in enumerate(self.problem.columns):
            first = same.setdefault(id(columns), i)
            if first != i:
                table[i] = table[first]
                continue
            for column in columns:
                value = seconds * self.cost(column) + price * self.held(column, flight)
                if value < table[i, column.enters, column.leaves]:
                    table[i, column.enters, column.leaves] = value
        return table

    def cost(self, column: Column) -> float:
        return column.price.seconds + self.kappa * column.price.once_seconds

    def held(self, column: Column, flight: int) -> float:
        return column.price.parameter_nbytes + flight * column.price.activation_nbytes

    def _intervals(self, table: Numbers) -> Numbers:
        """[segment, a, b] -> [i, j, a, b]: the min-plus product of segments i .. j - 1."""
        found = np.full((self.count, self.count + 1, self.width, self.width), math.inf)
        reached = table.copy()
        starts = np.arange(self.count)
        found[starts, starts + 1] = reached
        for length in range(2, self.count + 1):
            n = self.count - length + 1
            reached = (reached[:n, :, :, None] + table[length - 1 :, None, :, :]).min(2)
            found[starts[:n], starts[:n] + length] = reached
        return found

    def _budget(self, stage: _Stage) -> Numbers:
        """[i, j, a, 1]: bytes for parameters and activations, with the least transient taken off."""
        inflow = stage.flight * self.received[: self.count]
        left = stage.limit - self.fixed_nbytes - self.least_transient[:, :, None] - inflow[:, None, :]
        return left[:, :, :, None]

    def price(self, stage: _Stage, price: float) -> None:
        """Raise the bounds of all cells of a stage by one more price of a byte."""
        if any(abs(price - known) <= 1e-3 * price for known in stage.prices):
            return
        stage.prices.append(price)
        relaxed = self._intervals(self._weighed(price, stage.flight)) + self.problem.fixed.seconds
        np.maximum(stage.bounds, relaxed - price * self._budget(stage), out=stage.bounds)

    # -- one cell ------------------------------------------------------------------------------------------------------

    def cell(self, stage: _Stage, key: tuple[int, int, int, int]) -> _Cell:
        found = stage.cells.get(key)
        if found is None:
            found = stage.cells[key] = self._solve_cell(stage, key)
        return found

    def _solve_cell(self, stage: _Stage, key: tuple[int, int, int, int]) -> _Cell:
        """By classes of the most transient bytes W of a run: columns of at most the largest W of a class, the smallest
        paid for."""
        i, j, a, _ = key
        free = stage.limit - self.fixed_nbytes - stage.flight * self.received[i, a]
        fastest = self._path(stage, key, 0.0, math.inf)
        if fastest is None:
            return _Cell(math.inf, None)
        if fastest.nbytes <= free:
            return _Cell(fastest.cost, fastest)
        levels = sorted({c.price.transient_nbytes for columns in self.problem.columns[i:j] for c in columns})
        levels = [level for level in levels if level >= self.least_transient[i, j]]
        best, paid = _Cell(math.inf, None), levels[0]
        for number in _thinned(len(levels)):
            found = self._of_class(stage, key, levels[number], free, free - paid)
            run = found.run if best.run is None or (found.run and found.run.cost < best.run.cost) else best.run
            best = _Cell(min(best.bound, found.bound), run, found.price if found.bound < best.bound else best.price)
            paid = levels[min(number + 1, len(levels) - 1)]
        return best

    def _of_class(
        self, stage: _Stage, key: tuple[int, int, int, int], level: float, free: float, budget: float
    ) -> _Cell:
        """The best price of a byte by bisection. free: for everything; budget: for parameters and activations."""
        fat = self._path(stage, key, 0.0, level)
        lean = self._path(stage, key, math.inf, level)
        if fat is None or lean is None:
            return _Cell(math.inf, None)
        if fat.nbytes <= free:
            return _Cell(fat.cost, fat)
        saved = self._held_of(stage, key, fat) - self._held_of(stage, key, lean)
        if self._held_of(stage, key, lean) > budget + 1e-6 * stage.limit:
            return _Cell(math.inf, None)
        best = lean if lean.nbytes <= free else None
        low, high = 0.0, 4 * max(lean.cost - fat.cost, 1e-9) / max(saved, 1.0)
        bound, price = fat.cost, 0.0
        for _ in range(_STEPS):
            middle = high / 16 if low == 0.0 else math.sqrt(low * high)
            run = self._path(stage, key, middle, level)
            assert run is not None
            dual = run.cost + middle * (self._held_of(stage, key, run) - budget)
            if dual > bound:
                bound, price = dual, middle
            if run.nbytes <= free:
                high = middle
                best = run if best is None or run.cost < best.cost else best
            else:
                low, fat = middle, run
            if high - low <= 1e-3 * high:
                break
        return _Cell(bound, None if best is None else self._filled(stage, key, best, fat, free), price)

    def _held_of(self, stage: _Stage, key: tuple[int, int, int, int], run: _Run) -> float:
        columns = (self.problem.columns[s][c] for s, c in zip(range(key[0], key[1]), run.columns, strict=True))
        return sum(self.held(column, stage.flight) for column in columns)

    def _path(self, stage: _Stage, key: tuple[int, int, int, int], price: float, level: float) -> _Run | None:
        """Columns of at most `level` transient bytes with the least c + price * bytes (inf: the fewest bytes)."""
        i, j, a, b = key
        seconds, weight = (1e-12, 1.0) if price == math.inf else (1.0, price)
        reached: dict[int, tuple[float, tuple[int, ...] | None]] = {a: (0.0, ())}
        back: list[dict[int, tuple[int, int]]] = []
        for segment in range(i, j):
            best: dict[int, tuple[float, None]] = {}
            come: dict[int, tuple[int, int]] = {}
            for (enters, leaves), options in self._by_ends(segment).items():
                if enters not in reached:
                    continue
                least, number = math.inf, -1
                for c, cost, parameters, activations, transient in options:
                    if transient <= level:
                        value = seconds * cost + weight * (parameters + stage.flight * activations)
                        if value < least:
                            least, number = value, c
                total = reached[enters][0] + least
                if number >= 0 and (leaves not in best or total < best[leaves][0]):
                    best[leaves], come[leaves] = (total, None), (enters, number)
            reached = dict(best)
            back.append(come)
        if b not in reached:
            return None
        columns, layout = [], b
        for come in reversed(back):
            layout, number = come[layout]
            columns.append(number)
        columns.reverse()
        return self._run(stage, key, columns)

    def _by_ends(self, segment: int) -> dict[tuple[int, int], list[tuple[int, float, float, float, float]]]:
        columns = self.problem.columns[segment]
        found = self.kinds.get(id(columns))
        if found is None:
            found = {}
            for number, column in enumerate(columns):
                p = column.price
                entry = number, self.cost(column), p.parameter_nbytes, p.activation_nbytes, p.transient_nbytes
                found.setdefault((column.enters, column.leaves), []).append(entry)
            self.kinds[id(columns)] = found
        return found

    def _run(self, stage: _Stage, key: tuple[int, int, int, int], columns: list[int]) -> _Run:
        chosen = [self.problem.columns[s][c] for s, c in zip(range(key[0], key[1]), columns, strict=True)]
        nbytes = sum(self.held(c, stage.flight) for c in chosen) + max(c.price.transient_nbytes for c in chosen)
        return _Run(columns, sum(map(self.cost, chosen)) + self.problem.fixed.seconds, nbytes)

    def _filled(self, stage: _Stage, key: tuple[int, int, int, int], lean: _Run, fat: _Run, free: float) -> _Run:
        """The lean run with as many segments as fit run as in the faster, larger one: most seconds per byte first."""
        first = key[0]
        swaps = []
        for at, (old, new) in enumerate(zip(lean.columns, fat.columns, strict=True)):
            a, b = self.problem.columns[first + at][old], self.problem.columns[first + at][new]
            gain = self.cost(a) - self.cost(b)
            if old != new and (a.enters, a.leaves) == (b.enters, b.leaves) and gain > 0:
                swaps.append((gain / max(self.held(b, stage.flight) - self.held(a, stage.flight), 1.0), at, new))
        best = lean
        for _, at, new in sorted(swaps, key=lambda swap: (-swap[0], swap[1])):
            columns = list(best.columns)
            columns[at] = new
            run = self._run(stage, key, columns)
            if run.nbytes <= free and run.cost < best.cost:
                best = run
        return best

    # -- the program ---------------------------------------------------------------------------------------------------

    def solve(self) -> StageChoice | None:
        cuts = _Cuts(self)
        best: StageChoice | None = None
        bound = 0.0
        for _ in range(_ROUNDS):
            found = cuts.solve()
            if found is None:
                break
            value, path = found
            bound = max(bound, value)
            open_cells = []
            runs: list[int] | None = []
            for s, key in enumerate(path):
                cell = self.cell(self.stages[s], key)
                if cell.run is None:
                    runs = None
                elif runs is not None:
                    runs += cell.run.columns
                if cell.bound > self.stages[s].bounds[key] * (1 + 1e-12):
                    open_cells.append((s, key, cell))
            if runs is not None:
                best = self._better(best, tuple(key[0] for key in path), tuple(runs))
            if not open_cells or (best is not None and best.objective - bound <= 0.1 * self.gap * best.objective):
                break
            for s, key, cell in open_cells:
                if cell.price > 0.0 and math.isfinite(cell.bound):
                    self.price(self.stages[s], cell.price)
                self.stages[s].bounds[key] = max(self.stages[s].bounds[key], cell.bound)
        if best is None:
            return None
        bound = min(bound, best.objective)
        prices = tuple(
            sorted({(p, stage.flight) for stage in self.stages for p in stage.prices if p > 0.0}, reverse=True)
        )
        optimal = best.objective - bound <= self.gap * best.objective
        return StageChoice(best.bounds, best.columns, best.objective, bound, optimal, prices)

    def _better(
        self, best: StageChoice | None, bounds: tuple[int, ...], columns: tuple[int, ...]
    ) -> StageChoice | None:
        needed = memory(self.problem, bounds, columns)
        if any(n > limit * (1 + 1e-12) for n, limit in zip(needed, self.problem.limits, strict=True)):
            return best
        value = objective(self.problem, bounds, columns)
        if best is None or value < best.objective:
            return StageChoice(bounds, columns, value, 0.0, False)
        return best


class _Cuts:
    """Cut the segments into cells: least sum C + send + (m - 1) max C, exactly, on the stages' present bounds."""

    def __init__(self, program: _Program) -> None:
        self.program = program
        self.allowed = self._allowed()

    def _allowed(self) -> list[Numbers]:
        """Per stage [i, j]: whether segments [i, j) may form it."""
        problem, count = self.program.problem, self.program.count
        i, j = np.arange(count)[:, None], np.arange(count + 1)[None, :]
        masks = []
        for s in range(problem.stages):
            mask = (i < j) & (i >= s) & (j <= count - (problem.stages - 1 - s))
            if s == 0:
                mask = mask & (i == 0)
            if s == problem.stages - 1:
                mask = mask & (j == count)
            for segment, stage in problem.pinned:
                inside = (i <= segment) & (segment < j)
                mask = mask & (inside if stage == s else ~inside)
            for group in problem.together:
                low, high = min(group), max(group)
                touched = np.zeros_like(mask)
                for member in group:
                    touched |= (i <= member) & (member < j)
                mask = mask & (~touched | ((i <= low) & (high < j)))
            masks.append(mask)
        return masks

    def solve(self) -> tuple[float, list[tuple[int, int, int, int]]] | None:
        """(value, cells of the stages), or None where no cut is possible."""
        # [j, b, i, a], so that the least over (i, a) runs along memory
        cells = [
            np.ascontiguousarray(np.where(mask[:, :, None, None], stage.bounds, math.inf).transpose(1, 3, 0, 2))
            for mask, stage in zip(self.allowed, self.program.stages, strict=True)
        ]
        weight = self.program.problem.microbatches - 1
        every = self._least(cells, math.inf)
        if every is None:
            return None
        if weight == 0:
            return every[0], every[2]
        best = every[0] + weight * every[1], every[2]
        threshold = self._least_maximum(cells)
        # From the least maximum upwards: a larger one can only win while the sum that it might reach still pays.
        while every[0] + weight * threshold < best[0] * (1 - 1e-12):
            found = self._least(cells, threshold)
            assert found is not None
            value = found[0] + weight * found[1]
            if value < best[0]:
                best = value, found[2]
            highest = (best[0] - every[0]) / weight
            above = [c[(c > threshold) & (c < highest)] for c in cells]
            following = min((float(a.min()) for a in above if a.size), default=math.inf)
            # In steps that cannot hide more than a fraction of the gap.
            step = threshold + _HIDDEN * self.program.gap * best[0] / weight
            if following > highest:
                break
            threshold = max(following, step)
        return best[0] * (1 - _HIDDEN * self.program.gap), best[1]

    def _least(
        self, cells: list[Numbers], threshold: float
    ) -> tuple[float, float, list[tuple[int, int, int, int]]] | None:
        """(least sum of cells not above the threshold and of messages, its maximum, its cells)."""
        count, width = self.program.count, self.program.width
        reached = np.full((count + 1, width), math.inf)
        reached[0, 0] = 0.0
        back: list[tuple[Numbers, Numbers]] = []
        for s, table in enumerate(cells):
            enter = reached[:count] + (self.program.send[:count] if s else 0.0)
            total = np.where(table <= threshold, table + enter[None, None, :, :], math.inf)
            flat = total.reshape(count + 1, width, count * width)
            choice = flat.argmin(2)
            reached = np.take_along_axis(flat, choice[:, :, None], 2)[:, :, 0]
            back.append((choice // width, choice % width))
        if not math.isfinite(reached[count, 0]):
            return None
        path, j, b = [], count, 0
        for first, layout in reversed(back):
            i, a = int(first[j, b]), int(layout[j, b])
            path.append((i, j, a, b))
            j, b = i, a
        path.reverse()
        largest = max(float(c[j, b, i, a]) for c, (i, j, a, b) in zip(cells, path, strict=True))
        return float(reached[count, 0]), largest, path

    def _least_maximum(self, cells: list[Numbers]) -> float:
        count, width = self.program.count, self.program.width
        reached = np.full((count + 1, width), math.inf)
        reached[0, 0] = 0.0
        for s, table in enumerate(cells):
            open_ends = np.isfinite(self.program.send[:count]) if s else np.ones((count, width), dtype=bool)
            enter = np.where(open_ends, reached[:count], math.inf)
            reached = np.maximum(enter[None, None, :, :], table).min((2, 3))
        return float(reached[count, 0])


def _thinned(count: int, most: int = 7) -> list[int]:
    """At most so many of the numbers below `count`, the largest among them."""
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})
