"""Bytes of one rank over a step: what is alive while each instruction of its list runs.

Parameters and optimizer state lie there all the time; gradients appear in the first backward; a microbatch's
activations live from its forward to its backward, its messages from the posted receive to the instruction that reads
them, or from the send until the rank knows that they arrived. A CUDA allocator hands out blocks of 512 bytes and takes
memory from the device 2 MiB at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardplan.planner.instructions import Instruction, Op

_CUDA_SEGMENT_NBYTES = 2 << 20
_CUDA_BLOCK_NBYTES = 512
_COMPUTES = {Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT}


def block(nbytes: float, cuda: bool) -> float:
    """What an allocator hands out for a tensor."""
    return math.ceil(nbytes / _CUDA_BLOCK_NBYTES) * float(_CUDA_BLOCK_NBYTES) if cuda else float(nbytes)


@dataclass(frozen=True, slots=True)
class StageBytes:
    """What one rank holds of a stage, in bytes.

    parameters, optimizer: all the time. gradients: once a backward has run; standing: those of them whose memory is
    there between steps too (buckets). kept: per microbatch, from the end of its forward to its backward. forward,
    first, later: the most in a forward, in the first backward (kept and gradients but the standing ones included) and
    a later one (kept included), above everything else. waiting: per microbatch, what stays between the two parts of its
    backward (None: all that was kept). step: temporaries of the optimizer. Of a microbatch, by the
    other stage: received, activations that come; sent, those that leave and are not kept; returned, gradients that
    come; given, those that leave.
    """

    parameters: float
    optimizer: float
    gradients: float
    kept: float
    forward: float
    first: float
    later: float
    step: float = 0.0
    standing: float = 0.0
    received: Mapping[int, float] = field(default_factory=dict)
    returned: Mapping[int, float] = field(default_factory=dict)
    sent: Mapping[int, float] = field(default_factory=dict)
    given: Mapping[int, float] = field(default_factory=dict)
    waiting: float | None = None

    @property
    def fixed(self) -> float:
        return self.parameters + self.optimizer


@dataclass(frozen=True, slots=True)
class Moment:
    """While an instruction runs: parameters and optimizer state, gradients, activations of microbatches in flight and
    what else is alive, in bytes."""

    instruction: Instruction
    fixed: float
    gradients: float
    activations: float
    buffers: float

    @property
    def nbytes(self) -> float:
        return self.fixed + self.gradients + self.activations + self.buffers


def curve(
    line: Sequence[Instruction],
    stages: Mapping[int, StageBytes],
    cuda: bool = False,
    arrived: Mapping[int, Sequence[int]] | None = None,
) -> list[Moment]:
    """The moments of one position's instruction list. stages: those that the list names; arrived: what of its sends is
    known to have arrived when an instruction begins (`planner.receipts`), by index; None: each when the next computes.
    """
    fixed = sum(stage.fixed for stage in stages.values())
    gradients = {number: stage.standing for number, stage in stages.items()}
    held: dict[tuple[int, int], float] = {}
    messages: dict[tuple[int, int, str], float] = {}
    separate = {i.stage for i in line if i.op is Op.BACKWARD_WEIGHT}
    trains = {i.stage for i in line if i.op in (Op.BACKWARD, Op.BACKWARD_INPUT)}
    found: list[Moment] = []
    sending: dict[int, float] = {}
    for index, instruction in enumerate(line):
        stage, here = instruction.stage, stages[instruction.stage]
        key = stage, instruction.microbatch
        if instruction.op in _COMPUTES:
            for place in list(sending) if arrived is None else arrived.get(index, ()):
                sending.pop(place, None)
        before, extra = sum(held.values()), sum(messages.values()) + sum(sending.values())
        match instruction.op:
            case Op.RECV_ACT:
                messages[*key, f"a{instruction.peer}"] = here.received.get(instruction.peer, 0.0)
                extra += here.received.get(instruction.peer, 0.0)
            case Op.RECV_GRAD:
                messages[*key, f"g{instruction.peer}"] = here.returned.get(instruction.peer, 0.0)
                extra += here.returned.get(instruction.peer, 0.0)
            case Op.SEND_ACT:
                sending[index] = here.sent.get(instruction.peer, 0.0)
                extra += sending[index]
            case Op.SEND_GRAD:
                sending[index] = here.given.get(instruction.peer, 0.0)
                extra += sending[index]
            case Op.FORWARD:
                extra += here.forward
                if stage in trains:
                    came = sum(messages.pop(k) for k in [k for k in messages if k[:2] == key])
                    held[key] = here.kept + came
                else:
                    messages = {k: n for k, n in messages.items() if k[:2] != key}
            case Op.BACKWARD | Op.BACKWARD_INPUT:
                # In the first backward, from few gradients and all activations to the reverse.
                extra += (here.first if gradients[stage] < here.gradients else here.later) - here.kept
                messages = {k: n for k, n in messages.items() if k[:2] != key}
                if stage not in separate:
                    held.pop(key, None)
                    after = here.gradients
                else:
                    if here.waiting is not None:
                        # What was recomputed piles up as it waits.
                        extra += max(here.waiting - held.get(key, 0.0), 0.0)
                        held[key] = here.waiting
                    after = gradients[stage]
                found.append(_moment(instruction, fixed, gradients, before, extra, cuda))
                gradients[stage] = after
                continue
            case Op.BACKWARD_WEIGHT:
                extra += max(here.gradients - gradients[stage], 0.0)
                held.pop(key, None)
                found.append(_moment(instruction, fixed, gradients, before, extra, cuda))
                gradients[stage] = here.gradients
                continue
            case Op.OPTIMIZER_STEP:
                extra += here.step
        found.append(_moment(instruction, fixed, gradients, before, extra, cuda))
    return found


def peak(moments: Sequence[Moment]) -> Moment:
    """The moment of most bytes, the first of several."""
    return max(moments, key=lambda moment: moment.nbytes)


def _moment(
    instruction: Instruction,
    fixed: float,
    gradients: Mapping[int, float],
    activations: float,
    buffers: float,
    cuda: bool,
) -> Moment:
    if cuda:
        buffers = -(-buffers // _CUDA_SEGMENT_NBYTES) * _CUDA_SEGMENT_NBYTES
    return Moment(instruction, fixed, sum(gradients.values()), activations, buffers)
