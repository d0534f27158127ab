"""From a solved case to a Plan: strategies by node, stages, messages, simulated time, memory, certificate."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import fx

from shardplan.planner import schedules
from shardplan.planner.costs.base import OpCost
from shardplan.planner.describe import describe_nodes, op_name
from shardplan.planner.instructions import Schedule
from shardplan.planner.leaf_op import is_leaf
from shardplan.planner.placement import Mesh, Placement, R
from shardplan.planner.plan import (
    BUCKET_NBYTES,
    Alternative,
    DeviceSummary,
    Memory,
    Plan,
    StageLink,
    StagePlan,
    Status,
    input_texts,
)
from shardplan.planner.propagate import norm_notes, placed
from shardplan.planner.reductions import times_of
from shardplan.planner.rules import Strategy, has_rule, is_discovered, strategies, why_whole
from shardplan.planner.search.comparing import causes, spent
from shardplan.planner.search.put_off import SPLIT, weight_seconds
from shardplan.planner.search.runs import held_by, ops_of
from shardplan.planner.search.stage_memory import with_memory
from shardplan.planner.search.storing import Window, ways_to_store
from shardplan.planner.search.summing import Part, with_sums
from shardplan.planner.simulate import Simulation, messages_of, simulate
from shardplan.planner.stages import StageSplit, split_stages
from shardplan.planner.storage import Storage
from shardplan.planner.trace import info, infos, leaf_of, resolve

if TYPE_CHECKING:
    from shardplan.planner.search.candidate import Candidate
    from shardplan.planner.search.search import Search

_TIGHT = 0.9


@dataclass(slots=True)
class Finished:
    """A candidate with its tp strategies by node, how parameters are stored by name, and what the simulator says of its
    instruction list. exposed_seconds: of a step in which no sum of gradients hides behind backward: so the search
    counts them, and its bounds are bounds on this."""

    candidate: Candidate
    chosen: dict[str, Strategy]
    storage: dict[str, Storage]
    split: StageSplit
    stages: tuple[StagePlan, ...]
    links: tuple[StageLink, ...]
    instructions: Schedule
    simulation: Simulation
    exposed_seconds: float
    bucket_nbytes: int = BUCKET_NBYTES

    @property
    def seconds(self) -> float:
        return self.simulation.step_seconds

    @property
    def memory(self) -> tuple[Memory, ...]:
        """Of a rank of every position: the sum over its stages."""
        by_rank: dict[int, Memory] = {}
        for stage in self.stages:
            rank = stage.ranks[0]
            by_rank[rank] = by_rank[rank].beside(stage.memory) if rank in by_rank else stage.memory
        return tuple(by_rank.values())

    @property
    def peak_nbytes(self) -> int:
        return max(memory.peak_nbytes for memory in self.memory)

    @property
    def fits(self) -> bool:
        """Whether no device holds more than it may, op by op (the search adds up less finely)."""
        return all(not memory.limit or memory.peak_nbytes <= memory.limit for memory in self.memory)

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """(first, last) of the segments of every stage."""
        return tuple((stage.first, stage.last) for stage in self.stages)

    def detailed(self, search: Search) -> tuple[StagePlan, ...]:
        """The stages with where their seconds go."""
        return tuple(_detailed(search, self.candidate, self.chosen, stage) for stage in self.stages)

    def compared(self, search: Search, best: Finished) -> str:
        """Why it lost, in words with numbers."""
        case, other = self.candidate.case, best.candidate.case
        if case == other and self.seconds <= best.seconds:
            return "this is the plan"
        used = f"uses {case.devices} of {other.devices} devices" if case.devices < other.devices else ""
        more = causes(
            spent(self.seconds, self.detailed(search), case.microbatches),
            spent(best.seconds, best.detailed(search), other.microbatches),
        )
        reasons = ", ".join(filter(None, (used, more)))
        return f"{self.seconds / best.seconds - 1:.1%} slower" + (f": {reasons}" if reasons else "")

    def plan(self, search: Search, baselines: tuple[Alternative, ...], runners_up: tuple[Alternative, ...]) -> Plan:
        """The Plan of this candidate."""
        trace, candidate = search.trace, self.candidate
        around = search.costs.overheads(0)
        bound = min(search.tally.bound + around.step_seconds, self.exposed_seconds)
        gap = (self.exposed_seconds - bound) / self.exposed_seconds if self.exposed_seconds else 0.0
        outcome = "optimal" if gap <= search.options.gap and not search.tally.timed_out else "feasible"
        coverage = getattr(search.costs, "coverage", None)
        inputs = input_texts(
            (source.name, info(trace.node(n)).shape, str(info(trace.node(n)).dtype).removeprefix("torch."))
            for n, source in trace.sources.items()
            if source.kind == "input"
        )
        return Plan(
            model=trace.model_name,
            fingerprint=trace.fingerprint,
            batch_size=trace.batch_size,
            inputs=inputs,
            devices=tuple(
                DeviceSummary(d.kind.name, d.node, search.cluster.memory_limit(i))
                for i, d in enumerate(search.cluster.devices)
            ),
            stages=self.detailed(search),
            microbatches=candidate.case.microbatches,
            schedule=candidate.schedule,
            instructions=self.instructions,
            splits=self._splits(),
            storage=self.storage,
            bucket_nbytes=self.bucket_nbytes,
            step_seconds=self.seconds,
            status=Status(
                outcome,
                self.seconds * (1.0 - gap),
                gap,
                search.options.solver,
                time.monotonic() - search.budget.started,
                self._binds(),
                {
                    "solved": search.tally.solved,
                    "pruned by the bound": search.tally.pruned,
                    "do not fit": search.tally.infeasible,
                },
            ),
            baselines=baselines,
            runners_up=runners_up,
            coverage=coverage() if coverage is not None else {},
            calibration=dict(around.factors),
            calibrated_by=around.jobs,
            overheads={
                "forward": around.forward_seconds,
                "backward": around.backward_seconds,
                "step": around.step_seconds,
            },
            replicated_ops=self._without_rule(search),
            discovered_ops=self._discovered(search),
            leaves=self._leaves(search),
            links=self.links,
            nodes=describe_nodes(trace, self.split),
            constraints=tuple(map(str, search.options.constraints)),
            batch_norm=trace.batch_norm,
            notes=(*trace.notes, *search.tally.notes, *norm_notes(self._splits())),
        )

    def _splits(self) -> dict[str, dict[str, str]]:
        found = {
            axis: {name: str(s) for name, s in follow.strategies.items() if _says_something(s)}
            for axis, follow in self.candidate.columns.follows.items()
        }
        if self.candidate.case.tp > 1:
            found["tp"] = {name: str(s) for name, s in self.chosen.items() if _says_something(s)}
        return {axis: dict(sorted(by_node.items())) for axis, by_node in sorted(found.items())}

    def _binds(self) -> tuple[str, ...]:
        slowest = max(
            range(len(self.stages)), key=lambda s: self.stages[s].forward_seconds + self.stages[s].backward_seconds
        )
        found = []
        if len(self.stages) > 1:
            found.append(f"stage {slowest} sets the pace of the pipeline")
        for index, stage in enumerate(self.stages):
            if stage.memory.limit and stage.memory.peak_nbytes > _TIGHT * stage.memory.limit:
                share = stage.memory.peak_nbytes / stage.memory.limit
                found.append(f"memory of stage {index} is {share:.0%} of its limit")
        return tuple(found) or ("compute on every device",)

    def _without_rule(self, search: Search) -> tuple[tuple[str, int, float, str], ...]:
        columns = self.candidate.columns
        seconds: dict[tuple[str, str], list[float]] = {}
        total = sum(s.forward_seconds + s.backward_seconds for s in self.stages) or 1.0
        for segment in search.trace.segments:
            for node in ops_of(search.trace, segment):
                if not has_rule(node):
                    why = why_whole(node) or "no split of it is exact"
                    seconds.setdefault((op_name(node), why), []).append(columns.op_price(node, None).seconds)
        return tuple((name, len(values), sum(values) / total, why) for (name, why), values in sorted(seconds.items()))

    def _leaves(self, search: Search) -> tuple[tuple[str, float, str, str], ...]:
        total = sum(s.forward_seconds + s.backward_seconds for s in self.stages) or 1.0
        found = []
        for segment in search.trace.segments:
            for node in ops_of(search.trace, segment):
                note = leaf_of(node)
                if note is not None:
                    seconds = self.candidate.columns.op_price(node, self.chosen.get(node.name)).seconds
                    how = "batch split" if note.splits else f"whole: {note.unsplit}"
                    found.append((note.leaf.name, seconds / total, note.reason, how))
        return tuple(found)

    def _discovered(self, search: Search) -> tuple[tuple[str, int, str], ...]:
        found: dict[tuple[str, str], int] = {}
        for segment in search.trace.segments:
            for node in ops_of(search.trace, segment):
                if is_discovered(node):
                    ways = "; ".join(str(s).partition(": ")[2] for s in strategies(node) if s.is_split)
                    found[op_name(node), ways] = found.get((op_name(node), ways), 0) + 1
        return tuple((name, count, ways) for (name, ways), count in sorted(found.items()))


def _says_something(strategy: Strategy) -> bool:
    return any(p != R for p in (*strategy.inputs, *strategy.outputs))


def finish(search: Search, candidate: Candidate) -> Finished:
    """Work out what a candidate means for every node, and simulate it."""
    chosen, stored = _chosen(search, candidate)
    split = split_stages(search.trace, candidate.choice.bounds)
    links = links_of(search, candidate, chosen, split)
    stages = _stages(search, candidate, chosen, stored)
    case = candidate.case
    instructions = schedules.build(
        candidate.schedule,
        candidate.stages,
        case.microbatches,
        split.edges(),
        training=search.options.training,
        grad_edges=split.grad_edges(),
        chunks=candidate.chunks,
    )
    stages, bucket_nbytes = with_sums([Part(search, candidate, chosen, stored)] * len(stages), stages)
    stages = with_memory(search, candidate, chosen, links, instructions, stages, stored, bucket_nbytes)
    storage = {search.trace.sources[node].name: found for node, found in sorted(stored.items())}
    simulation, exposed = simulated(instructions, stages, links)
    return Finished(candidate, chosen, storage, split, stages, links, instructions, simulation, exposed, bucket_nbytes)


def simulated(
    instructions: Schedule, stages: Iterable[StagePlan], links: Iterable[StageLink]
) -> tuple[Simulation, float]:
    """-> (what the simulator says, seconds of a step in which no sum of gradients hides behind backward)."""
    times, messages = [times_of(stage) for stage in stages], messages_of(links)
    found = simulate(instructions, times, messages)
    if not any(stage.reductions for stage in times):
        return found, found.step_seconds
    whole = [
        replace(t, reductions=(), reduce_seconds=t.reduce_seconds + sum(s for _, s in t.reductions)) for t in times
    ]
    return found, simulate(instructions, whole, messages).step_seconds


def _chosen(search: Search, candidate: Candidate) -> tuple[dict[str, Strategy], dict[str, Storage]]:
    """By node: the strategy on tp, and how a parameter is stored that is not stored as it is used."""
    found: dict[str, Strategy] = {}
    stored: dict[str, Storage] = {}
    for index, segment in enumerate(search.trace.segments):
        column = candidate.segments[index].columns[candidate.choice.columns[index]]
        run = candidate.segments[index].runs[column.index]
        ops = ops_of(search.trace, segment)
        for node, strategy in zip(ops, run.choices, strict=True):
            if strategy is not None:
                found[node.name] = strategy
        for node, strategy, storage in zip(held_by(search.trace, ops), run.parameters, run.storage, strict=True):
            if strategy is not None:
                found.setdefault(node.name, strategy)
            if storage is not None:
                stored.setdefault(node.name, storage)
    return found, stored


def _tp(chosen: dict[str, Strategy], value: fx.Node) -> Placement:
    maker, index = resolve(value)
    return placed(chosen.get(maker.name), index)


def links_of(
    search: Search, candidate: Candidate, chosen: dict[str, Strategy], split: StageSplit
) -> tuple[StageLink, ...]:
    nbytes: dict[tuple[int, int], list[float]] = {}
    for crossing in split.crossings:
        node = search.trace.node(crossing.name)
        size = candidate.columns.local_nbytes(node, _tp(chosen, node))
        for target in crossing.targets:
            held = nbytes.setdefault((crossing.source, target), [0.0, 0.0])
            held[0] += size
            held[1] += size if crossing.info.needs_grad and search.options.training else 0.0
    apart = candidate.case.stride("pp")
    found = []
    for (source, target), (there, back) in sorted(nbytes.items()):
        ranks = candidate.position(source) * apart, candidate.position(target) * apart
        seconds = (0.0,) * 5  # on one position nothing is sent
        if ranks[0] != ranks[1]:
            sent, returned = search.costs.p2p(round(there), *ranks), search.costs.p2p(round(back), *ranks[::-1])
            seconds = sent, returned, search.costs.p2p(1, *ranks), *search.costs.slowdown("p2p", ranks)
        found.append(StageLink(source, target, round(there), seconds[0], round(back), *seconds[1:]))
    return tuple(found)


def _stages(
    search: Search,
    candidate: Candidate,
    chosen: dict[str, Strategy],
    stored: dict[str, Storage],
) -> tuple[StagePlan, ...]:
    problem, choice, case = candidate.problem, candidate.choice, candidate.case
    ends = [*choice.bounds[1:], len(candidate.segments)]
    found = []
    for stage, (first, last) in enumerate(zip(choice.bounds, ends, strict=True)):
        position = candidate.position(stage)
        columns = [candidate.segments[i].columns[choice.columns[i]] for i in range(first, last)]
        prices = [column.price for column in columns]
        segments = search.trace.segments[first:last]
        recomputed = tuple(
            segment.name
            for segment, column, i in zip(segments, columns, range(first, last), strict=True)
            if candidate.segments[i].runs[column.index].rematerialized
        )
        parameters, gradients, optimizer, optimizing, adding = _parameters(
            search, candidate, chosen, stored, first, last
        )
        weight = again = 0.0
        if candidate.schedule in SPLIT and search.options.training:
            again = search.costs.overheads(0).backward_seconds  # of an instruction more
            weight = weight_seconds(search, candidate, chosen, stored, stage) + again
        found.append(
            StagePlan(
                first=first,
                last=last,
                blocks=tuple(segment.name for segment in segments),
                ranks=case.ranks(position),
                mesh=Mesh(("dp", "tp"), (case.dp, case.tp)),
                forward_seconds=sum(p.forward_seconds for p in prices) + problem.fixed.forward_seconds,
                backward_seconds=sum(p.backward_seconds for p in prices) + problem.fixed.backward_seconds + again,
                weight_seconds=weight,
                once_seconds=sum(p.once_seconds for p in prices) + search.costs.overheads(0).step_seconds,
                memory=Memory(
                    parameters=round(parameters),
                    gradients=round(gradients),
                    optimizer=round(optimizer),
                    limit=round(problem.limits[position]),
                ),
                rematerialized=recomputed,
                optimizer_seconds=optimizing,
                adding_seconds=adding,
            )
        )
    return tuple(found)


def _detailed(search: Search, candidate: Candidate, chosen: dict[str, Strategy], stage: StagePlan) -> StagePlan:
    """The stage with the seconds of its classes of ops, and of what is neither op nor overhead."""
    ops = op_seconds(search, candidate, chosen, stage)
    around = search.costs.overheads(0)
    ahead = stage.forward_seconds - around.forward_seconds - sum(s[0] for s in ops.values())
    back = stage.backward_seconds - around.backward_seconds - sum(s[1] + s[2] for s in ops.values())
    communication = max(ahead, 0.0), max(back - stage.adding_seconds, 0.0) if search.options.training else 0.0
    least = 1e-9 * (stage.forward_seconds + stage.backward_seconds)  # what rounding leaves
    communication = communication[0] * (communication[0] > least), communication[1] * (communication[1] > least)
    return replace(stage, op_seconds=ops, communication_seconds=communication)


def op_seconds(
    search: Search, candidate: Candidate, chosen: dict[str, Strategy], stage: StagePlan
) -> dict[str, tuple[float, float, float]]:
    """See `StagePlan.op_seconds`. Segments of one kind that run alike are looked at once."""
    columns = candidate.columns
    known: dict[tuple[int, int, int], list[tuple[str, OpCost]]] = {}
    total: dict[str, list[float]] = {}
    again = set(stage.rematerialized)

    def priced(nodes: Iterable[fx.Node]) -> list[tuple[str, OpCost]]:
        return [(str(n.target) if not is_leaf(n) else "leaf", columns.op_cost(n, chosen.get(n.name))) for n in nodes]

    def add(costs: list[tuple[str, OpCost]], recomputed: bool) -> None:
        for name, cost in costs:
            held = total.setdefault(name, [0.0, 0.0, 0.0])
            back = cost.backward_seconds if search.options.training else 0.0
            for side, seconds in enumerate((cost.forward_seconds, back, cost.forward_seconds * recomputed)):
                held[side] += seconds

    for index in range(stage.first, stage.last):
        segment = search.trace.segments[index]
        key = segment.kind, id(candidate.segments[index]), candidate.choice.columns[index]
        if key not in known:
            known[key] = priced(ops_of(search.trace, segment))
        add(known[key], segment.name in again)
    shared = (search.trace.node(name) for name in sorted(search.trace.shared))
    add(priced(n for n in shared if n.op == "call_function" and resolve(n)[0] is n and infos(n)), False)
    return {name: (held[0], held[1], held[2]) for name, held in sorted(total.items())}


def _parameters(
    search: Search,
    candidate: Candidate,
    chosen: dict[str, Strategy],
    stored: dict[str, Storage],
    first: int,
    last: int,
) -> tuple[float, float, float, float, float]:
    """Bytes of parameters, gradients and optimizer state of a stage; seconds of its optimizer step, and of adding to
    gradients in a microbatch."""
    held: dict[fx.Node, None] = {}
    for segment in search.trace.segments[first:last]:
        held |= dict.fromkeys(held_by(search.trace, ops_of(search.trace, segment)))
    parameters = gradients = state = seconds = adding = 0.0
    for node in held:
        kept = stored.get(node.name)
        level = kept.level if kept is not None else 0
        (way,) = ways_to_store(candidate.columns, node, _tp(chosen, node), Window(), (level,))
        parameters += way.parameter_nbytes
        gradients += way.gradient_nbytes
        state += way.optimized_nbytes * search.options.optimizer_factor
        if way.optimized_nbytes:
            seconds += search.costs.optimizer(round(way.optimized_nbytes), 0)
            adding += candidate.columns.adding_seconds(way.gradient_nbytes)
    return parameters, gradients, state, seconds, adding
