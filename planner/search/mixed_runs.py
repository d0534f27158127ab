"""What a run of segments costs on a way whose columns are not all known: a bound, and what the known ones reach.

A cell is a run [first, last) between two layouts with some microbatches in flight; t and u are taken together as
c = t + once * u. Where its fastest columns fit, they are its cost. Elsewhere `stage_cells` bounds it over all columns,
made or not, and until it is looked at, that bound stands for its cost too. `settle` replaces it by the cheapest run of
known columns that fits (`stage_fronts`); runs of the same segments are settled together.
"""

from __future__ import annotations

import math

import numpy as np

from shardplan.planner.search.mixed_cells import Key, Link, numbers_of
from shardplan.planner.search.mixed_problem import LAYOUTS, MixedProblem, Way
from shardplan.planner.search.problem import Price, Weights
from shardplan.planner.search.stage_cells import Known, StageCells
from shardplan.planner.search.stage_fronts import best_within
from shardplan.planner.search.stage_ilp import Column, StageProblem


class _Cells(StageCells):
    """Of runs of at most `longest` segments."""

    def __init__(self, problem: StageProblem, known: Known, kappa: float, longest: int) -> None:
        self._most = longest
        super().__init__(problem, known, kappa)

    def _longest(self, best: float) -> int:
        return self._most


