"""Lower one stage: the traced ops it runs, on local shapes, with the conversions that its edges need."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from shardplan.errors import NotSupported
from shardplan.planner.leaf_op import Leaf
from shardplan.planner.placement import MICROBATCH_AXIS, Layout, Mesh, P, R, conversion, local_shape
from shardplan.planner.plan import Plan
from shardplan.planner.propagate import placed
from shardplan.planner.reshard import steps
from shardplan.planner.rules import Slot, Strategy, local_call
from shardplan.planner.stages import StageSplit
from shardplan.planner.storage import Storage, part_shape
from shardplan.planner.trace import Trace, info, is_tensor, mutated, needs_grad, resolve, tensor_args
from shardplan.rewrite import collectives, kernels
from shardplan.rewrite.conversions import conversion_call
from shardplan.rewrite.emit import Bound, Group, emit, set_group
from shardplan.rewrite.implement import IMPLEMENTATIONS, OpContext, implementation_of
from shardplan.rewrite.program import Argument, Denominator
from shardplan.rewrite.stored import StoredParameters, storage_of


def stage_mesh(plan: Plan, stage: int) -> Mesh:
    """The mesh a stage's layouts refer to: the plan's mesh behind the microbatch axis. Time is the outermost split,
    because an inner one would have to be undone, by a collective that does not exist, before an outer one changes."""
    mesh = plan.stages[stage].mesh
    return Mesh((MICROBATCH_AXIS, *mesh.axes), (plan.microbatches, *mesh.sizes))


def strategies_on(plan: Plan, mesh: Mesh, node: fx.Node) -> dict[str, Strategy]:
    """Strategies of an op on the axes of a mesh that have more than one rank."""
    found = {a: plan.strategy(a, node.name) for a, size in zip(mesh.axes, mesh.sizes, strict=True) if size > 1}
    return {axis: strategy for axis, strategy in found.items() if strategy is not None}


def made_layout(plan: Plan, mesh: Mesh, value: fx.Node) -> Layout:
    """How a traced value lies when its op has run on the mesh."""
    maker, index = resolve(value)
    strategies = strategies_on(plan, mesh, maker)
    return tuple(placed(strategies.get(axis), index) for axis in mesh.axes)


def read_layout(strategies: Mapping[str, Strategy], mesh: Mesh, position: int) -> Layout:
    """How an op of these strategies wants its tensor argument."""
    return tuple(strategies[a].inputs[position] if a in strategies else R for a in mesh.axes)


@dataclass(slots=True)
class Lowered:
    """A stage graph and what goes in. arguments: in placeholder order, behind comm and device. leaves: by the name that
    the source calls them. uneven, late: see `Program`."""

    graph: fx.Graph
    arguments: list[Argument] = field(default_factory=list)
    denominators: list[Denominator] = field(default_factory=list)
    leaves: dict[str, Leaf] = field(default_factory=dict)
    uneven: set[str] = field(default_factory=set)
    late: set[str] = field(default_factory=set)


class StageLowering:
    """Builds the graph of one stage. Use: `require` what is wanted, then `finish`.

    arrivals: how values of other stages arrive, by name.
    """

    def __init__(
        self,
        trace: Trace,
        plan: Plan,
        split: StageSplit,
        stage: int,
        train: bool,
        arrivals: Mapping[str, Layout] | None = None,
    ) -> None:
        self.trace = trace
        self.plan = plan
        self.split = split
        self.stage = stage
        self.train = train
        self.arrivals = arrivals or {}
        self.mesh = stage_mesh(plan, stage)
        self.graph = fx.Graph()
        self.lowered = Lowered(self.graph)
        self.comm = self.graph.placeholder("comm")
        self.device = self.graph.placeholder("device")
        self.home: dict[str, fx.Node] = {}
        self.converted: dict[tuple[str, Layout], fx.Node] = {}
        self.totals: dict[tuple[str, Layout], fx.Node] = {}
        self.sites = {node.name: i for i, node in enumerate(trace.nodes())}
        self.group: Group | None = None
        self.stored = self._stored()
        self.parameters = StoredParameters(self, ())

    # -- layouts -------------------------------------------------------------------------------------------------------

    def chosen(self, node: fx.Node) -> dict[str, Strategy]:
        """Strategies of an op on the axes of this stage that have more than one rank."""
        return strategies_on(self.plan, self.mesh, node)

    def layout(self, value: fx.Node) -> Layout:
        """How the traced value lies when its op has run. Every rank has all of a constant of the trace."""
        if value.name in self.trace.constants:
            return (R,) * len(self.mesh.axes)
        if value.name in self.arrivals:
            return self.arrivals[value.name]
        return made_layout(self.plan, self.mesh, value)

    def local_shape(self, value: fx.Node) -> tuple[int, ...]:
        return local_shape(info(value).shape, self.layout(value), self.mesh)

    def _stored(self) -> dict[str, Storage]:
        """Placeholder -> how the parameter is stored, where that is not as it is used."""
        found = {
            name: storage_of(self.plan, self.trace, name, self.layout(self.trace.node(name)), self.mesh)
            for name, source in (self.trace.sources.items() if self.plan.storage else ())
            if source.kind == "param"
        }
        return {name: stored for name, stored in found.items() if stored is not None}

    # -- values --------------------------------------------------------------------------------------------------------

    def argument(self, value: fx.Node, kind: str, name: str, stage: int = -1) -> fx.Node:
        """Make the value an argument of the stage."""
        prefix = {"recv": "recv_", "denominator": "count_", "shard": "part_"}.get(kind, "")
        with self.graph.inserting_after(self._last_placeholder()):
            node = self.graph.placeholder(prefix + re.sub(r"\W", "_", value.name))
        grad = self.train and kind in ("recv", "param", "shard") and needs_grad(value)
        shape = self.local_shape(value)
        if kind == "shard":
            dim, axis = self.stored[value.name].dim, self.stored[value.name].axis
            shape = part_shape(shape, dim, self.mesh.size(axis))
        layout = self.layout(value) if kind == "recv" else ()
        self.lowered.arguments.append(Argument(kind, name, shape, info(value).dtype, grad, stage, layout))
        return node

    def _last_placeholder(self) -> fx.Node:
        return [n for n in self.graph.nodes if n.op == "placeholder"][-1]

    def value(self, node: fx.Node, wanted: Layout | None = None) -> fx.Node:
        """The traced value in the stage graph, converted to `wanted` if given."""
        have = self.layout(node)
        if wanted is None or wanted == have:
            return self.made(node)
        key = (node.name, wanted)
        if key not in self.converted:
            layout = self.total_layout(node, have, wanted)
            made = self.made(node) if layout is None else self.total(node, layout)
            self.converted[key] = self.convert(made, node, layout or have, wanted)
        return self.converted[key]

    def made(self, node: fx.Node) -> fx.Node:
        """The traced value as its op leaves it."""
        if node.name not in self.home:
            self.home[node.name] = self.fetch(node)
        return self.home[node.name]

    def total_layout(self, node: fx.Node, have: Layout, wanted: Layout) -> Layout | None:
        """Layout of a value that microbatches have summands of and that follows from the inputs alone, so that the sum
        over microbatches and ranks can be taken before the first of them; None where it is no such value."""
        sums = [i for i in range(len(have)) if have[i] == P and wanted[i] != P and self.mesh.sizes[i] > 1]
        if MICROBATCH_AXIS not in [self.mesh.axes[i] for i in sums] or resolve(node)[0].name not in self.trace.shared:
            return None
        return tuple(R if i in sums else placement for i, placement in enumerate(have))

    def total(self, node: fx.Node, layout: Layout) -> fx.Node:
        """The value summed up, see `total_layout`; one of the program's denominators."""
        if (node.name, layout) not in self.totals:
            axes = tuple(
                axis
                for axis, before, after in zip(self.mesh.axes, self.layout(node), layout, strict=True)
                if before != after and axis != MICROBATCH_AXIS
            )
            name = "_".join(["total", re.sub(r"\W", "_", node.name), *axes])
            inner = StageLowering(self.trace, self.plan, self.split, self.stage, train=False)
            inner.run(inner.needed([node])[0])
            shape = local_shape(info(node).shape, layout, self.mesh)
            self.totals[node.name, layout] = self.counted(name, inner, inner.made(node), axes, shape, info(node).dtype)
        return self.totals[node.name, layout]

    def counted(
        self,
        name: str,
        inner: StageLowering,
        value: fx.Node,
        axes: tuple[str, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> fx.Node:
        """Add a denominator, a value of the lowering `inner`, behind those that it needs itself. -> the argument that
        it becomes."""
        inner.graph.output((value,))
        self.lowered.leaves |= inner.lowered.leaves
        known = {d.name for d in self.lowered.denominators}
        made = Denominator(name, self.stage, emit(inner.graph), tuple(inner.lowered.arguments), axes)
        self.lowered.denominators += [d for d in (*inner.lowered.denominators, made) if d.name not in known]
        with self.graph.inserting_after(self._last_placeholder()):
            node = self.graph.placeholder(name)
        self.lowered.arguments.append(Argument("denominator", name, shape, dtype))
        return node

    def fetch(self, node: fx.Node) -> fx.Node:
        if node.op == "placeholder":
            source = self.trace.sources[node.name]
            if node.name in self.stored:
                return self.parameters.fetch(node)
            return self.argument(node, source.kind, source.name)
        stage = self.split.stage_of.get(node.name, self.stage)
        if stage != self.stage:
            return self.argument(node, "recv", node.name, stage)
        raise AssertionError(f"{node.name} is needed before it is computed")

    def convert(self, made: fx.Node, node: fx.Node, have: Layout, wanted: Layout) -> fx.Node:
        differentiable = self.train and needs_grad(node)
        for step in steps(have, wanted, self.mesh):
            if not differentiable and conversion(step.source, step.target, needs_grad(node)).forward == "identity":
                continue
            made = self.emit(*conversion_call(self.comm, made, step, differentiable))
        return made

    def emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Append a call to the stage graph."""
        node = self.graph.call_function(target, args, kwargs)
        if self.group is not None:
            set_group(node, self.group)
        return node

    # -- ops -----------------------------------------------------------------------------------------------------------

    def run(self, nodes: Iterable[fx.Node]) -> None:
        """Lower these ops, in order."""
        for node in nodes:
            self.op(node)

    def op(self, node: fx.Node) -> None:
        maker, index = resolve(node)
        if maker is not node:
            self.home[node.name] = self.emit(node.target, (self.value(maker), index), {})
            return
        chosen = self.chosen(node)
        arguments = []
        for position, argument in enumerate(tensor_args(node)):
            if not is_tensor(argument):
                arguments.append(self.value(argument))
                continue
            arguments.append(self.value(argument, read_layout(chosen, self.mesh, position)))
        call = local_call(node, chosen, self.mesh)
        name = implementation_of(node, chosen)
        if name is not None:
            context = OpContext(self, node, call, arguments, chosen)
            made = IMPLEMENTATIONS[name](context)
        else:
            made = self.emit(call.target, self.fill(call.args, arguments), self.fill(call.kwargs, arguments))
        scale = 1
        for axis, strategy in chosen.items():
            if strategy.scale:
                scale *= self.mesh.size(axis)
        if scale > 1:
            made = self.emit(torch.ops.aten.mul.Tensor, (made, 1.0 / scale), {})
        self.home[node.name] = made

    def leaf(self, leaf: Leaf) -> Bound:
        """Make a submodule that is kept whole known to the stage's source."""
        name = "leaf_" + re.sub(r"\W", "_", leaf.name)
        self.lowered.leaves[name] = leaf
        return Bound(name)

    def fill(self, value: Any, arguments: list[fx.Node]) -> Any:
        """A local call's arguments with slots replaced, and baked devices by the device at hand."""
        if isinstance(value, Slot):
            return arguments[value.index]
        if isinstance(value, torch.device) and value.type != "meta":
            return self.device
        if isinstance(value, (tuple, list)):
            return type(value)(self.fill(item, arguments) for item in value)
        if isinstance(value, dict):
            return {key: self.fill(item, arguments) for key, item in value.items()}
        return value

    def denominator(self, op: OpContext, axes: tuple[str, ...], weight: fx.Node | None, ignore_index: int) -> fx.Node:
        """The number of tokens (or their weight) of the whole batch that a mean over `axes` divides by.

        Counted before the first microbatch, over all of them, where the target follows from the inputs alone; otherwise
        counted in place, which only ranks can do, not microbatches.
        """
        target = tensor_args(op.node)[1]
        weights = [a for a in tensor_args(op.node)[2:3] if weight is not None]
        spatial = tuple(axis for axis in axes if axis != MICROBATCH_AXIS)
        roots = [target, *weights]
        same = self.mesh.size(MICROBATCH_AXIS) > 1 and spatial == axes  # every microbatch has the same tokens
        if same or any(n.name in self.split.stage_of for root in roots for n in ancestors(root)):
            if spatial != axes:
                raise NotSupported(
                    f"{op.node.name} divides by a count that depends on parameters",
                    ["microbatches cannot know it before they have all run"],
                    ["microbatches=1"],
                )
            count = op.emit(kernels.cross_entropy_count, op.arguments[1], weight, ignore_index)
            for axis in spatial:
                count = self.emit(collectives.all_reduce, (self.comm, count, axis), {})
            return count
        name = f"count_{op.node.name}"
        inner = StageLowering(self.trace, self.plan, self.split, self.stage, train=False)
        inner.run(inner.needed(roots)[0])
        values = []
        for position, root in enumerate(roots, start=1):
            values.append(inner.value(root, read_layout(op.chosen, self.mesh, position)))
        count = inner.emit(kernels.cross_entropy_count, (*values, *[None] * (2 - len(values)), ignore_index), {})
        return self.counted(name, inner, count, spatial, (), torch.float32)

    # -- what a stage needs --------------------------------------------------------------------------------------------

    def needed(self, wanted: Iterable[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """(shared nodes, this stage's own nodes) that the wanted values depend on, in graph order, with the stage's
        writes to buffers."""
        found: set[fx.Node] = set()
        pending = [n for n in wanted if self._mine(n)]
        pending += [n for n in self.trace.nodes() if self.split.stage_of.get(n.name) == self.stage and mutated(n)]
        while pending:
            node = pending.pop()
            if node in found:
                continue
            found.add(node)
            pending += [a for a in node.all_input_nodes if self._mine(a) and a not in found]
        ordered = [n for n in self.trace.nodes() if n in found]
        return (
            [n for n in ordered if n.name not in self.split.stage_of],
            [n for n in ordered if n.name in self.split.stage_of],
        )

    def _mine(self, node: fx.Node) -> bool:
        return node.op == "call_function" and self.split.stage_of.get(node.name, self.stage) == self.stage


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and everything that it is computed from."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending += current.all_input_nodes
    return found
