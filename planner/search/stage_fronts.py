"""What a run of segments can cost for what memory, by the columns at hand: exact fronts, prefix by prefix.

For a stage with q microbatches in flight, a word and the layout that enters, the front is the set of nondominated
(cost, bytes held, transient bytes) over all choices of columns with layouts that agree, per layout that leaves. It
follows from that of the word's prefix and the columns of its last segment. Transient bytes are rounded up a
little, and a front keeps at most `_MOST` points, spread evenly: what a front promises always exists; where it was
thinned, something cheaper may exist too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shardplan.planner.search.stage_ilp import Column, StageProblem
from shardplan.planner.search.stage_words import Numbers, Words

_MOST = 96
_CLOSE = 2e-3
"""Share of a stage's memory up to which transient bytes are rounded."""


@dataclass(frozen=True, slots=True)
class Front:
    """Points by rising cost. back: (layout and point of the prefix, column of the last segment), [point, 3]."""

    cost: Numbers
    held: Numbers
    transient: Numbers
    back: Numbers

    @property
    def nbytes(self) -> Numbers:
        return self.held + self.transient


class Fronts:
    """Of one problem. kappa: share of once-a-step seconds that counts."""

    def __init__(self, problem: StageProblem, words: Words, kappa: float) -> None:
        self.words = words
        self.fronts: dict[tuple[int, float, int, int], dict[int, Front]] = {}
        self.options: dict[tuple[int, int], dict[tuple[int, int], Front]] = {}
        self.columns = words.by_kind(problem)
        self.kappa = kappa
        self.levels = np.array(_levels(problem, self.columns))

    def front(self, flight: int, room: float, word: int, enters: int) -> dict[int, Front]:
        """By layout that leaves. room: bytes for everything; points that need more are left out."""
        chain = []
        while word >= 0 and (flight, room, word, enters) not in self.fronts:
            chain.append(word)
            word = self.words.parent[word]
        for at in reversed(chain):
            parent = self.words.parent[at]
            before = self.fronts[flight, room, parent, enters] if parent >= 0 else {enters: _NOTHING}
            self.fronts[flight, room, at, enters] = self._longer(before, flight, self.words.last[at], room)
        return self.fronts[flight, room, chain[0] if chain else word, enters]

    def columns_of(self, flight: int, room: float, word: int, enters: int, leaves: int, point: int) -> list[int]:
        """The columns of a point, per segment."""
        found = []
        while word >= 0:
            back = self.fronts[flight, room, word, enters][leaves].back
            leaves, point, column = (int(value) for value in back[point])
            found.append(column)
            word = self.words.parent[word]
        return found[::-1]

    def _longer(self, before: dict[int, Front], flight: int, kind: int, room: float) -> dict[int, Front]:
        parts: dict[int, list[Front]] = {}
        for (enters, leaves), options in self._options(flight, kind).items():
            prefix = before.get(enters)
            if prefix is None:
                continue
            shape = len(prefix.cost), len(options.cost)
            points, columns = np.indices(shape).reshape(2, -1)
            front = Front(
                (prefix.cost[:, None] + options.cost[None, :]).reshape(-1),
                (prefix.held[:, None] + options.held[None, :]).reshape(-1),
                np.maximum(prefix.transient[:, None], options.transient[None, :]).reshape(-1),
                np.stack([np.full(points.shape, enters), points, options.back[columns, 2]], 1),
            )
            parts.setdefault(leaves, []).append(front)
        found = {}
        for leaves, fronts in parts.items():
            joined = self._nondominated(fronts, room)
            if len(joined.cost):
                found[leaves] = joined
        return found

    def _options(self, flight: int, kind: int) -> dict[tuple[int, int], Front]:
        """The columns of a kind of segment, by layouts, as fronts of their own."""
        found = self.options.get((flight, kind))
        if found is None:
            by_ends: dict[tuple[int, int], list[int]] = {}
            columns = self.columns[kind]
            for number, column in enumerate(columns):
                by_ends.setdefault((column.enters, column.leaves), []).append(number)
            found = self.options[flight, kind] = {}
            for ends, numbers in by_ends.items():
                prices = [columns[n].price for n in numbers]
                front = Front(
                    np.array([p.seconds + self.kappa * p.once_seconds for p in prices]),
                    np.array([p.parameter_nbytes + flight * p.activation_nbytes for p in prices]),
                    self.levels[np.searchsorted(self.levels, [p.transient_nbytes for p in prices])],
                    np.array([(0, 0, n) for n in numbers]),
                )
                found[ends] = self._nondominated([front], math.inf, len(numbers))
        return found

    def _nondominated(self, fronts: list[Front], room: float, most: int = _MOST) -> Front:
        cost = np.concatenate([f.cost for f in fronts])
        held = np.concatenate([f.held for f in fronts])
        transient = np.concatenate([f.transient for f in fronts])
        order = nondominated(cost, held, transient, room, most)
        back = np.concatenate([f.back for f in fronts])
        return Front(cost[order], held[order], transient[order], back[order])


