"""ZB-V (Qi et al. 2024, "Pipeline Parallelism with Controllable Memory"): two stages a position, in the shape of a V.

With p positions, position s has stages s and 2p - 1 - s: the first half of the model goes down the positions, the
second half comes back, and the position that begins a microbatch also ends it. Backward is in two parts. No position
holds more than the activations of p microbatches (2p of its half-sized stages, as under 1F1B), and where forward and
both parts of backward take equally long the bubble nearly vanishes.

The order is found by running the positions in units of time under a rule: a position does what is first possible of

1. the input's part of a backward, of its later stage first;
2. a forward, of its later stage first, if it then holds no more than it may;
3. the weights' part of a backward, oldest first.

With equal parts the step is then 6 m + p - 1 of these units, at most three more (p up to 8, m >= p): little but the
time in which the last position waits for its first microbatch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from shardplan.planner.instructions import Instruction, Op


def v_position(stage: int, positions: int) -> int:
    """Where a stage stands."""
    return stage if stage < positions else 2 * positions - 1 - stage


def v_orders(positions: int, microbatches: int, training: bool) -> list[tuple[Instruction, ...]]:
    """The compute order of every position."""
    return _Run(positions, microbatches, training).orders()


@dataclass(slots=True)
class _Position:
    """stages: earlier and later. forwards, inputs: how many microbatches of each are done; waiting: weights' parts."""

    stages: tuple[int, int]
    forwards: list[int] = field(default_factory=lambda: [0, 0])
    inputs: list[int] = field(default_factory=lambda: [0, 0])
    waiting: deque[Instruction] = field(default_factory=deque)
    held: int = 0
    order: list[Instruction] = field(default_factory=list)


class _Run:
    """All positions in steps of one unit of time. now: how many."""

    def __init__(self, positions: int, microbatches: int, training: bool) -> None:
        self.last = 2 * positions - 1
        self.microbatches = microbatches
        self.training = training
        self.limit = 2 * positions
        self.places = [_Position((s, self.last - s)) for s in range(positions)]
        self.now = 0
        self.forwards = [0] * (self.last + 1)
        self.inputs = [0] * (self.last + 1)

    def orders(self) -> list[tuple[Instruction, ...]]:
        each = 2 * self.microbatches * (3 if self.training else 1)
        while any(len(place.order) < each for place in self.places):
            chosen = [self.choose(place) for place in self.places]
            assert any(chosen), "the later stage always has room, so the oldest microbatch goes on"
            for place, instruction in zip(self.places, chosen, strict=True):
                if instruction is not None:
                    self.run(place, instruction)
            self.now += 1
        return [tuple(place.order) for place in self.places]

    def choose(self, place: _Position) -> Instruction | None:
        for half in (1, 0) if self.training else ():
            microbatch, stage = place.inputs[half], place.stages[half]
            after = self.inputs[stage + 1] if stage < self.last else self.microbatches
            if microbatch < min(place.forwards[half], after):
                return Instruction(Op.BACKWARD_INPUT, stage, microbatch)
        for half in (1, 0):
            microbatch, stage = place.forwards[half], place.stages[half]
            before = self.forwards[stage - 1] if stage else self.microbatches
            if microbatch < before and self.fits(place, half):
                return Instruction(Op.FORWARD, stage, microbatch)
        return place.waiting[0] if place.waiting else None

    def fits(self, place: _Position, half: int) -> bool:
        """Whether one more forward may be held. The earlier stage leaves room for the later."""
        if not self.training:
            return True
        if half == 1:
            return place.held < self.limit
        return place.held < self.limit and place.forwards[0] - place.inputs[0] < self.limit - place.stages[0]

    def run(self, place: _Position, instruction: Instruction) -> None:
        half = place.stages.index(instruction.stage)
        place.order.append(instruction)
        if instruction.op is Op.FORWARD:
            place.forwards[half] += 1
            place.held += 1
            self.forwards[instruction.stage] += 1
        elif instruction.op is Op.BACKWARD_INPUT:
            place.inputs[half] += 1
            place.waiting.append(Instruction(Op.BACKWARD_WEIGHT, instruction.stage, instruction.microbatch))
            self.inputs[instruction.stage] += 1
        else:
            place.waiting.popleft()
            place.held -= 1
