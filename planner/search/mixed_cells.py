"""What a run of segments costs on one way: its fastest columns that fit, and a bound over all columns.

A point of a run is (t, u, P, A, W): seconds of a microbatch and of a step, bytes of parameters, of activations per
microbatch, and transient ones. Points of [a, b) are those of segment a joined to those of [a + 1, b) where the layouts
agree; a point that is worse than another in t, u, W and in P + q A for the least and the most q (so for all between)
is dropped. Where columns are complete the points are kept apart in t and u and none is cut off: the result is exact.
Otherwise t and u are taken together as c = t + once * u, the points may be thinned, and the bound is

    c >= max over weightings (at most once, mu, f <= q) of  path(weighting) - mu (limit - least W - fixed - q received)

with path the cheapest run by weighted prices: the limit holds, so mu times what is above it may be taken off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from shardplan.planner.search.mixed_problem import LAYOUTS, MixedProblem, Way
from shardplan.planner.search.problem import Price, Weights
from shardplan.planner.search.stage_ilp import Column

_MOST_POINTS = 24
_SECONDS, _ONCE, _PARAMETERS, _ACTIVATIONS, _TRANSIENT = range(5)
Link = tuple[int, "Link | None"]
"""Column of the first segment, and the rest of the run."""


@dataclass(slots=True)
class Points:
    """values: [point, (t, u, P, A, W)]; links: how."""

    values: np.ndarray
    links: list[Link]


@dataclass(slots=True)
class Cells:
    """Runs of one way. low, real: [flight][enters, leaves, first, last] -> c of the bound, and of the best run found.
    points: (flight, enters, leaves, first, last) -> the runs that fit, where real is not the plain path."""

    way: Way
    low: list[np.ndarray]
    real: list[np.ndarray]
    points: dict[tuple[int, int, int, int, int], Points] = field(default_factory=dict)


class CellMaker:
    """Cells of one way."""

    def __init__(self, problem: MixedProblem, way: Way) -> None:
        self.problem, self.way = problem, way
        self.count = len(way.columns)
        self.flights = sorted(set(problem.in_flight))
        self.kinds: dict[int, int] = {}
        self.words = [self.kinds.setdefault(id(columns), len(self.kinds)) for columns in way.columns]
        self._best: dict[int, dict[tuple[int, int], tuple[float, int, Price]]] = {}
        self._points: dict[tuple[tuple[int, ...], int], list[Points]] = {}

    def make(self) -> Cells:
        shape = (LAYOUTS, LAYOUTS, self.count + 1, self.count + 1)
        cells = Cells(self.way, [np.full(shape, math.inf) for _ in self.flights], [])
        plain = self._path(Weights(once=self.problem.once))
        if self.way.complete:
            cells.real = [np.full(shape, math.inf) for _ in self.flights]
            for first in range(self.count):
                for last in range(first + 1, self.count + 1):
                    self._by_points(cells, first, last, tuple(range(len(self.flights))))
            cells.low = cells.real
            return cells
        cells.real = [plain.copy() for _ in self.flights]
        held = self._held(plain.shape)
        for number, flight in enumerate(self.flights):
            over = held[number] > self.way.limit
            cells.low[number] = np.maximum(plain, self._lagrangian(flight))
            cells.real[number][over] = math.inf
            for first, last in sorted({(int(a), int(b)) for _, _, a, b in np.argwhere(over & np.isfinite(plain))}):
                self._by_points(cells, first, last, (number,))
            cells.low[number] = np.minimum(cells.low[number], cells.real[number])
            # What no point of the front reaches may still be reached by a column that was not made.
            unknown = np.isinf(cells.real[number]) & np.isfinite(plain)
            cells.low[number][unknown] = np.maximum(plain, self._lagrangian(flight))[unknown]
        return cells

    # -- runs by weighted prices ---------------------------------------------------------------------------------------

    def _matrices(self, weights: Weights) -> np.ndarray:
        """[segment, enters, leaves]: least weighted price."""
        known: dict[int, np.ndarray] = {}
        for columns in self.way.columns:
            if id(columns) not in known:
                made = known[id(columns)] = np.full((LAYOUTS, LAYOUTS), math.inf)
                for column in columns:
                    at = column.enters, column.leaves
                    made[at] = min(made[at], weights.of(column.price))
        return np.stack([known[id(columns)] for columns in self.way.columns])

    def _path(self, weights: Weights) -> np.ndarray:
        """[enters, leaves, first, last]: the cheapest run, with what every stage takes."""
        each = self._matrices(weights)
        found = np.full((LAYOUTS, LAYOUTS, self.count + 1, self.count + 1), math.inf)
        following = np.full(
            (self.count + 1, LAYOUTS, LAYOUTS), math.inf
        )  # of the segment behind: [last, enters, leaves]
        for first in reversed(range(self.count)):
            joined = (each[first][None, :, :, None] + following[:, None, :, :]).min(2)
            joined[first + 1] = each[first]
            following = joined
            found[:, :, first, :] = joined.transpose(1, 2, 0)
        fixed = self.way.fixed
        seconds = fixed.seconds + weights.nbytes * weights.in_flight * fixed.activation_nbytes
        return found + seconds

    def _held(self, shape: tuple[int, ...]) -> list[np.ndarray]:
        """[flight][enters, leaves, first, last]: bytes of the plain cheapest runs."""
        found = [np.full(shape, math.inf) for _ in self.flights]
        fixed = self.way.fixed.activation_nbytes
        # Of what is behind: [last, enters, leaves]
        cost = np.full((self.count + 1, LAYOUTS, LAYOUTS), math.inf)
        parameters, activations, transient = (np.zeros_like(cost) for _ in range(3))
        every = np.arange(self.count + 1)[:, None, None], np.arange(LAYOUTS)[None, None, :]
        mine_at = np.arange(LAYOUTS)[None, :, None]
        for first in reversed(range(self.count)):
            c, p, a, w = self._matrix(self.way.columns[first])
            out = (c[None, :, :, None] + cost[:, None]).argmin(2)  # [last, enters, leaves]: layout between
            behind = every[0], out, every[1]
            cost = c[mine_at, out] + cost[behind]
            parameters = p[mine_at, out] + parameters[behind]
            activations = a[mine_at, out] + activations[behind]
            transient = np.maximum(w[mine_at, out], transient[behind])
            at = first + 1
            cost[at], parameters[at], activations[at], transient[at] = c, p, a, w
            received = np.array(self.way.received[first])[None, :, None]
            for number, flight in enumerate(self.flights):
                held = parameters + flight * (activations + received + fixed) + transient
                found[number][:, :, first, :] = held.transpose(1, 2, 0)
        return found

    def _matrix(self, columns: tuple[Column, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """[enters, leaves]: cost, parameters, activations, transient bytes of the cheapest column."""
        made = tuple(np.full((LAYOUTS, LAYOUTS), fill) for fill in (math.inf, 0.0, 0.0, 0.0))
        for ends, (cost, _, price) in self._fastest(columns).items():
            values = cost, price.parameter_nbytes, price.activation_nbytes, price.transient_nbytes
            for table, value in zip(made, values, strict=True):
                table[ends] = value
        return made  # type: ignore[return-value]

    def _fastest(self, columns: tuple[Column, ...]) -> dict[tuple[int, int], tuple[float, int, Price]]:
        """(enters, leaves) -> cost, number and price of the cheapest column."""
        best = self._best.get(id(columns))
        if best is None:
            best = self._best[id(columns)] = {}
            weights = Weights(once=self.problem.once)
            for number, column in enumerate(columns):
                ends, cost = (column.enters, column.leaves), weights.of(column.price)
                if ends not in best or cost < best[ends][0]:
                    best[ends] = cost, number, column.price
        return best

    def _lagrangian(self, flight: int) -> np.ndarray:
        best = np.full((LAYOUTS, LAYOUTS, self.count + 1, self.count + 1), -math.inf)
        least = np.zeros((self.count + 1, self.count + 1))
        transients = self.way.transients or (0.0,) * self.count
        for first in range(self.count):
            least[first, first + 1 :] = np.maximum.accumulate(transients[first:])
        received = np.array([[*(r[e] for r in self.way.received), 0.0] for e in range(LAYOUTS)])  # [enters, first]
        for weights in self.way.known:
            if weights.nbytes == 0 or weights.in_flight > flight or weights.once > self.problem.once:
                continue
            room = self.way.limit - least[None, None] - flight * received[:, None, :, None]
            best = np.maximum(best, self._path(weights) - weights.nbytes * room)
        return best

    # -- runs point by point -------------------------------------------------------------------------------------------

    def _by_points(self, cells: Cells, first: int, last: int, numbers: tuple[int, ...]) -> None:
        for leaves in range(LAYOUTS):
            for enters, points in enumerate(self._front(first, last, leaves)):
                if not points.links:
                    continue
                for number in numbers:
                    flight = self.flights[number]
                    fixed = self.way.received[first][enters] + self.way.fixed.activation_nbytes
                    held = _held_by(points.values, flight) + points.values[:, _TRANSIENT] + flight * fixed
                    kept = np.flatnonzero(held <= self.way.limit)
                    if not len(kept):
                        continue
                    values = points.values[kept].copy()
                    values[:, _SECONDS] += self.way.fixed.seconds
                    fit = Points(values, [points.links[k] for k in kept])
                    cells.points[number, enters, leaves, first, last] = fit
                    cost = values[:, _SECONDS] + self.problem.once * values[:, _ONCE]
                    cells.real[number][enters, leaves, first, last] = cost.min()

    def _front(self, first: int, last: int, leaves: int) -> list[Points]:
        """Per layout that enters, the points of [first, last) that leave in `leaves`."""
        key = tuple(self.words[first:last]), leaves
        found = self._points.get(key)
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
        self._points[key] = found
        return found

    def _pruned(self, values: np.ndarray, links: list[Link]) -> Points:
        kept = np.flatnonzero(_held_by(values, self.flights[0]) + values[:, _TRANSIENT] <= self.way.limit)
        values = values[kept]
        if self.way.complete:
            times = [values[:, _SECONDS], values[:, _ONCE]]
        else:
            times = [values[:, _SECONDS] + self.problem.once * values[:, _ONCE]]
        held = [_held_by(values, self.flights[0]), _held_by(values, self.flights[-1]), values[:, _TRANSIENT]]
        measured = np.stack([*times, *held], 1)
        order = np.lexsort(measured.T[::-1])
        measured, kept, values = measured[order], kept[order], values[order]
        chosen: list[int] = []
        for k in range(len(measured)):
            if not chosen or not (measured[chosen] <= measured[k]).all(1).any():
                chosen.append(k)
        if not self.way.complete and len(chosen) > _MOST_POINTS:
            places = np.unique(np.linspace(0, len(chosen) - 1, _MOST_POINTS).round().astype(int))
            chosen = [chosen[place] for place in places]
        return Points(values[chosen], [links[kept[k]] for k in chosen])

    # -- columns of a chosen run ---------------------------------------------------------------------------------------

    def columns(
        self,
        cells: Cells,
        key: tuple[int, int, int, int, int],
        most: float = math.inf,
        once: tuple[float, float] = (0.0, math.inf),
    ) -> tuple[int, ...]:
        """Of the best run of a cell with at most `most` seconds and once[1] once a step, once[0] of which are free."""
        points = cells.points.get(key)
        if points is None:
            return self._plain_columns(*key[1:])
        seconds, of_step = points.values[:, _SECONDS], points.values[:, _ONCE]
        cost = seconds + self.problem.once * np.maximum(of_step - once[0], 0.0)
        cost[(seconds > most) | (of_step > once[1])] = math.inf
        return _numbers(points.links[int(cost.argmin())])

    def _plain_columns(self, enters: int, leaves: int, first: int, last: int) -> tuple[int, ...]:
        behind: dict[int, tuple[float, Link | None]] = {leaves: (0.0, None)}
        for index in reversed(range(first, last)):
            here: dict[int, tuple[float, Link | None]] = {}
            for (into, out), (cost, number, _) in sorted(self._fastest(self.way.columns[index]).items()):
                rest = behind.get(out)
                if rest is not None and (into not in here or cost + rest[0] < here[into][0]):
                    here[into] = cost + rest[0], (number, rest[1])
            behind = here
        return _numbers(behind[enters][1])


def _numbers(link: Link | None) -> tuple[int, ...]:
    found = []
    while link is not None:
        found.append(link[0])
        link = link[1]
    return tuple(found)


def _held_by(values: np.ndarray, flight: int) -> np.ndarray:
    return values[:, _PARAMETERS] + flight * values[:, _ACTIVATIONS]
