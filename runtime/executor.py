"""Executes a Program's instruction list on one rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from shardplan.errors import NotSupported
from shardplan.planner.instructions import Instruction, Op
from shardplan.planner.placement import MICROBATCH_AXIS, P
from shardplan.rewrite.emit import load
from shardplan.rewrite.parts import part_of
from shardplan.rewrite.program import Argument, Program, Result
from shardplan.runtime.comm import DistComm, Groups

Tensors = Mapping[str, torch.Tensor]
_BUCKET_NBYTES = 25 << 20


@dataclass(slots=True)
class _Flight:
    """One microbatch between its forward and its backward."""

    received: dict[str, torch.Tensor] = field(default_factory=dict)
    results: tuple[torch.Tensor, ...] = ()


@dataclass(slots=True)
class Span:
    """A timed instruction. seconds: start and end on this rank's monotonic clock."""

    instruction: Instruction
    start: float
    end: float


class Executor:
    """One rank of one program. Make it on every rank of the job, in the same order (groups are created)."""

    def __init__(
        self,
        program: Program,
        rank: int,
        device: torch.device,
        tensors: Tensors,
        groups: Groups,
        seed: int = 0,
        name: str = "",
    ) -> None:
        self.program = program
        self.rank = rank
        self.device = device
        self.tensors = tensors
        self.groups = groups
        self.train = program.kind == "train"
        self.stage = next((i for i, p in enumerate(program.placement) if rank in p.ranks), -1)
        self.inputs = {spec.name: spec for spec in program.inputs}
        self.spans: list[Span] | None = None
        self._create_groups()
        self.loss_ranks = program.placement[program.loss_stage].ranks if program.loss_stage >= 0 else ()
        if self.stage < 0:
            return
        self.placement = program.placement[self.stage]
        self.comm = DistComm(self.placement, rank, groups, seed)
        self.coordinate = self.placement.coordinate(rank)
        code = program.stages[self.stage]
        self.code = code
        self.function = load(code.source, f"{name}stage{self.stage}")
        self.instructions = program.schedule[self.stage]
        self.constants = {n: t.to(device) for n, t in program.constants.items()}
        self._fixed = [self._static(a) for a in code.arguments]
        self._inputs = [(i, a.name) for i, a in enumerate(code.arguments) if a.kind == "input"]
        self._recvs = [(i, a) for i, a in enumerate(code.arguments) if a.kind == "recv"]
        self._counts = [(i, a.name) for i, a in enumerate(code.arguments) if a.kind == "denominator"]
        self._recv_from: dict[int, list[Argument]] = {}
        for _, argument in self._recvs:
            self._recv_from.setdefault(argument.stage, []).append(argument)
        self._send_to: dict[int, list[tuple[int, Result]]] = {}
        for i, result in enumerate(code.results):
            for target in result.stages:
                self._send_to.setdefault(target, []).append((i, result))
        # Messages between two ranks match by order alone, so both sides list a microbatch's tensors by name.
        for arguments in self._recv_from.values():
            arguments.sort(key=lambda argument: argument.name)
        for sent in self._send_to.values():
            sent.sort(key=lambda item: item[1].name)
        self._peer = {s: self._rank_of(s) for s in {*self._recv_from, *self._send_to}}
        self._losses = [i for i, result in enumerate(code.results) if result.kind == "loss"]
        self._outputs = [(i, result) for i, result in enumerate(code.results) if result.kind == "output"]
        self.denominators = [
            (d, load(d.source, f"{name}{d.name}")) for d in program.denominators if d.stage == self.stage
        ]
        self._reduced = self._reductions()

    # -- set-up --------------------------------------------------------------------------------------------------------

    def _create_groups(self) -> None:
        for placement in self.program.placement:
            for axis, size in zip(placement.mesh.axes, placement.mesh.sizes, strict=True):
                if axis != MICROBATCH_AXIS and size > 1:
                    self.groups.of_stage(placement, (axis,))
        for spec in self.program.parameters:
            if len(spec.reduce_axes) > 1:
                for stage in spec.stages:
                    self.groups.of_stage(self.program.placement[stage], spec.reduce_axes)
        for ranks in sorted({r for spec in self.program.parameters for r in self._twins(spec.stages)}):
            self.groups.get(ranks)

    def _twins(self, stages: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Groups of ranks at the same place of several stages that hold the same part of a tied parameter."""
        if len(stages) < 2:
            return []
        placements = [self.program.placement[stage] for stage in stages]
        if len({p.mesh for p in placements}) > 1:
            raise NotSupported("a parameter is tied across stages of unequal width")
        return [tuple(ranks) for ranks in zip(*(p.ranks for p in placements), strict=True)]

    def _rank_of(self, stage: int) -> int:
        other = self.program.placement[stage]
        if other.mesh != self.placement.mesh:
            raise NotSupported(
                f"stages {self.stage} and {stage} have different meshes", [f"{self.placement.mesh} and {other.mesh}"]
            )
        return other.ranks[self.placement.ranks.index(self.rank)]

    def _static(self, argument: Argument) -> torch.Tensor | None:
        if argument.kind in ("param", "buffer"):
            return self.tensors[argument.name]
        return self.constants[argument.name] if argument.kind == "constant" else None

    def _reductions(self) -> list[tuple[Any, list[str]]]:
        """(group, parameter names) of the gradient sums at the end of a step, in one order on all ranks: first over the
        axes of a stage, then over the stages of a tied parameter."""
        mine: dict[tuple[int, ...], list[str]] = {}
        twins: dict[tuple[int, ...], list[str]] = {}
        for spec in self.program.parameters:
            if not spec.trainable or self.stage not in spec.stages:
                continue
            ranks = self.placement.group(self.rank, spec.reduce_axes)
            if len(ranks) > 1:
                mine.setdefault(ranks, []).append(spec.name)
            for group in self._twins(spec.stages):
                if self.rank in group:
                    twins.setdefault(group, []).append(spec.name)
        # All ranks of a stage hold the same parameters, so sizes and names order the groups alike everywhere.
        ordered = [*sorted(mine.items(), key=lambda item: (len(item[0]), item[1])), *sorted(twins.items())]
        return [(self.groups.get(ranks), names) for ranks, names in ordered]

    # -- one step ------------------------------------------------------------------------------------------------------

    def run(
        self,
        batch: Tensors,
        training: bool = True,
        optimizer_step: Callable[[], None] | None = None,
        step: int = 0,
    ) -> tuple[torch.Tensor | None, list[list[torch.Tensor]]]:
        """One step on the global batch.

        Returns (this rank's share of the loss summed over microbatches, or None; per microbatch the output tensors).
        """
        if self.stage < 0:
            return None, []
        self.batch = batch
        self.comm.training, self.comm.step = training, step
        self.flights: dict[int, _Flight] = {}
        self.arriving: dict[tuple[str, int], tuple[torch.Tensor, Any]] = {}
        self.sending: list[tuple[Any, torch.Tensor]] = []
        self.loss: torch.Tensor | None = None
        self.outputs: list[list[torch.Tensor]] = []
        self.counts = self._count()
        current: Instruction | None = None
        try:
            with torch.set_grad_enabled(self.train):
                for current in self.instructions:
                    started = time.perf_counter() if self.spans is not None else 0.0
                    self._do(current, optimizer_step)
                    if self.spans is not None:
                        if self.device.type == "cuda":
                            torch.cuda.synchronize(self.device)
                        self.spans.append(Span(current, started, time.perf_counter()))
                for work, _ in self.sending:
                    work.wait()
        except Exception as error:
            error.add_note(f"on rank {self.rank}, stage {self.stage}, at instruction {current} of this list:")
            error.add_note(" ".join(f"[{i}]" if i is current else str(i) for i in self.instructions))
            raise
        finally:
            self.flights, self.arriving, self.sending = {}, {}, []
        return self.loss, self.outputs

    def _do(self, instruction: Instruction, optimizer_step: Callable[[], None] | None) -> None:
        op = instruction.op
        if op is Op.FORWARD:
            self._forward(instruction.microbatch)
        elif op is Op.BACKWARD:
            self._backward(instruction.microbatch)
        elif op is Op.RECV_ACT:
            for argument in self._recv_from[instruction.peer]:
                self._post(argument.name, instruction, argument.shape, argument.dtype)
        elif op is Op.SEND_ACT:
            results = self.flights[instruction.microbatch].results
            for i, _ in self._send_to[instruction.peer]:
                self._send(results[i].detach(), instruction.peer)
        elif op is Op.RECV_GRAD:
            for _, result in self._send_to[instruction.peer]:
                if result.requires_grad:
                    self._post(f"{result.name}<{instruction.peer}", instruction, result.shape, result.dtype)
        elif op is Op.SEND_GRAD:
            flight = self.flights[instruction.microbatch]
            for argument in self._recv_from[instruction.peer]:
                if argument.requires_grad:
                    leaf = flight.received[argument.name]
                    self._send(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, instruction.peer)
        elif op is Op.REDUCE_GRADS:
            self.flights.clear()
            self._reduce()
        elif op is Op.OPTIMIZER_STEP:
            if optimizer_step is not None:
                optimizer_step()
        else:
            raise NotSupported(f"instruction {instruction}")

    def _post(self, name: str, instruction: Instruction, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        buffer = torch.empty(shape, dtype=dtype, device=self.device)
        work = dist.irecv(buffer, self._peer[instruction.peer])
        self.arriving[name, instruction.microbatch] = buffer, work

    def _send(self, value: torch.Tensor, stage: int) -> None:
        value = value.contiguous()
        self.sending.append((dist.isend(value, self._peer[stage]), value))

    def _arrived(self, name: str, microbatch: int) -> torch.Tensor:
        buffer, work = self.arriving.pop((name, microbatch))
        work.wait()
        return buffer

    def _input(self, name: str, microbatch: int) -> torch.Tensor:
        layout = self.inputs[name].layout
        part = part_of(self.batch[name], layout, self.placement.mesh, {**self.coordinate, MICROBATCH_AXIS: microbatch})
        return part.to(self.device, non_blocking=True)

    def _arguments(self, microbatch: int, received: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        arguments = self._fixed.copy()
        for i, name in self._inputs:
            arguments[i] = self._input(name, microbatch)
        for i, argument in self._recvs:
            arguments[i] = received[argument.name]
        for i, name in self._counts:
            arguments[i] = self.counts[name]
        return arguments  # type: ignore[return-value]

    def _forward(self, microbatch: int) -> None:
        flight = self.flights[microbatch] = _Flight()
        for _, argument in self._recvs:
            value = self._arrived(argument.name, microbatch)
            flight.received[argument.name] = value.requires_grad_(argument.requires_grad)
        self.comm.microbatch = microbatch
        flight.results = self.function(self.comm, self.device, *self._arguments(microbatch, flight.received))
        for i in self._losses:
            share = flight.results[i].detach()
            self.loss = share if self.loss is None else self.loss + share
        if self._outputs:
            self.outputs.append([flight.results[i] for i, _ in self._outputs])
        if not self.train:
            # Messages keep what they send; nothing else of a forward is needed again.
            flight.received = {}

    def _backward(self, microbatch: int) -> None:
        flight = self.flights[microbatch]
        outs: list[torch.Tensor] = []
        grads: list[torch.Tensor | None] = []
        for result, value in zip(self.code.results, flight.results, strict=True):
            if not result.requires_grad:
                continue
            grad: torch.Tensor | None = None
            for stage in result.stages:
                part = self._arrived(f"{result.name}<{stage}", microbatch)
                grad = part if grad is None else grad.add_(part)
            if value.requires_grad:
                outs.append(value)
                grads.append(grad if grad is not None else torch.ones_like(value))
        self.comm.microbatch = microbatch
        flight.results = ()
        if outs:
            torch.autograd.backward(outs, grads)

    def _count(self) -> dict[str, torch.Tensor]:
        """Denominators of token-weighted means, over the whole batch."""
        found: dict[str, torch.Tensor] = {}
        for denominator, function in self.denominators:
            total = torch.zeros((), device=self.device)
            with torch.no_grad():
                for microbatch in range(self.program.microbatches):
                    self.comm.microbatch = microbatch
                    values = [
                        self._input(a.name, microbatch) if a.kind == "input" else self._static(a)
                        for a in denominator.arguments
                    ]
                    total = total + function(self.comm, self.device, *values)[0]
                for axis in denominator.axes:
                    total = self.comm.all_reduce(total, axis)
            found[denominator.name] = total
        return found

    def _reduce(self) -> None:
        for group, names in self._reduced:
            grads = []
            for name in names:
                leaf = self.tensors[name]
                if leaf.grad is None:
                    leaf.grad = torch.zeros_like(leaf)
                grads.append(leaf.grad)
            for bucket in buckets(grads):
                if len(bucket) == 1 and bucket[0].is_contiguous():
                    dist.all_reduce(bucket[0], group=group)
                    continue
                flat = torch.cat([grad.reshape(-1) for grad in bucket])
                dist.all_reduce(flat, group=group)
                for grad, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    grad.copy_(part.view_as(grad))

    # -- after a step --------------------------------------------------------------------------------------------------

    def whole_loss(self, share: torch.Tensor | None) -> torch.Tensor:
        """The loss of the global batch, the same on every rank of the job. share: what `run` returned."""
        loss_stage = self.program.loss_stage
        code = self.program.stages[loss_stage]
        result = next(r for r in code.results if r.kind == "loss")
        value = torch.zeros(result.shape, dtype=result.dtype, device=self.device)
        if share is not None:
            value = share.clone()
            for axis, placement in zip(self.placement.mesh.axes, result.layout, strict=True):
                if placement == P and axis != MICROBATCH_AXIS:
                    value = self.comm.all_reduce(value, axis)
        if set(self.loss_ranks) != set(range(dist.get_world_size())):
            dist.broadcast(value, self.loss_ranks[0])
        return value


def buckets(tensors: list[torch.Tensor], nbytes: int = _BUCKET_NBYTES) -> list[list[torch.Tensor]]:
    """Consecutive tensors of one dtype, together at most `nbytes` (a larger tensor stands alone)."""
    found: list[list[torch.Tensor]] = []
    size = 0
    for tensor in tensors:
        mine = tensor.numel() * tensor.element_size()
        if found and found[-1][0].dtype == tensor.dtype and size + mine <= nbytes:
            found[-1].append(tensor)
            size += mine
        else:
            found.append([tensor])
            size = mine
    return found
