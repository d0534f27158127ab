"""One case of the outer search: its columns, its stage program, and columns made where memory binds.

Columns are made that weigh memory: the fastest, the leanest, a few in between, and those for the prices of a byte that
the stage program asks for (column generation); for each weighting they are the best there is, so `certified` gives a
bound over all columns, not only over those that were made. A case whose bound can still win is solved with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from shardplan.errors import NotSupported, SolverTimeout
from shardplan.planner.placement import Layout, Mesh, Placement, R, fits
from shardplan.planner.propagate import Follow, follow_batch, parts_of
from shardplan.planner.rules import strategies
from shardplan.planner.schedules import in_flight
from shardplan.planner.search.boundaries import Boundaries
from shardplan.planner.search.candidate import Candidate, Prepared
from shardplan.planner.search.case import Case
from shardplan.planner.search.columns import Columns, SegmentColumns
from shardplan.planner.search.memory import Keeps
from shardplan.planner.search.problem import Price, Weights
from shardplan.planner.search.recomputing import Curve
from shardplan.planner.search.runs import held_by, ops_of
from shardplan.planner.search.stage_cells import Known, hull_steps
from shardplan.planner.search.stage_dp import certified
from shardplan.planner.search.stage_ilp import StageChoice, StageProblem
from shardplan.planner.search.stages import solve_stages
from shardplan.planner.search.storing import AUTO, Stored, Window, ways_to_store
from shardplan.planner.trace import info, infos, needs_grad, resolve
from shardplan.planner.wire import EXACT, Wire

if TYPE_CHECKING:
    from shardplan.planner.search.search import Search

_TIED_OPTIONS = 8
"""Up to so many combinations of placements of tied parameters are all tried."""
_ROUNDS = 4
_PRICES = 8
"""Prices of a byte between what the fastest columns pay and what the leanest do."""
_LEANEST = 1e8
_CEILING = 1.25
"""A bound is raised to so much of itself at once: what costs more need not be looked at then."""
_SHARES = 2
"""Of segments that a stage has many of, so many different numbers."""


@dataclass(slots=True)
class Sketch:
    """A prepared case and what is proven of it. known: weightings for which its columns are the best there are. bound:
    on every plan of the case with these tied placements (inf: none fits). wanted: prices of a byte that may raise it.
    refined: whether the columns are those to solve it with, and the bound is what they prove.
    """

    prepared: Prepared
    problem: StageProblem
    known: Known
    bound: float
    wanted: tuple[float, ...] = ()
    refined: bool = False


@dataclass(frozen=True, slots=True)
class Lower:
    """seconds: of every segment and a microbatch, from below; total: of all of them one after the other; fixed: of
    every stage; again: what computing activations again adds to the total."""

    seconds: list[float]
    total: float
    fixed: float
    again: Curve


class Cases:
    """Solves cases for a search; keeps what cases share."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.trace = search.trace
        self.cluster = search.cluster
        self.costs = search.costs
        self.options = search.options
        self.decided = search.decided
        self.budget = search.budget
        wire = Wire.parse(search.options.reduction)
        self.wire = EXACT if wire.exact else wire
        self.keeps = Keeps(search.trace, search.costs)
        self.boundaries = Boundaries(search.trace)
        self.limits = [search.cluster.memory_limit(r) for r in range(len(search.cluster))]
        self.makers: dict[tuple[int, ...], Columns] = {}
        self.follows: dict[tuple[int, int], dict[str, Follow]] = {}
        self._followed_for: list[tuple[int, int, frozenset[tuple[tuple[int, ...], Layout]], dict[str, Follow]]] = []
        self._floors: dict[tuple[int, ...], Lower] = {}
        self._cheapest: dict[tuple[int, ...], Lower] = {}
        self._twins: dict[tuple[int, int], bool] = {}
        self.tied = self._tied()
        rounded = {node for node, source in search.trace.sources.items() if source.name in search.trace.masters}
        if rounded and (self.options.zero == 1 or any(self.decided.levels.get(node) == (1,) for node in rounded)):
            raise NotSupported(
                "level 1 for parameters that are used in a lower precision than they are stored in",
                hints=["zero=2 splits their gradients as well"],
            )

    def _tied(self) -> list[str]:
        """Parameters that more than one segment reads: they get one placement, tried in turn."""
        readers: dict[str, set[int]] = {}
        for index, segment in enumerate(self.trace.segments):
            for name in segment.nodes:
                for argument in self.trace.node(name).all_input_nodes:
                    source = self.trace.sources.get(argument.name)
                    if source is not None and source.kind == "param":
                        readers.setdefault(argument.name, set()).add(index)
        return [name for name, indices in readers.items() if len(indices) > 1]

    def follow(self, case: Case) -> dict[str, Follow]:
        """How the batch is split on the axes "mb" and "dp" of a case."""
        sizes = case.microbatches, case.dp
        if sizes not in self.follows:
            # What small axes allow, larger ones mostly do too, so one analysis of the trace serves many cases.
            small = replace(case, microbatches=_smallest_factor(sizes[0]), dp=_smallest_factor(sizes[1]))
            if small != case:
                self.follow(small)
            self.follows[sizes] = self._followed_before(case) or self._followed(case)
        return self.follows[sizes]

    def _followed(self, case: Case) -> dict[str, Follow]:
        found = follow_batch(self.trace, case.mesh)
        self._followed_for.append((case.microbatches, case.dp, parts_of(self.trace, found), found))
        return found

    def _followed_before(self, case: Case) -> dict[str, Follow] | None:
        """The result for smaller axes, where the larger ones divide all the same (see `parts_of`)."""
        for microbatches, dp, parts, found in self._followed_for:
            alike = (microbatches > 1, dp > 1) == (case.microbatches > 1, case.dp > 1)
            if not alike or case.microbatches % microbatches or case.dp % dp:
                continue
            mesh = Mesh(tuple(found), tuple(case.mesh.size(axis) for axis in found))
            if all(fits(shape, layout, mesh) for shape, layout in parts):
                return found
        return None

    def floor(self, case: Case) -> Lower:
        """What no column of the case can undercut: every op by its cheapest split, nothing converted."""
        return self._lower(self._floors, case, self._floor_of)

    def cheapest(self, case: Case) -> Lower:
        """The fastest columns, whatever they cost once a step and hold in memory."""
        return self._lower(self._cheapest, case, self._cheapest_of)

    def _lower(self, known: dict[tuple[int, ...], Lower], case: Case, of: Callable[[Columns], Lower]) -> Lower:
        """Both depend on the local shapes alone, so cases that cut the batch into as many parts share them, if every op
        splits it alike in time and over replicas."""
        parts = case.microbatches * case.dp
        twin = Case(1, 1, case.tp, parts)  # in time: there are no messages between microbatches
        shared = self._alike(case, twin)
        strides = case.stride("dp"), case.stride("tp")
        key = (parts, case.tp) if shared else (case.microbatches, case.dp, case.tp, *strides)
        if key not in known:
            known[key] = of(self.columns(twin if shared else case))
        return known[key]

    def _floor_of(self, columns: Columns) -> Lower:
        seconds = [columns.floor(index) for index in range(len(self.trace.segments))]
        return Lower(seconds, sum(seconds), self.shared(columns).seconds, columns.curve())

    def _cheapest_of(self, columns: Columns) -> Lower:
        weights = Weights()
        segments = columns.of_all(range(len(self.trace.segments)), {}, [weights])
        found = self.lower(columns, segments, weights)
        # Replicas that store gradients in parts add less to them than as many more microbatches would.
        adding = [columns.most_adding(index) for index in range(len(segments))]
        each = [max(s - a, 0.0) for s, a in zip(found.seconds, adding, strict=True)]
        return Lower(each, max(found.total - sum(adding), 0.0), found.fixed, found.again)

    def lower(self, columns: Columns, segments: list[SegmentColumns], weights: Weights) -> Lower:
        """Of given columns, by their weighted price, which has to be least among all for these weights."""
        each = [min((weights.of(c.price) for c in s.columns), default=math.inf) * columns.proven for s in segments]
        path = cheapest_path(segments, weights) * columns.proven
        return Lower(each, path, self.shared(columns).seconds, columns.curve())

    def _alike(self, case: Case, twin: Case) -> bool:
        key = case.microbatches, case.dp
        if key not in self._twins:
            mine, other = self.follow(case), self.follow(twin).get("mb")
            self._twins[key] = all(
                followed is other or (other is not None and followed.strategies == other.strategies)
                for followed in mine.values()
            )
        return self._twins[key]

    def columns(self, case: Case) -> Columns:
        """The maker of a case's columns, which do not depend on the number of stages."""
        mesh = case.dp, case.tp, case.microbatches, case.stride("dp"), case.stride("tp")
        if mesh not in self.makers:
            self.makers[mesh] = Columns(
                self.trace,
                case,
                self.costs,
                self.follow(case),
                self.keeps,
                self.boundaries,
                self.budget,
                self.options.optimizer_factor,
                self.options.training,
                self.options.rematerialize,
                dict(self.decided.levels),
                AUTO if self.options.zero == "auto" else (int(self.options.zero),),
                self.wire,
                self.options.average_every,
            )
            self._fix_tied_levels(self.makers[mesh])
        return self.makers[mesh]

    def _fix_tied_levels(self, columns: Columns) -> None:
        """What several segments read is stored in one way: in parts for the optimizer where that is no slower."""
        for name in self.tied:
            node = self.trace.node(name)
            if len(columns.levels_of(node)) > 1:
                ways = ways_to_store(columns, node, R, Window(), (0, 1))
                best = min(ways, key=lambda w: (w.price.once_seconds + w.price.backward_seconds, -_level(w)))
                columns.levels[name] = (_level(best),)

    def prepare(self, case: Case, weights: list[Weights] | None = None) -> list[Prepared]:
        """Columns of all segments, once per placement of the tied parameters."""
        columns = self.columns(case)
        found = [self._prepared(case, columns, f, weights or [self.once(case)]) for f in self._forced(case, columns)]
        return [prepared for prepared in found if prepared is not None]

    def _prepared(
        self, case: Case, columns: Columns, forced: dict[str, Placement], weights: list[Weights]
    ) -> Prepared | None:
        segments = columns.of_all(range(len(self.trace.segments)), forced, weights)
        return Prepared(case, columns, segments, forced) if all(s.columns for s in segments) else None

    def _forced(self, case: Case, columns: Columns) -> list[dict[str, Placement]]:
        """Placements of the tied parameters to be tried: all, or where those are many, what their readers like."""
        base = self.decided.placements if case.tp > 1 else {}
        choices: dict[str, list[Placement]] = {}
        for name in self.tied:
            if name in base:
                continue
            node = self.trace.node(name)
            mesh = columns.mesh
            placements = [s.outputs[0] for s in strategies(node) if not s.outputs[0].sections]
            if case.tp == 1:
                placements = [R]
            legal = [p for p in placements if fits(info(node).shape, columns.layout(node, p), mesh)]
            if needs_grad(node) and len(legal) > 1:
                legal = [p for p in legal if p != R]
            choices[name] = legal
        if math.prod(map(len, choices.values())) > _TIED_OPTIONS:
            return self._liked(case, columns, base, choices)
        return [{**base, **dict(zip(choices, option))} for option in product(*choices.values())]

    def _liked(
        self, case: Case, columns: Columns, base: dict[str, Placement], choices: dict[str, list[Placement]]
    ) -> list[dict[str, Placement]]:
        """Placements that segments which read a tied parameter choose when they are solved for themselves: those of
        the first reader, those of the last, and all whole. Readers of one kind agree, so this is what fits them all."""
        weights = self.once(case)
        first: dict[str, Placement] = {}
        last: dict[str, Placement] = {}
        for index, segment in enumerate(self.trace.segments):
            held = [node.name for node in held_by(self.trace, ops_of(self.trace, segment))]
            made = columns.of(index, base, [weights]) if any(name in choices for name in held) else None
            if made is None or not made.columns:
                continue
            best = min(made.columns, key=lambda column: weights.of(column.price))
            for name, strategy in zip(held, made.runs[best.index].parameters, strict=True):
                if name in choices and strategy is not None:
                    first.setdefault(name, strategy.outputs[0])
                    last[name] = strategy.outputs[0]
        whole = {name: legal[0] for name, legal in choices.items()}
        found = [{**base, **whole, **liked} for liked in (first, last, {})]
        return [option for i, option in enumerate(found) if option not in found[:i]]

    def problem(self, prepared: Prepared, schedule: str) -> StageProblem:
        case, columns, segments = prepared.case, prepared.columns, prepared.segments
        """The stage program of a case."""
        cut_seconds: list[dict[int, float]] = []
        cut_nbytes: list[dict[int, float]] = []
        for index in range(len(segments) - 1):
            seconds: dict[int, float] = {}
            nbytes: dict[int, float] = {}
            for number, placement in enumerate(columns.boundary_layouts(index)):
                nbytes[number] = self._crossing_nbytes(columns, index, placement)
                ranks = (0, case.stride("pp") % len(self.cluster))
                once = self.costs.p2p(round(nbytes[number]), *ranks) if case.stages > 1 else 0.0
                seconds[number] = 2 * once if self.options.training else once
            cut_seconds.append(seconds)
            cut_nbytes.append(nbytes)
        flights = self.flights(case, schedule)
        limits = tuple(float(min(self.limits[s * case.width : (s + 1) * case.width])) for s in range(case.stages))
        shared = self.shared(columns)
        fixed = replace(shared, activation_nbytes=shared.activation_nbytes * max(flights))
        same = {id(s): tuple(s.columns) for s in segments}  # equal segments share one tuple
        return StageProblem(
            tuple(same[id(s)] for s in segments),
            case.stages,
            case.microbatches,
            tuple(cut_seconds),
            tuple(cut_nbytes),
            limits,
            flights,
            fixed,
            tuple(sorted(self.decided.pinned.items())),
            tuple(self.decided.together),
            tuple(columns.least_transient(index) for index in range(len(segments))),
            tuple(columns.least_recomputing(index) for index in range(len(segments))),
        )

    def shared(self, columns: Columns) -> Price:
        """Of every stage: ops that it computes for itself (positions, masks), priced as if it needed all of them, and
        what running a microbatch takes besides its ops."""
        if columns.shared is None:
            nodes = (self.trace.node(name) for name in sorted(self.trace.shared))
            ops = [n for n in nodes if n.op == "call_function" and resolve(n)[0] is n and infos(n)]
            shared = sum((columns.op_price(n, None) for n in ops), Price())
            around = self.costs.overheads(0)
            columns.shared = Price(
                shared.forward_seconds + around.forward_seconds,
                around.backward_seconds if self.options.training else 0.0,
                activation_nbytes=shared.activation_nbytes,
            )
        return columns.shared

    def _crossing_nbytes(self, columns: Columns, index: int, placement: Placement) -> float:
        """Bytes of all tensors that cross behind segment `index`, on one rank."""
        free = self.boundaries.free[index]
        crossing = self.boundaries.crossing[index]
        return sum(columns.local_nbytes(node, placement if node is free else R) for node in crossing)

    # -- one case ------------------------------------------------------------------------------------------------------

    def once(self, case: Case) -> Weights:
        """Time alone, once-a-step work folded into the microbatches."""
        return Weights(once=1.0 / (case.stages + case.microbatches - 1))

    def memory_weights(self, case: Case) -> list[Weights]:
        """Objectives that give up speed for memory altogether."""
        return [self._weighing(case, _LEANEST / self._limit(case), flight) for flight in self._few_flights(case)]

    def _limit(self, case: Case) -> float:
        return max(min(self.limits[: case.devices]), 1)

    def _few_flights(self, case: Case, between: bool = True) -> tuple[int, ...]:
        """Microbatches in flight for which columns are made: the fewest, the most, and powers of two between them."""
        flights = sorted(set(self.flights(case, self.search.schedule)))
        inner = [q for q in flights if q & (q - 1) == 0] if between else []
        return tuple(sorted({flights[0], *inner, flights[-1]}))

    def _weighing(self, case: Case, price: float, flight: int) -> Weights:
        return Weights(once=self.once(case).once, nbytes=price, in_flight=flight)

    def flights(self, case: Case, schedule: str) -> tuple[int, ...]:
        if not self.options.training:
            return (1,) * case.stages
        return tuple(in_flight(schedule, s, case.stages, case.microbatches) for s in range(case.stages))

    def sketch(self, prepared: Prepared, bound: float, best: float) -> Sketch:
        """The case with columns that weigh memory, and what they prove. bound: proven already."""
        case = prepared.case
        flights = self._few_flights(case, between=False)
        known = Known((), flights, True, shares=self._shares(prepared))
        found = Sketch(prepared, self.problem(prepared, self.search.schedule), known, bound)
        self._make(found)
        self._priced(found, self._spread(found, _PRICES // 3), min(best, _CEILING * bound), False)
        return found

    def refine(self, sketch: Sketch, best: float) -> None:
        """More prices of a byte, for more numbers of microbatches in flight: what it takes to solve the case well. Not
        refined still: there is more to prove than was looked for."""
        ceiling = min(best, _CEILING * sketch.bound)
        prices = self._spread(sketch, _PRICES)
        sketch.known = replace(sketch.known, prices=(), flights=self._few_flights(sketch.prepared.case))
        self._priced(sketch, prices, ceiling)
        sketch.refined = ceiling == best or sketch.bound < ceiling

    def _shares(self, prepared: Prepared) -> tuple[float, ...]:
        """Of a byte's price, what a gathered byte counts: all of it in a segment that is one of its kind on a stage,
        and as little as makes it one where a stage has many of them (see `stage_dp`)."""
        counts: dict[int, int] = {}
        for segment in prepared.segments:
            counts[id(segment)] = counts.get(id(segment), 0) + 1
        usual = {-(-count // prepared.case.stages) for count in counts.values()}
        return tuple(1.0 / count for count in [1, *sorted(usual - {1}, reverse=True)[:_SHARES]])

    def _make(self, sketch: Sketch) -> None:
        """The columns that are known to be among the sketch's, and its program."""
        case, known = sketch.prepared.case, sketch.known
        weights = [self.once(case)]
        weights += [self._weighing(case, _LEANEST / self._limit(case), flight) for flight in known.flights]
        each = [self._weighing(case, price, flight) for price in known.prices for flight in known.flights]
        weights += [replace(w, gathered=share) for w in each for share in (0.0, *known.shares)]
        prepared = self._prepared(case, sketch.prepared.columns, sketch.prepared.forced, weights)
        assert prepared is not None
        sketch.prepared, sketch.problem = prepared, self.problem(prepared, self.search.schedule)

    def _priced(self, sketch: Sketch, prices: tuple[float, ...], best: float, asking: bool = True) -> None:
        """Add the columns of these prices of a byte, and raise the bound by them, to no more than `best`."""
        known = sketch.known = replace(sketch.known, prices=(*sketch.known.prices, *prices))
        self._make(sketch)
        proven = sketch.prepared.columns.proven
        certificate = certified(sketch.problem, known, self.budget.gap, best / proven, asking)
        sketch.bound = max(sketch.bound, certificate.bound * proven)
        sketch.wanted = certificate.prices

    def _spread(self, sketch: Sketch, count: int) -> tuple[float, ...]:
        """Prices between the least and the most that the columns at hand pay for a byte, evenly."""
        steps: list[float] = []
        kappa = self.once(sketch.prepared.case)
        for columns in {id(c): c for c in sketch.problem.columns}.values():
            for flight in sketch.known.flights:
                cost = np.array([kappa.of(c.price) for c in columns])
                held = np.array([c.price.parameter_nbytes + flight * c.price.activation_nbytes for c in columns])
                steps += hull_steps(cost, held)
        if not steps:
            return ()
        ends = np.geomspace(min(steps) / 2, max(steps) * 2, count + 2)
        return tuple(float(price) for price in ends[1:-1])

    def solve(self, sketch: Sketch, best: float) -> Candidate | None:
        """The best choice found for a case; the sketch's bound is raised on the way."""
        choice = self._try(sketch.problem, best)
        found = None if choice is None else self._candidate(sketch, choice)
        best = best if choice is None else min(best, choice.objective)
        asked = False
        for _ in range(_ROUNDS):
            if sketch.bound >= best * (1 - self.budget.gap) or not sketch.wanted or self.budget.left() <= 0:
                break
            self._priced(sketch, sketch.wanted, best)
            asked = True
        if asked and sketch.bound < best * (1 - self.budget.gap):
            choice = self._try(sketch.problem, best)
            if choice is not None and (found is None or choice.objective < found.choice.objective):
                found = self._candidate(sketch, choice)
        if found is not None:
            sketch.bound = min(sketch.bound, found.choice.objective)
        return found

    def _try(self, problem: StageProblem, best: float) -> StageChoice | None:
        try:
            return solve_stages(problem, self.budget, best)
        except SolverTimeout:
            self.search.tally.timed_out = True
            return None

    def _candidate(self, sketch: Sketch, choice: StageChoice) -> Candidate:
        prepared = sketch.prepared
        return Candidate(
            prepared.case,
            prepared.columns,
            prepared.segments,
            sketch.problem,
            choice,
            self.search.schedule,
            prepared.forced,
        )


def _smallest_factor(n: int) -> int:
    """The smallest prime factor (1 of 1)."""
    return next((d for d in range(2, math.isqrt(n) + 1) if n % d == 0), n)


def _level(way: Stored) -> int:
    return way.storage.level if way.storage is not None else 0


def cheapest_path(segments: list[SegmentColumns], weights: Weights) -> float:
    """Least sum of weighted column prices where every segment takes the layout that the one before it leaves."""
    reached: dict[int, float] = {0: 0.0}
    for segment in segments:
        following: dict[int, float] = {}
        for column in segment.columns:
            if column.enters in reached:
                total = reached[column.enters] + weights.of(column.price)
                following[column.leaves] = min(total, following.get(column.leaves, math.inf))
        reached = following
    return min(reached.values(), default=math.inf)
