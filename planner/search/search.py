"""The outer search: over stages, mesh shapes and microbatches, cheapest bound first.

For every case (S, dp, tp, m) the segments' columns are made (`columns`), a bound on the step time follows from the
cheapest of them, and where that bound can still win, the stage program (`stage_ilp`) is solved. The best choices are
then scored by the simulator on the very instruction list that will run. Baselines are cases of the same kind, scored
the same way, so the plan is never worse than one of them. The schedule of a pipeline is chosen when its case is solved
(`scheduling`, which says by which share of a case's bounds that can pay), and then another order of its ranks is
looked at where that can pay (`placing`).

Bound of a case. Fold the once-a-step seconds u of a segment into its microbatches: c = t + u / (S + m - 1). For any
stages

    sum_s t_s + (m - 1) max_s t_s + max_s u_s  >=  sum_s c_s + (m - 1) max_s c_s,

and the right side is least where every segment runs by the column of least c and the stages are the contiguous
partition of least maximum (`_least_maximum`); the sum is taken along layouts that agree (`cheapest_path`). Columns
minimise c, memory aside; messages can only add. Before anything is solved the same holds with c = the cheapest split of
every op and no conversions, then with the fastest columns: both depend on the local shapes alone, so few have to be
worked out. To all of them is added what memory costs at least (`recomputing`). What a case itself proves is in
`stage_dp`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from shardplan.errors import BatchNotDivisible, ConflictingConstraints, NotSupported, SolverTimeout
from shardplan.planner.cluster import Cluster
from shardplan.planner.costs.base import Costs
from shardplan.planner.plan import Alternative, Plan
from shardplan.planner.schedules import CHUNKED
from shardplan.planner.search.baselines import NAMES, hand_made, why_missing
from shardplan.planner.search.case import Case
from shardplan.planner.search.casework import Cases, Lower, Sketch
from shardplan.planner.search.decided import decide
from shardplan.planner.search.decisions import Ledger, decisions
from shardplan.planner.search.even import NAME, even_stages
from shardplan.planner.search.finish import Finished, finish
from shardplan.planner.search.infeasible import explain_infeasible
from shardplan.planner.search.mixed_finish import solve_unequal
from shardplan.planner.search.mixed_groups import is_unequal
from shardplan.planner.search.moving import moved
from shardplan.planner.search.options import SolveOptions
from shardplan.planner.search.placing import placed_otherwise
from shardplan.planner.search.scheduling import Scheduling
from shardplan.planner.search.solver import Budget
from shardplan.planner.trace import Trace, info

_RUNNERS_UP = 4
_MOVED = 3
"""Best cases whose cuts are moved once more."""


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
    search = Search(trace, cluster, costs, options or SolveOptions())
    if not is_unequal(search.cluster):
        return search.solve()
    if search.options.schedule in CHUNKED:
        raise NotSupported(
            f"schedule={search.options.schedule!r} on unequal devices",
            ["several stages on one group of devices are planned where all devices are equal"],
            ['schedule="zb" or "1f1b"'],
        )
    return solve_unequal(search)


class Search:
    def __init__(self, trace: Trace, cluster: Cluster, costs: Costs, options: SolveOptions) -> None:
        self.trace = trace
        self.options = options
        self.decided = decide(trace, cluster, options.constraints)
        assert self.decided.cluster is not None
        self.cluster = self.decided.cluster
        self.costs = costs
        self.budget = Budget(options.solver, options.gap / 2, options.time_limit)
        self.tally = Tally()
        self.schedule = "1f1b" if options.schedule in ("auto", *CHUNKED) else options.schedule
        if len(self.cluster) > self.most_tensor and "tp" not in self.decided.degrees:
            self.tally.notes.append(f"tensor parallelism was searched up to {self.most_tensor} devices")
        self.work = Cases(self)
        self._parameters: dict[int, float] = {}
        self.scheduling = Scheduling(self)
        self.ledger = Ledger()

    # -- cases ---------------------------------------------------------------------------------------------------------

    def cases(self) -> list[Case]:
        """Every case that the constraints and the batch allow."""
        found = [
            case
            for case in self._all_cases()
            if self.decided.allows(case, self.trace, self.cluster)
            and case.stages <= len(self.trace.segments)
            and self.scheduling.possible(case)
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
                for tp in self._tensor_degrees(used // stages):
                    dp = used // stages // tp
                    for microbatches in self._microbatches(stages, dp):
                        yield Case(stages, dp, tp, microbatches)
                        if "dp" in self.decided.within and dp > 1 and tp > 1:
                            yield Case(stages, dp, tp, microbatches, ("dp", "tp", "pp"))

    @property
    def most_tensor(self) -> int:
        """Tensor parallelism is tried up to twice the devices of a node (16 at least), or as the user says."""
        nodes: dict[int, int] = {}
        for device in self.cluster.devices:
            nodes[device.node] = nodes.get(device.node, 0) + 1
        return self.decided.degrees.get("tp", max(16, 2 * max(nodes.values())))

    def _tensor_degrees(self, devices: int) -> list[int]:
        most = self.most_tensor
        return [tp for tp in _divisors(devices) if tp <= most]

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
        for axis, followed in self.work.follow(case).items():
            if followed.reason is not None:
                return f"{'microbatches' if axis == 'mb' else 'replicas'}: {followed.reason}"
        return None

    # -- one case ------------------------------------------------------------------------------------------------------

    def bound(self, case: Case, lower: Lower) -> float:
        """No plan of the case is faster; see the module docstring."""
        limit, flights = max(self.work.limits), self.work.flights(case, self.schedule)
        total = max(sum(lower.seconds), lower.total)
        total += lower.again.least(self.memory_floor(case) * case.stages, limit, flights)
        if not math.isfinite(total):
            return math.inf
        slowest = max(_least_maximum(lower.seconds, case.stages), total / case.stages) + lower.fixed
        return total + lower.fixed * case.stages + (case.microbatches - 1) * slowest

    def can_hold(self, case: Case) -> bool:
        """Whether the parameters of a case may fit."""
        return self.memory_floor(case) <= max(self.work.limits[: case.devices])

    def memory_floor(self, case: Case) -> float:
        """Bytes that the fullest device of a case holds at least: its share of the parameters with their gradients and
        optimizer state, each split as far as the mesh can, for its use and for storage."""
        stored = case.dp if self.options.zero != 0 or self.decided.levels else 1
        if case.tp not in self._parameters:
            total = 0.0
            for name, source in self.trace.sources.items():
                if source.kind == "param":
                    node = self.trace.node(name)
                    split = case.tp if any(extent % case.tp == 0 for extent in info(node).shape) else 1
                    held = 2 + self.options.optimizer_factor if source.trainable and self.options.training else 1
                    total += info(node).nbytes * held / split
            self._parameters[case.tp] = total
        return self._parameters[case.tp] / stored / case.stages

    # -- the search ----------------------------------------------------------------------------------------------------

    def solve(self) -> Plan:
        """Cases by their lowest bound; each is bounded better, twice, before it is solved, and then simulated: what a
        bound has to beat are the seconds that the plan would show."""
        found: list[Finished] = []
        overfull: list[Finished] = []
        unfit: list[Case] = []
        best = math.inf
        queue = self._queue()
        while queue:
            bound, devices, text, work, case = heapq.heappop(queue)
            if bound == math.inf:
                rest = [(case, text), *((entry[-1], entry[2]) for entry in queue)]
                self.tally.infeasible += len(rest)
                unfit += [other for other, _ in rest]
                for other, name in rest:
                    self.ledger.drop(other, name)
                break
            if bound >= best * (1 - self.options.gap / 2):
                self.tally.pruned += 1 + len(queue)  # no other bound is lower
                self.tally.bound = min(self.tally.bound, bound)
                break
            if self.budget.left() < 0.1 * self.options.time_limit and found:
                self.tally.timed_out = True
                self.tally.bound = min(self.tally.bound, bound)
                break
            share = self.scheduling.share(case)  # of what the case's own bounds say
            if isinstance(work, Sketch) and not work.refined:
                self.work.refine(work, best / share)
                bound = max(bound, self.scheduling.bound(work, best))
                self.ledger.saw(case, text, bound)
                if bound < math.inf:
                    heapq.heappush(queue, (bound, devices, text, work, case))
                else:
                    self.tally.infeasible += 1
                    unfit.append(case)
            elif isinstance(work, Sketch):
                candidate = self.work.solve(work, best / share)
                bound = max(bound, self.scheduling.bound(work, best))
                self.tally.bound = min(self.tally.bound, bound)
                done, over = None, None
                if candidate is not None:
                    done, over = self.scheduling.scheduled(candidate, best)
                    self.tally.solved += done is not None or over is None
                if done is not None:
                    found.append(done)
                    best = min(best, done.exposed_seconds)  # bounds count sums in full too
                    for other in placed_otherwise(self, done, best):
                        heapq.heappush(queue, (0.0, other.devices, str(other), False, other))
                    name = done.candidate.schedule
                    self._say(f"{case} {name}: {done.seconds * 1e3:.2f} ms", best)
                elif over is not None:
                    overfull.append(over)
                    self._say(f"{case}: {over.peak_nbytes / 2**30:.2f} GiB op by op, which does not fit")
                elif candidate is None and bound < best * (1 - self.options.gap / 2):
                    self.tally.infeasible += 1
                    unfit.append(case)
            elif not self.can_hold(case):
                self.ledger.drop(case, text)
                self.tally.infeasible += 1
                unfit.append(case)
            elif not work:
                better = max(bound, share * self.bound(case, self.work.cheapest(case)))
                self.ledger.saw(case, text, better)
                heapq.heappush(queue, (better, devices, text, True, case))
            else:
                sketches = self._sketches(case, bound / share, best / share)
                self.ledger.drop(case, text)
                for number, sketch in enumerate(sketches):
                    self.ledger.saw(case, f"{text} {number}", share * sketch.bound)
                    heapq.heappush(queue, (share * sketch.bound, devices, f"{text} {number}", sketch, case))
                if not sketches:
                    self.tally.infeasible += 1
                    unfit.append(case)
        if not found and overfull:
            # The leanest of them: the search's own sums fit, so what is over is little.
            least = min(overfull, key=lambda f: f.peak_nbytes)
            self.tally.notes.append("counted op by op, the fullest device holds more than it may: leave it some room")
            found = [least]
        if not found:
            if self.tally.timed_out:
                raise SolverTimeout(f"no plan within {self.options.time_limit:g} s", [], ["raise time_limit"])
            raise explain_infeasible(self, unfit)
        return self._finish(found)

    def _sketches(self, case: Case, bound: float, best: float) -> list[Sketch]:
        """The case with columns that weigh memory, once per placement of the tied parameters; what cannot fit is left
        out."""
        found = []
        for prepared in self.work.prepare(case):
            lower = self.work.lower(prepared.columns, prepared.segments, self.work.once(case))
            sketch = self.work.sketch(prepared, max(bound, self.bound(case, lower)), best)
            if sketch.bound < math.inf:
                found.append(sketch)
        return found

    def _queue(self) -> list[tuple[float, int, str, bool | Sketch, Case]]:
        """Exact cases as a heap of (bound, devices, name, work, case). work: what is known of the case, from nothing
        (False: ops alone) over its fastest columns (True) to those that weigh memory."""
        found: list[tuple[float, int, str, bool | Sketch, Case]] = []
        excluded: dict[str, None] = {}
        for case in self.cases():
            reason = self.exact(case)
            if reason is None:
                bound = self.scheduling.share(case, closely=False) * self.bound(case, self.work.floor(case))
                found.append((bound, case.devices, str(case), False, case))
                self.ledger.saw(case, str(case), bound)
            else:
                excluded[reason] = None
        self.tally.notes += [f"not exact with {reason}" for reason in sorted(excluded)]
        if not found:
            raise ConflictingConstraints(
                "the settings ask for a split that is not exact for this model", sorted(excluded), ["microbatches=1"]
            )
        heapq.heapify(found)
        return found

    def _say(self, text: str, best: float | None = None) -> None:
        """best: seconds of the best that was found; said with what is proven of it so far."""
        if self.options.progress is None:
            return
        if best is not None:
            bound = min(self.tally.bound, best)
            text += f", best {best * 1e3:.2f} ms, bound {bound * 1e3:.2f} ms, gap {(best - bound) / best:.1%}"
        self.options.progress(text)

    def _finish(self, found: list[Finished]) -> Plan:
        found.sort(key=lambda f: (f.seconds, str(f.candidate.case)))
        found = [*(moved(self, f) for f in found[:_MOVED]), *found[_MOVED:]]
        found.sort(key=lambda f: (f.seconds, str(f.candidate.case)))
        own = [f.candidate for f in found if f.candidate.schedule == self.schedule]
        comparable = self.options.schedule not in CHUNKED
        baselines = hand_made(self, own) if comparable else {}
        even = even_stages(self) if comparable and len(self.cluster) > 1 else None
        if even is not None:
            baselines[even.label] = even
        hand = [finish(self, c) for c in baselines.values()]
        finished = [*found[: 1 + _RUNNERS_UP], *(f for f in hand if f.fits or not found[0].fits)]
        finished.sort(key=lambda f: (f.seconds, str(f.candidate.case)))
        best = finished[0]
        names = {id(c): name for name, c in baselines.items()}
        shown = {
            name: Alternative(name, f.seconds, f.peak_nbytes, f.compared(self, best))
            for f in finished
            if (name := names.get(id(f.candidate))) is not None
        }
        for f in hand:
            if not any(f is kept for kept in finished):
                name = names[id(f.candidate)]
                shown[name] = Alternative(name, None, f.peak_nbytes, "does not fit into memory, counted op by op")
        for name in NAMES:
            reason = why_missing(self, name) if comparable else f"it does not run under {self.options.schedule}"
            shown.setdefault(name, Alternative(name, None, 0, reason))
        if len(self.cluster) > 1:
            shown.setdefault(NAME, Alternative(NAME, None, 0, "does not fit into memory in equal stages"))
        runners = [
            Alternative(str(f.candidate.case), f.seconds, f.peak_nbytes, f.compared(self, best))
            for f in finished[1:]
            if id(f.candidate) not in names and f.candidate.case != best.candidate.case
        ]
        why = decisions(self, best, [*found, *finished], self.ledger)
        return replace(best.plan(self, tuple(shown.values()), tuple(runners[:_RUNNERS_UP])), decisions=why)


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
