"""Bytes of one rank over a step: what is alive while each instruction of its list runs.

Parameters and optimizer state lie there all the time; gradients appear in the first backward; a microbatch's
activations live from its forward to its backward, its messages from the posted receive to the instruction that reads
them, or from the send to the next instruction but one. A CUDA allocator hands out blocks of 512 bytes and takes memory
from the device 2 MiB at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardplan.planner.instructions import Instruction, Op

_CUDA_SEGMENT_NBYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class StageBytes:
    """What one rank holds of a stage.

    parameters, optimizer: all the time. gradients: once a backward has run; standing: those of them whose memory is
    there between steps too (buckets). kept: per microbatch, from the end of its forward to its backward. forward,
    first, later: the most in a forward, in the first backward (kept and gradients included) and a later one (kept
    included), above everything else. step: temporaries of the optimizer. received, returned: bytes of a microbatch's
    activations that come from stages before, and of its gradients from stages behind, by stage.
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


def curve(line: Sequence[Instruction], stages: Mapping[int, StageBytes], cuda: bool = False) -> list[Moment]:
    """The moments of one position's instruction list. stages: those that the list names."""
    fixed = sum(stage.fixed for stage in stages.values())
    gradients = {number: stage.standing for number, stage in stages.items()}
    held: dict[tuple[int, int], float] = {}
    messages: dict[tuple[int, int, str], float] = {}
    separate = {i.stage for i in line if i.op is Op.BACKWARD_WEIGHT}
    trains = {i.stage for i in line if i.op in (Op.BACKWARD, Op.BACKWARD_INPUT)}
    found: list[Moment] = []
    for instruction in line:
        stage, here = instruction.stage, stages[instruction.stage]
        key = stage, instruction.microbatch
        before, extra = sum(held.values()), sum(messages.values())
        match instruction.op:
            case Op.RECV_ACT:
                messages[*key, f"a{instruction.peer}"] = here.received.get(instruction.peer, 0.0)
                extra = sum(messages.values())
            case Op.RECV_GRAD:
                messages[*key, f"g{instruction.peer}"] = here.returned.get(instruction.peer, 0.0)
                extra = sum(messages.values())
            case Op.FORWARD:
                extra += here.forward
                if stage in trains:
                    arrived = sum(messages.pop(k) for k in [k for k in messages if k[:2] == key])
                    held[key] = here.kept + arrived
                else:
                    messages = {k: n for k, n in messages.items() if k[:2] != key}
            case Op.BACKWARD | Op.BACKWARD_INPUT:
                # In the first backward, from few gradients and all activations to the reverse.
                alone = gradients[stage] == 0.0 and here.gradients > 0
                extra += (here.first if alone else here.later) - here.kept
                messages = {k: n for k, n in messages.items() if k[:2] != key}
                if stage not in separate:
                    held.pop(key, None)
                    after = here.gradients
                else:
                    after = gradients[stage]
                found.append(_moment(instruction, fixed, gradients, before, extra, cuda))
                gradients[stage] = after
                continue
            case Op.BACKWARD_WEIGHT:
                extra += 0.0 if gradients[stage] else here.gradients
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
