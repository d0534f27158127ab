"""Prices of the ops and parameters of a trace on one mesh, per strategy on its tensor-parallel axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from shardplan.planner.costs import mixtures
from shardplan.planner.costs.base import Costs, OpCost
from shardplan.planner.placement import D, Placement, R, fits, local_shape
from shardplan.planner.propagate import Follow, placed
from shardplan.planner.rules import LocalCall, Strategy, groups_fit, local_call, strategies
from shardplan.planner.rules.strategy import SENT
from shardplan.planner.search.case import Case
from shardplan.planner.search.memory import Keeps, lies_otherwise, root
from shardplan.planner.search.problem import Price
from shardplan.planner.trace import Trace, info, infos, is_tensor, needs_grad, resolve, tensor_args
from shardplan.planner.wire import EXACT, Wire

SAMPLE_NBYTES = 4 << 20
_ADDING = 1.5  # what adding to a gradient moves, over a copy of as many bytes


class OpPrices:
    """follows: how the batch lies on the other axes. wire: what sums of gradients over replicas are sent as, once in so
    many `steps`. optimizer_factor: bytes of optimizer state for each of a parameter."""

    def __init__(
        self,
        trace: Trace,
        case: Case,
        costs: Costs,
        follows: dict[str, Follow],
        keeps: Keeps,
        optimizer_factor: float,
        training: bool,
        wire: Wire,
        steps: int,
    ) -> None:
        self.trace = trace
        self.mesh = case.mesh
        self.tp, self.width, self.microbatches = case.tp, case.width, case.microbatches
        self.costs = costs
        self.follows = follows
        self.keeps = keeps
        self.optimizer_factor = optimizer_factor
        self.training = training
        self.wire, self.steps = wire, steps
        self.ranks = case.ranks(0)
        self.tp_ranks = self.ranks[: case.tp]
        self.dp_ranks = self.ranks[:: case.tp]
        self._legal: dict[str, list[Strategy]] = {}
        self._nbytes: dict[tuple[str, Placement], float] = {}
        self._op_prices: dict[tuple[str, Strategy | None], Price] = {}
        self._calls: dict[tuple[str, Strategy | None], LocalCall] | None = None
        """Local calls, where several devices with the same mesh price them."""

    # -- layouts -------------------------------------------------------------------------------------------------------

    def others(self, node: fx.Node) -> dict[str, Strategy]:
        """Strategies on the axes that follow the batch."""
        return {axis: f.strategies[node.name] for axis, f in self.follows.items() if node.name in f.strategies}

    def placement(self, chosen: Mapping[str, Strategy], value: fx.Node) -> Placement:
        """How a value lies on tp under strategies by node."""
        maker, index = resolve(value)
        return placed(chosen.get(maker.name), index)

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

    def legal(self, node: fx.Node) -> list[Strategy]:
        """Strategies on tp that fit together with the batch's."""
        found = self._legal.get(node.name)
        if found is None:
            found = self._legal[node.name] = self._fitting(node)
        return found

    def _fitting(self, node: fx.Node) -> list[Strategy]:
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

    # -- prices --------------------------------------------------------------------------------------------------------

    def op_cost(self, node: fx.Node, tp: Strategy | None) -> OpCost:
        """Seconds of the op itself on one rank."""
        return self._cost(node, local_call(node, self.chosen(node, tp), self.mesh))

    def _cost(self, node: fx.Node, call: LocalCall) -> OpCost:
        cost = self.costs.op(call, 0)
        if not lies_otherwise(node):
            return cost
        # A local call does not know strides, so this was priced as a view.
        again = self.costs.copy(sum(result.nbytes for result in call.outputs), 0)
        back = again if needs_grad(node) else 0.0
        return replace(
            cost, forward_seconds=cost.forward_seconds + again, backward_seconds=cost.backward_seconds + back
        )

    def chosen(self, node: fx.Node, tp: Strategy | None) -> dict[str, Strategy]:
        """Strategies of an op on the axes of several ranks."""
        chosen = self.others(node) | ({"tp": tp} if tp is not None else {})
        return {axis: s for axis, s in chosen.items() if self.mesh.size(axis) > 1}

    def op_price(self, node: fx.Node, tp: Strategy | None) -> Price:
        """Compute of one op on one rank, the messages of its implementation, and the tensors that it leaves behind."""
        key = (node.name, tp)
        if key not in self._op_prices:
            self._op_prices[key] = self._op_price(node, tp)
        return self._op_prices[key]

    def _op_price(self, node: fx.Node, tp: Strategy | None) -> Price:
        chosen = self.chosen(node, tp)
        call = self._call(node, tp)
        cost = self._cost(node, call)
        forward, backward = cost.forward_seconds, cost.backward_seconds if self.training else 0.0
        for axis, strategy in chosen.items():
            if strategy.impl in ("cross_entropy", "batch_norm") and axis != "mb":
                extra = self._implementation_seconds(strategy, call.inputs[0].nbytes, call.inputs[0].shape, axis)
                forward, backward = forward + extra[0], backward + extra[1]
            if strategy.impl == SENT:
                ranks = self.tp_ranks if axis == "tp" else self.dp_ranks
                sent = sum(self.collective_seconds("all_to_all", round(n), ranks) for n in mixtures.sent_nbytes(call))
                forward, backward = forward + sent, backward + sent * (backward > 0)
        out = sum(result.nbytes for result in call.outputs)
        kept = self.keeps.extra_of(node, call) if self.training else 0.0
        for position, result in enumerate(call.outputs):
            if self.training and self.keeps.is_kept(node, position):
                kept += result.nbytes
        transient = out + sum(
            argument.nbytes
            for argument, given in zip(call.inputs, tensor_args(node), strict=True)
            if root(given)[0].name not in self.trace.sources  # parameters and inputs lie there anyway
        )
        return Price(forward, backward, 0.0, 0.0, kept, transient)

    def _call(self, node: fx.Node, tp: Strategy | None) -> LocalCall:
        """The op as one rank runs it."""
        known = self._calls.get((node.name, tp)) if self._calls is not None else None
        if known is None:
            known = local_call(node, self.chosen(node, tp), self.mesh)
            if self._calls is not None:
                self._calls[node.name, tp] = known
        return known

    def _implementation_seconds(
        self, strategy: Strategy, nbytes: int, shape: tuple[int, ...], axis: str
    ) -> tuple[float, float]:
        ranks = self.tp_ranks if axis == "tp" else self.dp_ranks
        if strategy.impl == "cross_entropy":
            if strategy.name != "class":
                return 0.0, 0.0
            per_token = nbytes // max(shape[1 if len(shape) > 1 else 0], 1)
            once = self.collective_seconds("all_reduce", per_token, ranks)
            return once + self.collective_seconds("all_reduce", 2 * per_token, ranks), 0.0
        channels = shape[1] * 4 if len(shape) > 1 else 4
        each = self.collective_seconds("all_reduce", channels, ranks)
        return 2 * each, 2 * each

    def parameter_price(self, node: fx.Node, tp: Placement) -> Price:
        """Memory of a parameter with its gradient and optimizer state, and its share of the work once a step."""
        used = self.local_nbytes(node, tp)
        nbytes = self.stored_nbytes(node, used)
        rounded = used if self.trace.sources[node.name].name in self.trace.masters else 0.0
        trainable = self.trace.sources[node.name].trainable and self.training
        if not trainable:
            return Price(parameter_nbytes=nbytes + rounded)
        once = self.costs.optimizer(round(nbytes), 0) + self.summing(node, tp)[0]
        held = nbytes * (2 + self.optimizer_factor) + rounded
        return Price(0.0, self.adding_seconds(nbytes), once, held)

    def summing(self, node: fx.Node, tp: Placement) -> tuple[float, tuple[int, ...]]:
        """Seconds of summing a parameter's gradient over ranks once a step, and these ranks."""
        ranks = self.reduce_ranks(self.layout(node, tp))
        if len(ranks) == 1:
            return 0.0, ranks
        # Gradients travel in buckets, so a parameter costs its share of a large message.
        nbytes = self.stored_nbytes(node, self.local_nbytes(node, tp))
        sample = self.costs.collective("all_reduce", SAMPLE_NBYTES, ranks)
        shape = local_shape(info(node).shape, self.layout(node, tp), self.mesh)
        sent = nbytes * self.wire.share(shape, info(node).dtype.itemsize) if self.wire is not EXACT else nbytes
        reduce = sample * sent / SAMPLE_NBYTES + self.costs.copy(round(nbytes), 0)
        return reduce * self.costs.overheads(0).reduce / self.steps, ranks

    def stored_nbytes(self, node: fx.Node, used_nbytes: float) -> float:
        """Bytes of a parameter as the optimizer has it, where the ops have it in so many (see `planner.precision`)."""
        master = self.trace.masters.get(self.trace.sources[node.name].name)
        return used_nbytes if master is None else used_nbytes * master.itemsize / info(node).dtype.itemsize

    def adding_seconds(self, nbytes: float) -> float:
        """Seconds of a microbatch: all but the first add to a gradient that is there (two are read, one is written)."""
        return _ADDING * self.costs.copy(round(nbytes), 0) * (self.microbatches - 1) / self.microbatches

    def reduce_ranks(self, layout: tuple[Placement, ...]) -> tuple[int, ...]:
        """Ranks of the first replica group over which a gradient has to be summed."""
        axes = {axis for axis, p in zip(self.mesh.axes, layout, strict=True) if p == D and axis != "mb"}
        if axes == {"dp", "tp"}:
            return self.ranks
        return self.dp_ranks if "dp" in axes else self.tp_ranks if "tp" in axes else (0,)

    def collective_seconds(self, kind: str, nbytes: int, ranks: tuple[int, ...]) -> float:
        """Seconds of a collective inside a stage."""
        return self.costs.collective(kind, nbytes, ranks) * self.costs.overheads(0).collective
