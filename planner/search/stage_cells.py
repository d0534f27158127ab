"""What runs of segments cost on a stage: bounds over all columns, and fronts of the columns at hand.

A cell is a word (`stage_words`) between two layouts on a stage of some limit and microbatches in flight; its bound is
the Lagrangian one of `stage_dp`, for every number of recomputed segments. Weightings with a price of a byte may be
known for a smaller share kappa of the once-a-step seconds than the problem's: they bound it too, a little lower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from shardplan.planner.search.stage_fronts import Fronts
from shardplan.planner.search.stage_ilp import StageProblem
from shardplan.planner.search.stage_words import Numbers, Words

_PRICES = 10
"""Prices of a byte for which cells of given columns are bounded."""
_COUNTED = 16
"""Numbers of recomputed segments that are told apart at least."""
_ENTRIES = 1 << 18
"""Of the table of bounds: up to this size, more are."""
_AT_ONCE = 1 << 21
"""Entries of a product."""


@dataclass(frozen=True, slots=True)
class Known:
    """Weightings for which the best columns are among the given ones: prices of a byte, at each of `flights`; leanest:
    those of the fewest bytes too. Without a price: always.
    kappa: the share of once-a-step seconds of weightings with a price (None: the problem's)."""

    prices: tuple[float, ...] = ()
    flights: tuple[int, ...] = ()
    leanest: bool = False
    kappa: float | None = None


class StageCells:
    """known: weightings of the given columns, None: all. kappa: share of once-a-step seconds that counts. words is None
    where nothing can fit, or be part of a solution better than `best`."""

    def __init__(self, problem: StageProblem, known: Known | None, kappa: float, best: float = math.inf) -> None:
        self.problem, self.known, self.kappa = problem, known, kappa
        pairs = list(zip(problem.limits, problem.in_flight, strict=True))
        self.pairs = sorted(set(pairs))
        self.groups = [self.pairs.index(pair) for pair in pairs]
        flights = {flight for _, flight in pairs}
        self.given = tuple(sorted(flights)) if known is None else tuple(sorted(known.flights))
        if known is None:
            transients = tuple(min(c.price.transient_nbytes for c in columns) for columns in problem.columns)
            again = transients
        else:
            transients = problem.least_transients or (0.0,) * len(problem.columns)
            again = problem.least_recomputing or transients
        self._vectors()
        most = self._longest(best)
        self.words = Words(problem, most, transients, again) if most else None
        if self.words is None:
            return
        self.counted = self._counted()
        self.budget = self._budget()
        self.fronts = Fronts(problem, self.words, self.kappa)
        self.by_count = self._bounds()
        self.bounds = self.by_count.min(2)

    def _longest(self, best: float) -> int:
        """No stage of more segments than this can fit, or be part of a solution better than `best`."""
        return len(self.problem.columns)

    def _room(self, group: int, word: int, enters: int) -> float:
        assert self.words is not None
        limit, flight = self.pairs[group]
        received = self.words.received[self.words.first[word], enters]
        return limit - self.problem.fixed.activation_nbytes - flight * received

    def _vectors(self) -> None:
        """Per tuple of columns: [column] of c, P, A, recomputed, enters, leaves, c with the share known of prices."""
        known = self.kappa if self.known is None or self.known.kappa is None else self.known.kappa
        self.vectors: dict[int, Numbers] = {}
        for columns in self.problem.columns:
            if id(columns) not in self.vectors:
                rows = [
                    (
                        c.price.seconds + self.kappa * c.price.once_seconds,
                        c.price.parameter_nbytes,
                        c.price.activation_nbytes,
                        c.recomputed,
                        c.enters,
                        c.leaves,
                        c.price.seconds + known * c.price.once_seconds,
                    )
                    for c in columns
                ]
                self.vectors[id(columns)] = np.array(rows, dtype=float)

    def _counted(self) -> int:
        modes = {c.recomputed for columns in self.problem.columns for c in columns}
        assert self.words is not None
        entries = len(self.pairs) * len(self.words) * self.words.width**2
        return min(self.words.most, max(_ENTRIES // entries, _COUNTED)) if len(modes) > 1 else 0

    def _weighed(self, seconds: float, price: float, flight: int) -> Numbers:
        """[kind, recomputed, enters, leaves]: least seconds * c + price * (P + q A) over the columns."""
        assert self.words is not None
        width = self.words.width
        table = np.full((len(self.words.members), 2, width, width), math.inf)
        for kind, member in enumerate(self.words.members):
            v = self.vectors[id(self.problem.columns[member])]
            value = seconds * v[:, 6 if price else 0] + price * (v[:, 1] + flight * v[:, 2])
            where = tuple(v[:, 3:6].T.astype(int))
            np.minimum.at(table[kind], where, value)
        return table

    def _budget(self) -> Numbers:
        """[group, word, count, a, 1]: bytes for parameters and activations, the least transient taken off."""
        assert self.words is not None
        words = self.words
        received = words.received[words.first]  # [word, a]
        transients = words.needs(self.counted)
        limits = np.array([limit for limit, _ in self.pairs]) - self.problem.fixed.activation_nbytes
        flights = np.array([flight for _, flight in self.pairs])
        left = limits[:, None, None] - flights[:, None, None] * received[None]  # [group, word, a]
        return (left[:, :, None, :] - transients[None, :, :, None])[..., None]

    def _tables(self, seconds: float, price: float) -> tuple[list[int], Numbers]:
        """Groups for which the price is known, and for each [kind, recomputed, a, b] at its own microbatches in flight:
        what lies between two that are known is bounded by the line between them."""
        at = {flight: self._weighed(seconds, price, flight) for flight in self.given}
        groups, tables = [], []
        for group, (_, flight) in enumerate(self.pairs):
            low = max((f for f in at if f <= flight), default=None)
            high = min((f for f in at if f >= flight), default=None)
            if low is None or high is None:
                continue
            groups.append(group)
            if low == high:
                tables.append(at[low])
            else:
                share = (high - flight) / (high - low)
                tables.append(share * at[low] + (1 - share) * at[high])
        return groups, np.array(tables)

    def _bounds(self) -> Numbers:
        """[group, word, count, a, b]."""
        assert self.words is not None
        fixed = self.problem.fixed.seconds
        free = self.words.products(self._weighed(1.0, 0.0, 0)[None], self.counted) + fixed
        self.free = free[0] - fixed
        bounds = np.repeat(free, len(self.pairs), 0)
        if self.known is None or self.known.leanest:
            for groups, held in self._batches(0.0, 1.0):
                slack = 1e-6 * np.array([self.pairs[g][0] for g in groups])[:, None, None, None, None]
                bounds[groups] = np.where(held > self.budget[groups] + slack, math.inf, bounds[groups])
        self.prices = self._spread() if self.known is None else self.known.prices
        for price in self.prices:
            for groups, relaxed in self._batches(1.0, price):
                relaxed = relaxed + fixed - price * self.budget[groups]
                bounds[groups] = np.maximum(bounds[groups], relaxed)
        return bounds

    def _batches(self, seconds: float, price: float) -> Iterator[tuple[list[int], Numbers]]:
        """(groups, product of their tables) of one weighting, in parts that are not too large."""
        assert self.words is not None
        groups, tables = self._tables(seconds, price)
        entries = len(self.words) * (self.counted + 1) * self.words.width**2
        step = max(_AT_ONCE // entries, 1)
        for first in range(0, len(groups), step):
            yield groups[first : first + step], self.words.products(tables[first : first + step], self.counted)

    def _spread(self) -> tuple[float, ...]:
        """Prices of a byte between which the best one must lie: the steps between columns, spread evenly."""
        steps: list[float] = []
        for flight in (min(self.given), max(self.given)):
            for v in self.vectors.values():
                steps += hull_steps(v[:, 0], v[:, 1] + flight * v[:, 2])
        if not steps:
            return ()
        low, high = min(steps) * 0.99, max(steps) * 1.01
        return tuple(np.geomspace(low, high, _PRICES)) if high > low else (low,)


def hull_steps(cost: Numbers, nbytes: Numbers) -> list[float]:
    """Seconds per byte of the steps along the lower convex hull, from the fastest point to the leanest."""
    order = np.lexsort((nbytes, cost))
    hull: list[tuple[float, float]] = []  # by falling bytes
    for c, n in zip(cost[order], nbytes[order], strict=True):
        if hull and n >= hull[-1][1]:
            continue
        while len(hull) > 1 and (c - hull[-1][0]) * (hull[-2][1] - hull[-1][1]) <= (hull[-1][0] - hull[-2][0]) * (
            hull[-1][1] - n
        ):
            hull.pop()
        hull.append((float(c), float(n)))
    return [(d[0] - c[0]) / (c[1] - d[1]) for c, d in pairwise(hull) if d[0] > c[0]]
