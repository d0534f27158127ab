"""Signs of life of a rank: a slot of bytes in which it says that it lives, which call it is in and at what place.

The slot of a worker lies in memory that its driver shares; that of a rank under torchrun is its own and is published by
`runtime.watch`. Writing a place is one copy of a fixed number of bytes: the executor does it at every instruction.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence

from shardplan.planner.instructions import Instruction, Op
from shardplan.rewrite.program import Program

PLACE_NBYTES = 144
_HEAD = struct.Struct("<dq")
_CALL_NBYTES = 96
SLOT_NBYTES = _HEAD.size + _CALL_NBYTES + PLACE_NBYTES
BEAT_SECONDS = 0.5

_WAITS = {Op.FORWARD: "forward", Op.BACKWARD: "backward", Op.BACKWARD_INPUT: "backward", Op.BACKWARD_WEIGHT: "weights"}
_SHOWN_RANKS = 8


class Slot:
    """One rank's bytes: when it last lived (seconds of the machine's monotonic clock), how many calls it began, the
    call it is in ("" between calls), the place in it."""

    def __init__(self, memory: memoryview | None = None) -> None:
        self.memory = memoryview(bytearray(SLOT_NBYTES)) if memory is None else memory
        self.place = self.memory[_HEAD.size + _CALL_NBYTES :]
        self._call = self.memory[_HEAD.size : _HEAD.size + _CALL_NBYTES]

    def beat(self) -> None:
        struct.pack_into("<d", self.memory, 0, time.monotonic())

    def begin(self, call: str) -> None:
        self.place[:] = padded("", PLACE_NBYTES)
        self._call[:] = padded(call, _CALL_NBYTES)
        struct.pack_into("<q", self.memory, 8, self.calls + 1)

    def end(self) -> None:
        self._call[:] = padded("", _CALL_NBYTES)

    @property
    def beaten(self) -> float:
        """When it last lived; 0.0: not yet."""
        return _HEAD.unpack_from(self.memory)[0]

    @property
    def calls(self) -> int:
        return _HEAD.unpack_from(self.memory)[1]

    @property
    def call(self) -> str:
        return text(self._call)

    def where(self) -> str:
        """For people: the place, or the call where it has not come to the first instruction, or that it is idle."""
        if not self.call:
            return "between calls"
        return text(self.place) or f"in {self.call}, outside the instruction list"


def padded(value: str, nbytes: int) -> bytes:
    """Text as exactly so many bytes."""
    return value.encode(errors="replace")[:nbytes].ljust(nbytes, b"\0")


def text(value: memoryview) -> str:
    """Inverse of `padded`."""
    return bytes(value).rstrip(b"\0").decode(errors="replace")


def places(program: Program, instructions: Sequence[Instruction]) -> list[bytes]:
    """What a rank writes as its place at each of its instructions: the instruction, its microbatch, and whom it may
    wait for there."""
    found = []
    for index, instruction in enumerate(instructions):
        where = f"stage {instruction.stage}"
        if instruction.microbatch >= 0:
            where += f", microbatch {instruction.microbatch}"
        peers = _peers(program, instruction)
        name = f"instruction {instruction} ({index + 1} of {len(instructions)}; {where}"
        found.append(padded(f"{name}; peers: {peers})" if peers else f"{name})", PLACE_NBYTES))
    return found


def _peers(program: Program, instruction: Instruction) -> str:
    code = program.stages[instruction.stage]
    stages: set[int] = set()
    if instruction.peer >= 0:
        stages = {instruction.peer}
    elif instruction.op is Op.FORWARD:
        stages = {argument.stage for argument in code.arguments if argument.kind == "recv"}
    elif instruction.op in _WAITS:
        stages = {stage for result in code.results if result.requires_grad for stage in result.stages}
    elif instruction.op is Op.REDUCE_GRADS:
        tied = [spec.stages for spec in program.parameters if instruction.stage in spec.stages]
        stages = {stage for some in tied for stage in some} - {instruction.stage}
    texts = [f"stage {stage} ({_ranks(program, stage)})" for stage in sorted(stages)]
    if len(program.placement[instruction.stage].ranks) > 1 and instruction.peer < 0:
        texts.append(_ranks(program, instruction.stage))
    return ", ".join(texts)


def _ranks(program: Program, stage: int) -> str:
    ranks = program.placement[stage].ranks
    shown = ", ".join(map(str, ranks[:_SHOWN_RANKS]))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{', ...' if len(ranks) > _SHOWN_RANKS else ''}"
