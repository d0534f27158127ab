"""Stages of unequal devices: a program over suffixes.

From the last stage forwards, V[l, u, a, h] is the least sum of c = t + once * u and of sends of a pipeline of l stages
for the segments [a, n) that uses the devices u (a multiset of used counts per kind of unit: units of a kind are alike)
and begins with head h = (way, layout that enters). Microbatches in flight depend on l alone. Cells above limits can be
left out (`mixed_boxes`); where all flights have the same cells, l is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from shardplan.planner.search.mixed_cells import Key, PointCells
from shardplan.planner.search.mixed_problem import (
    LAYOUTS,
    MixedProblem,
    MixedStage,
    Take,
)
from shardplan.planner.search.mixed_runs import RunCells

Step = tuple[int, int, int, int, int, int]
"""Of a path: flight (its position), layouts that enter and leave, first and last segment, way."""
Used = tuple[tuple[int, ...], ...]
"""Per kind of unit, the devices in use of each, ascending."""
Range = tuple[float, float]
WHOLE: Range = (0.0, math.inf)


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


@dataclass(frozen=True, slots=True)
class _Flat:
    """cells: [cell, (way, enters, leaves, first, last)]; starts: [cell] its first point; seconds, once: [point]."""

    cells: np.ndarray
    starts: np.ndarray
    seconds: np.ndarray
    once: np.ndarray


class Programs:
    """The program of one problem with given cells."""

    def __init__(self, problem: MixedProblem) -> None:
        self.problem = problem
        self.count = problem.count
        self.cells = [PointCells(problem, way) if way.complete else RunCells(problem, way) for way in problem.ways]
        self.states = States(problem.units, (way.takes for way in problem.ways))
        self.flights = sorted(set(problem.in_flight))
        self.exact = all(way.complete for way in problem.ways)
        self.heads = len(problem.ways) * LAYOUTS
        self._shut = self._apart()
        self.low = self._tables([c.low for c in self.cells])
        self.real = self.low if self.exact else self._tables([c.real for c in self.cells])
        settled = all(cells.settled for cells in self.cells)
        self.alike = (
            settled
            and all(np.array_equal(self.low[0], other) for other in self.low[1:])
            and not (problem.stages or problem.pinned)
        )
        self._flat = [self._flattened(number) for number in range(len(self.flights))] if self.exact else []
        self._room = np.zeros(0)

    def _apart(self) -> np.ndarray:
        """[first, last]: runs that part what must stay together."""
        first, last = np.indices((self.count + 1, self.count + 1))
        shut = np.zeros(first.shape, dtype=bool)
        for group in self.problem.together:
            inside = sum(((first <= i) & (i < last)).astype(int) for i in group)
            shut |= (inside > 0) & (inside < len(set(group)))
        return shut

    def _tables(self, cells: list[list[np.ndarray]]) -> list[np.ndarray]:
        """[flight][way, enters, leaves, first, last], with what must stay together kept."""
        found = [np.stack([held[number] for held in cells]) for number in range(len(self.flights))]
        for table in found:
            table[..., self._shut] = math.inf
        return found

    def settle(self, path: list[Step]) -> bool:
        """Find what the cells of a path, and those with a segment more or less, cost. False: those of the path were
        known."""
        fresh = False
        touched: dict[tuple[int, int], None] = {}
        for number, enters, leaves, first, last, way in path:
            cells = self.cells[way]
            if cells.settle((number, enters, leaves, first, last)):
                fresh = True
                touched[number, way] = None
                for end in (last - 1, last + 1):
                    if first < end <= self.count:
                        cells.settle((number, enters, leaves, first, end))
        for number, way in touched:
            self.real[number][way] = np.where(self._shut, math.inf, self.cells[way].real[number])
        return fresh

    def possible(self, path: list[Step]) -> bool:
        """Whether all cells of a path can be run as far as is known."""
        return all(math.isfinite(self.real[number][(way, *ends)]) for number, *ends, way in path)

    # -- boxes ---------------------------------------------------------------------------------------------------------

    def boxed(self, tables: list[np.ndarray], most: float, once: Range = WHOLE) -> list[np.ndarray]:
        """The tables with cells of at most `most` seconds (and with at most once[1] once a step, once[0] of which cost
        nothing, where columns are complete)."""
        if self.exact:
            return self._of_points(most, once[1], lambda t, u: t + self.problem.once * np.maximum(u - once[0], 0.0))
        return [np.where(table <= most, table, math.inf) for table in tables]

    def apart(self, most: float, most_once: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of cells within both limits: the least seconds of a microbatch, and the least once a step."""
        seconds = self._of_points(most, most_once, lambda t, u: t)
        return seconds, self._of_points(most, most_once, lambda t, u: u)

    def within(self, most: float, most_once: float) -> tuple[np.ndarray, np.ndarray]:
        """All seconds of a microbatch, and all once a step, of runs within both limits; ascending."""
        kept = [(flat.seconds[inside], flat.once[inside]) for flat in self._flat
                if (inside := (flat.seconds <= most) & (flat.once <= most_once)).any()]  # fmt: skip
        if not kept:
            return np.zeros(0), np.zeros(0)
        return np.unique(np.concatenate([t for t, _ in kept])), np.unique(np.concatenate([u for _, u in kept]))

    def _flattened(self, number: int) -> _Flat:
        """The points of all cells that are not shut."""
        cells, points = [], []
        for way, made in enumerate(self.cells):
            for key, held in made.points.items():
                if key[0] == number and math.isfinite(self.low[number][(way, *key[1:])]):
                    cells.append((way, *key[1:]))
                    points.append(held.values[:, :2])
        starts = np.cumsum([0, *(len(p) for p in points)])[:-1]
        values = np.concatenate(points) if points else np.zeros((0, 2))
        return _Flat(np.array(cells, dtype=np.int64).reshape(-1, 5), starts, values[:, 0], values[:, 1])

    def _of_points(
        self, most: float, most_once: float, cost: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> list[np.ndarray]:
        """Tables of the least cost of the points within both limits."""
        found = []
        for flat, like in zip(self._flat, self.low, strict=True):
            table = np.full(like.shape, math.inf)
            if len(flat.starts):
                inside = (flat.seconds <= most) & (flat.once <= most_once)
                values = np.where(inside, cost(flat.seconds, flat.once), math.inf)
                table[tuple(flat.cells.T)] = np.minimum.reduceat(values, flat.starts)
            found.append(table)
        return found

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

    def solve(self, tables: list[np.ndarray], stages: int = 0, below: float = math.inf) -> tuple[float, list[Step]]:
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

    def _together(self, table: np.ndarray) -> tuple[float, list[Step]]:
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

    def _trace(self, layers: list[_Layer], at: int) -> list[Step]:
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

    def _trace_single(self, layer: _Layer) -> list[Step]:
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

    def choice(self, path: list[Step], most: float, once: Range) -> list[MixedStage]:
        """The stages of a path through the tables of a box."""
        found = []
        for number, enters, leaves, first, last, way in path:
            key: Key = number, enters, leaves, first, last
            columns = self.cells[way].columns(key, most if self.exact else math.inf, once)
            found.append(MixedStage(way, first, last, columns))
        return found