def nondominated(cost: Numbers, held: Numbers, transient: Numbers, room: float, most: int) -> Numbers:
    """Positions of the points that fit and that no other is at least as good as in all three, by rising cost; of more
    than `most` some, spread evenly."""
    fits = np.flatnonzero(held + transient <= room)
    order = fits[np.lexsort((transient[fits], held[fits], cost[fits]))]
    mine, level = held[order], transient[order]
    kept = np.zeros(len(order), dtype=bool)
    for value in np.unique(level):
        # The least bytes held by what is cheaper and needs no more transient bytes.
        least = np.minimum.accumulate(np.where(level <= value, mine, math.inf))
        before = np.concatenate([[math.inf], least[:-1]])
        kept |= (level == value) & (mine < before)
    order = order[kept]
    if len(order) > most:
        order = order[_thinned(cost[order], held[order], transient[order], most)]
    return order


def _thinned(cost: Numbers, held: Numbers, transient: Numbers, most: int) -> Numbers:
    """Positions to keep, in order: spread evenly over bytes held, for each level of transient bytes; among neighbours
    the one that is least above the convex hull, as sums of such are what the best solutions consist of."""
    by_held = np.lexsort((cost, held))
    hull: list[int] = []
    for point in by_held:
        if hull and cost[point] >= cost[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (cost[a] - cost[b]) * (held[point] - held[b]) > (cost[b] - cost[point]) * (held[b] - held[a]):
                break
            hull.pop()
        hull.append(int(point))
    excess = cost - np.interp(held, held[hull], cost[hull])
    levels = np.unique(transient, return_inverse=True)[1]
    buckets = max(most // (int(levels.max()) + 1), 8)
    low, high = float(held.min()), float(held.max())
    bucket = np.minimum(((held - low) / max(high - low, 1.0) * buckets).astype(int), buckets - 1)
    key = levels * buckets + bucket
    ranked = np.lexsort((excess, key))
    first = np.concatenate([[True], key[ranked][1:] != key[ranked][:-1]])
    return np.sort(ranked[first])


def _levels(problem: StageProblem, columns: list[tuple[Column, ...]]) -> list[float]:
    """Transient bytes of columns, close ones represented by the largest."""
    least = _CLOSE * min(problem.limits)
    found: list[float] = []
    for value in sorted({c.price.transient_nbytes for mine in columns for c in mine}, reverse=True):
        if not found or found[-1] - value > least:
            found.append(value)
    return found[::-1]


_NOTHING = Front(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros((1, 3), dtype=int))


def best_within(front: Front, room: float) -> int | None:
    """The cheapest point that fits."""
    fits = np.flatnonzero(front.nbytes <= room)
    return int(fits[0]) if len(fits) else None
