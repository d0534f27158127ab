"""From the trace and its costs to columns: the ways to run a segment on one mesh.

For every kind of segment one op-level problem is built and solved between all layouts of the tensors at its two ends;
each solution is a column. Activations may be recomputed in backward: that is another weighting of the same problem, in
which forward counts twice and activations do not. Segments of one kind share their columns.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from torch import fx

from shardplan.planner.costs.base import Costs
from shardplan.planner.placement import COLLECTIVES, D, Mesh, Placement, R, S, conversion, fits, local_shape
from shardplan.planner.propagate import Follow, placed
from shardplan.planner.rules import Strategy, groups_fit, local_call, strategies
from shardplan.planner.search.boundaries import Boundaries
from shardplan.planner.search.elimination import eliminate
from shardplan.planner.search.memory import Keeps, copies
from shardplan.planner.search.problem import Option, Price, SegmentProblem, Value, Weights, total_price
from shardplan.planner.search.segment_ilp import solve_segment
from shardplan.planner.search.solver import Budget
from shardplan.planner.search.stage_ilp import Column
from shardplan.planner.trace import Segment, Trace, info, infos, is_tensor, mutated, needs_grad, resolve, tensor_args

_REDUCE_SAMPLE_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """One point of the outer search: stages x (dp x tp) devices each, and microbatches."""

    stages: int
    dp: int
    tp: int
    microbatches: int

    @property
    def width(self) -> int:
        return self.dp * self.tp

    @property
    def devices(self) -> int:
        return self.stages * self.width

    @property
    def mesh(self) -> Mesh:
        """Layouts refer to this mesh; the batch is split in time first, then over replicas."""
        return Mesh(("mb", "dp", "tp"), (self.microbatches, self.dp, self.tp))

    def __str__(self) -> str:
        return f"pp{self.stages} dp{self.dp} tp{self.tp} m{self.microbatches}"


@dataclass(frozen=True, slots=True)
class Run:
    """How a column runs its segment: a tp strategy per op and parameter it reads, by position in the segment."""

    choices: tuple[Strategy | None, ...]
    parameters: tuple[Strategy | None, ...]
    rematerialized: bool = False


@dataclass(slots=True)
class SegmentColumns:
    """columns of one segment; runs[column.index] says how."""

    columns: list[Column] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


def ops_of(trace: Trace, segment: Segment) -> list[fx.Node]:
    """The segment's ops, results of multi-result ops left out."""
    nodes = (trace.node(name) for name in segment.nodes)
    return [node for node in nodes if resolve(node)[0] is node and infos(node)]


