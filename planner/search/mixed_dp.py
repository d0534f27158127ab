"""The program of one problem for unequal devices: its cells, cut to boxes (`mixed_boxes`), and what paths through them
settle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shardplan.planner.search.mixed_cells import Key, PointCells
from shardplan.planner.search.mixed_problem import MixedProblem, MixedStage
from shardplan.planner.search.mixed_runs import RunCells
from shardplan.planner.search.mixed_states import States, least_slowest
from shardplan.planner.search.mixed_suffix import Step, Suffixes

Range = tuple[float, float]
WHOLE: Range = (0.0, math.inf)


@dataclass(frozen=True, slots=True)
class _Flat:
    """cells: [cell, (way, enters, leaves, first, last)]; starts: [cell] its first point; seconds, once: [point]."""

    cells: np.ndarray
    starts: np.ndarray
    seconds: np.ndarray
    once: np.ndarray


class Programs:
    """The program of one problem. most: c of a cell from which on it is of no interest."""

    def __init__(self, problem: MixedProblem, most: float = math.inf) -> None:
        self.problem = problem
        self.count = problem.count
        self.cells = [
            PointCells(problem, way) if way.complete else RunCells(problem, way, most) for way in problem.ways
        ]
        self.states = States(problem.units, (way.takes for way in problem.ways))
        self.flights = sorted(set(problem.in_flight))
        self.exact = all(way.complete for way in problem.ways)
        self.suffixes = Suffixes(problem, self.states)
        self._shut = self._apart()
        self.low = self._tables([c.low for c in self.cells])
        self.real = self.low if self.exact else self._tables([c.real for c in self.cells])
        self._flat = [self._flattened(number) for number in range(len(self.flights))] if self.exact else []

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

    @property
    def settled(self) -> bool:
        """Whether what cells cost is known of all."""
        return all(cells.settled for cells in self.cells)

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
                for begin, end in ((first, last - 1), (first, last + 1), (first - 1, last), (first + 1, last)):
                    if 0 <= begin < end <= self.count:
                        cells.settle((number, enters, leaves, begin, end))
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

    # -- programs ------------------------------------------------------------------------------------------------------

    def least_slowest(self, tables: list[np.ndarray]) -> float:
        """No choice has a lower maximum of c: any flight, any layouts."""
        cell = np.minimum.reduce([table.min((1, 2)) for table in tables])  # [way, first, last]
        return least_slowest(self.states, [way.takes for way in self.problem.ways], cell)

    def solve(self, tables: list[np.ndarray], stages: int = 0, below: float = math.inf) -> tuple[float, list[Step]]:
        """See `Suffixes.solve`."""
        return self.suffixes.solve(tables, stages, below)

    def choice(self, path: list[Step], most: float, once: Range) -> list[MixedStage]:
        """The stages of a path through the tables of a box."""
        found = []
        for number, enters, leaves, first, last, way in path:
            key: Key = number, enters, leaves, first, last
            columns = self.cells[way].columns(key, most if self.exact else math.inf, once)
            found.append(MixedStage(way, first, last, columns))
        return found
