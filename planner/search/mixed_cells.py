"""What a run of segments costs on a way all of whose columns are known: exact, point by point.

A point of a run is (t, u, P, A, W): seconds of a microbatch and of a step, bytes of parameters, of activations per
microbatch, and transient ones. Points of [a, b) are those of segment a joined to those of [a + 1, b) where the layouts
agree; a point that is worse than another in t, u, W and in P + q A for the least and the most q (so for all between)
is dropped. t and u stay apart and nothing is cut off, so these are for few segments: `mixed_runs` has the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shardplan.planner.search.mixed_problem import LAYOUTS, MixedProblem, Way

_SECONDS, _ONCE, _PARAMETERS, _ACTIVATIONS, _TRANSIENT = range(5)
Key = tuple[int, int, int, int, int]
"""Flight (its position), layouts that enter and leave, first and last segment."""
Link = tuple[int, "Link | None"]
"""Column of the first segment, and the rest of the run."""


@dataclass(slots=True)
class Points:
    """values: [point, (t, u, P, A, W)]; links: how."""

    values: np.ndarray
    links: list[Link]


class PointCells:
    """Runs of one way. low, real: [flight][enters, leaves, first, last] -> the least c = t + once * u; points: the runs
    that fit."""

    def __init__(self, problem: MixedProblem, way: Way) -> None:
        self.problem, self.way = problem, way
        self.count = len(way.columns)
        self.flights = sorted(set(problem.in_flight))
        kinds: dict[int, int] = {}
        self.words = [kinds.setdefault(id(columns), len(kinds)) for columns in way.columns]
        self._fronts: dict[tuple[tuple[int, ...], int], list[Points]] = {}
        self.points: dict[Key, Points] = {}
        shape = (LAYOUTS, LAYOUTS, self.count + 1, self.count + 1)
        self.low = self.real = [np.full(shape, math.inf) for _ in self.flights]
        for first in range(self.count):
            for last in range(first + 1, self.count + 1):
                self._fitting(first, last)

    @property
    def settled(self) -> bool:
        return True

    def settle(self, key: Key) -> bool:
        """Nothing is left to find out."""
        return False

    def _fitting(self, first: int, last: int) -> None:
        for leaves in range(LAYOUTS):
            for enters, points in enumerate(self._front(first, last, leaves)):
                for number, flight in enumerate(self.flights):
                    fixed = self.way.received[first][enters] + self.way.fixed.activation_nbytes
                    held = _held_by(points.values, flight) + points.values[:, _TRANSIENT] + flight * fixed
                    kept = np.flatnonzero(held <= self.way.limit)
                    if not len(kept):
                        continue
                    values = points.values[kept].copy()
                    values[:, _SECONDS] += self.way.fixed.seconds
                    self.points[number, enters, leaves, first, last] = Points(values, [points.links[k] for k in kept])
                    cost = values[:, _SECONDS] + self.problem.once * values[:, _ONCE]
                    self.real[number][enters, leaves, first, last] = cost.min()

    def _front(self, first: int, last: int, leaves: int) -> list[Points]:
        """Per layout that enters, the points of [first, last) that leave in `leaves`."""
        key = tuple(self.words[first:last]), leaves
        found = self._fronts.get(key)
        if found is not None:
            return found
        behind = self._front(first + 1, last, leaves) if first + 1 < last else None
        values: list[list[np.ndarray]] = [[] for _ in range(LAYOUTS)]
        links: list[list[Link]] = [[] for _ in range(LAYOUTS)]
        for number, column in enumerate(self.way.columns[first]):
            p = column.price
            mine = np.array([p.seconds, p.once_seconds, p.parameter_nbytes, p.activation_nbytes, p.transient_nbytes])
            if behind is None:
                if column.leaves == leaves:
                    values[column.enters].append(mine[None])
                    links[column.enters].append((number, None))
                continue
            rest = behind[column.leaves]
            if rest.links:
                joined = rest.values + mine
                joined[:, _TRANSIENT] = np.maximum(rest.values[:, _TRANSIENT], mine[_TRANSIENT])
                values[column.enters].append(joined)
                links[column.enters] += [(number, link) for link in rest.links]
        empty = np.zeros((0, 5))
        found = [self._pruned(np.concatenate(v) if v else empty, k) for v, k in zip(values, links, strict=True)]
        self._fronts[key] = found
        return found

    def _pruned(self, values: np.ndarray, links: list[Link]) -> Points:
        kept = np.flatnonzero(_held_by(values, self.flights[0]) + values[:, _TRANSIENT] <= self.way.limit)
        values = values[kept]
        times = values[:, _SECONDS], values[:, _ONCE]
        held = _held_by(values, self.flights[0]), _held_by(values, self.flights[-1]), values[:, _TRANSIENT]
        measured = np.stack([*times, *held], 1)
        order = np.lexsort(measured.T[::-1])
        measured, kept, values = measured[order], kept[order], values[order]
        chosen: list[int] = []
        for k in range(len(measured)):
            if not chosen or not (measured[chosen] <= measured[k]).all(1).any():
                chosen.append(k)
        return Points(values[chosen], [links[kept[k]] for k in chosen])

    def columns(self, key: Key, most: float = math.inf, once: tuple[float, float] = (0.0, math.inf)) -> tuple[int, ...]:
        """Of the best run of a cell with at most `most` seconds and once[1] once a step, once[0] of which are free."""
        points = self.points[key]
        seconds, of_step = points.values[:, _SECONDS], points.values[:, _ONCE]
        cost = seconds + self.problem.once * np.maximum(of_step - once[0], 0.0)
        cost[(seconds > most) | (of_step > once[1])] = math.inf
        return numbers_of(points.links[int(cost.argmin())])


def numbers_of(link: Link | None) -> tuple[int, ...]:
    """The columns of a run."""
    found = []
    while link is not None:
        found.append(link[0])
        link = link[1]
    return tuple(found)


def _held_by(values: np.ndarray, flight: int) -> np.ndarray:
    return values[:, _PARAMETERS] + flight * values[:, _ACTIVATIONS]
