"""From the trace and its costs to columns: the ways to run a segment on one mesh.

For every kind of segment one op-level problem is built and solved between all layouts of the tensors at its two ends;
each solution is a column. Activations may be recomputed in backward: that is another weighting of the same problem, in
which forward counts twice and activations do not. Segments of one kind share their columns.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from torch import fx

from shardplan.planner.costs.base import Costs
from shardplan.planner.placement import Placement, R, S, fits
from shardplan.planner.propagate import Follow
from shardplan.planner.search.boundaries import Boundaries
from shardplan.planner.search.builder import Builder
from shardplan.planner.search.case import Case
from shardplan.planner.search.elimination import eliminate
from shardplan.planner.search.memory import Keeps
from shardplan.planner.search.op_prices import OpPrices
from shardplan.planner.search.problem import Price, SegmentProblem, Weights, total_price
from shardplan.planner.search.recomputing import Curve, Lever, curve
from shardplan.planner.search.runs import Run, held_by, ops_of
from shardplan.planner.search.segment_ilp import solve_segment
from shardplan.planner.search.solver import Budget
from shardplan.planner.search.stage_ilp import Column
from shardplan.planner.search.storing import Window
from shardplan.planner.trace import Trace, info, mutated
from shardplan.planner.wire import EXACT, Wire


@dataclass(slots=True)
class SegmentColumns:
    """columns of one segment; runs[column.index] says how."""

    columns: list[Column] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


def _kept(price: Price) -> Price:
    """The price of a column whose activations are kept."""
    return replace(
        price,
        backward_seconds=price.backward_seconds + price.regather_seconds,
        transient_nbytes=price.transient_nbytes + price.gathered_nbytes,
        regather_seconds=0.0,
    )


@dataclass(frozen=True, slots=True)
class _Made:
    """A solution of an op-level problem: its price and how it runs."""

    price: Price
    run: Run


class Columns(OpPrices):
    """Columns of every segment on one mesh; cases that differ in their number of stages share them."""

    def __init__(
        self,
        trace: Trace,
        case: Case,
        costs: Costs,
        follows: dict[str, Follow],
        keeps: Keeps,
        boundaries: Boundaries,
        budget: Budget,
        optimizer_factor: float,
        training: bool,
        rematerialize: bool | str,
        levels: dict[str, tuple[int, ...]],
        any_level: tuple[int, ...],
        wire: Wire = EXACT,
        steps: int = 1,
    ) -> None:
        """wire: what sums of gradients over replicas are sent as, once in so many steps."""
        super().__init__(trace, case, costs, follows, keeps, optimizer_factor, training, wire, steps)
        self.boundaries = boundaries
        self.budget = budget
        self.rematerialize = rematerialize
        self.levels, self.any_level = levels, any_level
        self._builders: dict[Hashable, Builder] = {}
        self._made: dict[Hashable, dict[tuple[int, int], _Made]] = {}
        self._columns: dict[Hashable, SegmentColumns] = {}
        self._ends: dict[int, Hashable] = {}
        self._numbers: dict[Hashable, int] = {}
        self._plain: dict[int, int] = {}
        self.proven = 1.0
        """Share of their cost that is proven of all columns: a bound on a program of them is worth that share."""
        self.shared: Price | None = None
        """Of the ops that every stage computes for itself; filled in by `casework`."""
        self._floors: dict[int, float] = {}
        self._curve: Curve | None = None
        self._forwards: dict[int, float] = {}
        self._transients: dict[int, float] = {}
        self._recomputing: dict[int, float] = {}

    def on(self, costs: Costs, levels: dict[str, tuple[int, ...]]) -> Columns:
        """The same mesh on other devices: what depends on shapes alone is shared."""
        if self._calls is None:
            self._calls = {}
        found = copy.copy(self)
        found.costs, found.levels, found.proven, found.shared = costs, levels, 1.0, None
        found._builders, found._made, found._columns, found._op_prices = {}, {}, {}, {}
        found._numbers, found._plain, found._ends = {}, {}, {}
        found._floors, found._transients, found._recomputing = {}, {}, {}
        found._forwards, found._curve = {}, None
        return found

    # -- layouts -------------------------------------------------------------------------------------------------------

    def boundary_layouts(self, index: int) -> list[Placement]:
        """Layouts that the free tensor behind a segment may have; whole first."""
        node = self.boundaries.free[index] if index >= 0 else None
        found = [R]
        if node is not None and self.tp > 1 and len(info(node).shape) > 1:
            shards = (S(1), S(0)) if self.boundaries.mixes else (S(1),)
            found += [s for s in shards if fits(info(node).shape, self.layout(node, s), self.mesh)]
        return found

    def levels_of(self, node: fx.Node) -> tuple[int, ...]:
        """Levels at which a parameter may be stored."""
        return self.levels.get(node.name, self.any_level)

    def window(self, index: int, allowed: Mapping[fx.Node, Sequence[Placement]]) -> Window:
        """Of a segment that holds these parameters and buffers, each in one of these placements."""
        if len(self.dp_ranks) == 1:
            return Window()
        forward = backward = 0.0
        for node in ops_of(self.trace, self.trace.segments[index]):
            prices = [self.op_price(node, s) for s in self.legal(node)]
            forward += min((p.forward_seconds for p in prices), default=0.0)
            backward += min((p.backward_seconds for p in prices), default=0.0)
        held = [node for node in allowed if self.trace.sources[node.name].kind == "param"]
        return Window(forward, backward, sum(min(self.local_nbytes(n, p) for p in allowed[n]) for n in held))

    # -- columns -------------------------------------------------------------------------------------------------------

    def of(self, index: int, forced: dict[str, Placement], weights: Sequence[Weights]) -> SegmentColumns:
        """Columns of segment `index`: the best for every weighting, between all layouts at its ends, with and without
        recomputation. forced: tp placements of parameters that the user or a tie fixes."""
        return self.of_all([index], forced, weights)[0]

    def of_all(
        self, indices: Iterable[int], forced: dict[str, Placement], weights: Sequence[Weights]
    ) -> list[SegmentColumns]:
        """The same of several segments; segments of one kind share one object."""
        weighed = tuple(weights)
        mine: dict[int, SegmentColumns] = {}
        found = []
        for index in indices:
            kind = self._kind(index, forced)
            if kind not in mine:
                key = (kind, weighed)
                if key not in self._columns:
                    self._columns[key] = self._joined(index, kind, forced, weights)
                mine[kind] = self._columns[key]
            found.append(mine[kind])
        return found

    def _kind(self, index: int, forced: dict[str, Placement]) -> int:
        """Equal for segments that have the same columns."""
        if not forced and index in self._plain:
            return self._plain[index]
        kind = self._numbers.setdefault(self._described(index, forced), len(self._numbers))
        if not forced:
            self._plain[index] = kind
        return kind

    def _described(self, index: int, forced: dict[str, Placement]) -> Hashable:
        segment = self.trace.segments[index]
        if index not in self._ends:
            entering, leaving = self.boundary_layouts(index - 1), self.boundary_layouts(index)
            tensor = self.boundaries.before(index)
            nbytes = tuple(self.local_nbytes(tensor, p) for p in entering) if tensor is not None else ()
            batch = tuple(f.strategies.get(name) for f in self.follows.values() for name in segment.nodes)
            layouts = tuple(map(str, entering)), tuple(map(str, leaving))
            self._ends[index] = self.boundaries.place[index], layouts, nbytes, batch
        # Forced parameters are named, so segments with different ones do not share a solution.
        mine = ()
        if forced or self.levels:
            held = held_by(self.trace, ops_of(self.trace, segment))
            mine = tuple(sorted((n.name, str(forced[n.name])) for n in held if n.name in forced))
            mine += tuple((place, self.levels[n.name]) for place, n in enumerate(held) if n.name in self.levels)
        return segment.kind, self._ends[index], mine

    def _joined(
        self, index: int, kind: Hashable, forced: dict[str, Placement], weights: Sequence[Weights]
    ) -> SegmentColumns:
        modes = self._modes(index)
        wanted = [(w.again() if again else w, again) for w in weights for again in modes]
        found = SegmentColumns()
        seen: set[tuple[object, ...]] = set()
        solved = self._solve(index, kind, forced, [w for w, _ in wanted])
        for ends in sorted({key for made in solved for key in made}):
            for (_, recompute), made in zip(wanted, solved, strict=True):
                if ends not in made:
                    continue
                price, run = made[ends].price, made[ends].run
                mine = self.whole(index, price, ends[0], recompute)
                if (ends, mine) in seen:
                    continue
                seen.add((ends, mine))
                found.columns.append(Column(mine, *ends, len(found.runs), recompute))
                found.runs.append(replace(run, rematerialized=recompute))
        return found

    def floor(self, index: int) -> float:
        """Seconds of segment `index` and a microbatch that no column of it can undercut: every op by its cheapest legal
        split, and nothing converted."""
        kind = self.trace.segments[index].kind
        if kind not in self._floors:
            total = 0.0
            for node in ops_of(self.trace, self.trace.segments[index]):
                total += min((self.op_price(node, s).seconds for s in self.legal(node)), default=0.0)
            self._floors[kind] = total
        return self._floors[kind]

    def curve(self) -> Curve:
        """What computing again takes at least for the bytes that it saves, over all segments."""
        if self._curve is None:
            self._curve = curve(self._lever(index) for index in range(len(self.trace.segments)))
        return self._curve

    def _lever(self, index: int) -> Lever:
        tensor = self.boundaries.before(index)
        layouts = self.boundary_layouts(index - 1)
        entering = min(self.local_nbytes(tensor, p) for p in layouts) if tensor is not None else 0.0
        transient, modes = self.least_transient(index), self._modes(index)
        kept = self.least_recomputing(index) - transient if False in modes else entering
        return Lever(kept, entering, self._least_forward(index) if True in modes else math.inf, transient)

    def _least_forward(self, index: int) -> float:
        """Seconds of a segment's forward, every op by its cheapest legal split."""
        kind = self.trace.segments[index].kind
        if kind not in self._forwards:
            nodes = ops_of(self.trace, self.trace.segments[index])
            prices = ([self.op_price(node, s) for s in self.legal(node)] for node in nodes)
            self._forwards[kind] = sum(min((p.forward_seconds for p in mine), default=0.0) for mine in prices)
        return self._forwards[kind]

    def least_transient(self, index: int) -> float:
        """Bytes that some op of the segment holds while it runs, whichever splits are chosen."""
        kind = self.trace.segments[index].kind
        if kind not in self._transients:
            self._transients[kind] = max(
                (
                    min((self.op_price(node, s).transient_nbytes for s in self.legal(node)), default=0.0)
                    for node in ops_of(self.trace, self.trace.segments[index])
                ),
                default=0.0,
            )
        return self._transients[kind]

    def least_recomputing(self, index: int) -> float:
        """The same where the segment's activations are recomputed: then it holds them while it runs backwards."""
        segment = self.trace.segments[index]
        if segment.kind not in self._recomputing:
            self._recomputing[segment.kind] = sum(
                min((self.op_price(node, s).activation_nbytes for s in self.legal(node)), default=0.0)
                for node in ops_of(self.trace, segment)
            )
        return self._recomputing[segment.kind] + self.least_transient(index)

    def _modes(self, index: int) -> tuple[bool, ...]:
        writes = any(mutated(self.trace.node(n)) for n in self.trace.segments[index].nodes)
        if not self.training or writes or self.rematerialize is False:
            return (False,)
        return (True,) if self.rematerialize is True else (False, True)

    def whole(self, index: int, price: Price, enters: int, recompute: bool) -> Price:
        """The price of a column from that of its ops; enters: number of the layout that comes in."""
        return self._recomputed(index, price, self.boundary_layouts(index - 1)[enters]) if recompute else _kept(price)

    def _recomputed(self, index: int, price: Price, entering: Placement) -> Price:
        """The same column, its activations recomputed: the forward runs again, only what enters is kept."""
        tensor = self.boundaries.before(index)
        kept = self.local_nbytes(tensor, entering) if tensor is not None else 0.0
        held = price.activation_nbytes + price.gathered_nbytes
        return replace(
            price,
            backward_seconds=price.backward_seconds + price.forward_seconds,
            activation_nbytes=kept,
            transient_nbytes=price.transient_nbytes + held,
            regather_seconds=0.0,
            gathered_nbytes=held,
        )

    def _solve(
        self, index: int, kind: Hashable, forced: dict[str, Placement], weights: Sequence[Weights]
    ) -> list[dict[tuple[int, int], _Made]]:
        """Per weighting, (layout that enters, layout that leaves) -> the best run of the segment."""
        missing = [w for w in dict.fromkeys(weights) if (kind, w) not in self._made]
        if missing:
            builder = self._builders.get(kind)
            if builder is None:
                builder = self._builders[kind] = Builder(self, index, forced)
            for weighting, made in zip(missing, self._run(builder, missing), strict=True):
                self._made[kind, weighting] = made
        return [self._made[kind, w] for w in weights]

    def _run(self, builder: Builder, weights: list[Weights]) -> list[dict[tuple[int, int], _Made]]:
        problem = builder.problem
        if problem is None:
            return [{} for _ in weights]
        solved = eliminate(problem, weights)
        options = [m.options for m in solved] if solved is not None else [self._program(problem, w) for w in weights]
        found: list[dict[tuple[int, int], _Made]] = []
        for by_ends in options:
            found.append({})
            for ends, choice in by_ends.items():
                price = total_price(problem, choice)
                assert price is not None
                found[-1][ends] = _Made(price + builder.constant, builder.run(choice))
        return found

    def _program(self, problem: SegmentProblem, weights: Weights) -> dict[tuple[int, int], tuple[int, ...]]:
        """The same by integer programs."""
        found = {}
        for enters, leaves in product(*map(range, problem.ends)):
            fixed, kept = problem.between(enters, leaves)
            choice = solve_segment(fixed, weights, self.budget) if all(fixed.ops) else None
            if choice is not None:
                self.proven = min(self.proven, choice.proven)
                found[enters, leaves] = tuple(keep[k] for keep, k in zip(kept, choice.options, strict=True))
        return found

    def most_adding(self, index: int) -> float:
        """The same of all parameters of a segment, at most."""
        held = held_by(self.trace, ops_of(self.trace, self.trace.segments[index]))
        trained = [n for n in held if self.training and self.trace.sources[n.name].trainable]
        return sum(self.adding_seconds(self.local_nbytes(node, R)) for node in trained)
