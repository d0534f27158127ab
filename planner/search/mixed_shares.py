"""Replicas on devices of several kinds that run unequal numbers of microbatches.

Sets       groups of devices of several kinds (a node, or all); m: microbatches of the step, each run by one replica,
           which holds the whole model.
Choice     a group, m, shares n_r >= 1 with sum n_r = m, and which segments recompute (the same on all devices).
Objective  max_r n_r t_r + max_r u_r + the sum of all gradients over the group
           t_r, u_r: seconds of a microbatch, and of the optimizer, on the device of replica r alone
Subject to every device holds its parameters, and the activations of one microbatch.
Bound      the same with each t_r at its least, memory left out.

For given t the shares are best that give one microbatch after another to the replica that would be done with it first.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

import numpy as np

from shardplan.planner.placement import R
from shardplan.planner.search.case import Case
from shardplan.planner.search.columns import Columns
from shardplan.planner.search.mixed_candidate import MixedCandidate, Sharing
from shardplan.planner.search.mixed_groups import Group
from shardplan.planner.search.mixed_problem import MixedProblem, MixedStage, fits, prices_of
from shardplan.planner.search.mixed_runs import RunCells
from shardplan.planner.trace import mutated

if TYPE_CHECKING:
    from shardplan.planner.search.mixed import MixedSearch


def shares_of(seconds: list[float], microbatches: int) -> tuple[int, ...]:
    """seconds: of a microbatch, per replica. The least maximum of shares times seconds, each at least one."""
    shares = [1] * len(seconds)
    queue = [(2 * t, r) for r, t in enumerate(seconds)]
    heapq.heapify(queue)
    for _ in range(microbatches - len(seconds)):
        _, r = heapq.heappop(queue)
        shares[r] += 1
        heapq.heappush(queue, ((shares[r] + 1) * seconds[r], r))
    return tuple(shares)


def by_speed(search: MixedSearch, gap: float) -> tuple[list[MixedCandidate], float]:
    """The candidates that are better than those before them, and a bound on all choices (inf: there are none)."""
    found: list[MixedCandidate] = []
    bound = best = math.inf
    for takes in _groups(search):
        kinds = tuple(dict.fromkeys(kind for kind, _ in takes))
        (ranks,) = search.ranks([Group(takes, sum(count for _, count in takes), 1)])
        place = [kinds.index(kind) for kind, count in takes for _ in range(count)]
        for m in search.microbatches():
            if m < len(ranks) or search.search.exact(Case(1, 1, 1, m)) is not None:
                continue
            shared = _Shared(search, takes, kinds, place, ranks, m)
            least = shared.bound()
            if least < best * (1 - gap) and (made := shared.candidate()) is not None and made.objective < best:
                found.append(made)
                best = made.objective
            bound = min(bound, least)
    return found[::-1], min(bound, best)


def _groups(search: MixedSearch) -> list[tuple[tuple[int, int], ...]]:
    """What may be a group, as the search's settings allow."""
    degrees, decided = search.decided.degrees, search.decided
    excluded = (
        not search.options.training
        or search.options.zero not in ("auto", 0)
        or degrees.get("pp", 1) != 1
        or degrees.get("tp", 1) != 1
        or decided.levels
        or any(stage for stage in decided.pinned.values())
        or any(placement.is_shard for placement in decided.placements.values())
        or any(mutated(node) for node in search.trace.nodes())
    )
    if excluded:
        return []
    found: dict[tuple[tuple[int, int], ...], None] = {}
    for group in search.groups:
        kinds = {search.devices.name_of(kind) for kind, _ in group.takes}
        if len(kinds) > 1 and group.tp == 1 and degrees.get("dp", group.dp) == group.dp:
            found[group.takes] = None
    return list(found)


