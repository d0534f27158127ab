"""The search for unequal devices: stages on groups of devices of their own size, kind and mesh.

Devices of one node, kind and limit form a unit; units that look alike are of one kind. A stage runs on some devices of
one unit, on several whole units of a kind, on a whole node of several kinds, or on everything; each such group with
every mesh (dp, tp) is a way (`mixed_problem`). Which ways in which order, where the cuts are and how every segment runs
is decided together (`mixed_boxes`), once per number of microbatches and placement of tied parameters. Numbers of
microbatches are taken by a bound from the fastest split of every op:

    step >= (m - 1) * (least slowest stage) + (least sum of stages), where nothing is converted, sent or held.

Prices of a way are those of its first devices; where units of a kind have several nodes, a message between two stages
on them is bounded as if it stayed in the node, and the plan is priced on its own ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from shardplan.errors import ConflictingConstraints
from shardplan.planner.placement import Placement, R
from shardplan.planner.schedules import in_flight
from shardplan.planner.search.case import Case
from shardplan.planner.search.columns import Columns, SegmentColumns
from shardplan.planner.search.mixed_boxes import solve_mixed
from shardplan.planner.search.mixed_candidate import MixedCandidate, Priced
from shardplan.planner.search.mixed_groups import DeviceGroups, Group
from shardplan.planner.search.mixed_problem import LAYOUTS, MixedChoice, MixedProblem, Way
from shardplan.planner.search.mixed_shares import by_speed
from shardplan.planner.search.mixed_states import States, least_slowest, least_sum
from shardplan.planner.search.op_prices import SAMPLE_NBYTES
from shardplan.planner.search.placed_costs import PlacedCosts
from shardplan.planner.search.problem import Price, Weights
from shardplan.planner.search.runs import held_by, ops_of
from shardplan.planner.search.stage_cells import Known
from shardplan.planner.trace import info
from shardplan.planner.transfers import Side, traffic, transfers

if TYPE_CHECKING:
    from shardplan.planner.search.search import Search

_MOST_STAGES = 16
_LEANEST = 1e8
_LAST_SHARE = 0.1
"""Of the time, in which nothing new is begun."""
_PRICES = (0.01, 0.05, 0.2, 1.0, 5.0)
"""Prices of a byte, as the share of the model's seconds that all of a device's memory is worth."""
Traffic = dict[tuple[int, int], int]


class MixedSearch:
    """See module docstring."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.trace, self.cluster, self.costs = search.trace, search.cluster, search.costs
        self.work, self.options, self.decided = search.work, search.options, search.decided
        self.count = len(self.trace.segments)
        self.devices = DeviceGroups(search)
        self.units, self.groups, self.ranks = self.devices.units, self.devices.groups, self.devices.ranks
        most = min(self.count, len(self.cluster), _MOST_STAGES)
        self.most_stages = min(most, self.decided.degrees.get("pp", most))
        if most == _MOST_STAGES < min(self.count, len(self.cluster)):
            self.search.tally.notes.append(f"pipelines of unequal devices were searched up to {_MOST_STAGES} stages")
        self.states: States | None = None
        self._traffic: dict[object, tuple[Traffic, Traffic] | None] = {}

    # -- ways ----------------------------------------------------------------------------------------------------------

    def microbatches(self) -> list[int]:
        batch = self.trace.batch_size
        wanted = self.options.microbatches
        return [m for m in range(1, batch + 1) if batch % m == 0 and (wanted == "auto" or m == wanted)]

    def priced(self, m: int) -> Priced:
        """Groups whose replicas divide the batch and compute exactly, with the makers of their columns."""
        found = Priced()
        for group in self.groups:
            case = Case(1, group.dp, group.tp, m)
            if self.trace.batch_size % (m * group.dp) or self.search.exact(case) is not None:
                continue
            found.groups.append(group)
            found.columns.append(self._columns(case, group))
        return found

    def _columns(self, case: Case, group: Group) -> Columns:
        ranks = self.ranks([group])[0]
        placed = PlacedCosts(self.costs, self.cluster, ranks, group.dp, group.tp)
        return self.work.columns(case).on(
            placed, {**self.work.columns(case).levels, **{name: (0,) for name in self.work.tied}}
        )

    def alone(self, m: int, kinds: Sequence[int]) -> Priced:
        """Single devices of some kinds of units."""
        groups = [Group(((kind, 1),), 1, 1) for kind in kinds]
        return Priced(groups, [self._columns(Case(1, 1, 1, m), group) for group in groups])

    def summing_seconds(self, nbytes: float, ranks: tuple[int, ...]) -> float:
        """Of a sum of gradients, in large messages."""
        placed = PlacedCosts(self.costs, self.cluster, ranks, len(ranks), 1)
        each = placed.collective("all_reduce", SAMPLE_NBYTES, tuple(range(len(ranks))))
        return (each * nbytes / SAMPLE_NBYTES + placed.copy(round(nbytes), 0)) * placed.overheads(0).reduce

    def floor(self, m: int, priced: Priced) -> float:
        """See module docstring."""
        cell = np.full((len(priced.groups), self.count + 1, self.count + 1), math.inf)
        for way, columns in enumerate(priced.columns):
            each = [columns.floor(index) for index in range(self.count)]
            fixed = self.shared(columns).seconds
            for first in range(self.count):
                cell[way, first, first + 1 :] = np.cumsum(each[first:]) + fixed
        takes = [group.takes for group in priced.groups]
        if self.states is None:
            self.states = States(self.units, (group.takes for group in self.groups))
        slowest = least_slowest(self.states, takes, cell)
        return (m - 1) * slowest + least_sum(self.states, takes, cell) if m > 1 else slowest

    def shared(self, columns: Columns) -> Price:
        """`casework.shared` with the prices of the way."""
        return self.work.shared(columns)

    def ways(
        self, m: int, priced: Priced, forced: dict[str, Placement], prices: Sequence[float]
    ) -> tuple[list[Way], list[list[SegmentColumns]]]:
        ways, made = [], []
        flights = self._flights(m)
        for group, columns in zip(priced.groups, priced.columns, strict=True):
            ranks = self.ranks([group])[0]
            limit = float(min(self.cluster.memory_limit(r) for r in ranks))
            seconds = sum(columns.floor(index) for index in range(self.count))
            folded = sorted(1.0 / (stages[-1] + m - 1) for stages in self.ranges())
            known = Known(
                tuple(p * seconds / limit for p in prices), tuple(sorted({flights[0], flights[-1]})), True, folded[0]
            )
            weights = [Weights(once=once) for once in folded]
            for flight in known.flights:
                for price in (_LEANEST / limit, *known.prices):
                    weights.append(Weights(once=folded[0], nbytes=price, in_flight=flight))
            cannot = self._not_split(group)
            mine = (
                {n: p for n, p in forced.items() if n not in cannot}
                if group.tp > 1
                else {n: R for n in forced if n in self.work.tied}
            )
            segments = columns.of_all(range(self.count), mine, weights)
            blocked = self._holding(cannot)
            same = {id(s): tuple(s.columns) for s in segments}
            each = tuple(() if i in blocked else same[id(s)] for i, s in enumerate(segments))
            received = [(0.0,) * LAYOUTS]
            for boundary in range(self.count - 1):
                layouts = columns.boundary_layouts(boundary)
                sizes = [self.crossing_nbytes(columns, boundary, p) for p in layouts]
                received.append((sizes[0], sizes[-1]))
            transients = tuple(columns.least_transient(index) for index in range(self.count))
            fixed = self.shared(columns)
            again = tuple(columns.least_recomputing(index) for index in range(self.count))
            ways.append(Way(group.takes, limit, each, tuple(received), fixed, known, False, transients, again))
            made.append(segments)
        return ways, made

    def crossing_nbytes(self, columns: Columns, boundary: int, placement: Placement) -> float:
        """Bytes of all tensors that cross behind a segment, on one rank."""
        free = self.work.boundaries.free[boundary]
        crossing = self.work.boundaries.crossing[boundary]
        return sum(columns.local_nbytes(node, placement if node is free else R) for node in crossing)

    def _not_split(self, group: Group) -> set[str]:
        """Parameters that the user splits in a way that the group cannot."""
        return {
            name
            for name, placement in self.decided.placements.items()
            if placement.is_shard and (group.tp == 1 or info(self.trace.node(name)).shape[placement.dim] % group.tp)
        }

    def _holding(self, names: set[str]) -> set[int]:
        """Segments that read one of these parameters."""
        return {
            index
            for index, segment in enumerate(self.trace.segments)
            if names and any(node.name in names for node in held_by(self.trace, ops_of(self.trace, segment)))
        }

    def _flights(self, m: int) -> tuple[int, ...]:
        if not self.options.training:
            return (1,) * self.most_stages
        schedule = self.search.schedule
        return tuple(in_flight(schedule, 0, behind, m) for behind in range(1, self.most_stages + 1))

    def problem(self, m: int, ways: list[Way], sends: tuple[np.ndarray, ...], stages: range) -> MixedProblem:
        """Of all numbers of stages up to the largest; of one alone where the range is of one."""
        return MixedProblem(
            tuple(ways),
            self.units,
            sends,
            m,
            stages[-1],
            1.0 / (stages[-1] + m - 1),
            self._flights(m)[: stages[-1]],
            frozenset(stages) if len(stages) == 1 else frozenset(),
            tuple(sorted(self.decided.pinned.items())),
            tuple(self.decided.together),
        )

    # -- messages ------------------------------------------------------------------------------------------------------

    def sends(self, priced: Priced) -> tuple[np.ndarray, ...]:
        size = len(priced.groups) * LAYOUTS
        nothing = np.full((size, size), math.inf)
        known: dict[object, np.ndarray] = {}
        found = [nothing]
        for boundary in range(self.count - 1):
            key = self._signature(boundary)
            if key not in known:
                known[key] = self._send(priced, boundary)
            found.append(known[key])
        return tuple(found)

    def _signature(self, boundary: int) -> object:
        free = self.work.boundaries.free[boundary]
        follows = tuple(self.work.follows.values())
        return tuple(
            (
                info(n).shape,
                info(n).dtype,
                info(n).needs_grad,
                n is free,
                *(str(f[a].strategies.get(n.name)) for f in follows for a in f),
            )
            for n in self.work.boundaries.crossing[boundary]
        )

    def _send(self, priced: Priced, boundary: int) -> np.ndarray:
        size = len(priced.groups) * LAYOUTS
        made = np.full((size, size), math.inf)
        for i, left in enumerate(priced.groups):
            for j, right in enumerate(priced.groups):
                ranks = self.ranks([left, right])
                if not ranks:
                    continue
                for leaves in range(len(priced.columns[i].boundary_layouts(boundary))):
                    for enters in range(len(priced.columns[j].boundary_layouts(boundary))):
                        sent = self.crossing(boundary, priced.columns[i], priced.columns[j], leaves, enters)
                        if sent is not None:
                            there = {(ranks[0][s], ranks[1][t]): n for (s, t), n in sent[0].items()}
                            back = {(ranks[1][s], ranks[0][t]): n for (s, t), n in sent[1].items()}
                            seconds = self.seconds(there) + self.seconds(back)
                            made[i * LAYOUTS + leaves, j * LAYOUTS + enters] = seconds
        return made

    def crossing(
        self, boundary: int, left: Columns, right: Columns, leaves: int, enters: int
    ) -> tuple[Traffic, Traffic] | None:
        """Bytes by (sender, receiver) of a microbatch, and of its gradient; ranks count within their stage. None: the
        layouts cannot follow each other. Between equal meshes a tensor stays as it is, else it arrives whole."""
        same = left.mesh == right.mesh
        if (same and leaves != enters) or (not same and enters):
            return None
        key = self._signature(boundary), left.mesh, right.mesh, leaves, enters
        if key not in self._traffic:
            there: Traffic = {}
            back: Traffic = {}
            free = self.work.boundaries.free[boundary]
            for node in self.work.boundaries.crossing[boundary]:
                out = left.boundary_layouts(boundary)[leaves] if node is free else R
                into = right.boundary_layouts(boundary)[enters] if node is free else R
                source = Side(left.layout(node, out), left.mesh, tuple(range(left.width)))
                target = Side(right.layout(node, into), right.mesh, tuple(range(left.width, left.width + right.width)))
                item = info(node).dtype.itemsize
                _add(there, transfers(info(node).shape, source, target), item, left.width)
                if info(node).needs_grad and self.options.training:
                    _add(back, transfers(info(node).shape, target.dual(), source.dual()), item, -left.width)
            self._traffic[key] = there, back
        return self._traffic[key]

    def seconds(self, sent: Mapping[tuple[int, int], int]) -> float:
        """Until all has arrived, by (rank, rank): a rank sends and receives one message after another, ranks side by
        side."""
        busy: dict[tuple[str, int], float] = {}
        for (source, target), nbytes in sent.items():
            took = self.costs.p2p(nbytes, source, target)
            for end in (("out", source), ("in", target)):
                busy[end] = busy.get(end, 0.0) + took
        return max(busy.values(), default=0.0)

    # -- the search ----------------------------------------------------------------------------------------------------

    def solve(self) -> list[MixedCandidate]:
        """The candidates, best first; the tally says what is proven. Empty: nothing fits."""
        tally, gap = self.search.tally, self.options.gap / 2
        queue = []
        for m in self.microbatches():
            priced = self.priced(m)
            if priced.groups:
                queue.append((self.floor(m, priced), m, priced))
        if not queue:
            raise ConflictingConstraints(
                f"no arrangement of {len(self.cluster)} devices satisfies "
                + (", ".join(map(str, self.options.constraints)) or "the settings")
            )
        found, least = by_speed(self, gap)
        tally.bound = min(tally.bound, least)
        best = found[0].objective if found else math.inf
        for bound, m, priced in sorted(queue, key=lambda entry: entry[:2]):
            if bound >= best * (1 - gap):
                tally.pruned += 1
                tally.bound = min(tally.bound, bound)
                continue
            if found and self._late():
                tally.timed_out = True
                tally.bound = min(tally.bound, bound)
                continue
            for forced in self._forced(m, priced):
                made, proven = self._solve(m, priced, forced, best)
                tally.bound = min(tally.bound, max(bound, proven))
                if made is None:
                    tally.infeasible += math.isinf(proven)
                    tally.pruned += not math.isinf(proven)
                    continue
                tally.solved += 1
                found.append(made)
                best = min(best, made.objective)
                self.search._say(f"m{m}: {made.objective * 1e3:.2f} ms", best)
        tally.timed_out |= self.search.budget.left() <= 0 and tally.bound < best * (1 - gap)
        tally.bound = min(tally.bound, best)
        return sorted(found, key=lambda candidate: candidate.objective)

    def why_missing(self, name: str) -> str:
        """Why a baseline is not among the alternatives."""
        if name == "single device":
            return "does not fit into memory" if not self.decided.degrees else "excluded by the constraints"
        return "excluded by the constraints, the batch or memory"

    def _forced(self, m: int, priced: Priced) -> Iterator[dict[str, Placement]]:
        """Placements of the tied parameters that all groups with tensor parallelism can have."""
        options: list[dict[str, Placement]] | None = None
        for group, columns in zip(priced.groups, priced.columns, strict=True):
            if group.tp > 1:
                mine = self.work._forced(Case(1, group.dp, group.tp, m), columns)
                options = mine if options is None else [option for option in options if option in mine]
        yield from options or [{}]

    def _solve(
        self, m: int, priced: Priced, forced: dict[str, Placement], best: float
    ) -> tuple[MixedCandidate | None, float]:
        """With few columns, and where the gap stays too large, with those for more prices of a byte. Whatever the time,
        something is looked for as long as nothing is found."""
        gap, sends = self.options.gap / 2, self.sends(priced)
        found: MixedCandidate | None = None
        bound = 0.0
        for prices in ((), _PRICES):
            ways, segments = self.ways(m, priced, forced, prices)
            proven = math.inf
            for stages in self.ranges():
                if best < math.inf and self._late():
                    proven = 0.0
                    break
                problem = self.problem(m, ways, sends, stages)
                choice, least = solve_mixed(problem, gap, best, self._half_of_the_time())
                proven = min(proven, least)
                if choice is not None:
                    found = self._candidate(m, priced, problem, choice, segments, forced)
                    best = choice.objective
            bound = max(bound, proven * min(columns.proven for columns in priced.columns))
            if bound >= best * (1 - gap) or (best < math.inf and self._late()):
                break
        return found, bound

    def _late(self) -> bool:
        """Whether it is too late to begin a program."""
        return self.search.budget.left() < _LAST_SHARE * self.options.time_limit

    def _half_of_the_time(self) -> Callable[[], float]:
        """Seconds left to one program: the other half is for those that follow."""
        left = self.search.budget.left
        kept = left() / 2
        return lambda: left() - kept

    def ranges(self) -> list[range]:
        """Numbers of stages that are solved together: the fewer, the more of the once-a-step work the bound sees."""
        degree = self.decided.degrees.get("pp")
        if degree is not None:
            return [range(degree, degree + 1)] if degree <= self.most_stages else []
        ends = [*(end for end in (2, 4, 8) if end < self.most_stages), self.most_stages]
        return [range(low + 1, high + 1) for low, high in zip([0, *ends], ends, strict=False) if low < high]

    def _candidate(
        self,
        m: int,
        priced: Priced,
        problem: MixedProblem,
        choice: MixedChoice,
        segments: list[list[SegmentColumns]],
        forced: dict[str, Placement],
    ) -> MixedCandidate:
        groups = [priced.groups[s.way] for s in choice.stages]
        ranks = tuple(self.ranks(groups))
        assert len(ranks) == len(groups)
        columns = [priced.columns[s.way] for s in choice.stages]
        made = [segments[s.way] for s in choice.stages]
        return MixedCandidate(
            m,
            problem,
            choice.stages,
            ranks,
            groups,
            columns,
            made,
            forced,
            choice.objective,
            priced.groups,
            priced.columns,
            segments,
        )


def _add(into: Traffic, boxes: Sequence[object], itemsize: int, shift: int) -> None:
    for (source, target), numel in traffic(boxes).items():  # type: ignore[arg-type]
        pair = (source, target - shift) if shift > 0 else (source + shift, target)
        into[pair] = into.get(pair, 0) + numel * itemsize