def held_by(trace: Trace, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Parameters and buffers that the ops read, in order of first use."""
    found: dict[fx.Node, None] = {}
    for node in nodes:
        for argument in tensor_args(node):
            source = trace.sources.get(argument.name)
            if source is not None and source.kind in ("param", "buffer"):
                found[argument] = None
    return list(found)


@dataclass(frozen=True, slots=True)
class _Made:
    """A solution of an op-level problem: its price and how it runs."""

    price: Price
    run: Run


class Columns:
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
    ) -> None:
        self.trace = trace
        self.mesh = case.mesh
        self.tp, self.width, self.microbatches = case.tp, case.width, case.microbatches
        self.costs = costs
        self.follows = follows
        self.keeps = keeps
        self.boundaries = boundaries
        self.budget = budget
        self.optimizer_factor = optimizer_factor
        self.training = training
        self.rematerialize = rematerialize
        self.tp_ranks = tuple(range(case.tp))
        self.dp_ranks = tuple(range(0, case.width, case.tp))
        self._builders: dict[Hashable, _Builder] = {}
        self._made: dict[Hashable, dict[tuple[int, int], _Made]] = {}
        self._columns: dict[Hashable, SegmentColumns] = {}
        self._ends: dict[int, Hashable] = {}
        self.proven = 1.0
        """Share of their cost that is proven of all columns: a bound on a program of them is worth that share."""
        self.shared: Price | None = None
        """Of the ops that every stage computes for itself; filled in by `casework`."""
        self._nbytes: dict[tuple[str, Placement], float] = {}
        self._floors: dict[int, float] = {}
        self._transients: dict[int, float] = {}
        self._op_prices: dict[tuple[str, Strategy | None], Price] = {}

    # -- layouts -------------------------------------------------------------------------------------------------------

    def others(self, node: fx.Node) -> dict[str, Strategy]:
        """Strategies on the axes that follow the batch."""
        return {axis: f.strategies[node.name] for axis, f in self.follows.items() if node.name in f.strategies}

    def layout(self, value: fx.Node, tp: Placement) -> tuple[Placement, ...]:
        maker, index = resolve(value)
        others = self.others(maker)
        return tuple(tp if axis == "tp" else placed(others.get(axis), index) for axis in self.mesh.axes)

    def local_nbytes(self, value: fx.Node, tp: Placement) -> float:
        """Bytes of the value on one rank."""
        key = value.name, tp
        found = self._nbytes.get(key)
        if found is None:
            shape = local_shape(info(value).shape, self.layout(value, tp), self.mesh)
            found = self._nbytes[key] = float(math.prod(shape) * info(value).dtype.itemsize)
        return found

    def boundary_layouts(self, index: int) -> list[Placement]:
        """Layouts that the free tensor behind a segment may have; whole first."""
        node = self.boundaries.free[index] if index >= 0 else None
        found = [R]
        if node is not None and self.tp > 1 and len(info(node).shape) > 1:
            shard = S(1)
            if fits(info(node).shape, self.layout(node, shard), self.mesh):
                found.append(shard)
        return found

    # -- columns -------------------------------------------------------------------------------------------------------

    def of(self, index: int, forced: dict[str, Placement], weights: Sequence[Weights]) -> SegmentColumns:
        """Columns of segment `index`: the best for every weighting, between all layouts at its ends, with and without
        recomputation. forced: tp placements of parameters that the user or a tie fixes."""
        kind = self._kind(index, forced)
        key = (kind, tuple(weights))
        if key not in self._columns:
            self._columns[key] = self._joined(index, kind, forced, weights)
        return self._columns[key]

    def _kind(self, index: int, forced: dict[str, Placement]) -> Hashable:
        """Equal for segments that have the same columns."""
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
        if forced:
            held = held_by(self.trace, ops_of(self.trace, segment))
            mine = tuple(sorted((n.name, str(forced[n.name])) for n in held if n.name in forced))
        return segment.kind, self._ends[index], mine

    def _joined(
        self, index: int, kind: Hashable, forced: dict[str, Placement], weights: Sequence[Weights]
    ) -> SegmentColumns:
        modes = self._modes(index)
        wanted = [(replace(w, forward=2.0, in_flight=0.0) if again else w, again) for w in weights for again in modes]
        found = SegmentColumns()
        seen: set[tuple[object, ...]] = set()
        entering = self.boundary_layouts(index - 1)
        solved = self._solve(index, kind, forced, [w for w, _ in wanted])
        for ends in sorted({key for made in solved for key in made}):
            for (_, recompute), made in zip(wanted, solved, strict=True):
                if ends not in made:
                    continue
                price, run = made[ends].price, made[ends].run
                mine = self._recomputed(index, price, entering[ends[0]]) if recompute else price
                if (ends, mine) in seen:
                    continue
                seen.add((ends, mine))
                found.columns.append(Column(mine, *ends, index=len(found.runs)))
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

    def legal(self, node: fx.Node) -> list[Strategy]:
        """Strategies on tp that fit together with the batch's."""
        others, mesh = self.others(node), self.mesh
        found = []
        for strategy in strategies(node):
            if self.tp == 1 and strategy.name != "-":
                continue
            chosen = {**others, "tp": strategy}
            if len({s.impl for s in chosen.values() if s.impl}) > 1 or not groups_fit(chosen, mesh):
                continue  # an op is replaced by one implementation, and keeps its groups of channels together
            layouts = [
                (info(argument).shape, tuple(chosen[a].inputs[i] if a in chosen else R for a in mesh.axes))
                for i, argument in enumerate(tensor_args(node))
                if is_tensor(argument)
            ]
            layouts += [
                (result.shape, tuple(chosen[a].outputs[i] if a in chosen else R for a in mesh.axes))
                for i, result in enumerate(infos(node))
            ]
            if all(fits(shape, layout, mesh) for shape, layout in layouts):
                found.append(strategy)
        return found

    def _modes(self, index: int) -> tuple[bool, ...]:
        writes = any(mutated(self.trace.node(n)) for n in self.trace.segments[index].nodes)
        if not self.training or writes or self.rematerialize is False:
            return (False,)
        return (True,) if self.rematerialize is True else (False, True)

    def _recomputed(self, index: int, price: Price, entering: Placement) -> Price:
        """The same column, its activations recomputed: the forward runs again, only what enters is kept."""
        tensor = self.boundaries.before(index)
        kept = self.local_nbytes(tensor, entering) if tensor is not None else 0.0
        return replace(
            price,
            backward_seconds=price.backward_seconds + price.forward_seconds,
            activation_nbytes=kept,
            transient_nbytes=price.transient_nbytes + price.activation_nbytes,
        )

    def _solve(
        self, index: int, kind: Hashable, forced: dict[str, Placement], weights: Sequence[Weights]
    ) -> list[dict[tuple[int, int], _Made]]:
        """Per weighting, (layout that enters, layout that leaves) -> the best run of the segment."""
        missing = [w for w in dict.fromkeys(weights) if (kind, w) not in self._made]
        if missing:
            builder = self._builders.get(kind)
            if builder is None:
                builder = self._builders[kind] = _Builder(self, index, forced)
            for weighting, made in zip(missing, self._run(builder, missing), strict=True):
                self._made[kind, weighting] = made
        return [self._made[kind, w] for w in weights]

    def _run(self, builder: _Builder, weights: list[Weights]) -> list[dict[tuple[int, int], _Made]]:
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

    # -- prices --------------------------------------------------------------------------------------------------------

    def op_price(self, node: fx.Node, tp: Strategy | None) -> Price:
        """Compute of one op on one rank, the messages of its implementation, and the tensors that it leaves behind."""
        key = (node.name, tp)
        if key not in self._op_prices:
            self._op_prices[key] = self._op_price(node, tp)
        return self._op_prices[key]

    def _op_price(self, node: fx.Node, tp: Strategy | None) -> Price:
        chosen = self.others(node)
        if tp is not None:
            chosen["tp"] = tp
        chosen = {axis: s for axis, s in chosen.items() if self.mesh.size(axis) > 1}
        call = local_call(node, chosen, self.mesh)
        cost = self.costs.op(call, 0)
        forward, backward = cost.forward_seconds, cost.backward_seconds if self.training else 0.0
        for axis, strategy in chosen.items():
            if strategy.impl in ("cross_entropy", "batch_norm") and axis != "mb":
                extra = self._implementation_seconds(strategy, call.inputs[0].nbytes, call.inputs[0].shape, axis)
                forward, backward = forward + extra[0], backward + extra[1]
        out = sum(result.nbytes for result in call.outputs)
        if copies(node):  # a local call does not know strides, so this was priced as a view
            again = self.costs.copy(out, 0)
            forward += again
            backward += again if self.training and needs_grad(node) else 0.0
        kept = self.keeps.extra_nbytes(node, out) if self.training else 0.0
        for position, result in enumerate(call.outputs):
            if self.training and self.keeps.is_kept(node, position):
                kept += result.nbytes
        transient = out + sum(argument.nbytes for argument in call.inputs)
        return Price(forward, backward, 0.0, 0.0, kept, transient)

    def _implementation_seconds(
        self, strategy: Strategy, nbytes: int, shape: tuple[int, ...], axis: str
    ) -> tuple[float, float]:
        ranks = self.tp_ranks if axis == "tp" else self.dp_ranks
        if strategy.impl == "cross_entropy":
            if strategy.name != "class":
                return 0.0, 0.0
            per_token = nbytes // max(shape[1 if len(shape) > 1 else 0], 1)
            once = self.costs.collective("all_reduce", per_token, ranks)
            return once + self.costs.collective("all_reduce", 2 * per_token, ranks), 0.0
        channels = shape[1] * 4 if len(shape) > 1 else 4
        each = self.costs.collective("all_reduce", channels, ranks)
        return 2 * each, 2 * each

    def parameter_price(self, node: fx.Node, tp: Placement) -> Price:
        """Memory of a parameter with its gradient and optimizer state, and its share of the work once a step."""
        nbytes = self.local_nbytes(node, tp)
        trainable = self.trace.sources[node.name].trainable and self.training
        if not trainable:
            return Price(parameter_nbytes=nbytes)
        once = self.costs.optimizer(round(nbytes), 0)
        ranks = self.reduce_ranks(self.layout(node, tp))
        if len(ranks) > 1:
            # Gradients travel in buckets, so a parameter costs its share of a large message.
            sample = self.costs.collective("all_reduce", _REDUCE_SAMPLE_NBYTES, ranks)
            once += sample * nbytes / _REDUCE_SAMPLE_NBYTES + self.costs.copy(round(nbytes), 0)
        return Price(once_seconds=once, parameter_nbytes=nbytes * (2 + self.optimizer_factor))

    def reduce_ranks(self, layout: tuple[Placement, ...]) -> tuple[int, ...]:
        """Ranks of the first replica group over which a gradient has to be summed."""
        axes = {axis for axis, p in zip(self.mesh.axes, layout, strict=True) if p == D and axis != "mb"}
        if axes == {"dp", "tp"}:
            return tuple(range(self.width))
        return self.dp_ranks if "dp" in axes else self.tp_ranks if "tp" in axes else (0,)

    def conversion_price(self, value: fx.Node, source: Placement, target: Placement) -> Price | None:
        """A conversion on the tensor-parallel axis. None: not allowed (a buffer that is written has one layout)."""
        differentiable = needs_grad(value) and self.training
        step = conversion(source, target, needs_grad(value))
        whole = self.local_nbytes(value, R)
        seconds = [self._seconds(part, whole, "tp") for part in (step.forward, step.backward)]
        if not differentiable:
            seconds[1] = 0.0
        copied = step.forward != "identity"
        held = whole / self.tp if target.is_shard else whole
        keep = self.training and copied and self.keeps.is_read_again(value)
        return Price(seconds[0], seconds[1], 0.0, 0.0, held if keep else 0.0, held if copied else 0.0)

    def _seconds(self, part: str, whole_nbytes: float, axis: str) -> float:
        ranks = self.tp_ranks if axis == "tp" else self.dp_ranks
        if part == "identity":
            return 0.0
        if part in COLLECTIVES:
            nbytes = whole_nbytes / len(ranks) if part == "all_to_all" else whole_nbytes
            return self.costs.collective(part, round(nbytes), ranks)
        return self.costs.copy(round(whole_nbytes), 0)

    def batch_conversions(self, node: fx.Node) -> Price:
        """Conversions on "dp" that the followed strategy of an op needs on what it reads."""
        forward = backward = 0.0
        strategy = self.others(node).get("dp")
        if strategy is None:
            return Price()
        for argument, wanted in zip(tensor_args(node), strategy.inputs, strict=True):
            if not is_tensor(argument):
                continue
            maker, position = resolve(argument)
            step = conversion(placed(self.others(maker).get("dp"), position), wanted, needs_grad(argument))
            nbytes = float(info(argument).nbytes) / self.microbatches
            forward += self._seconds(step.forward, nbytes, "dp")
            backward += self._seconds(step.backward, nbytes, "dp") if self.training else 0.0
        return Price(forward, backward)


class _Builder:
    """The op-level problem of one segment (None where some op has no legal option left)."""

    def __init__(self, columns: Columns, index: int, forced: dict[str, Placement]) -> None:
        self.columns = columns
        self.trace = columns.trace
        self.forced = forced
        self.enters, self.leaves = columns.boundaries.before(index), columns.boundaries.free[index]
        self.entering, self.leaving = columns.boundary_layouts(index - 1), columns.boundary_layouts(index)
        self.index = index
        self.ops = ops_of(self.trace, self.trace.segments[index])
        self.held = held_by(self.trace, self.ops)
        self.written = {buffer for op in self.ops for buffer in mutated(op)}
        self.states: dict[Placement, int] = {R: 0}
        self.numbers: dict[fx.Node, int] = {}
        self.options: list[tuple[Option, ...]] = []
        self.strategies: list[list[Strategy | None]] = []
        self.names: list[str] = []
        self.values: dict[Value, fx.Node] = {}
        self.constant = Price()
        self.problem = self._problem()

    def state(self, placement: Placement) -> int:
        return self.states.setdefault(placement, len(self.states))

    def _problem(self) -> SegmentProblem | None:
        inside = set(self.ops)
        wanted = self._wanted_of_held()
        enter = -1
        for node in self._outside(inside):
            layouts = self._layouts(node)
            options = [Option(Price(), tuple(self.state(p) for p in layout), ()) for layout in layouts]
            self._add(node, [None] * len(options), options)
            if self.enters is not None and resolve(self.enters)[0] is node:
                enter = self.numbers[node]
        for node in self.held:
            self._held(node, wanted[node])
        for node in self.ops:
            if not self._op(node):
                return None
            self.constant += self.columns.batch_conversions(node)
        leave = None
        if self.leaves is not None:
            maker, result = resolve(self.leaves)
            leave = (self.numbers[maker], result), tuple(self.state(p) for p in self.leaving)
        names = {number: str(placement) for placement, number in self.states.items()}
        return SegmentProblem(
            tuple(self.names),
            tuple(self.options),
            self._conversions(),
            tuple(names[i] for i in range(len(names))),
            enter,
            leave,
        )

    def run(self, choice: tuple[int, ...]) -> Run:
        """What a choice means, by position in the segment."""
        chosen = {node: self.strategies[number][choice[number]] for node, number in self.numbers.items()}
        return Run(tuple(chosen[n] for n in self.ops), tuple(chosen[n] for n in self.held))

    def _add(self, node: fx.Node, strategies: list[Strategy | None], options: list[Option]) -> None:
        number = self.numbers[node] = len(self.options)
        self.options.append(tuple(options))
        self.strategies.append(strategies)
        self.names.append(node.name)
        for user in [node, *node.users]:
            if resolve(user)[0] is node and is_tensor(user):
                self.values[number, resolve(user)[1]] = user

    def _outside(self, inside: set[fx.Node]) -> list[fx.Node]:
        found: dict[fx.Node, None] = {}
        for node in self.ops:
            for argument in tensor_args(node):
                maker = resolve(argument)[0]
                if maker not in inside and maker not in self.held:
                    found[maker] = None
        return list(found)

    def _layouts(self, node: fx.Node) -> list[list[Placement]]:
        """The ways in which the results of an op of another segment may lie, per layout of what enters."""
        count = max(len(infos(node)), 1)
        if self.enters is None or resolve(self.enters)[0] is not node:
            return [[R] * count]
        place = resolve(self.enters)[1]
        return [[layout if i == place else R for i in range(count)] for layout in self.entering]

    def _wanted_of_held(self) -> dict[fx.Node, list[Placement]]:
        """Placements in which some option reads a parameter or buffer."""
        found: dict[fx.Node, dict[Placement, None]] = {node: {R: None} for node in self.held}
        for node in self.ops:
            for strategy in self.columns.legal(node):
                for argument, placement in zip(tensor_args(node), strategy.inputs, strict=True):
                    if argument in found and placement.kind in ("S", "D"):
                        found[argument][placement] = None
        return {node: list(placements) for node, placements in found.items()}

    def _held(self, node: fx.Node, placements: list[Placement]) -> None:
        allowed = [p for p in placements if fits(info(node).shape, self.columns.layout(node, p), self.columns.mesh)]
        if node.name in self.forced:
            allowed = [self.forced[node.name]]
        options = [Option(self.columns.parameter_price(node, p), (self.state(p),), (), str(p)) for p in allowed]
        self._add(node, [Strategy("-", (), (p,)) for p in allowed], options)

    def _op(self, node: fx.Node) -> bool:
        legal, options = [], []
        pinned = self.leaves is not None and resolve(self.leaves)[0] is node
        crossing = self._crosses(node)
        for strategy in self.columns.legal(node):
            if pinned and self.leaves is not None:
                if strategy.outputs[resolve(self.leaves)[1]] not in self.leaving:
                    continue
            elif crossing and any(p != R for p in strategy.outputs):
                continue
            needs = []
            for argument, placement in zip(tensor_args(node), strategy.inputs, strict=True):
                maker, position = resolve(argument)
                if placement == D and not needs_grad(argument):
                    placement = R
                needs.append(((self.numbers[maker], position), self.state(placement)))
            states = tuple(self.state(p) for p in strategy.outputs)
            legal.append(strategy)
            options.append(Option(self.columns.op_price(node, strategy), states, tuple(needs), strategy.name))
        if options:
            self._add(node, legal, options)
        return bool(options)

    def _crosses(self, node: fx.Node) -> bool:
        """Whether a result is read by other segments, or is the loss. Other results of the model may lie in any way."""
        mine = set(self.trace.segments[self.index].nodes)
        for value in [node, *node.users]:
            if resolve(value)[0] is not node:
                continue
            for reader in value.users:
                if reader.op == "output":
                    if reader.args[0][0] is value:  # type: ignore[index]
                        return True
                elif reader.name not in mine and resolve(reader)[0] is reader:
                    return True
        return False

    def _conversions(self) -> dict[tuple[Value, int, int], Price]:
        placements = {number: placement for placement, number in self.states.items()}
        found: dict[tuple[Value, int, int], Price] = {}
        needed = sorted({need for options in self.options for option in options for need in option.needs})
        for value, target in needed:
            node = self.values.get(value)
            if node is None:
                continue
            for source in sorted({option.states[value[1]] for option in self.options[value[0]]}):
                if source == target or node in self.written:
                    continue
                price = self.columns.conversion_price(node, placements[source], placements[target])
                if price is not None:
                    found[value, source, target] = price
        return found
