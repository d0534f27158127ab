"""Carry the split of the batch through the graph: the strategies of data parallelism and of microbatches.

On the axis "dp" the batch letter is followed from the inputs to the loss, converting where an op needs it. On the axis
"mb" (time) the same is done, but no conversion may communicate: microbatches cannot exchange tensors. A graph for which
that is impossible (batch normalisation, a product of two batch means) runs exactly only in one microbatch, and `reason`
says which op is in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from shardplan.planner.placement import (
    COLLECTIVES,
    MICROBATCH_AXIS,
    D,
    Layout,
    Mesh,
    P,
    Placement,
    R,
    S,
    conversion,
    fits,
)
from shardplan.planner.rules import Strategy, groups_fit, strategies
from shardplan.planner.rules.strategy import OWN, SENT
from shardplan.planner.trace import Trace, info, infos, is_tensor, leaf_of, mutated, needs_grad, resolve, tensor_args

REPLICA_NORM = "batch_norm_replica"
"""`Strategy.impl` of a batch normalisation by the statistics of each part."""


@dataclass(slots=True)
class Follow:
    """strategies: node name -> Strategy on the axis (placeholders included); reason: why the batch cannot be split
    exactly on this axis, or None."""

    strategies: dict[str, Strategy] = field(default_factory=dict)
    reason: str | None = None


def placed(strategy: Strategy | None, index: int) -> Placement:
    """Placement of result `index` under a strategy (None: replicated)."""
    return R if strategy is None or index >= len(strategy.outputs) else strategy.outputs[index]


def follow(trace: Trace, axis: str, mesh: Mesh, beside: Mapping[str, Mapping[str, Strategy]] | None = None) -> Follow:
    """The batch-split strategy of every node on `axis` ("dp" or "mb") of a mesh whose other axes are split as in
    `beside` (axis -> node name -> Strategy)."""
    return _Follower(trace, axis, mesh, beside or {}).run()


def follow_batch(trace: Trace, mesh: Mesh) -> dict[str, Follow]:
    """The axes of the mesh that the batch is split on, those of size 1 left out: microbatches, and replicas within."""
    found: dict[str, Follow] = {}
    for axis in (MICROBATCH_AXIS, "dp"):
        if mesh.size(axis) > 1:
            found[axis] = follow(trace, axis, mesh, {other: result.strategies for other, result in found.items()})
    return found


def parts_of(trace: Trace, follows: Mapping[str, Follow]) -> frozenset[tuple[tuple[int, ...], Layout]]:
    """The different (shape, placements on the axes of `follows`) of all tensors that ops read and make: what sizes of
    the axes have to divide.

    Where they divide by multiples of the sizes that the batch was followed for, following it again would give the same:
    a legal strategy of larger axes is one of smaller ones, and sizes have no other part in the choice.
    """
    found: set[tuple[tuple[int, ...], Layout]] = set()
    for node in trace.nodes():
        chosen = [f.strategies[node.name] for f in follows.values() if node.name in f.strategies]
        if len(chosen) < len(follows):
            continue
        for index, argument in enumerate(tensor_args(node) if node.op == "call_function" else ()):
            if is_tensor(argument):
                found.add((info(argument).shape, tuple(s.inputs[index] for s in chosen)))
        for index, made in enumerate(infos(node)):
            found.add((made.shape, tuple(placed(s, index) for s in chosen)))
    return frozenset(found)


def carry(
    trace: Trace,
    axis: str,
    mesh: Mesh,
    given: Callable[[fx.Node], Strategy | None],
    beside: Mapping[str, Mapping[str, Strategy]],
) -> dict[str, Strategy]:
    """The strategy of every node on `axis` of a mesh whose other axes are split as in `beside` (axis -> node name ->
    Strategy): the given one where it is legal here, else the one that converts its arguments at the least cost.

    Placeholders without a given strategy are replicated. Buffers lie as given: an op that writes to one reads it so.
    """
    return _Carrier(trace, axis, mesh, given, beside).run().strategies


class _Follower:
    def __init__(self, trace: Trace, axis: str, mesh: Mesh, beside: Mapping[str, Mapping[str, Strategy]]) -> None:
        self.trace = trace
        self.mesh = mesh
        self.beside = beside
        self.silent = axis == MICROBATCH_AXIS
        self.axis = axis
        self.result = Follow()
        self.chosen = self.result.strategies
        self.used: dict[str, int] = {}
        self.rewrites: list[str] = []
        self.known: dict[tuple[object, ...], list[Strategy]] | None = {}
        self.inside: frozenset[str] = frozenset()
        self.pulled_outside = False

    def run(self) -> Follow:
        segment_of = {segment.nodes[0]: segment for segment in self.trace.segments}
        nodes, position = list(self.trace.nodes()), 0
        while position < len(nodes):
            segment = segment_of.get(nodes[position].name)
            if segment is None:
                self.node(nodes[position])
                position += 1
                continue
            # Shared ops that stand between those of the segment go first: the segment may read them.
            mine, left = frozenset(segment.nodes), len(segment.nodes)
            start = position
            while left:
                left -= nodes[position].name in mine
                position += 1
            span = nodes[start:position]
            for node in span:
                if node.name not in mine:
                    self.node(node)
            self.segment(segment.kind, mine, [node for node in span if node.name in mine])
        self.loss()
        if self.rewrites and self.result.reason is None:
            self.result.reason = self.rewrites[0]
        return self.result

    def node(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.chosen[node.name] = Strategy("-", (), (self.source(node),))
        elif node.op == "call_function" and resolve(node)[0] is node and infos(node):
            self.op(node)

    def segment(self, kind: int, mine: frozenset[str], nodes: list[fx.Node]) -> None:
        """The ops of a segment; as in an earlier one of its kind whose arguments stood alike, if there is one."""
        ops = [node for node in nodes if resolve(node)[0] is node and infos(node)]
        outside = dict.fromkeys(
            argument for node in ops for argument in tensor_args(node) if resolve(argument)[0].name not in mine
        )
        key = (
            kind,
            *((self.state(a), self.used.get(a.name, 0) > 0, self.is_counted(a)) for a in outside),
            *(of.get(node.name) for of in self.beside.values() for node in ops),
        )
        found = self.known.get(key) if self.known is not None else None
        if found is not None:
            for node, strategy in zip(ops, found, strict=True):
                self.chosen[node.name] = strategy
                for argument in tensor_args(node):
                    self.used[argument.name] = self.used.get(argument.name, 0) + 1
            return
        self.inside, self.pulled_outside = mine, False
        for node in ops:
            self.op(node)
        self.inside = frozenset()
        if self.known is not None and not self.pulled_outside:
            self.known[key] = [self.chosen[node.name] for node in ops]

    def source(self, node: fx.Node) -> Placement:
        source = self.trace.sources[node.name]
        if source.kind == "input" and source.batch_dim is not None:
            return S(source.batch_dim)
        # A trainable parameter meets a different part of the batch on every rank: its gradient is a summand.
        return D if needs_grad(node) else R

    def state(self, argument: fx.Node) -> Placement:
        maker, index = resolve(argument)
        return placed(self.chosen.get(maker.name), index)

    def op(self, node: fx.Node) -> None:
        arguments = tensor_args(node)
        if self.silent and not (_repeatable(node) or self.is_statistic(node)):
            self.rewrites.append(f"{node.name} ({node.target}) would write to a buffer once per microbatch")
        carries = any(self.state(argument).kind in ("S", "P") for argument in arguments)
        best: tuple[tuple[float, ...], Strategy] | None = None
        for order, strategy in enumerate(map(self.per_replica, strategies(node, inner=True))):
            if not self.divisible(node, arguments, strategy) or self.needs_others(node, strategy):
                continue
            price = self.price(arguments, strategy)
            if price is None:
                continue
            sent, moved = price
            lost = any(p == P and self.state(a).is_shard for a, p in zip(arguments, strategy.inputs, strict=True))
            rank = (sent, lost, moved, strategy.is_split != carries, any(p == P for p in strategy.outputs), order)
            if best is None or rank < best[0]:
                best = rank, strategy
        if best is None:
            self.fail(node, arguments)
            best = (), strategies(node, inner=True)[0]
        self.choose(node, arguments, best[1])

    def needs_others(self, node: fx.Node, strategy: Strategy) -> bool:
        """Whether the op's implementation needs a sum over the axis that microbatches cannot give one another: batch
        statistics, or a count that is not known from the inputs alone."""
        if not self.silent or strategy.impl is None:
            return False
        if strategy.impl in ("cross_entropy", "nll_loss"):
            if not strategy.inputs[1].is_shard:
                return True  # the classes are split
            return not all(self.from_inputs(argument) for argument in tensor_args(node)[1:])
        return strategy.impl in ("batch_norm", OWN, SENT)

    def per_replica(self, strategy: Strategy) -> Strategy:
        """The strategy with statistics of each part instead of the whole batch, where that is asked for."""
        if self.trace.batch_norm != "replica" or strategy.impl != "batch_norm":
            return strategy
        return replace(strategy, impl=REPLICA_NORM)

    def is_statistic(self, node: fx.Node) -> bool:
        """Whether the op writes running statistics that every microbatch is to move, or counts how often it ran."""
        if self.trace.batch_norm != "replica":
            return False
        return node.target is torch.ops.aten.batch_norm.default or all(
            self.trace.sources[n.name].kind in ("buffer", "constant") for n in _placeholders(node)
        )

    def from_inputs(self, value: fx.Node) -> bool:
        maker = resolve(value)[0]
        return maker.op == "placeholder" or maker.name in self.trace.shared

    def is_counted(self, value: fx.Node) -> bool:
        """Whether the sum of the microbatches' summands can be had before the first: it follows from the inputs."""
        return resolve(value)[0].name in self.trace.shared

    def divisible(self, node: fx.Node, arguments: tuple[fx.Node, ...], strategy: Strategy) -> bool:
        """Whether all parts are even, beside the splits of the other axes, and a buffer is written as it lies."""
        others = {axis: of[node.name] for axis, of in self.beside.items() if node.name in of}

        def whole(shape: tuple[int, ...], place: Callable[[Strategy], Placement]) -> bool:
            by_axis = {**{axis: place(other) for axis, other in others.items()}, self.axis: place(strategy)}
            return fits(shape, tuple(by_axis.get(axis, R) for axis in self.mesh.axes), self.mesh)

        if not groups_fit({**others, self.axis: strategy}, self.mesh):
            return False
        written = mutated(node)
        for index, argument in enumerate(arguments):
            if argument in written and strategy.inputs[index] != self.state(argument):
                return False
            if is_tensor(argument) and not whole(info(argument).shape, lambda s, i=index: s.inputs[i]):
                return False
        return all(whole(made.shape, lambda s, i=index: placed(s, i)) for index, made in enumerate(infos(node)))

    def price(self, arguments: tuple[fx.Node, ...], strategy: Strategy) -> tuple[float, ...] | None:
        """(bytes communicated, bytes converted without communication), or None where it cannot be."""
        sent = moved = 0.0
        for argument, wanted in zip(arguments, strategy.inputs, strict=True):
            have = self.state(argument)
            differentiable = needs_grad(argument)
            step = conversion(have, wanted, differentiable)
            if step.forward == step.backward == "identity":
                continue
            nbytes = float(info(argument).nbytes)
            talks = [part for part in (step.forward, step.backward) if part in COLLECTIVES]
            if talks and self.silent and not (have == P and self.is_counted(argument)):
                return None
            sent += nbytes * sum(2 if part == "all_reduce" else 1 for part in talks)
            moved += nbytes
        return sent, moved

    def choose(self, node: fx.Node, arguments: tuple[fx.Node, ...], strategy: Strategy) -> None:
        self.chosen[node.name] = strategy
        for argument, wanted in zip(arguments, strategy.inputs, strict=True):
            if wanted.is_shard and self.state(argument) != wanted:
                self.pull(argument, wanted)
            self.used[argument.name] = self.used.get(argument.name, 0) + 1

    def pull(self, value: fx.Node, wanted: Placement) -> bool:
        """Make a value that was computed whole in the wanted split instead (an expanded mask, a position grid), if
        nobody has read it yet and its own arguments allow it without communication."""
        node, index = resolve(value)
        if node.op != "call_function" or self.used.get(value.name, 0) or len(infos(node)) > 1:
            return False
        if self.state(value).is_shard:
            return False
        arguments = tensor_args(node)
        for strategy in strategies(node, inner=True):
            if placed(strategy, index) != wanted or not self.divisible(node, arguments, strategy):
                continue
            price = self.price(arguments, strategy)
            if price is None or price[0] > 0:
                continue
            self.chosen[node.name] = strategy
            self.pulled_outside |= node.name not in self.inside
            for argument, part in zip(arguments, strategy.inputs, strict=True):
                if part.is_shard and self.state(argument) != part and self.used.get(argument.name, 0) <= 1:
                    self.used[argument.name] = 0
                    self.pull(argument, part)
                    self.used[argument.name] = 1
            return True
        return False

    def loss(self) -> None:
        outputs = next(n for n in self.trace.nodes() if n.op == "output").args[0]
        loss = outputs[0] if isinstance(outputs, (tuple, list)) else outputs  # type: ignore[index]
        if not isinstance(loss, fx.Node) or not self.silent:
            return
        step = conversion(self.state(loss), P, needs_grad(loss))
        if {step.forward, step.backward} & COLLECTIVES:
            self.result.reason = f"the loss ({loss.name}) is not a sum over the batch"

    def fail(self, node: fx.Node, arguments: tuple[fx.Node, ...]) -> None:
        if self.result.reason is None:
            note = leaf_of(node)
            if note is not None:
                why = note.unsplit or "splits its batch otherwise"
                self.result.reason = f"{note.leaf.name} is kept whole and {why}"
                return
            states = ", ".join(f"{a.name} {self.state(a)}" for a in arguments)
            self.result.reason = f"{node.name} ({node.target}) mixes the whole batch: its arguments stand as {states}"


