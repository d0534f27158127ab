"""Trace + Plan -> Program."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby

from torch import fx

from shardplan.errors import NotSupported, PlanMismatch
from shardplan.planner import schedules
from shardplan.planner.instructions import Op, Schedule
from shardplan.planner.placement import MICROBATCH_AXIS, D, Layout, Mesh, P, R, local_shape
from shardplan.planner.plan import Plan
from shardplan.planner.propagate import placed
from shardplan.planner.stages import Crossing, split_stages
from shardplan.planner.trace import Trace, info, is_tensor, mutated, needs_grad, resolve, tensor_args
from shardplan.planner.transfers import boundary
from shardplan.rewrite.emit import Group, emit
from shardplan.rewrite.lower import StageLowering, ancestors, made_layout, read_layout, stage_mesh, strategies_on
from shardplan.rewrite.program import Argument, Program, Result, StageCode, StageRanks, TensorSpec
from shardplan.rewrite.split_backward import split_backward
from shardplan.rewrite.stored import StoredParameters, storage_of


def compile_program(
    trace: Trace,
    plan: Plan,
    kind: str = "train",
    available: frozenset[str] | None = None,
    watched: frozenset[str] = frozenset(),
) -> Program:
    """The program of a plan.

    kind: "train" (the loss and gradients) or "forward" (the model's outputs). available: names of the inputs that a
    forward call gives; outputs that need others are left out. watched: names of ops whose results are returned as well
    (results of kind "watch", as they lie), for `rewrite.compare`. Raises PlanMismatch where the plan is for another
    trace.
    """
    if plan.fingerprint != trace.fingerprint:
        raise PlanMismatch("the plan was made for another graph", [f"{plan.fingerprint} is not {trace.fingerprint}"])
    return _Compiler(trace, plan, kind, available, watched).program()


@dataclass(slots=True)
class _Stage:
    lowering: StageLowering
    code: StageCode


class _Compiler:
    def __init__(
        self, trace: Trace, plan: Plan, kind: str, available: frozenset[str] | None, watched: frozenset[str]
    ) -> None:
        self.trace = trace
        self.plan = plan
        self.train = kind == "train"
        self.kind = kind
        self.split = split_stages(trace, tuple(stage.first for stage in plan.stages))
        self.shared = self.train and self._checked_shares()
        self.outputs = self._outputs(available)
        self.watched = [n for n in trace.nodes() if n.name in watched and n.name in self.split.stage_of]
        self.live = self._live()
        self.crossings = [c for c in map(self._live_crossing, self.split.crossings) if c is not None]
        self.instructions = self.schedule()
        self.boundaries = {(c.name, t): self._boundary(c, t) for c in self.crossings for t in c.targets}

    def _checked_shares(self) -> bool:
        """Whether replicas run microbatches of their own. Raises PlanMismatch where that would not be exact."""
        stages = [stage for stage in self.plan.stages if stage.shares]
        if not stages:
            return False
        (stage,), plan = stages[:1], self.plan
        wrong = {
            "more than one stage": len(plan.stages) > 1,
            f"shares {stage.shares} of {plan.microbatches} microbatches on {stage.mesh}": (
                len(stage.shares) != stage.mesh.size("dp")
                or sum(stage.shares) != plan.microbatches
                or min(stage.shares) < 1
            ),
            "splits on dp": bool(plan.splits.get("dp")),
            "parameters split for storage": bool(plan.storage),
            "replicas that step by themselves": bool(plan.average_every),
            "ops that write to buffers": any(mutated(node) for node in self.trace.nodes()),
        }
        if any(wrong.values()):
            raise PlanMismatch("shares of replicas", [text for text, is_so in wrong.items() if is_so])
        return True

    def _outputs(self, available: frozenset[str] | None) -> dict[int, fx.Node]:
        """Output position -> node, of what this program returns (position 0 is the loss)."""
        values = next(n for n in self.trace.nodes() if n.op == "output").args[0]
        assert isinstance(values, (tuple, list))
        found: dict[int, fx.Node] = {}
        for position, value in enumerate(values):
            if not isinstance(value, fx.Node) or not is_tensor(value) or (position == 0) != self.train:
                continue
            given = {
                self.trace.sources[n.name].name
                for n in ancestors(value)
                if n.op == "placeholder" and self.trace.sources[n.name].kind == "input"
            }
            if available is None or given <= available:
                found[position] = value
        return found

    def _live(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in [*self.outputs.values(), *self.watched, *(n for n in self.trace.nodes() if mutated(n))]:
            if node not in found:
                found |= ancestors(node)
        return found

    def _live_crossing(self, crossing: Crossing) -> Crossing | None:
        node = self.trace.node(crossing.name)
        stages = {self.split.stage_of[u.name] for u in node.users if u in self.live and u.name in self.split.stage_of}
        targets = tuple(t for t in crossing.targets if t in stages)
        return Crossing(crossing.name, crossing.source, targets, crossing.info) if targets else None

    def _boundary(self, crossing: Crossing, target: int) -> tuple[Layout, Layout]:
        """How the value leaves its stage, and how it arrives where its readers are."""
        node = self.trace.node(crossing.name)
        here, there = stage_mesh(self.plan, crossing.source), stage_mesh(self.plan, target)
        readers = [
            read_layout(strategies_on(self.plan, there, user), there, position)
            for user in node.users
            if user in self.live and self.split.stage_of.get(user.name) == target and resolve(user)[0] is user
            for position, argument in enumerate(tensor_args(user))
            if argument is node
        ]
        return boundary(info(node).shape, made_layout(self.plan, here, node), here, readers, there)

    def program(self) -> Program:
        stages = [self.stage(index) for index in range(len(self.plan.stages))]
        denominators = tuple(d for s in stages for d in s.lowering.lowered.denominators)
        used = [
            (index, argument)
            for index, stage in enumerate(stages)
            for argument in (
                *stage.code.arguments,
                *(a for d in stage.lowering.lowered.denominators for a in d.arguments),
            )
        ]
        constants = {a.name for _, a in used if a.kind == "constant"}
        by_name = {self.trace.sources[n].name: n for n in self.trace.constants}
        return Program(
            kind=self.kind,
            stages=tuple(s.code for s in stages),
            placement=tuple(
                StageRanks(stage_mesh(self.plan, i), stage.ranks, stage.shares if self.train else ())
                for i, stage in enumerate(self.plan.stages)
            ),
            schedule=self.instructions,
            microbatches=self.plan.microbatches,
            parameters=self.specs("param", used),
            buffers=self.specs("buffer", used),
            inputs=self.specs("input", used),
            denominators=denominators,
            loss_stage=self.split.loss_stage if self.train else -1,
            constants={name: self.trace.constants[by_name[name]] for name in sorted(constants)},
            uneven=frozenset(name for s in stages for name in s.lowering.lowered.uneven),
            late=frozenset(name for s in stages for name in s.lowering.lowered.late),
            bucket_nbytes=self.plan.bucket_nbytes,
            reduction=self.plan.reduction,
            average_every=self.plan.average_every,
            offload=self.plan.offload,
            leaves={name: leaf for s in stages for name, leaf in s.lowering.lowered.leaves.items()},
        )

    def schedule(self) -> Schedule:
        edges = frozenset((c.source, t) for c in self.crossings for t in c.targets)
        grad_edges = frozenset((c.source, t) for c in self.crossings if c.info.needs_grad for t in c.targets)
        if self.train and (edges, grad_edges) == (self.split.edges(), self.split.grad_edges()):
            return self.plan.instructions
        return schedules.build(
            self.plan.schedule,
            len(self.plan.stages),
            self.plan.microbatches,
            edges,
            training=self.train,
            grad_edges=grad_edges,
            chunks=self.plan.chunks,
        )

    def splits_backward(self, stage: int) -> bool:
        return any(i.stage == stage and i.op is Op.BACKWARD_INPUT for line in self.instructions for i in line)

    # -- one stage -----------------------------------------------------------------------------------------------------

    def stage(self, index: int) -> _Stage:
        arrivals = {name: arrives for (name, target), (_, arrives) in self.boundaries.items() if target == index}
        lowering = StageLowering(self.trace, self.plan, self.split, index, self.train, arrivals)
        sends = [c for c in self.crossings if c.source == index]
        mine = {p: n for p, n in self.outputs.items() if self.split.outputs[p][1] == index}
        watched = [n for n in self.watched if self.split.stage_of[n.name] == index]
        wanted = [*(self.trace.node(c.name) for c in sends), *mine.values(), *watched]
        shared, own = lowering.needed(wanted)
        lowering.run(shared)
        self.run_segments(lowering, index, own)
        results, values = [], []
        for crossing in sends:
            node = self.trace.node(crossing.name)
            leaving: dict[Layout, list[int]] = {}
            for target in crossing.targets:
                leaving.setdefault(self.boundaries[crossing.name, target][0], []).append(target)
            for layout, targets in leaving.items():
                values.append(lowering.value(node, layout))
                results.append(self.result("send", node, layout, lowering.mesh, tuple(targets)))
        for position, node in mine.items():
            value, result = self.output(lowering, position, node)
            values.append(value)
            results.append(result)
        for node in watched:
            values.append(lowering.value(node))
            results.append(self.result("watch", node, lowering.layout(node), lowering.mesh))
        lowering.graph.output(tuple(values))
        if self.splits_backward(index):
            late = split_backward(lowering.graph, lowering.lowered.arguments)
            results = [replace(result, late=waits) for result, waits in zip(results, late, strict=True)]
        lowering.graph.lint()
        code = StageCode(emit(lowering.graph), tuple(lowering.lowered.arguments), tuple(results))
        return _Stage(lowering, code)

    def run_segments(self, lowering: StageLowering, index: int, own: list[fx.Node]) -> None:
        """Lower the stage's ops. Segments to be recomputed become groups, unless they write to buffers (which must
        happen once); so do those whose parameters are gathered for them."""
        stage = self.plan.stages[index]
        segment_of = {name: s for s in self.trace.segments[stage.first : stage.last] for name in s.nodes}
        runs = [(segment, list(run)) for segment, run in groupby(own, lambda n: segment_of.get(resolve(n)[0].name))]
        lowering.parameters = StoredParameters(lowering, [run for _, run in runs])
        for number, (segment, run) in enumerate(runs):
            lowering.parameters.ahead(number)
            if segment is not None and self.train:
                recomputed = segment.name in stage.rematerialized and not any(
                    mutated(self.trace.node(name)) for name in segment.nodes
                )
                label = re.sub(r"\W+", "_", segment.name).strip("_")
                if recomputed:
                    lowering.group = Group(f"recomputed_{label}", True)
                elif lowering.parameters.gathers(number):
                    lowering.group = Group(f"gathered_{label}", False)
            lowering.parameters.begin(number)
            lowering.run(run)
            lowering.parameters.end(number)
            lowering.group = None

    def result(self, kind: str, node: fx.Node, layout: Layout, mesh: Mesh, targets: tuple[int, ...] = ()) -> Result:
        grad = self.train and needs_grad(node)
        shape = local_shape(info(node).shape, layout, mesh)
        return Result(
            kind, node.name, shape, info(node).dtype, grad, targets, layout=layout, global_shape=info(node).shape
        )

    def output(self, lowering: StageLowering, position: int, node: fx.Node) -> tuple[fx.Node, Result]:
        """The loss stays a summand where it is one: the executor adds it up once a step. Outputs are made whole on
        every axis on which they are not shards."""
        loss = self.train and position == 0
        layout: list = []
        for axis, placement in zip(lowering.mesh.axes, lowering.layout(node), strict=True):
            if loss and axis == MICROBATCH_AXIS:
                layout.append(P if lowering.mesh.size(axis) > 1 else R)
            elif placement == D or (placement == P and not loss and axis != MICROBATCH_AXIS):
                layout.append(R)
            else:
                layout.append(placement)
        wanted: Layout = tuple(layout)
        value = lowering.value(node, wanted)
        shape = local_shape(info(node).shape, wanted, lowering.mesh)
        if self.shared:  # every microbatch is with one replica
            wanted = tuple(P if axis == "dp" else p for axis, p in zip(lowering.mesh.axes, wanted, strict=True))
        return value, Result(
            "loss" if loss else "output", node.name, shape, info(node).dtype, loss and needs_grad(node),
            index=position, layout=wanted, global_shape=info(node).shape,
        )  # fmt: skip

    # -- tensors -------------------------------------------------------------------------------------------------------

    def readers(self, node: fx.Node) -> set[int]:
        """Stages of the whole graph that read a parameter, buffer or input, perhaps through ops of no stage."""
        found: set[int] = set()
        ahead, seen = [node], {node}
        while ahead:
            for user in ahead.pop().users:
                if user.name in self.split.stage_of:
                    found.add(self.split.stage_of[user.name])
                elif user not in seen:
                    seen.add(user)
                    ahead.append(user)
        return found

    def specs(self, kind: str, used: Iterable[tuple[int, Argument]]) -> tuple[TensorSpec, ...]:
        """How every parameter, buffer or input lies. Those that nothing here reads stay where the whole
        graph reads them, as in the plan's other programs."""
        stages: dict[str, list[int]] = {}
        for index, argument in used:
            held = "param" if argument.kind == "shard" else argument.kind
            if held == kind and index not in stages.setdefault(argument.name, []):
                stages[argument.name].append(index)
        found = []
        for placeholder, source in self.trace.sources.items():
            if source.kind != kind or (kind == "input" and source.name not in stages):
                continue
            node = self.trace.node(placeholder)
            at = tuple(sorted(stages.get(source.name) or self.readers(node) or [0]))
            mesh = stage_mesh(self.plan, at[0])
            meshes = [stage_mesh(self.plan, stage) for stage in at]
            wide = [a for a in mesh.axes if any(m.size(a) > 1 for m in meshes)]
            chosen = {axis: self.plan.strategy(axis, placeholder) for axis in wide}
            layout = tuple(placed(chosen.get(axis), 0) for axis in mesh.axes)
            if kind == "param" and self.shared:
                layout = tuple(D if axis == "dp" else p for axis, p in zip(mesh.axes, layout, strict=True))
            stored = storage_of(self.plan, self.trace, placeholder, layout, mesh) if kind == "param" else None
            if kind == "param" and source.name in self.plan.storage and len(set(meshes)) > 1:
                raise NotSupported(
                    f"{source.name} is split for storage and held by stages of different meshes",
                    [f"stage {stage}: {m}" for stage, m in zip(at, meshes, strict=True)],
                    [f"store {source.name} whole"],
                )
            master = self.trace.masters.get(source.name) if kind == "param" else None
            if master is not None and stored is not None and stored.level == 1:
                raise NotSupported(
                    f"of {source.name}, which is used in {info(node).dtype}, only the optimizer state is split",
                    [],
                    ["level 2 splits its gradient as well"],
                )
            alone = "dp" if self.plan.average_every else ""  # replicas step by themselves
            done = {MICROBATCH_AXIS, stored.axis if stored is not None else "", alone}
            reduce_axes = tuple(a for a, p in zip(mesh.axes, layout, strict=True) if p == D and a not in done)
            found.append(
                TensorSpec(
                    source.name,
                    info(node).shape,
                    master or info(node).dtype,
                    layout,
                    source.trainable,
                    reduce_axes if source.trainable else (),
                    at,
                    source.aliases,
                    stored,
                    None if master is None else info(node).dtype,
                )
            )
        return tuple(found)
