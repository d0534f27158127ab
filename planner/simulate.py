"""Event simulation of an instruction list: step time, spans, bubble, memory over time.

The semantics are those of `planner.instructions`. A receive and a send take no time of their own. A message travels
once both are posted; between two positions one message is on the link at a time in each direction, in the order in
which they became ready, and the next may follow while its latency passes. Compute goes on meanwhile; on CPU ranks,
where the thread that moves a message shares the core, it is slower by `Message.sending` and `receiving`. A forward or
backward starts when its position is free and its messages have arrived.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shardplan.errors import Deadlock
from shardplan.planner.deadlock import check, grid
from shardplan.planner.instructions import Instruction, Op, Schedule
from shardplan.planner.timeline import Counter, Event, Timeline, Track

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shardplan.planner.plan import StageLink

__all__ = ["Message", "Reductions", "Simulation", "Span", "StageTimes", "Transfer", "check", "messages_of", "simulate"]


Reductions = tuple[tuple[float, float], ...]
"""(share of the last backward after which the gradients are final, seconds of their sum over ranks) per bucket, in the
order in which they are summed."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """What a stage's instructions cost.

    forward_seconds, backward_seconds: per microbatch. weight_seconds: the part of the backward that a separate
        ``BACKWARD_WEIGHT`` takes (``BACKWARD_INPUT`` takes the rest).
    reduce_seconds, optimizer_seconds: once a step. reductions: sums that go on during the last backward, one after
        another; ``REDUCE_GRADS`` waits for the last of them and takes reduce_seconds after that. reducing: share of its
        speed that the backward loses while one of them goes on.
    activation_nbytes: kept from a microbatch's forward to the end of its backward; fixed_nbytes: all the time.
    """

    forward_seconds: float
    backward_seconds: float = 0.0
    weight_seconds: float = 0.0
    reduce_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    activation_nbytes: int = 0
    fixed_nbytes: int = 0
    reductions: Reductions = ()
    reducing: float = 0.0

    def __post_init__(self) -> None:
        if min(self.forward_seconds, self.backward_seconds, self.reduce_seconds, self.optimizer_seconds) < 0:
            raise ValueError(f"negative seconds in {self}")
        if not 0 <= self.weight_seconds <= self.backward_seconds:
            raise ValueError(f"weight_seconds must be a part of backward_seconds in {self}")
        if not 0 <= self.reducing <= 1:
            raise ValueError(f"reducing must be a share in {self}")

    def summed(self, start: float, end: float) -> tuple[float, float]:
        """When the backward that makes the gradients final and the last of the reductions are done, given the span of
        that backward by itself."""
        now, done, free = start, 0.0, start  # `done` seconds of the backward are behind it; a sum goes on until `free`
        for share, seconds in (*self.reductions, (1.0, 0.0)):
            left = max(share * (end - start) - done, 0.0)
            done += left
            slow = min(left, max(free - now, 0.0) * (1.0 - self.reducing))
            now = (
                (max(free, now) if slow < left else now + (slow / (1.0 - self.reducing) if slow else 0.0)) + left - slow
            )
            if seconds:
                free = max(free, now) + seconds
        return now, free

    def seconds(self, op: Op) -> float:
        """Duration of an instruction of that kind (0 for messages)."""
        match op:
            case Op.FORWARD:
                return self.forward_seconds
            case Op.BACKWARD:
                return self.backward_seconds
            case Op.BACKWARD_INPUT:
                return self.backward_seconds - self.weight_seconds
            case Op.BACKWARD_WEIGHT:
                return self.weight_seconds
            case Op.REDUCE_GRADS:
                return self.reduce_seconds
            case Op.OPTIMIZER_STEP:
                return self.optimizer_seconds
        return 0.0


class Message(NamedTuple):
    """What a message between two stages costs.

    seconds: until it has arrived; latency: the part of them in which the link can already carry the next one. sending,
    receiving: share of its speed that compute loses meanwhile at either end.
    """

    seconds: float
    latency: float = 0.0
    sending: float = 0.0
    receiving: float = 0.0


_NOTHING = Message(0.0)


def messages_of(links: Iterable[StageLink]) -> dict[tuple[int, int], Message]:
    """(sending stage, receiving stage) -> its message, activations and gradients."""
    found: dict[tuple[int, int], Message] = {}
    for link in links:
        shares = link.sending, link.receiving
        found[link.source, link.target] = Message(link.seconds, min(link.latency_seconds, link.seconds), *shares)
        found[link.target, link.source] = Message(
            link.grad_seconds, min(link.latency_seconds, link.grad_seconds), *shares
        )
    return found


class Span(NamedTuple):
    """One compute instruction at its position."""

    instruction: Instruction
    start_seconds: float
    end_seconds: float


class Transfer(NamedTuple):
    """One message on its way. activation: else a gradient."""

    source: int
    target: int
    microbatch: int
    activation: bool
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """Result of `simulate`.

    spans: per position, in order. busy_seconds: per position, seconds spent in spans. peak_microbatches and
    peak_nbytes: per stage. memory: per stage, (seconds, bytes from then on).
    """

    step_seconds: float
    spans: tuple[tuple[Span, ...], ...]
    transfers: tuple[Transfer, ...]
    busy_seconds: tuple[float, ...]
    peak_microbatches: dict[int, int]
    peak_nbytes: dict[int, int]
    memory: dict[int, tuple[tuple[float, int], ...]]

    @property
    def bubble_share(self) -> float:
        """Share of all positions' time in which they compute nothing."""
        whole = self.step_seconds * len(self.spans)
        return 1.0 - sum(self.busy_seconds) / whole if whole > 0 else 0.0

    def timeline(self, name: str = "predicted") -> Timeline:
        """Tracks of all positions, then one per link direction that carried something."""
        tracks = []
        for position, spans in enumerate(self.spans):
            stages = sorted({span.instruction.stage for span in spans})
            counters = tuple(Counter("bytes", at, n) for s in stages for at, n in self.memory[s]) if stages else ()
            label = f"stage {', '.join(map(str, stages))}" if stages else f"position {position}"
            tracks.append(Track(label, tuple(_event(span) for span in spans), counters))
        links: dict[tuple[int, int], list[Event]] = defaultdict(list)
        for t in self.transfers:
            what = "activation" if t.activation else "gradient"
            event = Event(f"{what} {t.microbatch}", "transfer", t.start_seconds, t.end_seconds)
            links[t.source, t.target].append(event)
        tracks += (Track(f"link {a}>{b}", tuple(events)) for (a, b), events in sorted(links.items()))
        return Timeline(name, tuple(tracks))


