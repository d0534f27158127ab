"""What one decision inside a plan's case is worth: the same plan with that one thing decided otherwise.

The op-level problem of a segment is solved anew with the placement of one large tensor forbidden (all others are free,
stored as they are), or with one level of storage asked for; its ends stay as they are. Recomputation
is changed with all placements and storage as they are. The step is then simulated with the stages' new seconds, and
a stage's peak moves by what its segments hold more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import fx

from shardplan.planner.instructions import Schedule
from shardplan.planner.placement import D, Placement
from shardplan.planner.plan import Decision, StageLink, StagePlan
from shardplan.planner.reductions import times_of
from shardplan.planner.report.words import pattern, plural
from shardplan.planner.search.builder import Builder
from shardplan.planner.search.elimination import eliminate
from shardplan.planner.search.problem import Price, Weights, total_price
from shardplan.planner.search.runs import Run, held_by, ops_of
from shardplan.planner.simulate import messages_of, simulate
from shardplan.planner.trace import Trace, info

if TYPE_CHECKING:
    from shardplan.planner.search.candidate import Candidate
    from shardplan.planner.search.columns import Columns
    from shardplan.planner.search.search import Search
    from shardplan.planner.search.stage_ilp import Column

_MOST_TENSORS = 6
_LEVELS = {
    0: "whole on every replica",
    1: "optimizer state in parts",
    2: "gradients and optimizer state in parts",
    3: "stored in parts",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """Stages of a plan that one candidate prices. stages: (number in the plan, (first, last) of its segments)."""

    search: Search
    candidate: Candidate
    stages: tuple[tuple[int, tuple[int, int]], ...]


@dataclass(slots=True)
class _Segment:
    """A segment of the plan: which stage it is on, the column that it runs by. key: equal for those that run alike.
    held: the parameters and buffers that it reads."""

    piece: Piece
    stage: int
    index: int
    key: tuple[object, ...]
    held: list[fx.Node]

    @property
    def trace(self) -> Trace:
        return self.piece.search.trace

    @property
    def columns(self) -> Columns:
        return self.piece.candidate.columns

    @property
    def column(self) -> Column:
        candidate = self.piece.candidate
        return candidate.segments[self.index].columns[candidate.choice.columns[self.index]]

    @property
    def run(self) -> Run:
        return self.piece.candidate.segments[self.index].runs[self.column.index]

    @property
    def modes(self) -> set[bool]:
        """Whether it can be run with and without recomputation."""
        return {column.recomputed for column in self.piece.candidate.segments[self.index].columns}


@dataclass(slots=True)
class _Plan:
    """The plan and how it changes."""

    segments: list[_Segment]
    stages: Sequence[StagePlan]
    links: Sequence[StageLink]
    instructions: Schedule
    builders: dict[tuple[object, ...], Builder] = field(default_factory=dict)

    def builder(self, segment: _Segment) -> Builder:
        made = self.builders.get(segment.key)
        if made is None:
            made = self.builders[segment.key] = Builder(segment.columns, segment.index, segment.piece.candidate.forced)
        return made

    def changed(self, prices: dict[int, Price]) -> tuple[float, int, int]:
        """Seconds of a step, and (bytes, stage) of the fullest stage, with other prices of some segments (by position
        in `segments`)."""
        times, peaks = [], []
        for number, stage in enumerate(self.stages):
            forward = backward = once = nbytes = 0.0
            transient = 0.0
            for at, new in prices.items():
                segment = self.segments[at]
                if segment.stage != number:
                    continue
                old = segment.column.price
                problem = segment.piece.candidate.problem
                held = problem.in_flight[min(number, len(problem.in_flight) - 1)]
                forward += new.forward_seconds - old.forward_seconds
                backward += new.backward_seconds - old.backward_seconds
                once += new.once_seconds - old.once_seconds
                nbytes += new.parameter_nbytes - old.parameter_nbytes
                nbytes += held * (new.activation_nbytes - old.activation_nbytes)
                transient = max(transient, new.transient_nbytes - old.transient_nbytes, key=abs)
            times.append(
                replace(
                    stage,
                    forward_seconds=max(stage.forward_seconds + forward, 0.0),
                    backward_seconds=max(stage.backward_seconds + backward, 0.0),
                    once_seconds=max(stage.once_seconds + once, 0.0),
                )
            )
            peaks.append(max(round(stage.memory.peak_nbytes + nbytes + transient), 0))
        simulation = simulate(self.instructions, [times_of(stage) for stage in times], messages_of(self.links))
        over = [peak / (s.memory.limit or 1 << 62) for peak, s in zip(peaks, self.stages, strict=True)]
        fullest = max(range(len(peaks)), key=lambda number: (over[number], peaks[number]))
        return simulation.step_seconds, peaks[fullest], fullest

    def decision(self, topic: str, chosen: str, other: str, prices: dict[int, Price], name: str = "") -> Decision:
        seconds, nbytes, stage = self.changed(prices)
        return Decision(topic, chosen, other, seconds, False, nbytes, stage, self.stages[stage].memory.limit, name)


def otherwise(
    pieces: Sequence[Piece], stages: Sequence[StagePlan], links: Sequence[StageLink], instructions: Schedule
) -> Iterable[Decision]:
    """Recomputation, storage, and the splits of the largest tensors."""
    segments = []
    for piece in pieces:
        trace = piece.search.trace
        for number, (first, last) in piece.stages:
            for index in range(first, last):
                kind = trace.segments[index].kind
                listed, column = piece.candidate.segments[index], piece.candidate.choice.columns[index]
                held = held_by(trace, ops_of(trace, trace.segments[index]))
                segments.append(_Segment(piece, number, index, (id(piece), kind, id(listed), column), held))
    plan = _Plan(segments, stages, links, instructions)
    yield from _recomputation(plan)
    yield from _storage(plan)
    yield from _splits(plan)


def _recomputation(plan: _Plan) -> Iterable[Decision]:
    again = sum(segment.column.recomputed for segment in plan.segments)
    chosen = f"of {again} of {plural(len(plan.segments), 'segment')}" if again else "of nothing"
    for other, wanted in (("of nothing", False), ("of every segment", True)):
        rules = {
            at: _Rule(recomputed=wanted)
            for at, segment in enumerate(plan.segments)
            if segment.column.recomputed is not wanted and wanted in segment.modes
        }
        if prices := _changes(plan, _solve(plan, rules)):
            yield plan.decision("recomputation", chosen, other, prices)


def _storage(plan: _Plan) -> Iterable[Decision]:
    """Where there are replicas: other levels for all parameters."""
    if not any(len(segment.columns.dp_ranks) > 1 for segment in plan.segments):
        return
    nbytes: dict[int, float] = {}
    for segment in plan.segments:
        for node, stored in zip(segment.held, segment.run.storage, strict=True):
            if segment.trace.sources[node.name].kind == "param":
                level = stored.level if stored else 0
                nbytes[level] = nbytes.get(level, 0.0) + float(info(node).nbytes)
    total = sum(nbytes.values())
    if not total:
        return
    mine = max(nbytes, key=lambda level: nbytes[level])
    share = "" if nbytes[mine] == total else f" ({nbytes[mine] / total:.0%} of the bytes)"
    for level, words in _LEVELS.items():
        solved = _solve(plan, dict.fromkeys(range(len(plan.segments)), _Rule(level=level))) if level != mine else {}
        if prices := _changes(plan, solved):
            yield plan.decision("storage", _LEVELS[mine] + share, words, prices)


def _splits(plan: _Plan) -> Iterable[Decision]:
    """Of the tensors with the most bytes on tensor-parallel stages, by name pattern and placement."""
    groups: dict[tuple[str, Placement], dict[int, set[int]]] = {}
    nbytes: dict[tuple[str, Placement], float] = {}
    for at, segment in enumerate(plan.segments):
        if segment.columns.tp == 1:
            continue
        for position, (node, strategy) in enumerate(zip(segment.held, segment.run.parameters, strict=True)):
            source = segment.trace.sources[node.name]
            if source.kind == "param" and strategy is not None:
                key = pattern(source.name), strategy.outputs[0]
                groups.setdefault(key, {}).setdefault(at, set()).add(position)
                nbytes[key] = nbytes.get(key, 0.0) + float(info(node).nbytes)
    for key in sorted(groups, key=lambda key: (-nbytes[key], key[0]))[:_MOST_TENSORS]:
        name, placement = key
        rules = {at: _Rule(frozenset(positions), placement) for at, positions in groups[key].items()}
        solved = _solve(plan, rules)
        if prices := _changes(plan, solved):
            first = min(solved)
            other = solved[first].placements[min(groups[key][first])]
            yield plan.decision(f"split of {name}", _words(placement), _words(other), prices, name)


def _words(placement: Placement) -> str:
    if placement.is_shard:
        return f"dim {placement.dim}"
    return "whole, its gradient summed" if placement == D else "whole, used alike"


# -- one segment -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rule:
    """What is otherwise in a segment; what a rule does not name stays: how tensors are stored, whether the segment is
    recomputed, and (but for a rule about `positions`) how they are split.

    positions: of tensors that may not have the placement not_. level: at which all parameters are stored, where they
    can be. recomputed: whether the segment is.
    """

    positions: frozenset[int] = frozenset()
    not_: Placement | None = None
    level: int | None = None
    recomputed: bool | None = None

    def allows(self, position: int, placement: Placement, level: int, mine: Placement | None, stored: int) -> bool:
        """An option of a tensor that now has the placement `mine` and is stored at the level `stored`."""
        if self.positions:
            return level == stored and (position not in self.positions or placement != self.not_)
        return placement == mine and level == (stored if self.level is None else self.level)


@dataclass(frozen=True, slots=True)
class _Solved:
    """placements: of the tensors that the segment holds."""

    price: Price
    placements: tuple[Placement, ...]


def _changes(plan: _Plan, solved: dict[int, _Solved]) -> dict[int, Price]:
    """Of the segments whose price is another one."""
    return {at: made.price for at, made in solved.items() if made.price != plan.segments[at].column.price}


def _solve(plan: _Plan, rules: dict[int, _Rule]) -> dict[int, _Solved]:
    """The best way to run each of these segments under its rule; empty where one has none. Segments that run alike are
    solved once."""
    known: dict[tuple[object, ...], _Solved | None] = {}
    found: dict[int, _Solved] = {}
    for at, rule in rules.items():
        segment = plan.segments[at]
        key = (*segment.key, rule)
        if key not in known:
            known[key] = _best(plan.builder(segment), segment, rule)
        made = known[key]
        if made is None:
            return {}
        found[at] = made
    return found


def _best(builder: Builder, segment: _Segment, rule: _Rule) -> _Solved | None:
    problem, column, run = builder.problem, segment.column, segment.run
    if problem is None:
        return None
    again = column.recomputed if rule.recomputed is None else rule.recomputed
    kept: list[Sequence[int]] = [range(len(options)) for options in problem.ops]
    for position, node in enumerate(builder.held):
        number = builder.numbers[node]
        chosen, stored = run.parameters[position], run.storage[position]
        now = chosen.outputs[0] if chosen is not None else None, stored.level if stored else 0
        mine = [
            k
            for k, way, at in zip(kept[number], builder.strategies[number], builder.stored[node], strict=True)
            if way is not None and rule.allows(position, way.outputs[0], at.level if at else 0, *now)
        ]
        if not mine and position in rule.positions:
            # Perhaps the other placement cannot be stored at this level.
            mine = [k for k, way in zip(kept[number], builder.strategies[number], strict=True)
                    if way is not None and way.outputs[0] != rule.not_]  # fmt: skip
            if not mine:
                return None
        kept[number] = mine or kept[number]
    weights = Weights(1.0 / segment.columns.microbatches, forward=2.0 if again else 1.0)
    ops = tuple(tuple(options[k] for k in keep) for options, keep in zip(problem.ops, kept, strict=True))
    solved = eliminate(replace(problem, ops=ops), [weights])
    choice = solved[0].options.get((column.enters, column.leaves)) if solved else None
    if choice is None:
        return None
    choice = tuple(keep[k] for keep, k in zip(kept, choice, strict=True))
    price = total_price(problem, choice)
    assert price is not None
    placements = []
    for node in builder.held:
        strategy = builder.strategies[builder.numbers[node]][choice[builder.numbers[node]]]
        assert strategy is not None
        placements.append(strategy.outputs[0])
    whole = segment.columns.whole(segment.index, price + builder.constant, column.enters, again)
    return _Solved(whole, tuple(placements))
