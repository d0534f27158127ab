"""Executes a Program's instruction list on one rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist

from shardplan.errors import NotSupported
from shardplan.planner.instructions import Instruction, Op
from shardplan.planner.placement import MICROBATCH_AXIS, P
from shardplan.planner.receipts import receipts
from shardplan.rewrite.program import Program
from shardplan.runtime import pulse
from shardplan.runtime.comm import DistComm
from shardplan.runtime.groups import Groups
from shardplan.runtime.mail import Ways
from shardplan.runtime.op_timing import OpClock
from shardplan.runtime.reduction import Attached, GradientSums
from shardplan.runtime.stage_run import Outputs, Shared, StageRun

Tensors = Mapping[str, torch.Tensor]
_SHOWN = 12


class Span(NamedTuple):
    """A timed instruction, in seconds of this process's monotonic clock: it waited for messages until `ready`.
    computing: seconds in which this thread had a core."""

    instruction: Instruction
    start: float
    ready: float
    end: float
    computing: float = 0.0


class Executor:
    """One rank of one program. Make it on every rank of the job, in the same order (groups are created).

    runs: the stages of this rank, which stand at one position and have one mesh. tensors: what their code uses; parts:
    what is stored of its parameters (None: the same).
    attached: shared by the executors whose programs share their tensors.
    place: where to write which instruction is run (see `runtime.pulse`).
    spans: None, or a list to which every instruction that runs is appended (a GPU is then synchronised for each).
    clock: told of them too, where their ops are timed.

    Raises NotSupported for a program in which the stages of a rank lie differently.
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
        self.clock: OpClock | None = None
        self.place = memoryview(bytearray(pulse.PLACE_NBYTES))
        stages = program.stages_of(rank)
        self.stage = stages[0] if stages else -1
        for placement in program.placement:
            for axis, size in zip(placement.mesh.axes, placement.mesh.sizes, strict=True):
                if axis != MICROBATCH_AXIS and size > 1:
                    groups.of_stage(placement, (axis,))
        self.sums = GradientSums(program, stages, rank, self.parts, groups, attached or Attached(), tensors)
        ways = Ways(program, rank, groups)
        self.runs: tuple[StageRun, ...] = ()
        if not stages:
            return
        self.placement = program.placement[self.stage]
        if any(program.placement[stage] != self.placement for stage in stages):
            raise NotSupported(
                f"stages {', '.join(map(str, stages))} of rank {rank} lie differently",
                [f"stage {stage}: {program.placement[stage].mesh}" for stage in stages],
            )
        self.coordinate = self.placement.coordinate(rank)
        self.comm = DistComm(self.placement, rank, groups, seed)
        self.runs = tuple(
            StageRun(program, stage, rank, self.comm, ways, tensors, self.parts, device, name) for stage in stages
        )
        self._prepare_instructions()

    # -- set-up --------------------------------------------------------------------------------------------------------

    def _prepare_instructions(self) -> None:
        position = next(p for p, line in enumerate(self.program.schedule) if any(i.stage == self.stage for i in line))
        self.instructions = tuple(
            i for i in self.program.schedule[position] if self.placement.has(self.coordinate, i.microbatch)
        )
        runs = {run.stage: run for run in self.runs}
        found = receipts(self.program.schedule, position, self._carries)
        for run in self.runs:
            run.schedule(self.instructions, found)
            run.arm = lambda run=run: self._arm(run)
        self.sums.beside = [run.split for run in self.runs]
        last = max((n for n, i in enumerate(self.instructions) if i.op is Op.REDUCE_GRADS), default=-1)
        end = max((n for n, i in enumerate(self.instructions) if i.op is Op.OPTIMIZER_STEP), default=-1)
        self._handlers: list[Callable[[int, Instruction], None]] = []
        for index, instruction in enumerate(self.instructions):
            handler = runs[instruction.stage].handler(instruction.op)
            if instruction.op is Op.REDUCE_GRADS:
                handler = self._reduce if index == last else _nothing
            elif instruction.op is Op.OPTIMIZER_STEP:
                handler = self._optimize if index == end else _nothing
            if handler is None:
                raise NotSupported(f"instruction {instruction} ({instruction.op.name})")
            self._handlers.append(handler)
        self._places = pulse.places(self.program, self.instructions)

    def _carries(self, sent: Instruction) -> bool:
        """Whether a send carries any tensor."""
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
    ) -> tuple[torch.Tensor | None, Outputs]:
        """One step on the global batch.

        Returns (this rank's share of the loss summed over microbatches, or None; its outputs). Raises InputMismatch;
        any exception carries a note that says where in the list it happened.
        """
        if not self.runs:
            return None, []
        shared = Shared(outputs=[{} for _ in range(self.program.microbatches)])
        if self.spans is not None:
            shared.ready = self._messages_are_here
        for run in self.runs:
            run.start(batch, shared)
        if self.train:
            self.sums.start()
        self.comm.step = step
        self._optimizer_step = optimizer_step
        self._at = -1
        try:
            with torch.set_grad_enabled(self.train):
                for run in self.runs:
                    run.count()
                if self.spans is None:
                    for index, handler in enumerate(self._handlers):
                        self._at = index
                        self.place[:] = self._places[index]
                        handler(index, self.instructions[index])
                else:
                    self._run_timed(self.spans)
                for sends in shared.sending.values():
                    for work, _ in sends:
                        work.wait()
        except Exception as error:
            error.add_note(self._where())
            raise
        finally:
            for run in self.runs:
                run.finish()
        return shared.loss, shared.outputs

    def _run_timed(self, spans: list[Span]) -> None:
        for index, handler in enumerate(self._handlers):
            self._at = index
            self.place[:] = self._places[index]
            instruction = self.instructions[index]
            start = self._ready = self._now()
            computing = time.thread_time()
            if self.clock is not None:
                self.clock.begin(instruction.op)
            handler(index, instruction)
            if self.clock is not None:
                self.clock.end()
            spans.append(Span(instruction, start, self._ready, self._now(), time.thread_time() - computing))

    def _messages_are_here(self) -> None:
        self._ready = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _where(self) -> str:
        if self._at < 0:
            return f"on rank {self.rank} ({self._stages()}), before the first instruction"
        first, last = max(self._at - _SHOWN, 0), self._at + _SHOWN + 1
        words = [str(i) for i in self.instructions]
        words[self._at] = f"[{words[self._at]}]"
        shown = [*(["..."] if first else []), *words[first:last], *(["..."] if last < len(words) else [])]
        place = ", ".join(f"{a} {self.coordinate[a]}" for a in self.placement.mesh.axes if a in self.coordinate)
        return (
            f"on rank {self.rank} ({self._stages()}; {place}) at instruction {self._at + 1} of {len(words)}:\n"
            f"  {' '.join(shown)}"
        )

    def _stages(self) -> str:
        numbers = [str(run.stage) for run in self.runs]
        return f"stage{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"

    def _arm(self, run: StageRun) -> None:
        self.sums.arm(run.stage)
        run.split.arm()

    def _reduce(self, _at: int, _instruction: Instruction) -> None:
        for run in self.runs:
            run.split.scatter()
        self.sums.finish()

    def _optimize(self, _at: int, _instruction: Instruction) -> None:
        if self._optimizer_step is not None:
            self._optimizer_step()

    def refresh(self) -> None:
        """The parts of parameters that are split for storage have changed."""
        for run in self.runs:
            run.split.refresh()

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


def _nothing(_at: int, _instruction: Instruction) -> None:
    """Of what is done once for all stages of a rank, the instructions before the last."""
