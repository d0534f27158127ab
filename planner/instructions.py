"""The instruction list: what each pipeline position does in one step, as data.

Two interpreters read it: the simulator (`planner.simulate`: time, memory, deadlock) and the executor
(`runtime.executor`). An instruction prints as ``2F0`` (stage 2, forward, microbatch 0) or ``1RECV_ACT0<0`` and
parses back; a schedule prints as one line per position.

Semantics that both interpreters share. ``RECV_*`` posts a receive and returns at once; ``SEND_*`` posts a send and
returns at once; a ``FORWARD`` or ``BACKWARD`` waits for the receives of its stage and microbatch. Between an ordered
pair of stages messages are matched in the order in which they were posted (no tags), so sends and receives of a pair
must be listed in the same order on both sides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Op(StrEnum):
    """Kinds of instruction; the value is what stands in the text form."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    SEND_ACT = "SEND_ACT"
    RECV_ACT = "RECV_ACT"
    SEND_GRAD = "SEND_GRAD"
    RECV_GRAD = "RECV_GRAD"
    REDUCE_GRADS = "REDUCE_GRADS"
    OPTIMIZER_STEP = "OPTIMIZER_STEP"


_SENDS = (Op.SEND_ACT, Op.SEND_GRAD)
_RECVS = (Op.RECV_ACT, Op.RECV_GRAD)
_ONCE = (Op.REDUCE_GRADS, Op.OPTIMIZER_STEP)
_TEXT = re.compile(r"^(\d+)([A-Z_]+?)(\d*)(?:([<>])(\d+))?$")


@dataclass(frozen=True, slots=True)
class Instruction:
    """op: kind; stage: the stage that executes it; microbatch: -1 for once-a-step work; peer: the other stage of a
    send or receive, else -1."""

    op: Op
    stage: int
    microbatch: int = -1
    peer: int = -1

    def __post_init__(self) -> None:
        if (self.op in _SENDS or self.op in _RECVS) != (self.peer >= 0):
            raise ValueError(f"{self.op} with peer {self.peer}")
        if (self.op in _ONCE) != (self.microbatch < 0):
            raise ValueError(f"{self.op} with microbatch {self.microbatch}")

    @property
    def is_send(self) -> bool:
        return self.op in _SENDS

    @property
    def is_recv(self) -> bool:
        return self.op in _RECVS

    def __str__(self) -> str:
        text = f"{self.stage}{self.op.value}"
        if self.microbatch >= 0:
            text += str(self.microbatch)
        if self.peer >= 0:
            text += (">" if self.is_send else "<") + str(self.peer)
        return text

    @staticmethod
    def parse(text: str) -> Instruction:
        """Inverse of ``str``. Raises ValueError."""
        found = _TEXT.match(text)
        if not found:
            raise ValueError(f"not an instruction: {text!r}")
        stage, op, microbatch, arrow, peer = found.groups()
        made = Instruction(
            Op(op), int(stage), int(microbatch) if microbatch else -1, int(peer) if peer is not None else -1
        )
        if arrow and (arrow == ">") != made.is_send:
            raise ValueError(f"wrong arrow: {text!r}")
        return made


Schedule = tuple[tuple[Instruction, ...], ...]
"""One instruction list per pipeline position (the ranks of a position all run the same list)."""


def schedule_text(schedule: Schedule) -> str:
    """One line per position, instructions separated by spaces."""
    return "\n".join(" ".join(map(str, line)) for line in schedule)


def parse_schedule(text: str) -> Schedule:
    """Inverse of `schedule_text`."""
    return tuple(tuple(Instruction.parse(word) for word in line.split()) for line in text.splitlines())
