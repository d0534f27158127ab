"""Executes a Program's instruction list on one rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.graph import GradientEdge, get_gradient_edge

from shardplan.errors import NotSupported
from shardplan.planner.instructions import Instruction, Op
from shardplan.planner.placement import MICROBATCH_AXIS, P
from shardplan.rewrite import storage
from shardplan.rewrite.emit import load
from shardplan.rewrite.program import Argument, Program, Result
from shardplan.runtime.comm import DistComm
from shardplan.runtime.groups import Channel, Groups
from shardplan.runtime.inputs import Inputs
from shardplan.runtime.receipts import receipts
from shardplan.runtime.reduction import Attached, GradientSums
from shardplan.runtime.storage import SplitStorage

Tensors = Mapping[str, torch.Tensor]
_SHOWN = 12


@dataclass(slots=True)
class _Flight:
    """One microbatch between its forward and its backward.

    received: by name; results: tensors that are still to be sent, by position; edges: where backward starts, by
    position (the results themselves need not be kept for it).
    """

    received: dict[str, torch.Tensor] = field(default_factory=dict)
    results: dict[int, torch.Tensor] = field(default_factory=dict)
    edges: dict[int, GradientEdge] = field(default_factory=dict)


class Span(NamedTuple):
    """A timed instruction, in seconds of this process's monotonic clock: it waited for messages until `ready`."""

    instruction: Instruction
    start: float
    ready: float
    end: float