class _Shared:
    """One group and number of microbatches. place: the kind of every replica."""

    def __init__(
        self,
        search: MixedSearch,
        takes: tuple[tuple[int, int], ...],
        kinds: tuple[int, ...],
        place: list[int],
        ranks: tuple[int, ...],
        m: int,
    ) -> None:
        self.search, self.m, self.ranks, self.place, self.takes = search, m, ranks, place, takes
        self.priced = search.alone(m, kinds)
        self.summing = search.summing_seconds(sum(self._trained(self.priced.columns[0])), ranks)

    def _trained(self, columns: Columns) -> list[float]:
        """Bytes of every parameter that is trained."""
        found = []
        for node, source in columns.trace.sources.items():
            if source.kind == "param" and source.trainable:
                value = columns.trace.node(node)
                found.append(columns.stored_nbytes(value, columns.local_nbytes(value, R)))
        return found

    def bound(self) -> float:
        """See module docstring."""
        least, once = [], 0.0
        for columns in self.priced.columns:
            floor = sum(columns.floor(i) for i in range(self.search.count))
            least.append(floor + self.search.shared(columns).seconds)
            once = max(once, sum(columns.costs.optimizer(round(n), 0) for n in self._trained(columns)))
        seconds = [least[kind] for kind in self.place]
        return max(n * t for n, t in zip(shares_of(seconds, self.m), seconds, strict=True)) + once + self.summing

    def candidate(self) -> MixedCandidate | None:
        """The best choice with recomputation as some device needs it; None: no device can hold it."""
        search, count = self.search, self.search.count
        ways, segments = search.ways(self.m, self.priced, {}, ())
        problem = search.problem(self.m, ways, (np.zeros((0, 0)),) * count, range(1, 2))
        best: MixedCandidate | None = None
        for way in sorted(range(len(ways)), key=lambda w: ways[w].limit):
            again = self._recomputed(problem, way)
            stages = [self._stage(problem, w, again) for w in range(len(ways))] if again is not None else [None]
            if any(stage is None for stage in stages):
                continue
            prices = [prices_of(problem, stage) for stage in stages if stage is not None]
            alone = [sum(p.seconds for p in held) + w.fixed.seconds for held, w in zip(prices, ways, strict=True)]
            seconds = [alone[kind] for kind in self.place]
            shares = shares_of(seconds, self.m)
            slowest = max(n * t for n, t in zip(shares, seconds, strict=True))
            once = max(sum(p.once_seconds for p in held) for held in prices) + self.summing
            if best is None or slowest + once < best.objective:
                stage, group = stages[way], Group(self.takes, len(self.ranks), 1)
                assert stage is not None
                best = MixedCandidate(
                    self.m, problem, (stage,), (self.ranks,), [group], [self.priced.columns[way]], [segments[way]], {},
                    slowest + once, self.priced.groups, self.priced.columns, segments,
                    sharing=Sharing(shares, slowest / (self.m * alone[way]), once),
                )  # fmt: skip
        return best

    def _recomputed(self, problem: MixedProblem, way: int) -> list[bool] | None:
        """Per segment, whether the best run of one device recomputes it; None: none fits."""
        cells = RunCells(problem, problem.ways[way])
        key = 0, 0, 0, 0, problem.count
        cells.settle(key)
        if not math.isfinite(cells.real[0][key[1:]]):
            return None
        chosen = zip(problem.ways[way].columns, cells.columns(key), strict=True)
        return [columns[number].recomputed for columns, number in chosen]

    def _stage(self, problem: MixedProblem, way: int, again: list[bool]) -> MixedStage | None:
        """All segments on one device, recomputed as wanted, by the fastest columns; None: that does not fit."""
        numbers = []
        for columns, wanted in zip(problem.ways[way].columns, again, strict=True):
            mine = [k for k, column in enumerate(columns) if column.recomputed == wanted]
            if not mine:
                return None
            numbers.append(min(mine, key=lambda k: columns[k].price.seconds))
        stage = MixedStage(way, 0, problem.count, tuple(numbers))
        return stage if fits(problem, [stage]) else None