_FINAL = (Op.BACKWARD, Op.BACKWARD_WEIGHT)
_CATEGORIES = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward",
    Op.BACKWARD_WEIGHT: "weight",
    Op.REDUCE_GRADS: "reduce",
    Op.OPTIMIZER_STEP: "optimizer",
}


def _event(span: Span) -> Event:
    return Event(str(span.instruction), _CATEGORIES[span.instruction.op], span.start_seconds, span.end_seconds)


class _Core:
    """The compute of one position, and what its messages take of it.

    ended: when it last computed; since: from when on without a pause. slowed: (start, end, share of speed lost) of
    messages whose effect has not been counted yet.
    """

    __slots__ = ("ended", "since", "slowed")

    def __init__(self) -> None:
        self.ended = self.since = 0.0
        self.slowed: list[tuple[float, float, float]] = []

    def run(self, now: float, seconds: float) -> tuple[float, float]:
        """Start and end of `seconds` of compute that can begin `now`. Messages that became known only after the compute
        that they slowed are counted here; a pause before `now` absorbs them."""
        if not self.slowed:
            start, end = now, now + seconds
        else:
            late = sum(s * max(min(e, self.ended) - max(b, self.since), 0.0) for b, e, s in self.slowed)
            start = max(self.ended + late, now)
            stop = start + seconds
            end = stop + sum(s * max(min(e, stop) - max(b, start), 0.0) for b, e, s in self.slowed)
            self.slowed = [(max(b, stop), e, s) for b, e, s in self.slowed if e > stop]
        if start > self.ended:
            self.since = start
        self.ended = end
        return start, end


