"""One stage on one rank: the handlers of its instructions. The executor calls them in the order of the list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from shardplan.planner.instructions import Instruction, Op
from shardplan.rewrite import storage
from shardplan.rewrite.emit import load
from shardplan.rewrite.later import Later
from shardplan.rewrite.program import Argument, Program
from shardplan.runtime.comm import DistComm
from shardplan.runtime.inputs import Inputs
from shardplan.runtime.mail import Mail, Ways
from shardplan.runtime.storage import SplitStorage

Tensors = Mapping[str, torch.Tensor]
Outputs = list[dict[tuple[int, int], torch.Tensor]]
"""Per microbatch, (stage, position of the result) -> this rank's part of an output."""
Handler = Callable[[int, Instruction], None]


@dataclass(slots=True)
class Shared:
    """What the stages of a rank have in common during a step.

    sending: index of a send in the list -> works and the tensors that they send. ready: called when the messages of an
    instruction are here.
    """

    sending: dict[int, list[tuple[Any, torch.Tensor]]] = field(default_factory=dict)
    outputs: Outputs = field(default_factory=list)
    loss: torch.Tensor | None = None
    ready: Callable[[], None] | None = None


@dataclass(slots=True)
class _Flight:
    """One microbatch between its forward and its backward.

    received: by position among the arguments; results: tensors that are still to be sent, by position; edges: where
    backward starts, by position (the results themselves need not be kept for it). Under a split backward: later, the
    gradients that wait; late, where its second part starts besides, and the gradients there.
    """

    received: dict[int, torch.Tensor] = field(default_factory=dict)
    results: dict[int, torch.Tensor] = field(default_factory=dict)
    edges: dict[int, GradientEdge] = field(default_factory=dict)
    later: Later | None = None
    late: tuple[list[GradientEdge], list[torch.Tensor]] = field(default_factory=lambda: ([], []))