class Executor:
    """One rank of one program. Make it on every rank of the job, in the same order (groups are created).

    tensors: what the stage's code uses; parts: what is stored of its parameters (None: the same).
    attached: shared by the executors whose programs share their tensors.
    spans: None, or a list to which every instruction that runs is appended (a GPU is then synchronised for each).
    """

    def __init__(
        self,
        program: Program,
        rank: int,
        device: torch.device,
        tensors: Tensors,
        groups: Groups,
        seed: int = 0,
        name: str = "",
        attached: Attached | None = None,
        parts: Tensors | None = None,
    ) -> None:
        self.program = program
        self.rank = rank
        self.device = device
        self.tensors = tensors
        self.parts = tensors if parts is None else parts
        self.train = program.kind == "train"
        self.spans: list[Span] | None = None
        stages = [index for index, placement in enumerate(program.placement) if rank in placement.ranks]
        if len(stages) > 1:
            raise NotSupported(f"rank {rank} runs stages {', '.join(map(str, stages))}", ["one stage a rank is run"])
        self.stage = stages[0] if stages else -1
        for placement in program.placement:
            for axis, size in zip(placement.mesh.axes, placement.mesh.sizes, strict=True):
                if axis != MICROBATCH_AXIS and size > 1:
                    groups.of_stage(placement, (axis,))
        self.sums = GradientSums(program, self.stage, rank, self.parts, groups, attached or Attached())
        channels = self._channels(groups)
        if self.stage < 0:
            return
        self.placement = program.placement[self.stage]
        self.coordinate = self.placement.coordinate(rank)
        self.comm = DistComm(self.placement, rank, groups, seed)
        self.split = SplitStorage(program, self.stage, self.comm, tensors, self.parts)
        self.code = program.stages[self.stage]
        self.function = load(self.code.source, f"{name}stage{self.stage}", program.leaves)
        self.denominators = [
            (d, load(d.source, f"{name}{d.name}", program.leaves))
            for d in program.denominators
            if d.stage == self.stage
        ]
        self._prepare_arguments()
        self._prepare_messages(channels)
        self._prepare_instructions()

    # -- set-up --------------------------------------------------------------------------------------------------------

    def _channels(self, groups: Groups) -> dict[tuple[int, int], Channel]:
        """(source stage, target stage) -> this rank's way there or from there. Collective."""
        found: dict[tuple[int, int], Channel] = {}
        for a, b in sorted({(i.stage, i.peer) for line in self.program.schedule for i in line if i.is_send}):
            source, target = self.program.placement[a], self.program.placement[b]
            if source.mesh != target.mesh:
                raise NotSupported(
                    f"stages {a} and {b} have different meshes",
                    [f"stage {a}: {source.mesh}", f"stage {b}: {target.mesh}"],
                )
            for sender, receiver in zip(source.ranks, target.ranks, strict=True):
                channel = groups.channel(sender, receiver)
                if self.rank in (sender, receiver):
                    found[a, b] = channel
        return found

    def _prepare_arguments(self) -> None:
        arguments = self.code.arguments
        self._constants = {n: t.to(self.device) for n, t in self.program.constants.items()}
        self._fixed = [self._static(a) for a in arguments]
        self._input_places = [(i, a.name) for i, a in enumerate(arguments) if a.kind == "input"]
        self._recv_places = [(i, a.name, a.requires_grad) for i, a in enumerate(arguments) if a.kind == "recv"]
        self._count_places = [(i, a.name) for i, a in enumerate(arguments) if a.kind == "denominator"]
        counted = [a for denominator, _ in self.denominators for a in denominator.arguments]
        names = {a.name for a in (*arguments, *counted) if a.kind == "input"}
        self.inputs = Inputs(self.program, self.placement, self.coordinate, self.device, names)

    def _static(self, argument: Argument) -> torch.Tensor | None:
        if argument.kind in ("param", "buffer"):
            return self.tensors[argument.name]
        if argument.kind == "shard":
            return self.parts[argument.name]
        return self._constants[argument.name] if argument.kind == "constant" else None

    def _prepare_messages(self, channels: dict[tuple[int, int], Channel]) -> None:
        """What every message carries. A channel keeps only the order, so both sides list the tensors by name."""
        self._to = {b: channel for (a, b), channel in channels.items() if a == self.stage}
        self._from = {a: channel for (a, b), channel in channels.items() if b == self.stage}
        self._acts_from: dict[int, list[Argument]] = {}
        self._acts_to: dict[int, list[tuple[int, Result]]] = {}
        for argument in sorted(self.code.arguments, key=lambda a: a.name):
            if argument.kind == "recv":
                self._acts_from.setdefault(argument.stage, []).append(argument)
        for i, result in sorted(enumerate(self.code.results), key=lambda item: item[1].name):
            for target in result.stages:
                self._acts_to.setdefault(target, []).append((i, result))
        self._starts = [(i, r.name, r.stages) for i, r in enumerate(self.code.results) if r.requires_grad]
        self._sent = {i for i, result in enumerate(self.code.results) if result.stages}
        self._losses = [i for i, result in enumerate(self.code.results) if result.kind == "loss"]
        self._outputs = [i for i, result in enumerate(self.code.results) if result.kind == "output"]
        self._ones: dict[int, torch.Tensor] = {}

    def _prepare_instructions(self) -> None:
        handlers = {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.RECV_ACT: self._receive_activations,
            Op.SEND_ACT: self._send_activations,
            Op.RECV_GRAD: self._receive_gradients,
            Op.SEND_GRAD: self._send_gradients,
            Op.REDUCE_GRADS: self._reduce,
            Op.OPTIMIZER_STEP: self._optimize,
        }
        self.instructions = self.program.schedule[self.stage]
        for instruction in self.instructions:
            if instruction.op not in handlers:
                raise NotSupported(f"instruction {instruction} ({instruction.op.name})")
        self._handlers = [handlers[i.op] for i in self.instructions]
        self._receipts = receipts(self.program.schedule, self.stage, self._carries)
        # Where a microbatch's last activation and last gradient leave, after which nothing of it is needed.
        self._last_send = {i.microbatch: n for n, i in enumerate(self.instructions) if i.op is Op.SEND_ACT}
        self._last_backward = max((n for n, i in enumerate(self.instructions) if i.op is Op.BACKWARD), default=-1)
        self._last_grad = {i.microbatch: n for n, i in enumerate(self.instructions) if i.op is Op.SEND_GRAD}

    def _carries(self, sent: Instruction) -> bool:
        code = self.program.stages[sent.stage]
        if sent.op is Op.SEND_ACT:
            return any(sent.peer in result.stages for result in code.results)
        return any(a.kind == "recv" and a.stage == sent.peer and a.requires_grad for a in code.arguments)

    # -- one step ------------------------------------------------------------------------------------------------------

    def run(
        self,
        batch: Tensors,
        optimizer_step: Callable[[], None] | None = None,
        step: int = 0,
    ) -> tuple[torch.Tensor | None, list[dict[int, torch.Tensor]]]:
        """One step on the global batch.

        Returns (this rank's share of the loss summed over microbatches, or None; per microbatch, position of the result
        -> output tensor). Raises InputMismatch; any exception carries a note that says where in the list it happened.
        """
        if self.stage < 0:
            return None, []
        self.inputs.start(batch)
        if self.train:
            self.sums.start()
        self.comm.step = step
        self._optimizer_step = optimizer_step
        self._flights: dict[int, _Flight] = {}
        self._arriving: dict[tuple[str, int], tuple[torch.Tensor, Any]] = {}
        self._sending: dict[int, list[tuple[Any, torch.Tensor]]] = {}
        self._loss: torch.Tensor | None = None
        outputs: list[dict[int, torch.Tensor]] = []
        self._found = outputs
        self._at = -1
        try:
            with torch.set_grad_enabled(self.train):
                self._counts = self._count()
                if self.spans is None:
                    for index, handler in enumerate(self._handlers):
                        self._at = index
                        handler(self.instructions[index])
                else:
                    self._run_timed(self.spans)
                for sends in self._sending.values():
                    for work, _ in sends:
                        work.wait()
        except Exception as error:
            error.add_note(self._where())
            raise
        finally:
            self.inputs.finish()
            self._flights, self._arriving, self._sending, self._found = {}, {}, {}, []
        return self._loss, outputs

    def _run_timed(self, spans: list[Span]) -> None:
        for index, handler in enumerate(self._handlers):
            self._at = index
            instruction = self.instructions[index]
            start = self._ready = self._now()
            handler(instruction)
            spans.append(Span(instruction, start, self._ready, self._now()))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _where(self) -> str:
        if self._at < 0:
            return f"on rank {self.rank} (stage {self.stage}), before the first instruction"
        first, last = max(self._at - _SHOWN, 0), self._at + _SHOWN + 1
        words = [str(i) for i in self.instructions]
        words[self._at] = f"[{words[self._at]}]"
        shown = [*(["..."] if first else []), *words[first:last], *(["..."] if last < len(words) else [])]
        place = ", ".join(f"{a} {self.coordinate[a]}" for a in self.placement.mesh.axes if a in self.coordinate)
        return (
            f"on rank {self.rank} (stage {self.stage}; {place}) at instruction {self._at + 1} of {len(words)}:\n"
            f"  {' '.join(shown)}"
        )

    # -- messages ------------------------------------------------------------------------------------------------------

    def _receive_activations(self, instruction: Instruction) -> None:
        channel = self._from[instruction.peer]
        for argument in self._acts_from.get(instruction.peer, ()):
            buffer = torch.empty(argument.shape, dtype=argument.dtype, device=self.device)
            self._arriving[argument.name, instruction.microbatch] = buffer, channel.receive(buffer)

    def _receive_gradients(self, instruction: Instruction) -> None:
        channel = self._from[instruction.peer]
        for _, result in self._acts_to.get(instruction.peer, ()):
            if result.requires_grad:
                buffer = torch.empty(result.shape, dtype=result.dtype, device=self.device)
                name = f"{result.name}<{instruction.peer}"
                self._arriving[name, instruction.microbatch] = buffer, channel.receive(buffer)

    def _send_activations(self, instruction: Instruction) -> None:
        results = self._flights[instruction.microbatch].results
        self._send(instruction.peer, [results[i] for i, _ in self._acts_to.get(instruction.peer, ())])
        if self._last_send[instruction.microbatch] == self._at:
            results.clear()

    def _send_gradients(self, instruction: Instruction) -> None:
        received = self._flights[instruction.microbatch].received
        leaves = [received[a.name] for a in self._acts_from.get(instruction.peer, ()) if a.requires_grad]
        self._send(instruction.peer, [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
        if self._last_grad[instruction.microbatch] == self._at:
            del self._flights[instruction.microbatch]

    def _send(self, stage: int, values: list[torch.Tensor]) -> None:
        channel = self._to[stage]
        values = [value.detach().contiguous() for value in values]
        self._sending[self._at] = [(channel.send(value), value) for value in values]

    def _arrived(self, name: str, microbatch: int) -> torch.Tensor:
        buffer, work = self._arriving.pop((name, microbatch))
        work.wait()
        return buffer

    def _release(self) -> None:
        """Let go of sent tensors that have arrived, and note the time: all messages are here."""
        for index in self._receipts.get(self._at, ()):
            for work, _ in self._sending.pop(index, ()):
                work.wait()
        if self.spans is not None:
            self._ready = self._now()

    # -- compute -------------------------------------------------------------------------------------------------------

    def _forward(self, instruction: Instruction) -> None:
        microbatch = instruction.microbatch
        flight = self._flights[microbatch] = _Flight()
        arguments = self._fixed.copy()
        for i, name, requires_grad in self._recv_places:
            value = self._arrived(name, microbatch)
            if requires_grad and self.train:
                flight.received[name] = value.requires_grad_()
            arguments[i] = value
        self._release()
        for i, name in self._input_places:
            arguments[i] = self.inputs.part(name, microbatch)
        for i, name in self._count_places:
            arguments[i] = self._counts[name]
        self.comm.microbatch = microbatch
        results = self.function(self.comm, self.device, *arguments)
        for i in self._losses:
            share = results[i].detach()
            self._loss = share if self._loss is None else self._loss + share
        if self._outputs:
            self._found.append({i: results[i].detach() for i in self._outputs})
        if microbatch in self._last_send:
            flight.results = {i: results[i] for i in self._sent}
        if self.train:
            flight.edges = {i: get_gradient_edge(results[i]) for i, _, _ in self._starts if results[i].requires_grad}
            for i in self._losses:
                if i not in self._ones and i in flight.edges:
                    self._ones[i] = torch.ones_like(results[i])

    def _backward(self, instruction: Instruction) -> None:
        microbatch = instruction.microbatch
        flight = self._flights[microbatch]
        edges: list[GradientEdge] = []
        gradients: list[torch.Tensor] = []
        for i, name, stages in self._starts:
            gradient: torch.Tensor | None = None
            for stage in stages:
                part = self._arrived(f"{name}<{stage}", microbatch)
                gradient = part if gradient is None else gradient.add_(part)
            if i in flight.edges:
                edges.append(flight.edges[i])
                gradients.append(self._ones[i] if gradient is None else gradient)
        self._release()
        flight.edges = {}
        self.comm.microbatch = microbatch
        if self._at == self._last_backward:
            self.sums.arm()
        if edges:
            torch.autograd.backward(edges, gradients)
            storage.settle(self.comm)
        if microbatch not in self._last_grad:
            del self._flights[microbatch]

    def _reduce(self, instruction: Instruction) -> None:
        self.split.scatter()
        self.sums.finish()

    def _optimize(self, instruction: Instruction) -> None:
        if self._optimizer_step is not None:
            self._optimizer_step()

    def _count(self) -> dict[str, torch.Tensor]:
        """The program's denominators, over the whole batch."""
        found: dict[str, torch.Tensor] = {}
        for denominator, function in self.denominators:
            parts = []
            with torch.no_grad():
                for microbatch in range(self.program.microbatches):
                    self.comm.microbatch = microbatch
                    values = [
                        found[a.name]
                        if a.kind == "denominator"
                        else self.inputs.part(a.name, microbatch)
                        if a.kind == "input"
                        else self._static(a)
                        for a in denominator.arguments
                    ]
                    parts.append(function(self.comm, self.device, *values)[0])
                total = sum(parts[1:], parts[0])
                for axis in denominator.axes:
                    total = self.comm.all_reduce(total, axis)
            found[denominator.name] = total
        return found

    # -- after a step --------------------------------------------------------------------------------------------------

    def whole_loss(self, share: torch.Tensor | None) -> torch.Tensor:
        """The loss of the global batch, the same on every rank of the job. share: what `run` returned."""
        program = self.program
        ranks = program.placement[program.loss_stage].ranks
        result = next(r for r in program.stages[program.loss_stage].results if r.kind == "loss")
        if share is None:
            value = torch.zeros(result.shape, dtype=result.dtype, device=self.device)
        else:
            value = share.clone()
            for axis, placement in zip(self.placement.mesh.axes, result.layout, strict=True):
                if placement == P and axis != MICROBATCH_AXIS:
                    value = self.comm.all_reduce(value, axis)
        if len(ranks) < dist.get_world_size():
            dist.broadcast(value, ranks[0])
        return value