def _repeatable(node: fx.Node) -> bool:
    """Whether an op may run once per microbatch: one that writes to a buffer may if it always writes the same and
    nobody reads what was there before."""
    return all(node.target is torch.ops.aten.copy_.default and set(b.users) == {node} for b in mutated(node))


def _placeholders(node: fx.Node) -> set[fx.Node]:
    """What the value is computed from in the end."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending += current.all_input_nodes
    return {n for n in found if n.op == "placeholder"}


def norm_notes(splits: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What to tell of a plan whose batch normalisation does not see the whole batch. splits: as in `Plan`."""
    nodes = {name for of in splits.values() for name, text in of.items() if f"[{REPLICA_NORM}]" in text}
    axes = [
        word
        for axis, word in (("dp", "replica"), (MICROBATCH_AXIS, "microbatch"))
        if any(f"[{REPLICA_NORM}]" in text for text in splits.get(axis, {}).values())
    ]
    if not nodes:
        return []
    return [
        f"not equal to one device: {len(nodes)} batch normalisation{'s' if len(nodes) > 1 else ''} "
        f'by the statistics of each {" and ".join(axes)} (batch_norm="replica")'
    ]


class _Carrier(_Follower):
    def __init__(
        self,
        trace: Trace,
        axis: str,
        mesh: Mesh,
        given: Callable[[fx.Node], Strategy | None],
        beside: Mapping[str, Mapping[str, Strategy]],
    ) -> None:
        super().__init__(trace, axis, mesh, beside)
        self.given = given
        self.known = None  # what is given differs from segment to segment

    def source(self, node: fx.Node) -> Placement:
        strategy = self.given(node)
        if strategy is None or not self.divisible(node, (), strategy):
            return R
        return strategy.outputs[0]

    def op(self, node: fx.Node) -> None:
        strategy, arguments = self.given(node), tensor_args(node)
        if strategy in strategies(node) and self.divisible(node, arguments, strategy):
            self.chosen[node.name] = strategy  # nothing is pulled: what makes the arguments was given as well
        else:
            super().op(node)
