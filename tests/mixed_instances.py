"""Small random instances of the stage program for unequal devices, and all their choices one by one."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np

from shardplan.planner.search.mixed_problem import LAYOUTS, MixedProblem, MixedStage, Way, fits, objective
from shardplan.planner.search.problem import Price
from shardplan.planner.search.stage_ilp import Column


def random_problem(rng: random.Random) -> MixedProblem:
    """Two or three kinds of units, ways of one or several devices, few columns, limits that often bind."""
    count = rng.randint(1, 4)
    units = tuple((rng.randint(1, 2),) * rng.randint(1, 2) for _ in range(rng.randint(1, 3)))
    microbatches = rng.choice([1, 2, 4, 8])
    takes = [((kind, used),) for kind, sizes in enumerate(units) for used in range(1, sizes[0] + 1)]
    takes += [((kind, sizes[0]),) * 2 for kind, sizes in enumerate(units) if len(sizes) == 2]
    kinds = [rng.randrange(2) for _ in range(count)]
    ways = []
    for take in rng.sample(takes, min(len(takes), 4)):
        speed = rng.uniform(0.5, 2.0) * sum(used for _, used in take)
        layouts = rng.randint(1, LAYOUTS)
        made = {kind: _columns(rng, speed, layouts) for kind in range(2)}
        received = tuple((rng.random() * 1e8,) * LAYOUTS for _ in range(count))
        fixed = Price(forward_seconds=rng.random() * 0.1, activation_nbytes=1e7)
        columns = tuple(made[kind] for kind in kinds)
        limit = rng.choice([1.5e9, 4e9, 1e12])
        ways.append(Way(take, limit, columns, received, fixed, complete=True))
    size = len(ways) * LAYOUTS
    sends = []
    for _ in range(count):
        send = np.array([[rng.random() * 0.3 for _ in range(size)] for _ in range(size)])
        send[np.array([[rng.random() < 0.15 for _ in range(size)] for _ in range(size)])] = math.inf
        sends.append(send)
    most = min(count, sum(map(sum, units)))
    flights = tuple(min(microbatches, behind) for behind in range(1, most + 1))
    pinned = ((rng.randrange(count), rng.randrange(2)),) if rng.random() < 0.2 else ()
    together = (tuple(rng.sample(range(count), 2)),) if count > 1 and rng.random() < 0.2 else ()
    wanted = frozenset({rng.randint(1, most)}) if rng.random() < 0.2 else frozenset()
    once = 1.0 / (most + microbatches - 1)
    return MixedProblem(tuple(ways), units, tuple(sends), microbatches, most, once, flights, wanted, pinned, together)


def _columns(rng: random.Random, speed: float, layouts: int) -> tuple[Column, ...]:
    found = []
    for enters, leaves in itertools.product(range(layouts), repeat=2):
        for _ in range(rng.randint(0 if enters or leaves else 1, 2)):
            price = Price(
                rng.random() / speed,
                rng.random() / speed,
                rng.random(),
                rng.random() * 1e9,
                rng.random() * 3e8,
                rng.random() * 2e8,
            )
            found.append(Column(price, enters, leaves, len(found)))
    return tuple(found)


def all_choices(problem: MixedProblem) -> Iterator[tuple[MixedStage, ...]]:
    """Every choice whose layouts agree and whose devices are there; limits and constraints are not looked at."""
    for stages in range(1, problem.most_stages + 1):
        for cuts in itertools.combinations(range(1, problem.count), stages - 1):
            ends = list(itertools.pairwise((0, *cuts, problem.count)))
            for ways in itertools.product(range(len(problem.ways)), repeat=stages):
                if _placeable(problem, ways):
                    yield from _runs(problem, ends, ways)


def _runs(
    problem: MixedProblem, ends: list[tuple[int, int]], ways: tuple[int, ...]
) -> Iterator[tuple[MixedStage, ...]]:
    each = [list(_stage(problem, way, *run)) for way, run in zip(ways, ends, strict=True)]
    for stages in itertools.product(*each):
        outer = problem.ways[stages[0].way].columns[0][stages[0].columns[0]].enters == 0
        last = stages[-1]
        if outer and problem.ways[last.way].columns[-1][last.columns[-1]].leaves == 0:
            yield stages


def _stage(problem: MixedProblem, way: int, first: int, last: int) -> Iterator[MixedStage]:
    columns = problem.ways[way].columns[first:last]
    for numbers in itertools.product(*(range(len(c)) for c in columns)):
        chosen = [c[k] for c, k in zip(columns, numbers, strict=True)]
        if all(a.leaves == b.enters for a, b in itertools.pairwise(chosen)):
            yield MixedStage(way, first, last, numbers)


def _placeable(problem: MixedProblem, ways: tuple[int, ...]) -> bool:
    """Whether single devices can be found for all ways, by trying all units."""

    def place(
        takes: list[tuple[int, int]], used: dict[tuple[int, int], int], rest: list[list[tuple[int, int]]]
    ) -> bool:
        if not takes:
            return place(rest[0], used, rest[1:]) if rest else True
        (kind, count), *others = takes
        for unit, size in enumerate(problem.units[kind]):
            if used.get((kind, unit), 0) + count <= size and place(
                others, {**used, (kind, unit): used.get((kind, unit), 0) + count}, rest
            ):
                return True
        return False

    everything = [list(problem.ways[way].takes) for way in ways]
    return place(everything[0], {}, everything[1:])


def optimum(problem: MixedProblem) -> float:
    """The least objective of all choices that fit; inf where none does."""
    return min((objective(problem, c) for c in all_choices(problem) if fits(problem, c)), default=math.inf)
