"""From a choice for unequal devices to a Plan: every stage is finished as a candidate of its own, then put together.

A stage's candidate has the stage's mesh, columns and prices; what it says of the other stages' segments is not used.
Messages are priced on the plan's ranks by the boxes that the runtime sends (`planner.transfers`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from shardplan.planner import schedules
from shardplan.planner.placement import Mesh, R
from shardplan.planner.plan import Alternative, Decision, Plan, StageLink, StagePlan
from shardplan.planner.rules import Strategy
from shardplan.planner.search import finish
from shardplan.planner.search.baselines import NAMES
from shardplan.planner.search.candidate import Candidate
from shardplan.planner.search.case import Case
from shardplan.planner.search.comparing import causes, spent
from shardplan.planner.search.decisions import Other, nearest
from shardplan.planner.search.finish import Finished
from shardplan.planner.search.infeasible import explain_infeasible
from shardplan.planner.search.mixed import MixedSearch
from shardplan.planner.search.mixed_baselines import hand_made
from shardplan.planner.search.mixed_candidate import MixedCandidate
from shardplan.planner.search.otherwise import Piece, otherwise
from shardplan.planner.search.stage_ilp import StageChoice, StageProblem
from shardplan.planner.search.summing import Part, with_sums
from shardplan.planner.stages import split_stages
from shardplan.planner.storage import Storage
from shardplan.planner.trace import info, resolve, tensor_args
from shardplan.planner.transfers import Side, boundary, traffic, transfers

if TYPE_CHECKING:
    from shardplan.planner.search.search import Search

_RUNNERS_UP = 4


def solve_unequal(search: Search) -> Plan:
    """The plan for unequal devices. Raises NoFeasiblePlan and what `Search.solve` raises."""
    mixed = MixedSearch(search)
    found = mixed.solve()
    if not found:
        cases = [case for case in search.cases() if search.exact(case) is None]
        raise explain_infeasible(search, cases)
    baselines = hand_made(mixed, found)
    made = [_Mixed(search, mixed, candidate) for candidate in (*found[: 1 + _RUNNERS_UP], *baselines.values())]
    made.sort(key=lambda each: (each.seconds, each.text))
    best = made[0]
    shown = {each.candidate.label: each.shown(best) for each in made if each.candidate.label}
    for name in NAMES:
        shown.setdefault(name, Alternative(name, None, 0, mixed.why_missing(name)))
    runners = [each.shown(best) for each in made[1:] if not each.candidate.label]
    plan = best.plan(tuple(shown.values()), tuple(runners[:_RUNNERS_UP]))
    return replace(plan, decisions=_decisions(best, made))


def _decisions(best: _Mixed, made: Sequence[_Mixed]) -> tuple[Decision, ...]:
    """Against the plans that were drawn up (bounds are those of whole families of plans here), and within the plan."""
    others = [
        Other(each.values(), each.seconds, False, each.name, each.causes(best)) for each in made if each is not best
    ]
    pieces = [
        Piece(part.search, part.candidate, ((number, (stage.first, stage.last)),))
        for number, (part, stage) in enumerate(zip(best.parts, best.stages, strict=True))
    ]
    return (*nearest(best.values(), others), *otherwise(pieces, best.stages, best.links, best.instructions))


class _Mixed:
    """A finished candidate for unequal devices."""

    def __init__(self, search: Search, mixed: MixedSearch, candidate: MixedCandidate) -> None:
        self.search, self.mixed, self.candidate = search, mixed, candidate
        self.trace = search.trace
        self.bounds = tuple(stage.first for stage in candidate.stages)
        self.parts = [self._part(number) for number in range(len(candidate.stages))]
        self.split = split_stages(self.trace, self.bounds)
        self.chosen = self._chosen()
        self.stored = self._stored()
        self.links = self._links()
        self.instructions = schedules.build(
            search.schedule,
            len(self.bounds),
            candidate.microbatches,
            self.split.edges(),
            training=search.options.training,
            grad_edges=self.split.grad_edges(),
        )
        stages = [self._stage(number) for number in range(len(self.parts))]
        self.stages, self.bucket_nbytes = with_sums(self.parts, stages)
        self.simulation, self.exposed_seconds = finish.simulated(self.instructions, self.stages, self.links)

    @property
    def seconds(self) -> float:
        return self.simulation.step_seconds

    @property
    def text(self) -> str:
        stages = zip(self.candidate.groups, self.candidate.ranks, self.bounds, strict=True)
        return " | ".join(f"{group} on {_ranks(ranks)} from {first}" for group, ranks, first in stages)

    @property
    def name(self) -> str:
        return self.candidate.label or f"pp{len(self.bounds)} m{self.candidate.microbatches}: {self.text}"

    def values(self) -> dict[str, str]:
        """What the plan decides, by topic."""
        kinds = [device.kind.name for device in self.search.cluster.devices]
        used: dict[str, int] = {}
        for rank in sorted(rank for ranks in self.candidate.ranks for rank in ranks):
            used[kinds[rank]] = used.get(kinds[rank], 0) + 1
        order = " then ".join(dict.fromkeys(kinds[ranks[0]] for ranks in self.candidate.ranks))
        meshes = " | ".join(f"dp{group.dp} x tp{group.tp}" for group in self.candidate.groups)
        sharing = self.candidate.sharing
        shares = "equal" if sharing is None else " : ".join(map(str, sharing.microbatches))
        return {
            "devices in use": ", ".join(f"{count} x {kind}" for kind, count in used.items()),
            "order of kinds": order,
            "pipeline stages": str(len(self.bounds)),
            "meshes of the stages": meshes,
            "microbatches": str(self.candidate.microbatches),
            "shares of replicas": shares,
        }

    def causes(self, best: _Mixed) -> str:
        """Why it lost, in words with numbers."""
        used, theirs = (sum(map(len, each.candidate.ranks)) for each in (self, best))
        more = causes(
            *(spent(each.seconds, each.stages, each.candidate.microbatches) for each in (self, best)),
        )
        reasons = ", ".join(filter(None, (f"uses {used} of {theirs} devices" if used < theirs else "", more)))
        return f"{self.seconds / best.seconds - 1:.1%} slower" + (f": {reasons}" if reasons else "")

    def shown(self, best: _Mixed) -> Alternative:
        peak = max(stage.memory.peak_nbytes for stage in self.stages)
        return Alternative(self.name, self.seconds, peak, "this is the plan" if self is best else self.causes(best))

    # -- stages --------------------------------------------------------------------------------------------------------

    def _part(self, number: int) -> Part:
        candidate, stage = self.candidate, self.candidate.stages[number]
        group, columns, segments = candidate.groups[number], candidate.columns[number], candidate.segments[number]
        placed = copy.copy(columns.costs)
        count = len(self.bounds)
        case = Case(count, columns.mesh.size("dp"), group.tp, candidate.microbatches)
        numbers = [0] * len(segments)
        numbers[stage.first : stage.last] = stage.columns
        way = candidate.problem.ways[stage.way]
        problem = StageProblem(
            way.columns,
            count,
            candidate.microbatches,
            (),
            (),
            (way.limit,) * count,
            tuple(candidate.problem.flight(count - s) for s in range(count)),
            way.fixed,
        )
        choice = StageChoice(self.bounds, tuple(numbers), candidate.objective, candidate.objective, False)
        made = Candidate(case, columns, segments, problem, choice, self.search.schedule, candidate.forced)
        view = copy.copy(self.search)
        view.costs = placed
        chosen, stored = finish._chosen(view, made)
        return Part(view, made, chosen, stored)

    def _mine(self, number: int) -> set[str]:
        """Nodes that the stage computes, and parameters that it holds."""
        stage = self.candidate.stages[number]
        names = {name for segment in self.trace.segments[stage.first : stage.last] for name in segment.nodes}
        held = {argument.name for name in names for argument in self.trace.node(name).all_input_nodes}
        return names | {name for name in held if name in self.trace.sources}

    def _chosen(self) -> dict[str, Strategy]:
        found: dict[str, Strategy] = {}
        for number in reversed(range(len(self.parts))):
            if self.candidate.groups[number].tp > 1:
                mine = self._mine(number)
                found |= {name: s for name, s in self.parts[number].chosen.items() if name in mine}
        return found

    def _stored(self) -> dict[str, Storage]:
        found: dict[str, Storage] = {}
        for number, part in enumerate(self.parts):
            mine = self._mine(number)
            for name, storage in part.stored.items():
                if name in mine:
                    found[self.trace.sources[name].name] = storage
        return dict(sorted(found.items()))

    def _stage(self, number: int) -> StagePlan:
        part, ranks = self.parts[number], self.candidate.ranks[number]
        stages = finish._stages(part.search, part.candidate, part.chosen, part.stored)
        stages = finish.with_memory(
            part.search, part.candidate, part.chosen, self.links, self.instructions, stages, part.stored
        )
        group = self.candidate.groups[number]
        mesh = Mesh(("dp", "tp"), (group.dp, group.tp))
        made = finish._detailed(part.search, part.candidate, part.chosen, stages[number])
        sharing = self.candidate.sharing
        if sharing is not None:
            made = replace(
                made,
                shares=sharing.microbatches,
                forward_seconds=made.forward_seconds * sharing.scale,
                backward_seconds=made.backward_seconds * sharing.scale,
                once_seconds=sharing.once,
            )
        return replace(made, ranks=ranks, mesh=mesh)

    # -- messages ------------------------------------------------------------------------------------------------------

    def _links(self) -> tuple[StageLink, ...]:
        found = []
        for source, target in sorted(self.split.edges()):
            there: dict[tuple[int, int], int] = {}
            back: dict[tuple[int, int], int] = {}
            for crossing in self.split.crossings:
                if crossing.source == source and target in crossing.targets:
                    self._cross(crossing.name, source, target, there, back)
            sides = self.candidate.ranks[source], self.candidate.ranks[target]
            first = sides[0][0], sides[1][0]
            found.append(
                StageLink(
                    source,
                    target,
                    _largest(there),
                    self.mixed.seconds(there),
                    _largest(back),
                    self.mixed.seconds(back),
                    self.search.costs.p2p(1, *first),
                    *self.search.costs.slowdown("p2p", first),
                )
            )
        return tuple(found)

    def _cross(
        self, name: str, source: int, target: int, there: dict[tuple[int, int], int], back: dict[tuple[int, int], int]
    ) -> None:
        node = self.trace.node(name)
        left, right = self.candidate.columns[source], self.candidate.columns[target]
        made = left.layout(node, left.placement(self.parts[source].chosen, node))
        readers = []
        for user in node.users:
            if self.split.stage_of.get(user.name) == target and resolve(user)[0] is user:
                chosen = right.others(user)
                if (tp := self.parts[target].chosen.get(user.name)) is not None:
                    chosen = {**chosen, "tp": tp}
                for position, argument in enumerate(tensor_args(user)):
                    if argument is node:
                        readers.append(tuple(chosen[a].inputs[position] if a in chosen else R for a in right.mesh.axes))
        leaves, arrives = boundary(info(node).shape, made, left.mesh, readers, right.mesh)
        here = Side(leaves, left.mesh, self.candidate.ranks[source])
        far = Side(arrives, right.mesh, self.candidate.ranks[target])
        item = info(node).dtype.itemsize
        for pair, numel in traffic(transfers(info(node).shape, here, far)).items():
            there[pair] = there.get(pair, 0) + numel * item
        if info(node).needs_grad and self.search.options.training:
            for pair, numel in traffic(transfers(info(node).shape, far.dual(), here.dual())).items():
                back[pair] = back.get(pair, 0) + numel * item

    # -- the plan ------------------------------------------------------------------------------------------------------

    def plan(self, baselines: tuple[Alternative, ...], runners_up: tuple[Alternative, ...]) -> Plan:
        first = self.parts[0]
        base = Finished(
            first.candidate,
            first.chosen,
            self.stored,
            self.split,
            self.stages,
            self.links,
            self.instructions,
            self.simulation,
            self.exposed_seconds,
            self.bucket_nbytes,
        ).plan(self.search, baselines, runners_up)
        return replace(base, stages=self.stages, splits=self._splits())

    def _splits(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        if any(group.tp > 1 for group in self.candidate.groups):
            found["tp"] = {name: str(s) for name, s in self.chosen.items() if finish._says_something(s)}
        for columns in self.candidate.columns:
            for axis, follow in columns.follows.items():
                held = found.setdefault(axis, {})
                held |= {n: str(s) for n, s in follow.strategies.items() if finish._says_something(s)}
        return {axis: dict(sorted(by_node.items())) for axis, by_node in sorted(found.items())}


def _largest(sent: dict[tuple[int, int], int]) -> int:
    """Bytes of the rank that receives the most."""
    held: dict[int, int] = {}
    for (_, target), nbytes in sent.items():
        held[target] = held.get(target, 0) + nbytes
    return max(held.values(), default=0)


def _ranks(ranks: tuple[int, ...]) -> str:
    first, last = min(ranks), max(ranks)
    return f"{first}-{last}" if last > first else str(first)
