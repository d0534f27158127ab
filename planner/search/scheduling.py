"""Which schedule runs a pipeline: GPipe, 1F1B, interleaved 1F1B, ZB-H1 or ZB-V (`planner.schedules`).

Model. With S positions, m microbatches and t the seconds of a microbatch on the slowest position, a step takes

    fill * sum_p t_p + (m - fill) * max_p t_p + max_p u_p + messages,

fill: what the pipeline stands idle while it fills and drains, as a share of one position's microbatch: 1 under GPipe
and 1F1B; 1 / v with v stages a position (interleaved); with backward in two parts at least the forward's share of a
microbatch, where all else is done in the gaps (ZB-H1), and half of it for half-sized stages (ZB-V). What it is for
equal stages the simulator says. With fill = 1 this is the stage program's objective V. As max >= sum / S, the step
under another schedule is at least

    rho V,    rho = (fill S + m - fill) / (S + m - 1),

so a bound on V becomes one on every allowed schedule by the least rho (`share`). Before a case is solved each schedule
is bounded by itself (`bound`): V with as many microbatches in flight as it has, as if the stages of a position were
neighbours.

A solved case is then run under each schedule that can still win (`scheduled`): the same columns where they fit, else
columns for as many microbatches in flight as that schedule has; under several stages a position the segments are cut
anew (`cut`), so that the largest stage, then the fullest position, is least. The simulator decides, and what does not
fit op by op is out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from shardplan.errors import SolverTimeout
from shardplan.planner.instructions import Op
from shardplan.planner.schedules import CHUNKED, build, compute_orders, in_flight, position_of
from shardplan.planner.search.candidate import Candidate
from shardplan.planner.search.finish import Finished, finish
from shardplan.planner.search.put_off import SPLIT
from shardplan.planner.search.runs import ops_of
from shardplan.planner.search.stage_dp import certified
from shardplan.planner.search.stage_ilp import StageChoice, StageProblem
from shardplan.planner.search.stages import solve_stages
from shardplan.planner.simulate import StageTimes, simulate
from shardplan.planner.trace import resolve, tensor_args
from shardplan.planner.weight_work import is_product

if TYPE_CHECKING:
    from shardplan.planner.search.case import Case
    from shardplan.planner.search.casework import Sketch
    from shardplan.planner.search.search import Search

_CHUNKS = (2, 4)
"""Stages a position that are tried under "interleaved"; where it is asked for, all of `_ASKED`."""
_ASKED = (2, 3, 4, 6, 8)
_SIMULATED = 2048
"""Up to so many microbatches x stages the simulator says what a schedule's bubble is."""
_UNDER = 0.98
"""What the simulator says of unequal stages may be so much less than the model."""
_RECOMPUTING = 0.75
"""The forward's share of a microbatch is at least this part of what it is without recomputation, where backward takes
up to twice as long as forward."""


@dataclass(frozen=True, slots=True)
class Way:
    """A schedule, its stages a position, and `fill` of the module docstring."""

    kind: str
    chunks: int
    fill: float


