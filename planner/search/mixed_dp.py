"""Stages of unequal devices: a program over suffixes, by thresholds.

From the last stage forwards, V[l, u, a, h] is the least sum of c = t + once * u and of sends of a pipeline of l stages
for the segments [a, n) that uses the devices u (a multiset of used counts per kind of unit: units of a kind are alike)
and begins with head h = (way, layout that enters). Microbatches in flight depend on l alone. Only cells with c <= C
count; where all flights have the same cells, l is left out.

Boxes. With U0 <= max u < U1 and C0 <= max c' <= C1, where c' = t + once * max(u - U0, 0),

    sum t + (m - 1) max t + max u + sends  >=  DP(c', C1, U1) + (m - 1) C0 + U0,

since once <= 1 / (S + m - 1) and so max u - U0 >= once * (sum (u_s - U0)+ + (m - 1) max (u_s - U0)+). Boxes are taken
by their bound and cut in two until the best is within the gap; a box with one value of each is exact. C starts at the
least slowest stage that the devices allow, by the same program with the maximum in place of the sum.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from shardplan.planner.search.mixed_cells import CellMaker, Cells
from shardplan.planner.search.mixed_problem import (
    LAYOUTS,
    MixedChoice,
    MixedProblem,
    MixedStage,
    Take,
    fits,
    objective,
)

Used = tuple[tuple[int, ...], ...]
"""Per kind of unit, the devices in use of each, ascending."""
_MOST_BOXES = 400
_NEARLY = 1.1


class States:
    """What may be in use, and what a way adds to it."""

    def __init__(self, units: tuple[tuple[int, ...], ...], takes: Iterable[Take]) -> None:
        empty = tuple((0,) * len(sizes) for sizes in units)
        self.numbers: dict[Used, int] = {empty: 0}
        self.takes = sorted(set(takes))
        self.steps: dict[tuple[int, Take], tuple[int, ...]] = {}
        queue = [empty]
        for used in queue:
            for take in self.takes:
                found = sorted(_taken(units, used, take))
                for after in found:
                    if after not in self.numbers:
                        self.numbers[after] = len(self.numbers)
                        queue.append(after)
                if found:
                    self.steps[self.numbers[used], take] = tuple(self.numbers[after] for after in found)
        self.order = sorted(range(len(queue)), key=lambda n: (sum(map(sum, queue[n])), n))
        left = [tuple(tuple(sorted(s - h for s, h in zip(sizes, held, strict=True)))
                      for sizes, held in zip(units, used, strict=True)) for used in queue]  # fmt: skip
        self.left = [self.numbers.get(rest, -1) for rest in left]
        """Per state, the state of what is left (-1: it is none)."""


def _taken(units: tuple[tuple[int, ...], ...], used: Used, take: Take) -> set[Used]:
    """States after taking, each part from a unit of its own."""
    found: set[Used] = {used}
    by_kind: dict[int, list[int]] = {}
    for kind, count in take:
        by_kind.setdefault(kind, []).append(count)
    for kind, counts in by_kind.items():
        following: set[Used] = set()
        size = units[kind][0]
        for state in found:
            for places in combinations(range(len(state[kind])), len(counts)):
                held = list(state[kind])
                if all(held[p] + c <= size for p, c in zip(places, counts, strict=True)):
                    for place, count in zip(places, counts, strict=True):
                        held[place] += count
                    following.add((*state[:kind], tuple(sorted(held)), *state[kind + 1 :]))
        found = following
    return found


def least_slowest(states: States, takes: Sequence[Take], cell: np.ndarray) -> float:
    """Of all ways to cover the segments: the least maximum of cell[way, first, last], inf where there is none."""
    count = cell.shape[1] - 1
    value = np.full((len(states.numbers), count + 1), math.inf)
    value[0, count] = -math.inf
    for used in states.order:
        if np.isposinf(value[used]).all():
            continue
        for way, take in enumerate(takes):
            for after in states.steps.get((used, take), ()):
                reached = np.maximum(cell[way], value[used][None, :]).min(1)
                value[after] = np.minimum(value[after], reached)
    return float(value[:, 0].min())


@dataclass(slots=True)
class _Layer:
    """value: [state, first, head]; came: the state, end and layout (packed) from which it was reached."""

    value: np.ndarray
    came: np.ndarray


class Programs:
    """The program of one problem with given cells."""

    def __init__(self, problem: MixedProblem) -> None:
        self.problem = problem
        self.count = problem.count
        self.makers = [CellMaker(problem, way) for way in problem.ways]
        self.cells: list[Cells] = [maker.make() for maker in self.makers]
        self.states = States(problem.units, (way.takes for way in problem.ways))
        self.flights = sorted(set(problem.in_flight))
        self.exact = all(way.complete for way in problem.ways)
        self.heads = len(problem.ways) * LAYOUTS
        self.low = self._tables([c.low for c in self.cells])
        self.real = self.low if self.exact else self._tables([c.real for c in self.cells])
        self.alike = all(np.array_equal(t[0], other) for t in (self.low, self.real) for other in t[1:]) and not (
            problem.stages or problem.pinned
        )
        self._values: np.ndarray | None = None
        self._room = np.zeros(0)

    def _tables(self, cells: list[list[np.ndarray]]) -> list[np.ndarray]:
        """[flight][way, enters, leaves, first, last], with what must stay together kept."""
        found = [np.stack([held[number] for held in cells]) for number in range(len(self.flights))]
        for group in self.problem.together:
            first, last = np.indices((self.count + 1, self.count + 1))
            inside = sum(((first <= i) & (i < last)).astype(int) for i in group)
            for table in found:
                table[..., (inside > 0) & (inside < len(set(group)))] = math.inf
        return found

    # -- boxes ---------------------------------------------------------------------------------------------------------

    def boxed(self, tables: list[np.ndarray], most_cost: float, once: tuple[float, float]) -> list[np.ndarray]:
        """The tables of a box: cells of more than most_cost left out, once-a-step seconds between `once`."""
        if once != (0.0, math.inf):
            tables = [self._by_once(number, *once) for number in range(len(self.flights))]
        return [np.where(table <= most_cost, table, math.inf) for table in tables]

    def _by_once(self, number: int, free: float, most: float) -> np.ndarray:
        shape = self.low[number].shape
        found = np.full(shape, math.inf)
        for way, cells in enumerate(self.cells):
            for key, points in cells.points.items():
                if key[0] == number:
                    t, u = points.values[:, 0], points.values[:, 1]
                    cost = np.where(u <= most, t + self.problem.once * np.maximum(u - free, 0.0), math.inf)
                    found[(way, *key[1:])] = cost.min()
        return np.where(np.isfinite(self.low[number]), found, math.inf)

    def once_values(self) -> np.ndarray:
        if self._values is None:
            parts = [p.values[:, 1] for cells in self.cells for p in cells.points.values()]
            self._values = np.unique(np.concatenate(parts)) if parts else np.zeros(0)
        return self._values

    # -- the least slowest stage ---------------------------------------------------------------------------------------

    def least_slowest(self, tables: list[np.ndarray]) -> float:
        """No choice has a lower maximum of c: any flight, any layouts."""
        cell = np.minimum.reduce([table.min((1, 2)) for table in tables])  # [way, first, last]
        return least_slowest(self.states, [way.takes for way in self.problem.ways], cell)

    def _in_front(self, tables: list[np.ndarray]) -> np.ndarray:
        """[state, last]: no run of stages for [0, last) on what the state leaves costs less, sends left out."""
        cell = np.minimum.reduce([table.min((1, 2)) for table in tables])  # [way, first, last]
        value = np.full((len(self.states.numbers), self.count + 1), math.inf)
        value[0, 0] = 0.0
        for used in self.states.order:
            if np.isinf(value[used]).all():
                continue
            for way, made in enumerate(self.problem.ways):
                for after in self.states.steps.get((used, made.takes), ()):
                    reached = (cell[way] + value[used][:, None]).min(0)
                    # What is taken may also stay unused.
                    value[after] = np.minimum(value[after], np.minimum(reached, value[used]))
        nothing = np.full(self.count + 1, -math.inf)
        return np.stack([value[left] if left >= 0 else nothing for left in self.states.left])

    # -- the program ---------------------------------------------------------------------------------------------------

    def solve(
        self, tables: list[np.ndarray], stages: int = 0, below: float = math.inf
    ) -> tuple[float, list[tuple[int, int, int, int, int, int]]]:
        """Least sum, and its stages first to last as (flight, enters, leaves, first, last, way). stages: their number,
        0: any. below: sums that are not less are of no interest, and may be given as inf."""
        front = self._in_front(tables)
        closed = np.isposinf(front)
        self._room = np.where(closed, -math.inf, below - np.where(closed, 0.0, front))
        if self.alike:
            return self._together(tables[0])
        layers = [self._start()]
        best, at = math.inf, 0
        for behind in range(1, self.problem.most_stages + 1):
            number = self.flights.index(self.problem.flight(behind))
            table = self._pinned(tables[number], behind, stages)
            layer = self._empty()
            for used in self.states.order:
                self._extend(layers[-1], layer, used, table, behind == 1)
            layers.append(layer)
            final = float(layer.value[:, 0, ::LAYOUTS].min())
            if (
                final < best
                and (not stages or behind == stages)
                and (not self.problem.stages or behind in self.problem.stages)
            ):
                best, at = final, behind
            if np.isinf(layer.value).all():
                break
        return best, self._trace(layers, at) if at else []

    def _together(self, table: np.ndarray) -> tuple[float, list[tuple[int, int, int, int, int, int]]]:
        """Where flights make no difference all numbers of stages share one layer."""
        layer, start = self._empty(), self._start()
        self._extend(start, layer, 0, table, True)
        for used in self.states.order:
            self._extend(layer, layer, used, table, False)
        best = float(layer.value[:, 0, ::LAYOUTS].min())
        return best, self._trace_single(layer) if math.isfinite(best) else []

    def _pinned(self, table: np.ndarray, behind: int, stages: int) -> np.ndarray:
        if not stages:
            return table
        table = table.copy()
        first, last = np.indices((self.count + 1, self.count + 1))
        for segment, stage in self.problem.pinned:
            inside = (first <= segment) & (segment < last)
            table[..., ~inside if stage == stages - behind else inside] = math.inf
        return table

    def _empty(self) -> _Layer:
        shape = len(self.states.numbers), self.count + 1, self.heads
        return _Layer(np.full(shape, math.inf), np.full(shape, -1, dtype=np.int64))

    def _start(self) -> _Layer:
        layer = self._empty()
        layer.value[0, self.count, 0] = 0.0
        return layer

    def _behind(self, layer: _Layer, used: int, begins: bool) -> np.ndarray:
        """[tail, last]: the least of what follows a stage that ends there by that way and layout."""
        found = np.full((self.heads, self.count + 1), math.inf)
        if begins:
            found[::LAYOUTS, self.count] = layer.value[used, self.count, 0]
            return found
        least = layer.value[used].min(1)
        for last in np.flatnonzero(np.isfinite(least) & (least <= self._room[used])):
            if 0 < last < self.count:
                found[:, last] = (self.problem.sends[last] + layer.value[used, last][None, :]).min(1)
        return found

    def _extend(self, source: _Layer, target: _Layer, used: int, table: np.ndarray, begins: bool) -> None:
        if not np.isfinite(source.value[used]).any():
            return
        behind = self._behind(source, used, begins).reshape(-1, LAYOUTS, self.count + 1)
        if not np.isfinite(behind).any():
            return
        ways = [w for w, way in enumerate(self.problem.ways) if (used, way.takes) in self.states.steps]
        if not ways:
            return
        lasts = np.flatnonzero(np.isfinite(behind).any((0, 1)))
        begin, end = int(lasts[0]), int(lasts[-1]) + 1
        total = table[ways, :, :, :, begin:end] + behind[ways][:, None, :, None, begin:end]
        by_layout = total.argmin(-1)
        least_of = np.take_along_axis(total, by_layout[..., None], -1)[..., 0]  # [way, enters, leaves, first]
        layout = least_of.argmin(2)
        least = np.take_along_axis(least_of, layout[:, :, None], 2)[:, :, 0]
        arg = layout * (self.count + 1) + begin + np.take_along_axis(by_layout, layout[:, :, None], 2)[:, :, 0]
        came = used * LAYOUTS * (self.count + 1) + arg
        for k, way in enumerate(ways):
            if not np.isfinite(least[k]).any():
                continue
            heads = slice(way * LAYOUTS, (way + 1) * LAYOUTS)
            for after in self.states.steps[used, self.problem.ways[way].takes]:
                held = target.value[after, :, heads]
                better = held > least[k].T
                held[better] = least[k].T[better]
                target.came[after, :, heads][better] = came[k].T[better]

    def _step(self, layer: _Layer, used: int, first: int, head: int) -> tuple[int, int, int]:
        packed = int(layer.came[used, first, head])
        used, rest = divmod(packed, LAYOUTS * (self.count + 1))
        leaves, last = divmod(rest, self.count + 1)
        return used, leaves, last

    def _next_head(self, layer: _Layer, used: int, last: int, tail: int) -> int:
        return int((self.problem.sends[last][tail] + layer.value[used, last]).argmin())

    def _trace(self, layers: list[_Layer], at: int) -> list[tuple[int, int, int, int, int, int]]:
        value = layers[at].value[:, 0, ::LAYOUTS]
        used, way = (int(x) for x in np.unravel_index(value.argmin(), value.shape))
        found, head, first = [], way * LAYOUTS, 0
        for behind in range(at, 0, -1):
            way, enters = divmod(head, LAYOUTS)
            used, leaves, last = self._step(layers[behind], used, first, head)
            number = self.flights.index(self.problem.flight(behind))
            found.append((number, enters, leaves, first, last, way))
            if behind > 1:
                head = self._next_head(layers[behind - 1], used, last, way * LAYOUTS + leaves)
            first = last
        return found

    def _trace_single(self, layer: _Layer) -> list[tuple[int, int, int, int, int, int]]:
        value = layer.value[:, 0, ::LAYOUTS]
        used, way = (int(x) for x in np.unravel_index(value.argmin(), value.shape))
        found, head, first = [], way * LAYOUTS, 0
        while first < self.count:
            way, enters = divmod(head, LAYOUTS)
            used, leaves, last = self._step(layer, used, first, head)
            found.append((0, enters, leaves, first, last, way))
            if last < self.count:
                head = self._next_head(layer, used, last, way * LAYOUTS + leaves)
            first = last
        return found

    def choice(self, path: list[tuple[int, int, int, int, int, int]], once: tuple[float, float]) -> list[MixedStage]:
        found = []
        for number, enters, leaves, first, last, way in path:
            key = number, enters, leaves, first, last
            columns = self.makers[way].columns(self.cells[way], key, once[1], once[0])
            found.append(MixedStage(way, first, last, columns))
        return found


@dataclass(frozen=True, slots=True, order=True)
class _Box:
    bound: float
    number: int
    stages: int
    cost: tuple[float, float]
    once: tuple[float, float]


def solve_mixed(
    problem: MixedProblem, gap: float, best: float = math.inf, left: Callable[[], float] = lambda: math.inf
) -> tuple[MixedChoice | None, float]:
    """(the cheapest choice found that costs less than `best`, None where there is none; a bound on all choices, inf
    where nothing can fit). gap: relative; left: seconds that are left."""
    return _Solver(problem, gap, best, left).solve()


class _Solver:
    def __init__(self, problem: MixedProblem, gap: float, best: float, left: Callable[[], float]) -> None:
        self.problem, self.gap, self.best, self.left = problem, gap, best, left
        self.programs = Programs(problem)
        self.found: list[MixedStage] | None = None
        self.number = 0
        self.pace = problem.microbatches - 1

    def solve(self) -> tuple[MixedChoice | None, float]:
        queue: list[_Box] = []
        wanted = sorted(self.problem.stages) if self.problem.stages else [0]
        if self.problem.pinned and not self.problem.stages:
            least = max(stage for _, stage in self.problem.pinned) + 1
            wanted = list(range(least, self.problem.most_stages + 1))
        for stages in wanted:
            self._first_try(stages)
            box = self._box(stages, (0.0, math.inf), (0.0, math.inf), 0.0)
            if box is not None:
                heapq.heappush(queue, box)
        closed = math.inf
        while queue:
            box = queue[0]
            if box.bound >= self.best * (1 - self.gap) or self.left() <= 0 or self.number > _MOST_BOXES:
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
        real = self.programs.real
        slowest = self.programs.least_slowest(real)
        if self.pace and math.isfinite(slowest):
            whole = 0.0, math.inf
            below = self.best - self.pace * slowest
            _, path = self.programs.solve(self.programs.boxed(real, slowest * _NEARLY, whole), stages, below)
            self._try(path, whole)

    def _box(self, stages: int, cost: tuple[float, float], once: tuple[float, float], known: float) -> _Box | None:
        """The box with its bound, its slowest stage at least what the devices allow; the choice it leads to is tried.
        None: it is empty, or cannot win."""
        programs = self.programs
        low = programs.boxed(programs.low, cost[1], once)
        cost = max(cost[0], programs.least_slowest(low)), cost[1]
        if cost[0] > cost[1] or math.isinf(cost[0]):
            return None
        if self.pace:  # a slower one could not win even if nothing else took any time
            cost = cost[0], min(cost[1], (self.best - once[0]) / self.pace)
            if cost[0] > cost[1]:
                return None
            low = programs.boxed(programs.low, cost[1], once)
        below = self.best - self.pace * cost[0] - once[0]
        total, path = programs.solve(low, stages, below)
        bound = max(known, total + self.pace * cost[0] + once[0])
        if math.isinf(bound) or bound >= self.best:
            return None
        if programs.real is not programs.low:
            real = programs.boxed(programs.real, cost[1], once)
            _, path = programs.solve(real, stages, below) if math.isfinite(programs.least_slowest(real)) else (0.0, [])
        self._try(path, once)
        self.number += 1
        most = min(cost[1], (self.best - total - once[0]) / self.pace) if self.pace else cost[1]
        return _Box(bound, self.number, stages, (cost[0], most), once)

    def _try(self, path: list[tuple[int, int, int, int, int, int]], once: tuple[float, float]) -> None:
        if not path:
            return
        made = self.programs.choice(path, once)
        value = objective(self.problem, made)
        if value < self.best and fits(self.problem, made):
            self.best, self.found = value, made

    def _cut(self, box: _Box) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        """The box in two by the seconds of the slowest stage, or by those of once a step."""
        if self.pace:
            tables = self.programs.boxed(self.programs.low, box.cost[1], box.once)
            values = np.unique(np.concatenate([t[np.isfinite(t)] for t in tables]))
            values = values[values >= box.cost[0]]
            if len(values) > 1:
                low, high = float(values[0]), float(values[-1])
                middle = int(np.searchsorted(values, (low + high) / 2, side="right")) - 1
                middle = min(max(middle, 0), len(values) - 2)
                return [
                    ((low, float(values[middle])), box.once),
                    ((float(values[middle + 1]), high), box.once),
                ]
        if not self.programs.exact:
            return []
        values = self.programs.once_values()
        values = values[(values >= box.once[0]) & (values <= box.once[1])]
        if len(values) < 2:
            return [(box.cost, (float(values[0]),) * 2)] if len(values) and box.once[0] < box.once[1] else []  # type: ignore[list-item]
        middle = (len(values) - 1) // 2
        whole = 0.0, math.inf
        return [
            (whole, (float(values[0]), float(values[middle]))),
            (whole, (float(values[middle + 1]), float(values[-1]))),
        ]
