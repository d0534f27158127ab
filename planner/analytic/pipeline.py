"""Seconds and held activations of a pipeline, from the same compute orders that the instruction lists are made of.

A recurrence over the orders of `planner.schedules`: a compute starts when its position is free and its message, sent
when its neighbour's compute ended, has arrived. That is `planner.simulate` without queues at a link; the tests hold the
two together. Every schedule repeats itself after `positions` microbatches, so that many microbatches are counted from a
few: T(m) = T(a) + (m - a)/p (T(a) - T(a - p)) with a = m mod p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from shardplan.planner.analytic.layer import Seconds
from shardplan.planner.instructions import Instruction, Op
from shardplan.planner.schedules import compute_orders

_PERIODS = 4


@dataclass(frozen=True, slots=True)
class Piped:
    """seconds: from the first forward to the last backward. idle_share: of all positions' time."""

    seconds: float
    idle_share: float


def run(kind: str, positions: int, microbatches: int, stages: Sequence[Seconds], sends: Sequence[float]) -> Piped:
    """stages: of one microbatch, stage s at position s mod positions. sends[p]: seconds of a message from position p to
    the next one or back.

    Interleaving goes by groups of `positions` microbatches; what an incomplete last group lacks is counted as busy time
    saved.
    """
    times = tuple((stage.forward, stage.backward_input, stage.backward_weight) for stage in stages)
    whole = _whole_groups(microbatches, positions, len(stages))
    seconds = _seconds(kind, positions, whole, times, tuple(sends))
    if whole > microbatches:
        slowest = max(sum(sum(times[s]) for s in range(p, len(times), positions)) for p in range(positions))
        seconds -= (whole - microbatches) * slowest
    busy = microbatches * sum(map(sum, times))
    return Piped(seconds, max(0.0, 1 - busy / (positions * seconds)) if seconds > 0 else 0.0)


def held_nbytes(kind: str, positions: int, microbatches: int, nbytes: Sequence[float]) -> list[float]:
    """The most that every position holds at once. nbytes: kept per stage and microbatch."""
    few = _few(positions, _whole_groups(microbatches, positions, len(nbytes)))
    return [
        _peak(order, nbytes) if kind != "gpipe" else microbatches * nbytes[position]
        for position, order in enumerate(_orders(kind, positions, few, len(nbytes) // positions))
    ]


def _whole_groups(microbatches: int, positions: int, stages: int) -> int:
    """Microbatches up to the end of the last group where stages are interleaved."""
    return microbatches if stages == positions else -(-microbatches // positions) * positions


def _peak(order: Sequence[Instruction], nbytes: Sequence[float]) -> float:
    split = any(instruction.op is Op.BACKWARD_WEIGHT for instruction in order)
    last = Op.BACKWARD_WEIGHT if split else Op.BACKWARD
    held = most = 0.0
    for instruction in order:
        if instruction.op is Op.FORWARD:
            held += nbytes[instruction.stage]
            most = max(most, held)
        elif instruction.op is last:
            held -= nbytes[instruction.stage]
    return most


def _few(positions: int, microbatches: int) -> int:
    """As many microbatches as show everything that more of them do."""
    if microbatches <= (_PERIODS + 1) * positions:
        return microbatches
    return _PERIODS * positions + microbatches % positions


@lru_cache(maxsize=256)
def _orders(kind: str, positions: int, microbatches: int, chunks: int) -> list[tuple[Instruction, ...]]:
    return compute_orders(kind, positions, microbatches, chunks)


@lru_cache(maxsize=4096)
def _seconds(
    kind: str,
    positions: int,
    microbatches: int,
    times: tuple[tuple[float, float, float], ...],
    sends: tuple[float, ...],
) -> float:
    if positions == 1:
        return microbatches * sum(map(sum, times))
    few = _few(positions, microbatches)
    seconds = _recur(kind, positions, few, times, sends)
    if few == microbatches:
        return seconds
    before = _recur(kind, positions, few - positions, times, sends)
    return seconds + (microbatches - few) / positions * (seconds - before)


def _recur(
    kind: str,
    positions: int,
    microbatches: int,
    times: tuple[tuple[float, float, float], ...],
    sends: tuple[float, ...],
) -> float:
    count = len(times)
    orders = _orders(kind, positions, microbatches, count // positions)
    # When the activation (towards the stage) and the gradient (from the next stage) of a microbatch are there.
    ready: list[list[float | None]] = [[None] * microbatches for _ in range(count)]
    ready[0] = [0.0] * microbatches
    back: list[list[float | None]] = [[None] * microbatches for _ in range(count)]
    cursors = [0] * positions
    clocks = [0.0] * positions
    active = list(range(positions))
    while active:
        moved = False
        for position in active:
            order, at, clock = orders[position], cursors[position], clocks[position]
            while at < len(order):
                instruction = order[at]
                stage, microbatch, op = instruction.stage, instruction.microbatch, instruction.op
                forward, by_input, by_weight = times[stage]
                if op is Op.FORWARD:
                    start = ready[stage][microbatch]
                    if start is None:
                        break
                    clock = max(clock, start) + forward
                    if stage + 1 < count:
                        ready[stage + 1][microbatch] = clock + sends[position]
                    else:
                        back[stage][microbatch] = clock
                elif op is Op.BACKWARD_WEIGHT:
                    clock += by_weight
                else:
                    start = back[stage][microbatch]
                    if start is None:
                        break
                    clock = max(clock, start) + by_input + (by_weight if op is Op.BACKWARD else 0.0)
                    if stage:
                        back[stage - 1][microbatch] = clock + sends[(position - 1) % positions]
                at += 1
            moved |= at > cursors[position]
            cursors[position], clocks[position] = at, clock
        active = [p for p in active if cursors[p] < len(orders[p])]
        assert moved or not active, f"{kind} with {positions} positions and {microbatches} microbatches is stuck"
    return max(clocks)
