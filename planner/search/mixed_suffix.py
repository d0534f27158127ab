"""Stages of unequal devices: a program over suffixes.

From the last stage forwards, V[l, u, a, h] is the least sum of c = t + once * u and of sends of a pipeline of l stages
for the segments [a, n) that uses the devices u (a multiset of used counts per kind of unit: units of a kind are alike)
and begins with head h = (way, layout that enters). Microbatches in flight depend on l alone; where all flights have the
same cells, l is left out. A way is left out of a cell where another on the same devices, with the same layouts at both
ends, costs no more there with the most that its messages can cost more than the first one's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shardplan.planner.search.mixed_problem import LAYOUTS, MixedProblem
from shardplan.planner.search.mixed_states import States, in_front

Layer = dict[int, np.ndarray]
"""State -> [first, head]."""
Step = tuple[int, int, int, int, int, int]
"""Of a path: flight (its position), layouts that enter and leave, first and last segment, way."""


@dataclass(frozen=True, slots=True)
class _Runs:
    """Cells of the ways of one set of devices, ordered by (first, head). tails, lasts, costs: [cell]; starts, firsts,
    heads: [(first, head)], the first of its cells, and what it is."""

    tails: np.ndarray
    lasts: np.ndarray
    costs: np.ndarray
    starts: np.ndarray
    firsts: np.ndarray
    heads: np.ndarray

    def reached(self, behind: np.ndarray) -> np.ndarray:
        """[(first, head)]: the least. behind: [tail, last], of what follows."""
        return np.minimum.reduceat(self.costs + behind[self.tails, self.lasts], self.starts)

    def of(self, first: int, head: int) -> slice:
        """Its cells."""
        place = int(np.flatnonzero((self.firsts == first) & (self.heads == head))[0])
        end = int(self.starts[place + 1]) if place + 1 < len(self.starts) else len(self.costs)
        return slice(int(self.starts[place]), end)


class Suffixes:
    """The program of one problem, for tables of cells [flight][way, enters, leaves, first, last]."""

    def __init__(self, problem: MixedProblem, states: States) -> None:
        self.problem, self.states = problem, states
        self.count, self.heads = problem.count, len(problem.ways) * LAYOUTS
        self.flights = sorted(set(problem.in_flight))
        self.sends = np.stack([s if s.size else np.full((self.heads,) * 2, math.inf) for s in problem.sends])
        self.before: dict[int, list[int]] = {}
        for used, _ in states.steps:
            for after in {after for take in states.takes for after in states.steps.get((used, take), ())}:
                held = self.before.setdefault(after, [])
                if used not in held:
                    held.append(used)
        self.rivals = self._rivals()
        self._room = np.zeros(0)

    # -- ways that others replace --------------------------------------------------------------------------------------

    def _rivals(self) -> list[tuple[int, int, np.ndarray]]:
        """(way, another on the same devices, [enters, leaves, first, last] by how much messages of the first may cost
        more)."""
        found = []
        ends = np.zeros((LAYOUTS, 1)), np.zeros((LAYOUTS, 1))
        for a, mine in enumerate(self.problem.ways):
            for b, theirs in enumerate(self.problem.ways):
                if a != b and mine.takes == theirs.takes:
                    heads = [slice(w * LAYOUTS, (w + 1) * LAYOUTS) for w in (a, b)]
                    into = _more(self.sends[:, :, heads[0]], self.sends[:, :, heads[1]], 1).T  # [enters, first]
                    out = _more(self.sends[:, heads[0]], self.sends[:, heads[1]], 2).T  # [leaves, last]
                    into = np.concatenate([ends[0], into[:, 1:], ends[0]], 1)
                    out = np.concatenate([ends[1], out[:, 1:], ends[1]], 1)
                    found.append((a, b, into[:, None, :, None] + out[None, :, None, :]))
        return found

    def _kept(self, table: np.ndarray) -> np.ndarray:
        """The table without cells that a rival replaces."""
        found = table.copy()
        for a, b, more in self.rivals:
            with_more = table[a] + more
            beaten = with_more <= table[b] if a < b else with_more < table[b]
            found[b][beaten & np.isfinite(with_more)] = math.inf
        return found

    def _runs(self, table: np.ndarray) -> list[_Runs | None]:
        """Per take."""
        table, found = self._kept(table), []
        for take in self.states.takes:
            ways = [w for w, way in enumerate(self.problem.ways) if way.takes == take]
            part = table[ways].transpose(3, 0, 1, 2, 4)  # [first, way, enters, leaves, last]
            firsts, places, enters, leaves, lasts = np.nonzero(np.isfinite(part))
            if not len(firsts):
                found.append(None)
                continue
            way = np.array(ways)[places]
            heads, tails = way * LAYOUTS + enters, way * LAYOUTS + leaves
            key = firsts * self.heads + heads
            starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
            costs = part[firsts, places, enters, leaves, lasts]
            found.append(_Runs(tails, lasts, costs, starts, firsts[starts], heads[starts]))
        return found

    # -- the program ---------------------------------------------------------------------------------------------------

    def solve(self, tables: list[np.ndarray], stages: int = 0, below: float = math.inf) -> tuple[float, list[Step]]:
        """Least sum, and its stages first to last. stages: their number, 0: any. below: sums that are not less are of
        no interest, and may be given as inf."""
        cell = np.minimum.reduce([table.min((1, 2)) for table in tables])  # [way, first, last]
        front = in_front(self.states, [way.takes for way in self.problem.ways], cell)
        closed = np.isposinf(front)
        self._room = np.where(closed, -math.inf, below - np.where(closed, 0.0, front))
        if float(front[0, self.count]) >= below:
            return math.inf, []
        fixed = stages or self.problem.stages or self.problem.pinned
        if not fixed and all(np.array_equal(tables[0], table) for table in tables[1:]):
            best, found = self._together(tables[0])
            if len(found) <= self.problem.most_stages:
                return best, found
        return self._layered(tables, stages)

    def _layered(self, tables: list[np.ndarray], stages: int) -> tuple[float, list[Step]]:
        problem = self.problem
        layers: list[Layer] = [{0: np.zeros(0)}]
        used_runs = []
        best, at, shown = math.inf, 0, tables[0]
        for behind in range(1, problem.most_stages + 1):
            number = self.flights.index(problem.flight(behind))
            table = self._pinned(tables[number], behind, stages) if stages else tables[number]
            same = used_runs and (table is shown or np.array_equal(table, shown))
            mine, shown = used_runs[-1] if same else self._runs(table), table
            used_runs.append(mine)
            layer: Layer = {}
            for used in self.states.order:
                self._extend(layers[-1], layer, used, mine)
            layers.append(layer)
            final = self._least(layer)
            allowed = (not stages or behind == stages) and (not problem.stages or behind in problem.stages)
            if final < best and allowed:
                best, at = final, behind
            if not layer:
                break
        if not at:
            return best, []
        used, head, first, found = *self._final(layers[at]), 0, []
        for behind in range(at, 0, -1):
            source, target = layers[behind - 1 : behind + 1]
            used, tail, last = self._origin(source, target, used, first, head, used_runs[behind - 1])
            found.append(self._step(behind, head, tail, first, last))
            head, first = self._next_head(layers[behind - 1], used, last, tail), last
        return best, found

    def _together(self, table: np.ndarray) -> tuple[float, list[Step]]:
        """Where flights make no difference all numbers of stages share one layer."""
        layer, start, runs = {}, {0: np.zeros(0)}, self._runs(table)
        self._extend(start, layer, 0, runs)
        for used in self.states.order:
            self._extend(layer, layer, used, runs)
        best = self._least(layer)
        if math.isinf(best):
            return best, []
        used, head, first, found = *self._final(layer), 0, []
        while first < self.count:
            used, tail, last = self._origin(layer | start, layer, used, first, head, runs)
            found.append((head, tail, first, last))
            if last < self.count:
                head = self._next_head(layer, used, last, tail)
            first = last
        most = self.problem.most_stages
        return best, [self._step(min(len(found) - s, most), *each) for s, each in enumerate(found)]

    def _step(self, behind: int, head: int, tail: int, first: int, last: int) -> Step:
        number = self.flights.index(self.problem.flight(behind))
        return number, head % LAYOUTS, tail % LAYOUTS, first, last, head // LAYOUTS

    def _pinned(self, table: np.ndarray, behind: int, stages: int) -> np.ndarray:
        table = table.copy()
        first, last = np.indices((self.count + 1, self.count + 1))
        for segment, stage in self.problem.pinned:
            inside = (first <= segment) & (segment < last)
            table[..., ~inside if stage == stages - behind else inside] = math.inf
        return table

    def _least(self, layer: Layer) -> float:
        """Of a pipeline that begins with the first segment."""
        return float(min((held[0, ::LAYOUTS].min() for held in layer.values()), default=math.inf))

    def _behind(self, layer: Layer, used: int) -> np.ndarray:
        """[tail, last]: the least of what follows a stage that ends there by that way and layout."""
        found = np.full((self.heads, self.count + 1), math.inf)
        if used == 0:  # nothing follows
            found[::LAYOUTS, self.count] = 0.0
            return found
        least = layer[used].min(1)
        lasts = np.flatnonzero(np.isfinite(least) & (least <= self._room[used]))
        lasts = lasts[(lasts > 0) & (lasts < self.count)]
        if len(lasts):
            found[:, lasts] = (self.sends[lasts] + layer[used][lasts][:, None, :]).min(2).T
        return found

    def _extend(self, source: Layer, target: Layer, used: int, runs: list[_Runs | None]) -> None:
        if used not in source:
            return
        behind = self._behind(source, used)
        if not np.isfinite(behind).any():
            return
        for place in self.states.possible[used]:
            mine = runs[place]
            if mine is None:
                continue
            reached = mine.reached(behind)
            for after in self.states.steps[used, self.states.takes[place]]:
                if not (np.isfinite(reached) & (reached <= self._room[after, mine.firsts])).any():
                    continue
                held = target.get(after)
                if held is None:
                    held = target[after] = np.full((self.count + 1, self.heads), math.inf)
                held[mine.firsts, mine.heads] = np.minimum(held[mine.firsts, mine.heads], reached)

    # -- backwards -----------------------------------------------------------------------------------------------------

    def _final(self, layer: Layer) -> tuple[int, int]:
        """State and head of the best."""
        used = min(sorted(layer), key=lambda state: layer[state][0, ::LAYOUTS].min())
        return used, int(layer[used][0, ::LAYOUTS].argmin()) * LAYOUTS

    def _origin(
        self,
        source: Layer,
        target: Layer,
        after: int,
        first: int,
        head: int,
        runs: list[_Runs | None],
    ) -> tuple[int, int, int]:
        """State before, tail and last segment of the stage by which a value was reached."""
        take = self.problem.ways[head // LAYOUTS].takes
        mine, value = runs[self.states.takes.index(take)], target[after][first, head]
        assert mine is not None
        cells = mine.of(first, head)
        tails, lasts = mine.tails[cells], mine.lasts[cells]
        for used in self.before[after]:
            if used not in source or after not in self.states.steps.get((used, take), ()):
                continue
            reached = mine.costs[cells] + self._behind(source, used)[tails, lasts]
            at = int(reached.argmin())
            if reached[at] == value:
                return used, int(tails[at]), int(lasts[at])
        raise AssertionError("a value without an origin")

    def _next_head(self, layer: Layer, used: int, last: int, tail: int) -> int:
        return int((self.sends[last][tail] + layer[used][last]).argmin()) if last < self.count else 0


def _more(mine: np.ndarray, theirs: np.ndarray, axis: int) -> np.ndarray:
    """The most by which seconds of messages are more than others, over an axis; at least 0."""
    possible = np.isfinite(theirs)
    more = np.where(possible, mine - np.where(possible, theirs, 0.0), 0.0)
    return np.maximum(more.max(axis), 0.0)
