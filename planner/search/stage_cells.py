"""What runs of segments cost on a stage: bounds over all columns, and fronts of the columns at hand.

A cell is a word (`stage_words`) between two layouts on a stage of some limit and microbatches in flight; its bound is
the Lagrangian one of `stage_dp`, for every number of recomputed segments. Weightings with a price of a byte may be
known for a smaller share kappa of the once-a-step seconds than the problem's: they bound it too, a little lower.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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
_CLOSE = 1e-9
_ANY_NBYTES = 1e30
_AT_ONCE = 1 << 21
"""Entries of a product."""


@dataclass(frozen=True, slots=True)
class Known:
    """Weightings for which the best columns are among the given ones: prices of a byte, at each of `flights`; leanest:
    those of the fewest bytes too. Without a price: always. shares: of the price, what a gathered byte counts in further
    weightings, beside those where it does not.
    kappa: the share of once-a-step seconds of weightings with a price (None: the problem's)."""

    prices: tuple[float, ...] = ()
    flights: tuple[int, ...] = ()
    leanest: bool = False
    kappa: float | None = None
    shares: tuple[float, ...] = ()


class StageCells:
    """known: weightings of the given columns, None: all. kappa: share of once-a-step seconds that counts. words is None
    where nothing can fit, or be part of a solution better than `best`."""

    from_start = False
    """Whether only runs that begin with the first segment are looked at."""

    def __init__(self, problem: StageProblem, known: Known | None, kappa: float, best: float = math.inf) -> None:
        self.problem, self.known, self.kappa = problem, known, kappa
        pairs = list(zip(problem.limits, problem.in_flight, strict=True))
        self.pairs = sorted(set(pairs))
        self.groups = [self.pairs.index(pair) for pair in pairs]
        flights = {flight for _, flight in pairs}
        self.given = _some(flights) if known is None else tuple(sorted(set(known.flights)))
        if known is None:
            transients = tuple(min(c.price.transient_nbytes for c in columns) for columns in problem.columns)
            again = transients
        else:
            transients = problem.least_transients or (0.0,) * len(problem.columns)
            again = problem.least_recomputing or transients
        self._vectors()
        most = self._longest(best)
        self.words = Words(problem, most, transients, again, self.from_start) if most else None
        if self.words is None:
            return
        self.counted = self._counted()
        self.rooms, self.needs = self._rooms(), self.words.needs(self.counted)
        self.mixtures = self._mixtures()
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
        """Per tuple of columns: [column] of c, P, A, recomputed, enters, leaves, c with the share of prices, G."""
        known = self.kappa if self.known is None or self.known.kappa is None else self.known.kappa
        self.vectors: dict[int, Numbers] = {}
        for columns in self.problem.columns:
            if id(columns) not in self.vectors:
                # Where these are all columns there are, all of their transient bytes are known to be held at once.
                least = min(c.price.transient_nbytes for c in columns)
                rows = [
                    (
                        c.price.seconds + self.kappa * c.price.once_seconds,
                        c.price.parameter_nbytes,
                        c.price.activation_nbytes,
                        c.recomputed,
                        c.enters,
                        c.leaves,
                        c.price.seconds + known * c.price.once_seconds,
                        c.price.gathered_nbytes if self.known is not None else c.price.transient_nbytes - least,
                    )
                    for c in columns
                ]
                self.vectors[id(columns)] = np.array(rows, dtype=float)

    def _counted(self) -> int:
        modes = {c.recomputed for columns in self.problem.columns for c in columns}
        assert self.words is not None
        entries = len(self.pairs) * len(self.words) * self.words.width**2
        return min(self.words.most, max(_ENTRIES // entries, _COUNTED)) if len(modes) > 1 else 0

    def _rooms(self) -> Numbers:
        """[group, word, a]: bytes for everything but what a stage is sent."""
        assert self.words is not None
        received = self.words.received[self.words.first]  # [word, a]
        limits = np.array([limit for limit, _ in self.pairs]) - self.problem.fixed.activation_nbytes
        flights = np.array([flight for _, flight in self.pairs])
        return limits[:, None, None] - flights[:, None, None] * received[None]

    def _mixtures(self) -> list[Numbers]:
        """Shares of W, by [kind]: none, and for every kind as much as its segments on a stage have between them."""
        assert self.words is not None
        kinds = len(self.words.members)
        found = [np.zeros(kinds)]
        numbers = [self.words.kinds.count(kind) for kind in range(kinds)]
        # What gathers so little that another's op takes more anyway, on every stage, has no part in W.
        common = [own for own, n in zip(self.words.own, numbers, strict=True) if n >= self.problem.stages]
        for kind, member in enumerate(self.words.members):
            most = float(self.vectors[id(self.problem.columns[member])][:, 7].max())
            if not most or self.words.own[kind] + most <= max(common, default=0.0):
                continue
            usual = -(-numbers[kind] // self.problem.stages)
            shares = [1.0 / usual] if self.known is None else [s for s in self.known.shares if s * usual <= 1 + _CLOSE]
            if shares:
                found.append(np.where(np.arange(kinds) == kind, max(shares), 0.0))
        return found

    def _weighed(self, seconds: float, price: float, flight: int, shares: Numbers) -> Numbers:
        """[kind, recomputed, enters, leaves]: least seconds * c + price * (P + q A + share G) over the columns."""
        assert self.words is not None
        width = self.words.width
        table = np.full((len(self.words.members), 2, width, width), math.inf)
        for kind, member in enumerate(self.words.members):
            v = self.vectors[id(self.problem.columns[member])]
            held = v[:, 1] + flight * v[:, 2] + shares[kind] * v[:, 7]
            value = seconds * v[:, 6 if price else 0] + price * held
            where = tuple(v[:, 3:6].T.astype(int))
            np.minimum.at(table[kind], where, value)
        return table

    def _budget(self, shares: Numbers) -> Numbers:
        """[group, word, count, a, 1]: bytes for parameters, activations and shares of what is gathered, the rest of the
        least transient ones taken off; any number where the segments of a word would have more than all of W."""
        assert self.words is not None
        given = self.words.counts @ shares
        mixed = np.where(given > 1 + _CLOSE, -_ANY_NBYTES, self.words.counts @ (shares * self.words.own))
        transients = mixed[:, None] + np.maximum(1.0 - given, 0.0)[:, None] * self.needs
        return (self.rooms[:, :, None, :] - transients[None, :, :, None])[..., None]

    def _between(self, flight: int) -> tuple[int, int, float] | None:
        """Positions in `given` of the flights next below and above, and the share of the former; None: unknown."""
        low = max((i for i, f in enumerate(self.given) if f <= flight), default=None)
        high = min((i for i, f in enumerate(self.given) if f >= flight), default=None)
        if low is None or high is None:
            return None
        ends = self.given[low], self.given[high]
        return low, high, (ends[1] - flight) / (ends[1] - ends[0]) if low < high else 1.0

    def _bounds(self) -> Numbers:
        """[group, word, count, a, b]."""
        assert self.words is not None
        fixed, none = self.problem.fixed.seconds, self.mixtures[0]
        free = self.words.products(self._weighed(1.0, 0.0, 0, none)[None], self.counted) + fixed
        self.free = free[0] - fixed
        bounds = np.repeat(free, len(self.pairs), 0)
        if self.known is None or self.known.leanest:
            budget = self._budget(none)
            for _, group, held in self._products(0.0, [1.0], none):
                slack = 1e-6 * self.pairs[group][0]
                bounds[group] = np.where(held > budget[group] + slack, math.inf, bounds[group])
        self.prices = self._spread() if self.known is None else self.known.prices
        for shares in self.mixtures:
            budget = self._budget(shares)
            for price, group, held in self._products(1.0, self.prices, shares):
                np.maximum(bounds[group], held + (fixed - price * budget[group]), out=bounds[group])
        return bounds

    def _products(
        self, seconds: float, prices: Sequence[float], shares: Numbers
    ) -> Iterator[tuple[float, int, Numbers]]:
        """(price, group, [word, count, a, b]: product of the tables). Products are concave in the microbatches in
        flight, so what lies between two that are known is bounded by the line between them."""
        assert self.words is not None
        ends = [(group, self._between(flight)) for group, (_, flight) in enumerate(self.pairs)]
        entries = len(self.given) * len(self.words) * (self.counted + 1) * self.words.width**2
        step = max(_AT_ONCE // max(entries, 1), 1)
        for first in range(0, len(prices) if self.given else 0, step):
            some = prices[first : first + step]
            tables = [self._weighed(seconds, price, flight, shares) for price in some for flight in self.given]
            held = self.words.products(np.array(tables), self.counted)
            for number, price in enumerate(some):
                mine = held[number * len(self.given) : (number + 1) * len(self.given)]
                for group, between in ends:
                    if between is not None:
                        low, high, share = between
                        line = mine[low] if low == high else share * mine[low] + (1 - share) * mine[high]
                        yield price, group, line

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


def _some(flights: Iterable[int]) -> tuple[int, ...]:
    """The least, the most, and powers of two between them."""
    every = sorted(flights)
    return tuple(f for f in every if f in (every[0], every[-1]) or f & (f - 1) == 0)


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