class RunCells:
    """Runs of one way. low, real: [flight][enters, leaves, first, last] -> c of the bound, and of the best run known.
    fits: where that is the fastest one. most: c of a cell from which on it is of no interest."""

    def __init__(self, problem: MixedProblem, way: Way, most: float = math.inf) -> None:
        self.problem, self.way = problem, way
        self.count = len(way.columns)
        self.flights = sorted(set(problem.in_flight))
        self._best: dict[int, dict[tuple[int, int], tuple[float, int, Price]]] = {}
        plain, held = self._plain()
        plain[plain > most] = math.inf
        self.fits = [np.isfinite(plain) & (bytes_held <= way.limit) for bytes_held in held]
        self._points: dict[tuple[int, int, int, int], tuple[float, int]] = {}
        self._cells: StageCells | None = None
        if all((fits == np.isfinite(plain)).all() for fits in self.fits):
            self.low = self.real = [plain] * len(self.flights)
            self._open = [np.zeros(plain.shape, dtype=bool) for _ in self.flights]
            return
        first, last = np.nonzero(np.isfinite(plain).any((0, 1)))
        self._longest = int((last - first).max(initial=0))
        self._cells = _Cells(self._stage_problem(), way.known, problem.once, self._longest)
        self.low = [np.where(fits, plain, low) for fits, low in zip(self.fits, self._bounds(plain), strict=True)]
        self.real = [low.copy() for low in self.low]
        self._open = [np.isfinite(low) & ~fits for fits, low in zip(self.fits, self.low, strict=True)]

    @property
    def settled(self) -> bool:
        """Whether no cell is left whose cost is only bounded."""
        return not any(left.any() for left in self._open)

    # -- the fastest columns -------------------------------------------------------------------------------------------

    def _plain(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """[enters, leaves, first, last]: c of the cheapest runs, memory aside; [flight]: bytes that they hold."""
        size = self.count + 1
        found = np.full((LAYOUTS, LAYOUTS, size, size), math.inf)
        held_of = [np.full_like(found, math.inf) for _ in self.flights]
        fixed = self.way.fixed.activation_nbytes
        # Of what is behind: [last, enters, leaves]
        cost = np.full((size, LAYOUTS, LAYOUTS), math.inf)
        parameters, activations, transient = (np.zeros_like(cost) for _ in range(3))
        every = np.arange(size)[:, None, None], np.arange(LAYOUTS)[None, None, :]
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
            found[:, :, first] = cost.transpose(1, 2, 0)
            received = np.array(self.way.received[first])[None, :, None]
            for number, flight in enumerate(self.flights):
                held = parameters + flight * (activations + received + fixed) + transient
                held_of[number][:, :, first] = held.transpose(1, 2, 0)
        return found + self.way.fixed.seconds, held_of

    def _matrix(self, columns: tuple[Column, ...]) -> tuple[np.ndarray, ...]:
        """[enters, leaves]: cost, parameters, activations, transient bytes of the cheapest column."""
        made = tuple(np.full((LAYOUTS, LAYOUTS), fill) for fill in (math.inf, 0.0, 0.0, 0.0))
        for ends, (cost, _, price) in self._fastest(columns).items():
            values = cost, price.parameter_nbytes, price.activation_nbytes, price.transient_nbytes
            for table, value in zip(made, values, strict=True):
                table[ends] = value
        return made

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

    # -- bounds --------------------------------------------------------------------------------------------------------

    def _stage_problem(self) -> StageProblem:
        """One stage for each number of microbatches in flight."""
        way, cuts = self.way, self.count - 1
        fixed = way.fixed.activation_nbytes
        return StageProblem(
            way.columns,
            len(self.flights),
            self.problem.microbatches,
            (dict.fromkeys(range(LAYOUTS), 0.0),) * cuts,
            tuple({e: n + fixed for e, n in enumerate(received)} for received in way.received[1:]),
            (way.limit,) * len(self.flights),
            tuple(self.flights),
            Price(forward_seconds=way.fixed.seconds),
            least_transients=way.transients,
            least_recomputing=way.recomputing,
        )

    def _bounds(self, plain: np.ndarray) -> list[np.ndarray]:
        """[flight][enters, leaves, first, last]. What the first segment receives is not counted here."""
        cells = self._cells
        assert cells is not None and cells.words is not None
        width = cells.words.width
        first, last = np.triu_indices(self.count + 1, 1)
        short = last - first <= self._longest
        first, last = first[short], last[short]
        words = cells.words.number[first, last - first]
        found = []
        for bounds in cells.bounds:
            table = np.full_like(plain, math.inf)
            table[:width, :width, first, last] = bounds[words].transpose(1, 2, 0)
            found.append(np.maximum(table, plain))
        return found

    # -- runs of known columns -----------------------------------------------------------------------------------------

    def settle(self, key: Key) -> bool:
        """Find what a cell, and those of the same segments, cost. False: it was known."""
        number, enters, leaves, first, last = key
        cells = self._cells
        if cells is None or not self._open[number][enters, leaves, first, last]:
            return False
        assert cells.words is not None
        word, room = int(cells.words.number[first, last - first]), self._room(key)
        firsts, lengths = np.nonzero(cells.words.number == word)
        fronts = cells.fronts.front(self.flights[number], room, word, enters)
        for out in range(LAYOUTS):
            cost, point = math.inf, best_within(fronts[out], room) if out in fronts else None
            if point is not None:
                cost = float(fronts[out].cost[point]) + self.way.fixed.seconds
                self._points[number, enters, out, word] = room, point
            at = enters, out, firsts, firsts + lengths
            left = self._open[number][at]
            self.real[number][at] = np.where(left, np.maximum(cost, self.low[number][at]), self.real[number][at])
            self._open[number][at] = False
        return True

    def _room(self, key: Key) -> float:
        number, enters, _, first, _ = key
        received = self.way.received[first][enters] + self.way.fixed.activation_nbytes
        return self.way.limit - self.flights[number] * received

    def columns(self, key: Key, most: float = math.inf, once: tuple[float, float] = (0.0, math.inf)) -> tuple[int, ...]:
        """Of the best run known of a cell that is settled; its seconds are not told apart from those once a step."""
        number, enters, leaves, first, last = key
        if self.fits[number][enters, leaves, first, last]:
            return self._plain_columns(*key[1:])
        cells = self._cells
        assert cells is not None and cells.words is not None
        word = int(cells.words.number[first, last - first])
        room, point = self._points[number, enters, leaves, word]
        return tuple(cells.fronts.columns_of(self.flights[number], room, word, enters, leaves, point))

    def _plain_columns(self, enters: int, leaves: int, first: int, last: int) -> tuple[int, ...]:
        behind: dict[int, tuple[float, Link | None]] = {leaves: (0.0, None)}
        for index in reversed(range(first, last)):
            here: dict[int, tuple[float, Link | None]] = {}
            for (into, out), (cost, number, _) in sorted(self._fastest(self.way.columns[index]).items()):
                rest = behind.get(out)
                if rest is not None and (into not in here or cost + rest[0] < here[into][0]):
                    here[into] = cost + rest[0], (number, rest[1])
            behind = here
        return numbers_of(behind[enters][1])