class Scheduling:
    """Of one search."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self._parts: tuple[float, float] | None = None
        self._ways: dict[tuple[int, int, bool], list[Way]] = {}

    def possible(self, case: Case) -> bool:
        """Whether the schedule that the user asks for can run the case at all."""
        if self.search.options.schedule not in CHUNKED:
            return True
        return case.stages > 1 and 2 * case.stages <= len(self.search.trace.segments)

    def ways(self, case: Case, closely: bool = True) -> list[Way]:
        """Those that the user allows, the least fill first. closely: not by the least that it can be, but as the
        simulator has it for equal stages."""
        if case.stages == 1 or not self.search.options.training:
            return [Way(self.search.schedule, 1, 1.0)]
        key = case.stages, case.microbatches, closely
        if key not in self._ways:
            found = [replace(way, fill=self._closer(case, way)) if closely else way for way in self._allowed(case)]
            self._ways[key] = sorted(found, key=lambda w: (w.fill, w.kind == "gpipe"))
        return self._ways[key]

    def _allowed(self, case: Case) -> list[Way]:
        asked, segments = self.search.options.schedule, len(self.search.trace.segments)
        forward = _RECOMPUTING * self.parts()[0]
        chunks = [v for v in (_ASKED if asked == "interleaved" else _CHUNKS) if v * case.stages <= segments]
        found = [Way("1f1b", 1, 1.0), Way("gpipe", 1, 1.0), Way("zb", 1, forward)]
        found += [Way("interleaved", v, 1.0 / v) for v in chunks]
        if 2 * case.stages <= segments:
            found.append(Way("zbv", 2, forward / 2))
        return [way for way in found if asked in ("auto", way.kind)]

    def _closer(self, case: Case, way: Way) -> float:
        if way.fill == 1.0 or case.stages * case.microbatches * way.chunks > _SIMULATED:
            return way.fill
        forward, weight = self.parts()
        found = []
        for again in (0.0, forward):  # without and with recomputation
            whole = 1.0 + again
            times = StageTimes(forward, whole - forward, weight if way.kind in SPLIT else 0.0)
            stages = case.stages * way.chunks
            edges = frozenset((s, s + 1) for s in range(stages - 1))
            schedule = build(way.kind, stages, case.microbatches, edges, chunks=way.chunks)
            seconds = simulate(schedule, [times] * stages).step_seconds / (whole * way.chunks)
            found.append((seconds - case.microbatches) / (case.stages - 1))
        return max(min(*found, 1.0), way.fill)

    def parts(self) -> tuple[float, float]:
        """Of a microbatch's seconds, the shares of forward and of gradients of weights, nothing recomputed."""
        if self._parts is None:
            columns = self.search.work.columns(next(iter(self.search.cases())))
            forward = weight = whole = 0.0
            by_kind = {segment.kind: segment for segment in self.search.trace.segments}
            counts = Counter(segment.kind for segment in self.search.trace.segments)
            for kind, segment in by_kind.items():
                for node in ops_of(self.search.trace, segment):
                    prices = [columns.op_price(node, s) for s in columns.legal(node)]
                    if prices:
                        least = min(prices, key=lambda p: p.seconds)
                        forward += counts[kind] * least.forward_seconds
                        whole += counts[kind] * least.seconds
                        if is_product(node) and any(_is_weight(self.search, a) for a in tensor_args(node)):
                            weight += counts[kind] * least.backward_seconds / 2
            self._parts = (forward / whole, weight / whole) if whole else (0.0, 0.0)
        return self._parts

    def share(self, case: Case, closely: bool = True) -> float:
        """rho of the module docstring: least over the allowed schedules."""
        return min(rho(case, way.fill) for way in self.ways(case, closely))

    def bound(self, sketch: Sketch, best: float) -> float:
        """On every schedule of a refined case that can take less than `best` seconds."""
        case, proven = sketch.prepared.case, sketch.prepared.columns.proven
        found = math.inf
        for way in self.ways(case):
            factor = rho(case, way.fill)
            if factor * sketch.bound >= min(found, best):
                return min(found, factor * sketch.bound)
            inside = sketch.bound
            flights = self.flights(case, way)
            if way.kind != self.search.schedule and flights != sketch.problem.in_flight:
                problem = replace(sketch.problem, in_flight=flights)
                certificate = certified(problem, sketch.known, self.search.budget.gap, best / factor / proven)
                inside = max(inside, certificate.bound * proven)
            found = min(found, factor * inside)
        return found

    def scheduled(self, candidate: Candidate, best: float) -> tuple[Finished | None, Finished | None]:
        """(The fastest that fits, the leanest that does not fit op by op), of schedules that may take less than `best`
        seconds. candidate: the solved case."""
        found: Finished | None = None
        overfull: Finished | None = None
        for way in self.ways(candidate.case):
            least = rho(candidate.case, way.fill) * candidate.choice.objective
            if least * _UNDER >= min(best, found.exposed_seconds if found is not None else math.inf):
                break  # no other schedule's is less
            for made in self._candidates(candidate, way, best):
                done = finish(self.search, made)
                if done.fits:
                    if found is None or done.exposed_seconds < found.exposed_seconds:
                        found = done
                    break
                if overfull is None or done.peak_nbytes < overfull.peak_nbytes:
                    overfull = done
        return found, overfull

    def _candidates(self, candidate: Candidate, way: Way, best: float) -> Iterator[Candidate]:
        """The candidate under a schedule, first with its own columns."""
        if way.kind == self.search.schedule:
            yield candidate
            return
        same = self._under(candidate, way)
        if same is not None:
            yield same
        flights = self.flights(candidate.case, way)
        if all(f <= q for f, q in zip(flights, candidate.problem.in_flight, strict=True)):
            return
        problem = replace(candidate.problem, in_flight=flights)  # whose columns the candidate's segments are
        try:
            choice = solve_stages(problem, self.search.budget, best / rho(candidate.case, way.fill))
        except SolverTimeout:
            return
        if choice is not None:
            other = self._under(replace(candidate, choice=choice), way)
            if other is not None:
                yield other

    def _under(self, candidate: Candidate, way: Way) -> Candidate | None:
        """The columns of a candidate under another schedule; None where the stages cannot be cut so."""
        if way.chunks == 1:
            return replace(candidate, schedule=way.kind)
        problem, choice = candidate.problem, candidate.choice
        seconds = [problem.columns[i][c].price.seconds for i, c in enumerate(choice.columns)]
        seconds = [max(s, 1e-12) for s in seconds]
        bounds = cut(problem, seconds, way, candidate.case.stages)
        if bounds is None:
            return None
        recut = StageChoice(bounds, choice.columns, choice.objective, choice.bound, False)
        return replace(candidate, schedule=way.kind, chunks=way.chunks, choice=recut)

    def flights(self, case: Case, way: Way) -> tuple[int, ...]:
        """Microbatches that a position holds at most, in whole ones of all its stages."""
        if way.chunks == 1:
            return tuple(in_flight(way.kind, s, case.stages, case.microbatches) for s in range(case.stages))
        orders = compute_orders(way.kind, case.stages, case.microbatches, way.chunks)
        ends = Op.BACKWARD_WEIGHT if way.kind in SPLIT else Op.BACKWARD
        found = []
        for order in orders:
            held = most = 0
            for instruction in order:
                held += (instruction.op is Op.FORWARD) - (instruction.op is ends)
                most = max(most, held)
            found.append(-(-most // way.chunks))
        return tuple(found)


def _is_weight(search: Search, value: fx.Node) -> bool:
    source = search.trace.sources.get(resolve(value)[0].name)
    return source is not None and source.kind == "param" and source.trainable


def rho(case: Case, fill: float) -> float:
    """See the module docstring."""
    return (fill * case.stages + case.microbatches - fill) / (case.stages + case.microbatches - 1)


def allowed(problem: StageProblem, stages: int) -> list[np.ndarray]:
    """Per stage [first, behind the last]: whether a stage may consist of these segments, by pins and togetherness."""
    count = len(problem.columns)
    first, behind = np.arange(count + 1)[:, None], np.arange(count + 1)[None, :]
    whole = first < behind
    for group in problem.together:
        touched = np.zeros_like(whole)
        for member in group:
            touched |= (first <= member) & (member < behind)
        whole = whole & (~touched | ((first <= min(group)) & (max(group) < behind)))
    found = []
    for stage in range(stages):
        mine = whole
        for segment, home in problem.pinned:
            inside = (first <= segment) & (segment < behind)
            mine = mine & (inside if home == stage else ~inside)
        found.append(mine)
    return found


def cut(problem: StageProblem, seconds: list[float], way: Way, positions: int) -> tuple[int, ...] | None:
    """First segment of every stage: the largest stage is least, exactly; then single segments move as long as that
    lowers the seconds of the fullest position. seconds: of every segment."""
    stages, count = positions * way.chunks, len(seconds)
    may = allowed(problem, stages)
    sums = np.concatenate([[0.0], np.cumsum(seconds)])
    costs = sums[None, :] - sums[:, None]
    reached = np.full(count + 1, math.inf)
    reached[0] = 0.0
    back = []
    for stage in range(stages):
        total = np.maximum(reached[:, None], np.where(may[stage], costs, math.inf))
        back.append(total.argmin(0))
        reached = total.min(0)
    if not math.isfinite(reached[count]):
        return None
    ends = [count]
    for choice in reversed(back):
        ends.append(int(choice[ends[-1]]))
    bounds = ends[::-1]  # first of every stage, and the end

    def loads(at: list[int]) -> tuple[float, float]:
        held = [0.0] * positions
        for stage in range(stages):
            held[position_of(way.kind, stage, positions)] += float(costs[at[stage], at[stage + 1]])
        return max(held), sum(h * h for h in held)

    now, moved = loads(bounds), True
    while moved:
        moved = False
        for stage in range(1, stages):
            for step in (-1, 1):
                other = list(bounds)
                other[stage] += step
                near = (stage - 1, stage)
                if not all(may[s][other[s], other[s + 1]] for s in near):
                    continue
                then = loads(other)
                if then < (now[0] * (1 - 1e-9), now[1] * (1 - 1e-9)) and then[0] <= now[0]:
                    bounds, now, moved = other, then, True
    return tuple(bounds[:-1])