class StageRun:
    """tensors: what the stage's code uses; parts: what is stored of its parameters; name: of the program, for
    tracebacks. arm: called before the backward that makes the stage's gradients final."""

    def __init__(
        self,
        program: Program,
        stage: int,
        rank: int,
        comm: DistComm,
        ways: Ways,
        tensors: Tensors,
        parts: Tensors,
        device: torch.device,
        name: str,
    ) -> None:
        self.program = program
        self.stage = stage
        self.comm = comm
        self.device = device
        self.train = program.kind == "train"
        self.tensors = tensors
        self.parts = parts
        self.code = program.stages[stage]
        self.split = SplitStorage(program, stage, comm, tensors, parts)
        self.function = load(self.code.source, f"{name}stage{stage}", program.leaves)
        self.denominators = [
            (d, load(d.source, f"{name}{d.name}", program.leaves)) for d in program.denominators if d.stage == stage
        ]
        self.mail = Mail(ways, stage, rank, device)
        self.shared = Shared()
        self.arm: Callable[[], None] = lambda: None
        self._flights: dict[int, _Flight] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._prepare_arguments(rank)
        results = self.code.results
        self._starts = [(i, [f"{r.name}<{s}" for s in r.stages]) for i, r in enumerate(results) if r.requires_grad]
        self._late = {i for i, result in enumerate(results) if result.late}
        self._sent = [i for i, result in enumerate(results) if result.stages]
        self._losses = [i for i, result in enumerate(results) if result.kind == "loss"]
        self._outputs = [i for i, result in enumerate(results) if result.kind == "output"]
        self._ones: dict[int, torch.Tensor] = {}

    # -- set-up --------------------------------------------------------------------------------------------------------

    def _prepare_arguments(self, rank: int) -> None:
        arguments = self.code.arguments
        self._constants = {n: t.to(self.device) for n, t in self.program.constants.items()}
        self._fixed = [self._static(a) for a in arguments]
        self._input_places = [(i, a.name) for i, a in enumerate(arguments) if a.kind == "input"]
        self._recv_places = [
            (i, a.name, a.requires_grad and self.train) for i, a in enumerate(arguments) if a.kind == "recv"
        ]
        self._count_places = [(i, a.name) for i, a in enumerate(arguments) if a.kind == "denominator"]
        counted = [a for denominator, _ in self.denominators for a in denominator.arguments]
        names = {a.name for a in (*arguments, *counted) if a.kind == "input"}
        placement = self.program.placement[self.stage]
        self.inputs = Inputs(self.program, placement, placement.coordinate(rank), self.device, names)

    def _static(self, argument: Argument) -> torch.Tensor | None:
        if argument.kind in ("param", "buffer"):
            return self.tensors[argument.name]
        if argument.kind == "shard":
            return self.parts[argument.name]
        return self._constants[argument.name] if argument.kind == "constant" else None

    def schedule(self, instructions: tuple[Instruction, ...], receipts: Mapping[int, tuple[int, ...]]) -> None:
        """Take up the rank's list: what this stage may let go of after each of its instructions. receipts: see
        `planner.receipts`."""
        mine = [(n, i) for n, i in enumerate(instructions) if i.stage == self.stage]
        self._receipts = receipts
        # Where a microbatch's last activation and last gradient leave, and after which nothing of it is needed.
        self._last_send = {i.microbatch: n for n, i in mine if i.op is Op.SEND_ACT}
        self._last_grad = {i.microbatch: n for n, i in mine if i.op is Op.SEND_GRAD}
        self._last = {i.microbatch: n for n, i in mine}
        self._last_backward = max((n for n, i in mine if i.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT)), default=-1)
        self._splits = any(i.op is Op.BACKWARD_INPUT for _, i in mine)

    def handler(self, op: Op) -> Handler | None:
        """What runs an instruction of that kind; None where it is none of a stage's."""
        return {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.BACKWARD_INPUT: self._backward_input,
            Op.BACKWARD_WEIGHT: self._backward_weight,
            Op.RECV_ACT: self._receive_activations,
            Op.SEND_ACT: self._send_activations,
            Op.RECV_GRAD: self._receive_gradients,
            Op.SEND_GRAD: self._send_gradients,
        }.get(op)

    # -- one step ------------------------------------------------------------------------------------------------------

    def start(self, batch: Tensors, shared: Shared) -> None:
        """Before the first instruction. Raises InputMismatch."""
        self.shared = shared
        self.inputs.start(batch)

    def finish(self) -> None:
        """Let go of the step."""
        self.inputs.finish()
        self._flights.clear()
        self._counts = {}
        self.mail.clear()

    def count(self) -> None:
        """The program's denominators, over the whole batch."""
        found = self._counts
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

    # -- messages ------------------------------------------------------------------------------------------------------

    def _receive_activations(self, _at: int, instruction: Instruction) -> None:
        self.mail.post_activations(instruction.peer, instruction.microbatch)

    def _receive_gradients(self, _at: int, instruction: Instruction) -> None:
        self.mail.post_gradients(instruction.peer, instruction.microbatch)

    def _send_activations(self, at: int, instruction: Instruction) -> None:
        peer, microbatch = instruction.peer, instruction.microbatch
        flight = self._flights[microbatch]
        sent: list[tuple[Any, torch.Tensor]] = []
        for outgoing in self.mail.acts_to[peer]:
            sent += self.mail.send(outgoing, flight.results[outgoing.index].detach(), peer, microbatch)
        if sent:
            self.shared.sending[at] = sent
        if self._last_send[microbatch] == at:
            flight.results.clear()
            self._end(at, microbatch)

    def _send_gradients(self, at: int, instruction: Instruction) -> None:
        peer, microbatch = instruction.peer, instruction.microbatch
        flight = self._flights[microbatch]
        sent: list[tuple[Any, torch.Tensor]] = []
        for outgoing in self.mail.grads_to[peer]:
            leaf = flight.received[outgoing.index]
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            sent += self.mail.send(outgoing, gradient, peer, microbatch)
        if sent:
            self.shared.sending[at] = sent
        if self._last_grad[microbatch] == at:
            flight.received.clear()
            self._end(at, microbatch)

    def _end(self, at: int, microbatch: int) -> None:
        if self._last[microbatch] == at:
            del self._flights[microbatch]

    def _release(self, at: int) -> None:
        """Let go of sent tensors that have arrived, and say that all messages are here."""
        for index in self._receipts.get(at, ()):
            for work, _ in self.shared.sending.pop(index, ()):
                work.wait()
        if self.shared.ready is not None:
            self.shared.ready()

    # -- compute -------------------------------------------------------------------------------------------------------

    def _forward(self, at: int, instruction: Instruction) -> None:
        microbatch = instruction.microbatch
        flight = self._flights[microbatch] = _Flight()
        arguments = self._fixed.copy()
        for i, name, requires_grad in self._recv_places:
            value = self.mail.arrived(name, microbatch)
            if requires_grad:
                flight.received[i] = value.requires_grad_()
            arguments[i] = value
        self._release(at)
        for i, name in self._input_places:
            arguments[i] = self.inputs.part(name, microbatch)
        for i, name in self._count_places:
            arguments[i] = self._counts[name]
        self.comm.microbatch = microbatch
        if self._splits:
            self.comm.later = flight.later = Later()
        results = self.function(self.comm, self.device, *arguments)
        shared = self.shared
        for i in self._losses:
            share = results[i].detach()
            shared.loss = share if shared.loss is None else shared.loss + share
        for i in self._outputs:
            shared.outputs[microbatch][self.stage, i] = results[i].detach()
        if microbatch in self._last_send:
            flight.results = {i: results[i] for i in self._sent}
        if self.train:
            flight.edges = {i: get_gradient_edge(results[i]) for i, _ in self._starts if results[i].requires_grad}
            for i in self._losses:
                if i not in self._ones and i in flight.edges:
                    self._ones[i] = torch.ones_like(results[i])
        self._end(at, microbatch)

    def _arrived(self, at: int, microbatch: int) -> tuple[list[GradientEdge], list[torch.Tensor]]:
        """Wait for the gradients of what was sent. -> where backward starts, and the gradients there."""
        flight = self._flights[microbatch]
        edges: list[GradientEdge] = []
        gradients: list[torch.Tensor] = []
        for i, names in self._starts:
            gradient: torch.Tensor | None = None
            for name in names:
                part = self.mail.arrived(name, microbatch)
                gradient = part if gradient is None else gradient + part
            if i in flight.edges:
                late = i in self._late and flight.later is not None
                (flight.late[0] if late else edges).append(flight.edges[i])
                (flight.late[1] if late else gradients).append(self._ones[i] if gradient is None else gradient)
        self._release(at)
        flight.edges = {}
        self.comm.microbatch = microbatch
        return edges, gradients

    def _backward(self, at: int, instruction: Instruction) -> None:
        microbatch = instruction.microbatch
        edges, gradients = self._arrived(at, microbatch)
        if at == self._last_backward:
            self.arm()
        if edges:
            torch.autograd.backward(edges, gradients)
            storage.settle(self.comm)
        self._end(at, microbatch)

    def _backward_input(self, at: int, instruction: Instruction) -> None:
        microbatch = instruction.microbatch
        edges, gradients = self._arrived(at, microbatch)
        later = self._flights[microbatch].later
        assert later is not None
        self.comm.later = later
        if edges:
            torch.autograd.backward(edges, gradients)
            storage.settle(self.comm)
        self._end(at, microbatch)

    def _backward_weight(self, at: int, instruction: Instruction) -> None:
        microbatch = instruction.microbatch
        flight = self._flights[microbatch]
        self._release(at)
        self.comm.microbatch = microbatch
        if at == self._last_backward:
            self.arm()
        edges, gradients = flight.late
        flight.late = [], []
        assert flight.later is not None
        self.comm.later = flight.later
        flight.later.run(edges, gradients)
        storage.settle(self.comm)
        self._end(at, microbatch)