def simulate(
    schedule: Schedule, times: Sequence[StageTimes], links: Mapping[tuple[int, int], Message] | None = None
) -> Simulation:
    """Runs the schedule in virtual time.

    times: one per stage. links: (sending stage, receiving stage) -> one message; activations and gradients are two
    entries, (s, t) and (t, s); a pair not named takes no time, nor does one of the same position.

    Raises Deadlock where the list cannot finish. Takes about a second for 16 stages x 1,024 microbatches.
    """
    links = links or {}
    home = {instruction.stage: p for p, line in enumerate(schedule) for instruction in line}
    durations = [{op: stage.seconds(op) for op in Op} for stage in times]
    cursors = [0] * len(schedule)
    clocks = [0.0] * len(schedule)
    spans: list[list[Span]] = [[] for _ in schedule]
    transfers: list[Transfer] = []
    # Messages of an ordered pair of stages match by order: the n-th sent is the n-th received.
    sends: dict[tuple[int, int], list[tuple[float, Instruction]]] = defaultdict(list)
    recvs: dict[tuple[int, int], list[tuple[float, Instruction]]] = defaultdict(list)
    matched: dict[tuple[int, int], int] = defaultdict(int)
    free: dict[tuple[int, int], float] = defaultdict(float)
    cores = [_Core() for _ in schedule]
    arrivals: dict[tuple[int, bool, int], float] = {}
    expected: dict[tuple[int, bool, int], int] = defaultdict(int)
    parked: dict[tuple[int, bool, int], int] = {}
    last = {(p, i.stage): n for p, line in enumerate(schedule) for n, i in enumerate(line) if i.op in _FINAL}
    summed: dict[int, float] = {}  # when a stage's reductions are done
    # Positions advance in the order of their clocks, so that messages become ready in order of time and a link that
    # several pairs of stages share serves them first come, first served.
    heap = [(0.0, position) for position in range(len(schedule))]

    def post(pair: tuple[int, int], now: float) -> None:
        n = matched[pair]
        if n >= len(sends[pair]) or n >= len(recvs[pair]):
            return
        matched[pair] = n + 1
        receive = recvs[pair][n][1]
        here, there = home[pair[0]], home[pair[1]]
        message = _NOTHING if here == there else links.get(pair, _NOTHING)
        start = max(now, free[here, there])
        end = start + message.seconds
        free[here, there] = end - message.latency
        for position, share in ((here, message.sending), (there, message.receiving)):
            if share and message.seconds:
                cores[position].slowed.append((start, end, share))
        activation = receive.op is Op.RECV_ACT
        transfers.append(Transfer(*pair, receive.microbatch, activation, start, end))
        key = (receive.stage, activation, receive.microbatch)
        expected[key] -= 1
        arrivals[key] = max(arrivals.get(key, 0.0), end)
        if not expected[key] and key in parked:
            position = parked.pop(key)
            heapq.heappush(heap, (max(clocks[position], arrivals[key]), position))

    while heap:
        now, position = heapq.heappop(heap)
        line = schedule[position]
        while cursors[position] < len(line):
            instruction = line[cursors[position]]
            op, stage = instruction.op, instruction.stage
            if instruction.peer >= 0:
                if instruction.is_send:
                    pair = (stage, instruction.peer)
                    sends[pair].append((now, instruction))
                else:
                    pair = (instruction.peer, stage)
                    recvs[pair].append((now, instruction))
                    expected[stage, op is Op.RECV_ACT, instruction.microbatch] += 1
                cursors[position] += 1
                post(pair, now)
                continue
            if op in (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT):
                key = (stage, op is Op.FORWARD, instruction.microbatch)
                if expected.get(key):
                    clocks[position] = now
                    parked[key] = position
                    break
                arrived = arrivals.get(key, 0.0)
                if arrived > now:
                    heapq.heappush(heap, (arrived, position))
                    break
            seconds = durations[stage][op]
            if op in _FINAL and times[stage].reductions and last[position, stage] == cursors[position]:
                alone, done = times[stage].summed(0.0, seconds)
                start, end = cores[position].run(now, alone)
                summed[stage] = start + done + (end - start - alone)
            else:
                if op is Op.REDUCE_GRADS:
                    now = max(now, summed.get(stage, now))
                start, end = cores[position].run(now, seconds)
            spans[position].append(Span(instruction, start, end))
            cursors[position] += 1
            if end > now:
                clocks[position] = end
                heapq.heappush(heap, (end, position))
                break
    stuck = {p: at for p, at in enumerate(cursors) if at < len(schedule[p])}
    if stuck:
        raise Deadlock("the instruction list cannot finish", grid(schedule, stuck))
    return _result(times, spans, transfers)


def _result(times: Sequence[StageTimes], spans: list[list[Span]], transfers: list[Transfer]) -> Simulation:
    held = {stage: 0 for stage in range(len(times))}
    most = dict(held)
    memory = {stage: [(0.0, times[stage].fixed_nbytes)] for stage in held}
    for line in spans:
        separate = {s.instruction.stage for s in line if s.instruction.op is Op.BACKWARD_WEIGHT}
        training = {s.instruction.stage for s in line if s.instruction.op in (Op.BACKWARD, Op.BACKWARD_INPUT)}
        for instruction, start, end in line:
            stage, op = instruction.stage, instruction.op
            if op is Op.FORWARD:
                held[stage] += 1
                most[stage] = max(most[stage], held[stage])
                _note(memory[stage], start, times[stage], held[stage])
                # Without a backward nothing outlives its forward.
                if stage not in training:
                    held[stage] -= 1
                    _note(memory[stage], end, times[stage], held[stage])
            elif op is Op.BACKWARD_WEIGHT or (op in (Op.BACKWARD, Op.BACKWARD_INPUT) and stage not in separate):
                held[stage] -= 1
                _note(memory[stage], end, times[stage], held[stage])
    return Simulation(
        step_seconds=max((line[-1].end_seconds for line in spans if line), default=0.0),
        spans=tuple(tuple(line) for line in spans),
        transfers=tuple(transfers),
        busy_seconds=tuple(sum(span.end_seconds - span.start_seconds for span in line) for line in spans),
        peak_microbatches=most,
        peak_nbytes={s: times[s].fixed_nbytes + most[s] * times[s].activation_nbytes for s in most},
        memory={stage: tuple(curve) for stage, curve in memory.items()},
    )


def _note(curve: list[tuple[float, int]], seconds: float, times: StageTimes, held: int) -> None:
    nbytes = times.fixed_nbytes + held * times.activation_nbytes
    if curve[-1][0] == seconds:
        curve[-1] = (seconds, nbytes)
    else:
        curve.append((seconds, nbytes))
