"""When nothing fits: by how many bytes, where, and which change would help. Every hint was re-solved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shardplan.errors import NoFeasiblePlan, ShardplanError
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import Constraint, MemoryLimit
from shardplan.planner.search.case import Case
from shardplan.planner.search.options import SolveOptions
from shardplan.planner.search.problem import Price
from shardplan.planner.search.stage_ilp import StageProblem
from shardplan.planner.trace import info

if TYPE_CHECKING:
    from shardplan.planner.search.search import Search

_CASES = 6
_HINT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Smallest:
    """The least memory that a case can do with. over: bytes above the limit on the worst stage."""

    case: Case
    stage: int
    nbytes: float
    limit: float
    parameters: float
    activations: float
    transient: float

    @property
    def over(self) -> float:
        return self.nbytes - self.limit


def smallest_peak(problem: StageProblem, case: Case) -> Smallest | None:
    """Leanest column per segment (both ends whole), stages so that the worst excess over its limit is least.

    Dynamic program over the first segment of each stage: best[s][i] = least worst excess of stages s.. on segments i...
    """
    count = len(problem.columns)
    best: list[list[tuple[float, int]]] = [[(float("inf"), count)] * (count + 1) for _ in range(case.stages + 1)]
    best[case.stages][count] = (float("-inf"), count)
    leanest: list[list[Price]] = []
    for stage in range(case.stages):
        flight = problem.in_flight[stage]
        row = []
        for columns in problem.columns:
            whole = [c.price for c in columns if c.enters == c.leaves == 0] or [c.price for c in columns]
            row.append(
                min(whole, key=lambda p, q=flight: p.parameter_nbytes + q * p.activation_nbytes + p.transient_nbytes)
            )
        leanest.append(row)

    def needs(stage: int, first: int, last: int) -> tuple[float, float, float]:
        prices = leanest[stage][first:last]
        received = min(problem.cut_nbytes[first - 1].values()) if first else 0.0
        activations = problem.in_flight[stage] * (sum(p.activation_nbytes for p in prices) + received)
        parameters = sum(p.parameter_nbytes for p in prices)
        return parameters, activations + problem.fixed.activation_nbytes, max(p.transient_nbytes for p in prices)

    for stage in reversed(range(case.stages)):
        for first in range(count):
            for last in range(first + 1, count + 1):
                rest = best[stage + 1][last][0]
                if rest == float("inf"):
                    continue
                worst = max(sum(needs(stage, first, last)) - problem.limits[stage], rest)
                if worst < best[stage][first][0]:
                    best[stage][first] = (worst, last)
    if best[0][0][0] == float("inf"):
        return None
    found, first = None, 0
    for stage in range(case.stages):
        last = best[stage][first][1]
        parameters, activations, transient = needs(stage, first, last)
        limit = problem.limits[stage]
        mine = Smallest(case, stage, parameters + activations + transient, limit, parameters, activations, transient)
        if found is None or mine.over > found.over:
            found = mine
        first = last
    return found


def explain_infeasible(search: Search, unfit: list[Case]) -> NoFeasiblePlan:
    """The error to raise when none of the cases fits."""
    smallest: Smallest | None = None
    # More devices, and more of them in tensor and pipeline parallelism, need the least memory each.
    for case in sorted(unfit, key=lambda c: (-c.stages * c.tp, -c.microbatches, c.dp))[:_CASES]:
        weights = [search.work.once(case), *search.work.memory_weights(case)]
        for prepared in search.work.prepare(case, weights):
            found = smallest_peak(search.work.problem(prepared, "1f1b"), case)
            if found is not None and (smallest is None or found.over < smallest.over):
                smallest = found
    kinds = ", ".join(f"{count} x {kind.name}" for kind, count in search.cluster.kinds().items())
    if smallest is None:
        return NoFeasiblePlan(f"no plan fits on {kinds}")
    first = smallest.case.ranks(smallest.stage)[0]
    limits = [search.cluster.memory_limit(r) for r in range(len(search.cluster))]
    details = [
        f"Smallest reachable peak: {_size(smallest.nbytes)} on device {first}, {_size(smallest.over)} over"
        f" ({_parameter_parts(search, smallest)},"
        f" activations {_size(smallest.activations)}, buffers {_size(smallest.transient)}), with {smallest.case}.",
        f"Conflict: memory(device {first}) <= {_size(smallest.limit)}"
        + "".join(f" <-> {c}" for c in search.options.constraints if not isinstance(c, MemoryLimit)),
    ]
    title = f"{search.trace.model_name} does not fit on {kinds} ({_range(limits)} usable each)"
    return NoFeasiblePlan(title, details, _hints(search, smallest) if search.options.hints else ())


def _parameter_parts(search: Search, smallest: Smallest) -> str:
    """Parameters, gradients and optimizer state, as the share of trainable parameters gives them."""
    sources = search.trace.sources.items()
    sizes = [(info(search.trace.node(n)).nbytes, s.trainable) for n, s in sources if s.kind in ("param", "buffer")]
    trained = sum(size for size, trainable in sizes if trainable and search.options.training)
    whole = sum(size for size, _ in sizes)
    state = trained * search.options.optimizer_factor
    scale = smallest.parameters / max(whole + trained + state, 1)
    parts = [f"parameters {_size(whole * scale)}"]
    if trained:
        parts += [f"gradients {_size(trained * scale)}", f"optimizer {_size(state * scale)}"]
    return ", ".join(parts)


def _hints(search: Search, smallest: Smallest) -> list[str]:
    from shardplan.planner.search.search import solve

    hints = []
    for text, options, cluster in _variants(search, smallest):
        quick = replace(options, time_limit=_HINT_SECONDS, gap=0.1, progress=None, hints=False)
        try:
            plan = solve(search.trace, cluster, search.costs, quick)
        except ShardplanError:
            continue
        peak = max(memory.peak_nbytes for memory in plan.memory())
        hints.append(f"{text}: fits with a peak of {_size(peak)}, step time {plan.step_seconds * 1e3:.1f} ms")
        if len(hints) == 3:
            break
    return hints


def _variants(search: Search, smallest: Smallest) -> Iterator[tuple[str, SolveOptions, Cluster]]:
    options = search.options
    if options.rematerialize is False:
        yield 'rematerialize="auto"', replace(options, rematerialize="auto"), search.cluster
    if options.zero != "auto":
        yield 'zero="auto"', replace(options, zero="auto"), search.cluster
    if options.microbatches != "auto":
        yield 'microbatches="auto"', replace(options, microbatches="auto"), search.cluster
    others = [c for c in options.constraints if not isinstance(c, MemoryLimit)]
    for constraint in others:
        kept: tuple[Constraint, ...] = tuple(c for c in options.constraints if c is not constraint)
        yield f"without {constraint}", replace(options, constraints=kept), search.cluster
    limit = int(smallest.nbytes * 1.001) + 1
    kept = tuple(c for c in options.constraints if not isinstance(c, MemoryLimit))
    yield (
        f"memory_limit={_size(limit)!r}",
        replace(options, constraints=kept),
        search.cluster.with_memory([max(limit, search.cluster.memory_limit(r)) for r in range(len(search.cluster))]),
    )


def _size(nbytes: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(nbytes) >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} B"


def _range(limits: list[int]) -> str:
    low, high = min(limits), max(limits)
    return _size(low) if low == high else f"{_size(low)} to {_size(high)}"
