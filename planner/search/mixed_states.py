"""Which devices of a mixed cluster are in use, and bounds from covering the segments with sets of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np

from shardplan.planner.search.mixed_problem import Take

Used = tuple[tuple[int, ...], ...]
"""Per kind of unit, the devices in use of each, ascending."""


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
        self.possible = [[place for place, take in enumerate(self.takes) if (number, take) in self.steps]
                         for number in range(len(queue))]  # fmt: skip
        """Per state, the takes (their positions) that it leaves room for."""


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
    least = _by_take(states, takes, cell)
    value = np.full((len(states.numbers), count + 1), math.inf)
    value[0, count] = -math.inf
    for used in states.order:
        if np.isposinf(value[used]).all():
            continue
        places = states.possible[used]
        reached = np.maximum(least[places], value[used]).min(2)
        for place, mine in zip(places, reached, strict=True):
            for after in states.steps[used, states.takes[place]]:
                np.minimum(value[after], mine, out=value[after])
    return float(value[:, 0].min())


def least_sum(states: States, takes: Sequence[Take], cell: np.ndarray) -> float:
    """The same for the sum."""
    return float(_sums(states, takes, cell)[:, -1].min())


def in_front(states: States, takes: Sequence[Take], cell: np.ndarray) -> np.ndarray:
    """[state, last]: no run of stages for [0, last) on what the state leaves has a lower sum of cell[way, first, last];
    -inf: nothing is known."""
    value = _sums(states, takes, cell)
    nothing = np.full(cell.shape[1], -math.inf)
    return np.stack([value[left] if left >= 0 else nothing for left in states.left])


def _sums(states: States, takes: Sequence[Take], cell: np.ndarray) -> np.ndarray:
    """[state, last]: the least sum of a run of stages for [0, last) on at most what the state has in use."""
    count = cell.shape[1] - 1
    least = _by_take(states, takes, cell)
    value = np.full((len(states.numbers), count + 1), math.inf)
    value[0, 0] = 0.0
    for used in states.order:
        if np.isinf(value[used]).all():
            continue
        places = states.possible[used]
        # What is taken may also stay unused.
        reached = np.minimum((least[places] + value[used][:, None]).min(1), value[used])
        for place, mine in zip(places, reached, strict=True):
            for after in states.steps[used, states.takes[place]]:
                np.minimum(value[after], mine, out=value[after])
    return value


def _by_take(states: States, takes: Sequence[Take], cell: np.ndarray) -> np.ndarray:
    """[take, first, last]: the least over the ways of the same devices."""
    found = np.full((len(states.takes), *cell.shape[1:]), math.inf)
    for way, take in enumerate(takes):
        place = states.takes.index(take)
        np.minimum(found[place], cell[way], out=found[place])
    return found
