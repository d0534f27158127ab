"""The outer search: over stages, mesh shapes and microbatches, cheapest bound first.

For every case (S, dp, tp, m) the segments' columns are made (`columns`), a bound on the step time follows from the
cheapest of them, and where that bound can still win, the stage program (`stage_ilp`) is solved. The best choices are
then scored by the simulator on the very instruction list that will run. Baselines are cases of the same kind, scored
the same way, so the plan is never worse than one of them.

Bound of a case. Fold the once-a-step seconds u of a segment into its microbatches: c = t + u / (S + m - 1). For any
stages

    sum_s t_s + (m - 1) max_s t_s + max_s u_s  >=  sum_s c_s + (m - 1) max_s c_s,

and the right side is least where every segment runs by the column of least c and the stages are the contiguous
partition of least maximum (`_least_maximum`); the sum is taken along layouts that agree (`_cheapest_path`). Columns
minimise c, memory aside; messages and memory can only add. A case whose columns do not fit counts with its bound all
the same, unless its parameters alone are too large: that no other split of its ops would fit is not proven. Before
anything is solved the same holds with c = the cheapest split of every op and no conversions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

from torch import fx

from shardplan.errors import BatchNotDivisible, ConflictingConstraints, SolverTimeout
from shardplan.planner.cluster import Cluster
from shardplan.planner.costs.base import Costs
from shardplan.planner.placement import Placement, R, fits
from shardplan.planner.plan import Alternative, Plan
from shardplan.planner.propagate import Follow, follow_batch
from shardplan.planner.rules import strategies
from shardplan.planner.schedules import in_flight
from shardplan.planner.search.baselines import NAMES, hand_made, why_missing
from shardplan.planner.search.candidate import Candidate, Prepared
from shardplan.planner.search.columns import Case, Columns, SegmentColumns, held_by, ops_of
from shardplan.planner.search.decided import decide
from shardplan.planner.search.finish import Finished, finish
from shardplan.planner.search.infeasible import explain_infeasible
from shardplan.planner.search.memory import Keeps
from shardplan.planner.search.options import SolveOptions
from shardplan.planner.search.problem import Price, Weights
from shardplan.planner.search.solver import Budget
from shardplan.planner.search.stage_ilp import StageProblem, solve_stages
from shardplan.planner.trace import Trace, info, infos, is_tensor, needs_grad, resolve

_RUNNERS_UP = 4
_TIED_OPTIONS = 8
"""Up to so many combinations of placements of tied parameters are all tried."""


@dataclass(slots=True)
class Tally:
    """What was searched, for the certificate."""

    solved: int = 0
    pruned: int = 0
    infeasible: int = 0
    bound: float = math.inf
    timed_out: bool = False
    notes: list[str] = field(default_factory=list)


def solve(trace: Trace, cluster: Cluster, costs: Costs, options: SolveOptions | None = None) -> Plan:
    """The best plan found, with its certificate.

    Raises NoFeasiblePlan, ConflictingConstraints, BatchNotDivisible, SolverTimeout, SolverUnavailable, NoMatch.
    """
    return Search(trace, cluster, costs, options or SolveOptions()).solve()


class Search:
    def __init__(self, trace: Trace, cluster: Cluster, costs: Costs, options: SolveOptions) -> None:
        self.trace = trace
        self.options = options
        self.decided = decide(trace, cluster, options.constraints)
        assert self.decided.cluster is not None
        self.cluster = self.decided.cluster
        self.costs = costs
        self.budget = Budget(options.solver, options.gap / 2, options.time_limit)
        self.keeps = Keeps(trace, costs)
        self.tally = Tally()
        self.schedule = "1f1b" if options.schedule == "auto" else options.schedule
        self.follows: dict[tuple[int, int], dict[str, Follow]] = {}
        self.tied = self._tied()
        if len(self.cluster.kinds()) > 1:
            self.tally.notes.append("the devices differ; compute is priced as on the first of them")
        self.crossings: list[list[fx.Node]] | None = None
        self.makers: dict[tuple[int, int, int], Columns] = {}

    # -- cases ---------------------------------------------------------------------------------------------------------

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
        sizes = case.dp, case.microbatches
        if sizes not in self.follows:
            self.follows[sizes] = follow_batch(self.trace, case.mesh)
        return self.follows[sizes]

    def cases(self) -> list[Case]:
        """Every case that the constraints and the batch allow."""
        found = [
            case
            for case in self._all_cases()
            if self.decided.allows(case, self.trace, self.cluster) and case.stages <= len(self.trace.segments)
        ]
        if not found:
            self._no_case()
        return found

    def _all_cases(self) -> Iterator[Case]:
        total = len(self.cluster)
        used_counts = sorted({n for n in range(1, total + 1) if total % n == 0} | {total}, reverse=True)
        wanted = math.prod(self.decided.degrees.values()) if len(self.decided.degrees) == 3 else 0
        if wanted and wanted <= total:
            used_counts = [wanted]
        for used in used_counts:
            for stages in _divisors(used):
                for tp in _divisors(used // stages):
                    dp = used // stages // tp
                    for microbatches in self._microbatches(stages, dp):
                        yield Case(stages, dp, tp, microbatches)

    def _microbatches(self, stages: int, dp: int) -> list[int]:
        batch = self.trace.batch_size
        if batch % dp:
            return []
        divisors = _divisors(batch // dp)
        if isinstance(self.options.microbatches, int):
            return [m for m in divisors if m == self.options.microbatches]
        if stages == 1:
            return [m for m in divisors if m & (m - 1) == 0 or m == divisors[-1]]
        return [m for m in divisors if m <= 8 * stages]

    def _no_case(self) -> None:
        batch = self.trace.batch_size
        m = self.options.microbatches
        degrees = self.decided.degrees
        if isinstance(m, int) and batch % (m * degrees.get("dp", 1)):
            raise BatchNotDivisible(
                f"a batch of {batch} does not divide into {degrees.get('dp', 1)} replicas x {m} microbatches",
                [],
                [f"microbatches={d}" for d in _divisors(batch // degrees.get("dp", 1) or 1)[:4]],
            )
        if batch % degrees.get("dp", 1):
            raise BatchNotDivisible(f"a batch of {batch} does not divide over dp={degrees['dp']}")
        given = ", ".join(map(str, self.options.constraints)) or "the settings"
        raise ConflictingConstraints(
            f"no arrangement of {len(self.cluster)} devices satisfies {given}",
            [f"{len(self.trace.segments)} segments can form at most as many stages"],
        )

    def exact(self, case: Case) -> str | None:
        """Why a case would not compute what one device computes, or None."""
        for axis, followed in self.follow(case).items():
            if followed.reason is not None:
                return f"{'microbatches' if axis == 'mb' else 'replicas'}: {followed.reason}"
        return None

    # -- one case ------------------------------------------------------------------------------------------------------

    def columns(self, case: Case) -> Columns:
        """The maker of a case's columns, which do not depend on the number of stages."""
        mesh = case.dp, case.tp, case.microbatches
        if mesh not in self.makers:
            self.makers[mesh] = Columns(
                self.trace,
                case,
                self.costs,
                self.follow(case),
                self.keeps,
                self.budget,
                self.options.optimizer_factor,
                self.options.training,
                self.options.rematerialize,
            )
        return self.makers[mesh]

    def prepare(self, case: Case, weights: list[Weights] | None = None) -> list[Prepared]:
        """Columns of all segments, once per placement of the tied parameters."""
        columns = self.columns(case)
        weights = weights or [Weights(once=1.0 / (case.stages + case.microbatches - 1))]
        found = []
        for forced in self._forced(case, columns):
            segments = [columns.of(i, forced, weights) for i in range(len(self.trace.segments))]
            if all(s.columns for s in segments):
                found.append(Prepared(case, columns, segments, forced))
        return found

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
        weights = Weights(once=1.0 / (case.stages + case.microbatches - 1))
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
        cut_seconds: list[dict[int, float]] = []
        cut_nbytes: list[dict[int, float]] = []
        for index in range(len(segments) - 1):
            seconds: dict[int, float] = {}
            nbytes: dict[int, float] = {}
            for number, placement in enumerate(columns.boundary_layouts(index)):
                nbytes[number] = self._crossing_nbytes(columns, index, placement)
                ranks = (0, case.width % len(self.cluster))
                once = self.costs.p2p(round(nbytes[number]), *ranks) if case.stages > 1 else 0.0
                seconds[number] = 2 * once if self.options.training else once
            cut_seconds.append(seconds)
            cut_nbytes.append(nbytes)
        flights = tuple(
            in_flight(schedule, s, case.stages, case.microbatches) if self.options.training else 1
            for s in range(case.stages)
        )
        limits = tuple(
            float(min(self.cluster.memory_limit(r) for r in range(s * case.width, (s + 1) * case.width)))
            for s in range(case.stages)
        )
        shared = sum((columns.op_price(n, None) for n in self._shared_ops()), Price())
        fixed = Price(shared.forward_seconds, 0.0, 0.0, 0.0, shared.activation_nbytes * max(flights))
        return StageProblem(
            tuple(tuple(s.columns) for s in segments),
            case.stages,
            case.microbatches,
            tuple(cut_seconds),
            tuple(cut_nbytes),
            limits,
            flights,
            fixed,
            tuple(sorted(self.decided.pinned.items())),
            tuple(self.decided.together),
        )

    def _shared_ops(self) -> list[fx.Node]:
        """Ops that every stage computes for itself (positions, masks); priced as if a stage needed all of them."""
        nodes = (self.trace.node(name) for name in sorted(self.trace.shared))
        return [n for n in nodes if n.op == "call_function" and resolve(n)[0] is n and infos(n)]

    def _crossing_nbytes(self, columns: Columns, index: int, placement: Placement) -> float:
        """Bytes of all tensors that cross behind segment `index`, on one rank."""
        free = columns.boundary(index)
        return sum(columns.local_nbytes(node, placement if node is free else R) for node in self._crossing(index))

    def _crossing(self, index: int) -> list[fx.Node]:
        """Tensors made up to segment `index` and read behind it."""
        if self.crossings is None:
            home = {name: i for i, segment in enumerate(self.trace.segments) for name in segment.nodes}
            self.crossings = [[] for _ in self.trace.segments]
            for name, made in home.items():
                node = self.trace.node(name)
                last = max((home[u.name] for u in node.users if u.name in home), default=made)
                if is_tensor(node):
                    for i in range(made, last):
                        self.crossings[i].append(node)
        return self.crossings[index]

    def bound(self, case: Case, cheapest: list[float], path: float | None = None) -> float:
        """No plan of the case is faster; see the module docstring.

        cheapest: c per segment. path: least sum of c over columns whose layouts agree, where columns are known.
        """
        fixed = sum(self.columns(case).op_price(node, None).forward_seconds for node in self._shared_ops())
        total = max(sum(cheapest), path or 0.0)
        slowest = max(_least_maximum(cheapest, case.stages), total / case.stages) + fixed
        return total + fixed * case.stages + (case.microbatches - 1) * slowest

    def memory_floor(self, case: Case) -> float:
        """Bytes that the fullest device of a case holds at least: its share of the parameters with their gradients and
        optimizer state, each split as far as the mesh can."""
        total = 0.0
        for name, source in self.trace.sources.items():
            if source.kind == "param":
                node = self.trace.node(name)
                split = case.tp if any(extent % case.tp == 0 for extent in info(node).shape) else 1
                held = 2 + self.options.optimizer_factor if source.trainable and self.options.training else 1
                total += info(node).nbytes * held / split
        return total / case.stages

    # -- the search ----------------------------------------------------------------------------------------------------

    def solve(self) -> Plan:
        found: list[Candidate] = []
        unfit: list[Case] = []
        best = math.inf
        for floor, case in self._ordered():
            if self._hopeless(floor, best):
                continue
            if self.budget.left() < 0.1 * self.options.time_limit and found:
                self.tally.timed_out = True
                self.tally.bound = min(self.tally.bound, floor)
                continue
            if self.memory_floor(case) > max(self.cluster.memory_limit(r) for r in range(case.devices)):
                self.tally.infeasible += 1
                unfit.append(case)
                continue
            fits_somewhere = False
            try:
                ready = self.prepare(case)
            except SolverTimeout:
                self.tally.timed_out = True
                self.tally.bound = min(self.tally.bound, floor)
                continue
            for prepared in ready:
                once = Weights(once=1.0 / (case.stages + case.microbatches - 1))
                cheapest = [min(once.of(c.price) for c in s.columns) for s in prepared.segments]
                path = _cheapest_path(prepared.segments, once)
                bound = max(floor, self.bound(case, cheapest, path) * prepared.columns.proven)
                if self._hopeless(bound, best):
                    fits_somewhere = True
                    continue
                candidate = self._solve_case(prepared, bound)
                if candidate is None:
                    continue
                fits_somewhere = True
                self.tally.solved += 1
                self.tally.bound = min(self.tally.bound, bound)
                best = min(best, candidate.choice.objective)
                found.append(candidate)
                self._say(f"{case}: {candidate.choice.objective * 1e3:.2f} ms, best {best * 1e3:.2f} ms")
            if not fits_somewhere:
                self.tally.infeasible += 1
                self.tally.bound = min(self.tally.bound, floor)
                unfit.append(case)
        if not found:
            if self.tally.timed_out:
                raise SolverTimeout(f"no plan within {self.options.time_limit:g} s", [], ["raise time_limit"])
            raise explain_infeasible(self, unfit)
        return self._finish(found)

    def _ordered(self) -> list[tuple[float, Case]]:
        """Exact cases with a bound that needs no solving: every op by its cheapest split, nothing converted."""
        found: list[tuple[float, Case]] = []
        excluded: dict[str, None] = {}
        for case in self.cases():
            reason = self.exact(case)
            if reason is None:
                columns = self.columns(case)
                floors = [columns.floor(index) for index in range(len(self.trace.segments))]
                found.append((self.bound(case, floors), case))
            else:
                excluded[reason] = None
        self.tally.notes += [f"not exact with {reason}" for reason in sorted(excluded)]
        if not found:
            raise ConflictingConstraints(
                "the settings ask for a split that is not exact for this model", sorted(excluded), ["microbatches=1"]
            )
        return sorted(found, key=lambda item: (item[0], item[1].devices, str(item[1])))

    def _hopeless(self, bound: float, best: float) -> bool:
        if bound < best * (1 - self.options.gap / 2):
            return False
        self.tally.pruned += 1
        self.tally.bound = min(self.tally.bound, bound)
        return True

    def _solve_case(self, prepared: Prepared, bound: float) -> Candidate | None:
        """The best choice of a case, with columns that weigh memory if the fastest do not fit. None: does not fit."""
        problem = self.problem(prepared, self.schedule)
        try:
            choice = solve_stages(problem, self.budget)
            if choice is None:
                return self._squeezed(prepared.case, self.schedule)
        except SolverTimeout:
            self.tally.timed_out = True
            self.tally.bound = min(self.tally.bound, bound)
            return None
        self.tally.timed_out |= not choice.optimal
        return Candidate(
            prepared.case, prepared.columns, prepared.segments, problem, choice, self.schedule, prepared.forced
        )

    def _squeezed(self, case: Case, schedule: str) -> Candidate | None:
        """A case that does not fit with its fastest columns: again with columns that weigh memory."""
        limit = min(self.cluster.memory_limit(r) for r in range(case.devices))
        flights = min(case.microbatches, case.stages)
        best = None
        for prepared in self.prepare(case, self.memory_weights(case, limit, flights)):
            columns, segments, forced = prepared.columns, prepared.segments, prepared.forced
            problem = self.problem(prepared, schedule)
            try:
                choice = solve_stages(problem, self.budget)
            except SolverTimeout:
                self.tally.timed_out = True
                continue
            if choice is not None and (best is None or choice.objective < best.choice.objective):
                best = Candidate(case, columns, segments, problem, choice, schedule, forced)
        return best

    def memory_weights(self, case: Case, limit: float, flights: int) -> list[Weights]:
        """Objectives that give up speed for memory, mildly and altogether."""
        once = 1.0 / (case.stages + case.microbatches - 1)
        shares = (0.0, 1e-3, 1e-2, 1e-1, 1e3)
        return [Weights(once=once, nbytes=share / max(limit, 1.0), in_flight=flights) for share in shares]

    def _say(self, text: str) -> None:
        if self.options.progress is not None:
            self.options.progress(text)

    def _finish(self, found: list[Candidate]) -> Plan:
        found.sort(key=lambda c: (c.choice.objective, str(c.case)))
        baselines = hand_made(self, found)
        finished: list[Finished] = [finish(self, c) for c in (*found[: 2 + _RUNNERS_UP], *baselines.values())]
        finished.sort(key=lambda f: (f.seconds, str(f.candidate.case)))
        best = finished[0]
        names = {id(c): name for name, c in baselines.items()}
        shown = {
            names[id(f.candidate)]: Alternative(names[id(f.candidate)], f.seconds, f.peak_nbytes, f.compared(best))
            for f in finished
            if id(f.candidate) in names
        }
        for name in NAMES:
            shown.setdefault(name, Alternative(name, None, 0, why_missing(self, name)))
        runners = [
            Alternative(str(f.candidate.case), f.seconds, f.peak_nbytes, f.compared(best))
            for f in finished[1:]
            if id(f.candidate) not in names and f.candidate.case != best.candidate.case
        ]
        return best.plan(self, tuple(shown.values()), tuple(runners[:_RUNNERS_UP]))


def _cheapest_path(segments: list[SegmentColumns], weights: Weights) -> float:
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


def _least_maximum(values: list[float], parts: int) -> float:
    """The least possible maximum of sums when the values are cut into `parts` runs (to 1e-9, from below)."""
    low, high = max(max(values), sum(values) / parts), sum(values)
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        runs, total = 1, 0.0
        for value in values:
            total += value
            if total > middle:
                runs, total = runs + 1, value
        low, high = (middle, high) if runs > parts else (low, middle)
    return low


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
