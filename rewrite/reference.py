"""Run a Program in this process: every rank a thread, every stage in turn. Slow, simple and exact.

The definition of what a Program computes, against which the distributed executor is tested, and a way to prove a plan
right without starting processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import get_gradient_edge

from shardplan.planner.placement import MICROBATCH_AXIS, R
from shardplan.planner.storage import span
from shardplan.planner.transfers import Box
from shardplan.rewrite import storage
from shardplan.rewrite.emit import load
from shardplan.rewrite.later import Later
from shardplan.rewrite.parts import assemble, part_of
from shardplan.rewrite.program import Argument, Program, Result, StageRanks, TensorSpec
from shardplan.rewrite.routes import deliver, routes
from shardplan.rewrite.threads import ThreadComm, make_comms, run_ranks

Coordinate = tuple[int, ...]
Shape = tuple[int, ...]
Tensors = dict[str, torch.Tensor]


@dataclass(slots=True)
class ReferenceResult:
    """loss: of the global batch (None for a forward program). gradients: parameter name -> whole gradient (None where
    no op read the parameter). buffers: name -> value after the step, from the first rank. outputs: position -> whole
    tensor. watched: op -> (its result, the gradient of its result or None), whole."""

    loss: torch.Tensor | None = None
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    watched: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)


def run_program(
    program: Program,
    state: Mapping[str, torch.Tensor],
    batch: Mapping[str, torch.Tensor],
    seed: int = 0,
) -> ReferenceResult:
    """state: whole parameters and buffers by name; batch: whole inputs by name; seed: of random ops. One step (the
    first of a job), no optimizer."""
    return _Run(program, state, batch, seed).run()


class _Run:
    def __init__(
        self,
        program: Program,
        state: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        seed: int,
    ) -> None:
        self.program = program
        self.batch = batch
        self.specs = {(kind, s.name): s for kind, specs in self._specs() for s in specs}
        self.routes = routes(program)
        self.functions = [load(code.source, f"stage{i}", program.leaves) for i, code in enumerate(program.stages)]
        self.comms = [make_comms(placement.mesh) for placement in program.placement]
        for comms in self.comms:
            for comm in comms.values():
                comm.base_seed = seed
        self.masters: dict[torch.Tensor, torch.Tensor] = {}
        self.tensors: list[dict[Coordinate, Tensors]] = []
        self.shards: list[dict[Coordinate, Tensors]] = []
        for stage, placement in enumerate(program.placement):
            held = [s for kind in ("param", "buffer") for s in self._of(kind) if stage in s.stages]
            self.tensors.append(
                {
                    c: {s.name: self._leaf(s, state[s.name], placement, comm) for s in held}
                    for c, comm in self.comms[stage].items()
                }
            )
            split = [s for s in held if s.storage is not None and s.storage.level > 1]
            self.shards.append(
                {
                    c: {s.name: self._shard(s, state[s.name], self.tensors[stage][c], placement, comm) for s in split}
                    for c, comm in self.comms[stage].items()
                }
            )

    def _specs(self) -> list[tuple[str, tuple[TensorSpec, ...]]]:
        return [("param", self.program.parameters), ("buffer", self.program.buffers), ("input", self.program.inputs)]

    def _of(self, kind: str) -> tuple[TensorSpec, ...]:
        return dict(self._specs())[kind]

    def _leaf(self, spec: TensorSpec, whole: torch.Tensor, placement: StageRanks, comm: ThreadComm) -> torch.Tensor:
        part = part_of(whole.detach(), spec.layout, placement.mesh, comm.coordinate)
        part = part.to(spec.used or part.dtype, copy=True)
        part.requires_grad_(spec.trainable and self.program.kind == "train")
        if spec.used is not None and part.requires_grad:
            part.register_post_accumulate_grad_hook(self._widen)
        return part

    def _widen(self, leaf: torch.Tensor) -> None:
        """Gradients of microbatches add up in the precision of the masters."""
        assert leaf.grad is not None
        master = self.masters.get(leaf)
        gradient = leaf.grad.to(torch.float32)
        self.masters[leaf] = gradient if master is None else master + gradient
        leaf.grad = None

    def _shard(
        self, spec: TensorSpec, whole: torch.Tensor, held: Tensors, placement: StageRanks, comm: ThreadComm
    ) -> torch.Tensor:
        """The stored part of a parameter; the whole one of level 3 is not kept."""
        assert spec.storage is not None
        axis, dim = spec.storage.axis, spec.storage.dim
        used = held[spec.name].detach()
        held[spec.name] = used if spec.storage.level < 3 else used[:0]
        low, high = span(used.shape[dim], comm.size(axis), comm.index(axis))
        stored = part_of(whole.detach(), spec.layout, placement.mesh, comm.coordinate)
        part = stored.narrow(dim, low, high - low).clone()
        return part.requires_grad_(spec.trainable and self.program.kind == "train")

    def argument(
        self, a: Argument, stage: int, place: Coordinate, comm: ThreadComm, received: Tensors, counts: Tensors
    ) -> torch.Tensor:
        if a.kind in ("param", "buffer"):
            return self.tensors[stage][place][a.name]
        if a.kind == "shard":
            return self.shards[stage][place][a.name]
        if a.kind == "constant":
            return self.program.constants[a.name]
        if a.kind == "recv":
            return received[a.name]
        if a.kind == "denominator":
            return counts[a.name]
        spec = self.specs["input", a.name]
        mesh = self.program.placement[stage].mesh
        return part_of(self.batch[a.name], spec.layout, mesh, {**comm.coordinate, MICROBATCH_AXIS: comm.microbatch})

    def run(self) -> ReferenceResult:
        result = ReferenceResult()
        counts = self.denominators()
        loss_parts: dict[tuple[tuple[str, int], ...], torch.Tensor] = {}
        output_parts: dict[int, dict[tuple[tuple[str, int], ...], torch.Tensor]] = {}
        watched: dict[str, tuple[Result, int, dict[tuple[tuple[str, int], ...], torch.Tensor]]] = {}
        grad = self.program.kind == "train"
        for microbatch in range(self.program.microbatches):
            leaves, values = self.forward(microbatch, counts, grad)
            for stage, code in enumerate(self.program.stages):
                for place, outs in values[stage].items():
                    key = (*sorted(self.comms[stage][place].coordinate.items()), (MICROBATCH_AXIS, microbatch))
                    for spec, value in zip(code.results, outs, strict=True):
                        if spec.kind == "loss":
                            loss_parts[key] = value.detach()
                        elif spec.kind == "output":
                            output_parts.setdefault(spec.index, {})[key] = value.detach()
                        elif spec.kind == "watch":
                            watched.setdefault(spec.name, (spec, stage, {}))[2][key] = value
                            if value.requires_grad:
                                value.retain_grad()
            if grad:
                self.backward(microbatch, leaves, values)
        for stage, code in enumerate(self.program.stages):
            mesh = self.program.placement[stage].mesh
            for spec in code.results:
                if spec.kind == "loss":
                    result.loss = assemble(loss_parts, spec.layout, mesh, spec.global_shape)
                elif spec.kind == "output":
                    result.outputs[spec.index] = assemble(
                        output_parts[spec.index], spec.layout, mesh, spec.global_shape
                    )
        for name, (spec, stage, parts) in watched.items():
            mesh = self.program.placement[stage].mesh
            value = assemble({k: v.detach() for k, v in parts.items()}, spec.layout, mesh, spec.global_shape)
            grads = {k: v.grad for k, v in parts.items() if v.requires_grad and v.grad is not None}
            whole = assemble(grads, spec.layout, mesh, spec.global_shape, gradient=True) if grads else None
            result.watched[name] = value, whole
        if grad:
            result.gradients = {spec.name: self.gradient(spec) for spec in self.program.parameters}
        for spec in self.program.buffers:
            stage = spec.stages[0]
            parts = {
                tuple(self.comms[stage][c].coordinate.items()): held[spec.name]
                for c, held in self.tensors[stage].items()
            }
            result.buffers[spec.name] = assemble(parts, spec.layout, self.program.placement[stage].mesh, spec.shape)
        return result

    def denominators(self) -> list[dict[Coordinate, Tensors]]:
        """Per stage and rank: the counts of `Program.denominators` over the whole batch."""
        found: list[dict[Coordinate, Tensors]] = [{c: {} for c in comms} for comms in self.comms]
        for index, denominator in enumerate(self.program.denominators):
            function = load(denominator.source, f"denominator{index}", self.program.leaves)

            def count(comm: ThreadComm, d=denominator, function=function) -> torch.Tensor:
                place = tuple(comm.coordinate.values())
                parts = []
                for microbatch in range(self.program.microbatches):
                    comm.microbatch = microbatch
                    earlier = found[d.stage][place]
                    values = [self.argument(a, d.stage, place, comm, {}, earlier) for a in d.arguments]
                    parts.append(function(comm, torch.device("cpu"), *values)[0])
                total = sum(parts[1:], parts[0])
                for axis in d.axes:
                    total = comm.all_reduce(total, axis)
                return total

            for place, total in run_ranks(self.comms[denominator.stage], count).items():
                found[denominator.stage][place][denominator.name] = total
        return found

    def forward(
        self, microbatch: int, counts: list[dict[Coordinate, Tensors]], grad: bool
    ) -> tuple[list[dict[Coordinate, Tensors]], list[dict[Coordinate, tuple[torch.Tensor, ...]]]]:
        """One microbatch through all stages: (received leaves, results), per stage and rank."""
        leaves: list[dict[Coordinate, Tensors]] = [{c: {} for c in comms} for comms in self.comms]
        values: list[dict[Coordinate, tuple[torch.Tensor, ...]]] = []
        for stage, code in enumerate(self.program.stages):

            def run(comm: ThreadComm, stage=stage, code=code) -> tuple[torch.Tensor, ...]:
                comm.microbatch = microbatch
                comm.later = Later()
                place = tuple(comm.coordinate.values())
                arguments = [
                    self.argument(a, stage, place, comm, leaves[stage][place], counts[stage][place])
                    for a in code.arguments
                ]
                with torch.set_grad_enabled(grad):
                    return self.functions[stage](comm, torch.device("cpu"), *arguments)

            values.append(run_ranks(self.running(stage, microbatch), run))
            for outs in values[stage].values():
                for spec, value in zip(code.results, outs, strict=True):
                    if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
                        raise AssertionError(f"{spec.name} is {value.dtype}{list(value.shape)}, not {spec}")
            for route in self.routes:
                if route.source == stage:
                    argument = self.program.stages[route.target].arguments[route.argument]
                    sent = {place: outs[route.result].detach() for place, outs in values[stage].items()}
                    got = self.move(route.values, stage, sent, route.target, argument.shape)
                    for place, value in got.items():
                        leaves[route.target][place][route.name] = value.requires_grad_(grad and argument.requires_grad)
        return leaves, values

    def move(
        self, boxes: tuple[Box, ...], source: int, held: dict[Coordinate, torch.Tensor], target: int, shape: Shape
    ) -> dict[Coordinate, torch.Tensor]:
        """Bring boxes of a tensor from the ranks of one stage to those of another. shape: local, where they go."""
        ranks = [dict(zip(self.comms[s], self.program.placement[s].ranks, strict=True)) for s in (source, target)]
        by_rank = {ranks[0][place]: value for place, value in held.items()}
        got = deliver(boxes, by_rank, ranks[1].values(), dict.fromkeys(ranks[1].values(), shape))
        return {place: got[rank] for place, rank in ranks[1].items()}

    def backward(
        self,
        microbatch: int,
        leaves: list[dict[Coordinate, Tensors]],
        values: list[dict[Coordinate, tuple[torch.Tensor, ...]]],
    ) -> None:
        """The same microbatch backward; gradients of parameters accumulate."""
        for stage in reversed(range(len(self.program.stages))):
            code = self.program.stages[stage]
            arrived: dict[tuple[int, Coordinate], torch.Tensor] = {}
            for route in self.routes:
                if route.source != stage or not code.results[route.result].requires_grad:
                    continue
                shape = code.results[route.result].shape
                sent = {place: _gradient(held[route.name]) for place, held in leaves[route.target].items()}
                for place, part in self.move(route.gradients, route.target, sent, stage, shape).items():
                    key = (route.result, place)
                    arrived[key] = arrived[key] + part if key in arrived else part

            def run(comm: ThreadComm, stage=stage, code=code, arrived=arrived) -> None:
                comm.microbatch = microbatch
                place = tuple(comm.coordinate.values())
                outs, grads = [], []
                late, late_grads = [], []
                for position, (spec, value) in enumerate(zip(code.results, values[stage][place], strict=True)):
                    if not spec.requires_grad or not value.requires_grad or spec.kind == "watch":
                        continue
                    if spec.kind == "loss":
                        (late if spec.late else outs).append(value)
                        (late_grads if spec.late else grads).append(torch.ones_like(value))
                        continue
                    (late if spec.late else outs).append(value)
                    (late_grads if spec.late else grads).append(arrived[position, place])
                if outs:
                    torch.autograd.backward(outs, grads)
                    storage.settle(comm)
                comm.later.run([get_gradient_edge(value) for value in late], late_grads)
                storage.settle(comm)

            run_ranks(self.running(stage, microbatch), run)

    def running(self, stage: int, microbatch: int) -> dict[Coordinate, ThreadComm]:
        """The ranks of a stage that run a microbatch."""
        placement = self.program.placement[stage]
        return {c: comm for c, comm in self.comms[stage].items() if placement.has(comm.coordinate, microbatch)}

    def gradient(self, spec: TensorSpec) -> torch.Tensor | None:
        """The whole gradient, added up over the stages that hold the parameter."""
        total: torch.Tensor | None = None
        for stage in spec.stages:
            held = self.shards if spec.storage is not None and spec.storage.level > 1 else self.tensors
            leaves = {place: tensors[spec.name] for place, tensors in held[stage].items()}
            if spec.name in self.program.uneven and any(leaf.grad is not None for leaf in leaves.values()):
                for leaf in leaves.values():
                    leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            gradients = {place: self.masters.get(leaf, leaf.grad) for place, leaf in leaves.items()}
            parts = {
                tuple(self.comms[stage][place].coordinate.items()): gradient
                for place, gradient in gradients.items()
                if gradient is not None
            }
            if not parts:
                continue
            if len(parts) != len(leaves):
                raise AssertionError(f"only some ranks of stage {stage} have a gradient of {spec.name}")
            layout, mesh = spec.layout, self.program.placement[stage].mesh
            if held is self.shards:
                assert spec.storage is not None
                parts = storage.joined(parts, spec.storage)
                layout = tuple(R if a == spec.storage.axis else p for a, p in zip(mesh.axes, layout, strict=True))
            whole = assemble(parts, layout, mesh, spec.shape, gradient=True)
            total = whole if total is None else total + whole
        return total


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
