"""Proves that an instruction list finishes and does each piece of work once; `planner.simulate` re-exports `check`.

Each position is a sequential process that blocks only on conditions which, once true, stay true (a message was sent, a
receive was posted). Such a system is confluent: whether it finishes does not depend on the order in which positions
advance, so one greedy run decides it.

A position may be many ranks, all with the same list, and a message between stages is then several between their ranks
(`planner.transfers`), or none for some. Each rank waits for less than its position does: where the positions finish in
some order, the ranks finish in the same one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

from shardplan.errors import Deadlock
from shardplan.planner.instructions import Instruction, Op, Schedule

_ACTS = (Op.SEND_ACT, Op.RECV_ACT)
_BACKWARDS = (Op.BACKWARD, Op.BACKWARD_INPUT)
_COMPUTES = (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)

Message = tuple[int, int, bool, int]
"""(source stage, target stage, activation, microbatch)."""


def check(
    schedule: Schedule, edges: Collection[tuple[int, int]], grad_edges: Collection[tuple[int, int]] | None = None
) -> None:
    """Raises Deadlock, with the grid and the place marked, unless the schedule is sound:

    * every stage stands at one position, runs every microbatch once forward and (if any stage has a backward) once
      backward, later; ``REDUCE_GRADS`` follows all backwards of its stage and ``OPTIMIZER_STEP`` follows that;
    * along each of `edges` (source, target stage) every microbatch's activation is sent after the forward that makes it
      and received before the one that needs it; in training its gradient goes back along `grad_edges` (default: the
      same edges); there are no other messages;
    * an ordered pair of stages lists its messages in the same order on both sides;
    * the list finishes, even where a send completes only once its receive is posted (between stages of one position a
      tensor is handed over, which waits for nothing).
    """
    _check_work(schedule)
    training = any(i.op is not Op.FORWARD and i.op in _COMPUTES for line in schedule for i in line)
    back = (edges if grad_edges is None else grad_edges) if training else ()
    _check_messages(schedule, set(edges), set(back))
    for rendezvous in (False, True):
        _run(schedule, rendezvous)


def _check_work(schedule: Schedule) -> None:
    homes: dict[int, int] = {}
    done: dict[tuple[int, int], list[Op]] = defaultdict(list)
    once: dict[int, list[Op]] = defaultdict(list)
    microbatches: dict[int, int] = defaultdict(int)
    training = any(i.op in _BACKWARDS for line in schedule for i in line)
    for position, line in enumerate(schedule):
        for at, instruction in enumerate(line):
            stage, op = instruction.stage, instruction.op
            place = {position: at}
            if homes.setdefault(stage, position) != position:
                raise _fault(schedule, f"stage {stage} stands at positions {homes[stage]} and {position}", place)
            if op in _COMPUTES:
                before = done[stage, instruction.microbatch]
                if op not in _next_ops(before, training):
                    ran = ", ".join(before) or "nothing"
                    raise _fault(schedule, f"{instruction} follows {ran} of that microbatch", place)
                if once[stage]:
                    raise _fault(schedule, f"{instruction} after {once[stage][-1]} of its stage", place)
                before.append(op)
                microbatches[stage] = max(microbatches[stage], instruction.microbatch + 1)
            elif op in (Op.REDUCE_GRADS, Op.OPTIMIZER_STEP):
                wanted = [] if op is Op.REDUCE_GRADS else [Op.REDUCE_GRADS]
                if once[stage] != wanted:
                    raise _fault(schedule, f"{instruction} out of order or twice", place)
                once[stage].append(op)
    count = max(microbatches.values(), default=0)
    for stage, position in sorted(homes.items()):
        for microbatch in range(count):
            if left := _next_ops(done[stage, microbatch], training):
                missing = Instruction(left[0], stage, microbatch)
                raise _fault(schedule, f"{missing} is missing", {position: len(schedule[position])})


def _next_ops(before: list[Op], training: bool) -> tuple[Op, ...]:
    """What may follow on one microbatch of a stage; empty when it is complete."""
    if not before:
        return (Op.FORWARD,)
    if before[-1] is Op.FORWARD and training:
        return _BACKWARDS
    return (Op.BACKWARD_WEIGHT,) if before[-1] is Op.BACKWARD_INPUT else ()


def _check_messages(schedule: Schedule, edges: set[tuple[int, int]], grad_edges: set[tuple[int, int]]) -> None:
    microbatches = 1 + max((i.microbatch for line in schedule for i in line), default=-1)
    sides: tuple[dict[tuple[int, int], list[tuple[bool, int]]], ...] = (defaultdict(list), defaultdict(list))
    for position, line in enumerate(schedule):
        computed: set[tuple[int, bool, int]] = set()
        seen: set[Instruction] = set()
        for at, instruction in enumerate(line):
            op, stage, microbatch, peer = instruction.op, instruction.stage, instruction.microbatch, instruction.peer
            if op in _COMPUTES:
                if op is not Op.BACKWARD_WEIGHT:
                    computed.add((stage, op is Op.FORWARD, microbatch))
                continue
            if peer < 0:
                continue
            activation = op in _ACTS
            pair = (stage, peer) if instruction.is_send else (peer, stage)
            edge = pair if activation else (pair[1], pair[0])
            if edge not in (edges if activation else grad_edges):
                raise _fault(schedule, f"{instruction} has no edge", {position: at})
            if instruction in seen:
                raise _fault(schedule, f"{instruction} stands twice", {position: at})
            seen.add(instruction)
            if ((stage, activation, microbatch) in computed) != instruction.is_send:
                when = "before its value is computed" if instruction.is_send else "after its value was needed"
                raise _fault(schedule, f"{instruction} stands {when}", {position: at})
            sides[instruction.is_recv][pair].append((activation, microbatch))
    for activation, wanted in ((True, edges), (False, {(target, source) for source, target in grad_edges})):
        for pair in sorted(wanted):
            for side, verb in zip(sides, ("sent", "received"), strict=True):
                found = sorted(m for kind, m in side[pair] if kind == activation)
                if found != list(range(microbatches)):
                    lost = sorted(set(range(microbatches)) - set(found))
                    what = "activations" if activation else "gradients"
                    raise _fault(schedule, f"{what} {lost[:8]} from stage {pair[0]} to {pair[1]} are never {verb}", {})
    sent, received = sides
    for pair in sorted(sent):
        for index, (left, right) in enumerate(zip(sent[pair], received[pair], strict=True)):
            if left != right:
                raise _fault(
                    schedule,
                    f"message {index} from stage {pair[0]} to {pair[1]} is {_words(left)} where it is sent and "
                    f"{_words(right)} where it is received",
                    {},
                )


def _words(message: tuple[bool, int]) -> str:
    return f"{'activation' if message[0] else 'gradient'} {message[1]}"


@dataclass
class _State:
    """Where every position stands (home: of a stage), and which messages were sent and are waited for."""

    cursors: list[int]
    home: dict[int, int]
    sent: set[Message] = field(default_factory=set)
    posted: set[Message] = field(default_factory=set)
    needs: dict[tuple[int, bool, int], list[Message]] = field(default_factory=lambda: defaultdict(list))


def _message(instruction: Instruction) -> Message:
    pair = (instruction.stage, instruction.peer) if instruction.is_send else (instruction.peer, instruction.stage)
    return (*pair, instruction.op in _ACTS, instruction.microbatch)


def _run(schedule: Schedule, rendezvous: bool) -> None:
    """Advances every position as far as it goes. Raises Deadlock if some position never ends."""
    home = {instruction.stage: position for position, line in enumerate(schedule) for instruction in line}
    state = _State([0] * len(schedule), home)
    waiting: dict[tuple[Message, bool], list[int]] = defaultdict(list)
    ready = list(range(len(schedule)))
    while ready:
        position = ready.pop()
        line = schedule[position]
        while state.cursors[position] < len(line):
            instruction = line[state.cursors[position]]
            if instruction.is_recv:
                message = _message(instruction)
                state.posted.add(message)
                state.needs[instruction.stage, message[2], instruction.microbatch].append(message)
                ready += waiting.pop((message, True), ())
            elif instruction.is_send:
                message = _message(instruction)
                state.sent.add(message)
                ready += waiting.pop((message, False), ())
            if lacking := _blocked_on(state, instruction, rendezvous):
                waiting[lacking].append(position)
                break
            state.cursors[position] += 1
    stuck = {p: at for p, at in enumerate(state.cursors) if at < len(schedule[p])}
    if stuck:
        raise _deadlock(schedule, state, stuck, rendezvous)


def _blocked_on(state: _State, instruction: Instruction, rendezvous: bool) -> tuple[Message, bool] | None:
    """(message, True): waits for its receive to be posted; (message, False): waits for it to be sent."""
    if instruction.is_send:
        message = _message(instruction)
        local = state.home[instruction.stage] == state.home[instruction.peer]
        return (message, True) if rendezvous and not local and message not in state.posted else None
    if instruction.op is Op.FORWARD or instruction.op in _BACKWARDS:
        key = (instruction.stage, instruction.op is Op.FORWARD, instruction.microbatch)
        return next(((m, False) for m in state.needs.get(key, ()) if m not in state.sent), None)
    return None


def _deadlock(schedule: Schedule, state: _State, stuck: dict[int, int], rendezvous: bool) -> Deadlock:
    details = []
    for position, at in stuck.items():
        instruction = schedule[position][at]
        lacking = _blocked_on(state, instruction, rendezvous)
        assert lacking is not None
        (source, target, activation, microbatch), receive = lacking
        owner = target if receive else source
        what = f"{'activation' if activation else 'gradient'} {microbatch} of stage {source} for stage {target}"
        where = _locate(schedule, owner, lacking)
        details.append(f"position {position} at {instruction} waits until {what} is {where}")
    meaning = "a send completes once its receive is posted" if rendezvous else "sends return at once"
    return Deadlock(f"the instruction list cannot finish ({meaning})", [*details, *grid(schedule, stuck)])


def _locate(schedule: Schedule, stage: int, lacking: tuple[Message, bool]) -> str:
    message, receive = lacking
    for position, line in enumerate(schedule):
        for at, instruction in enumerate(line):
            if instruction.peer < 0 or instruction.stage != stage or instruction.is_recv != receive:
                continue
            if _message(instruction) == message:
                return f"{'received' if receive else 'sent'}, at instruction {at} of position {position}"
    return "received, but nothing does" if receive else "sent, but nothing does"


def _fault(schedule: Schedule, title: str, place: dict[int, int]) -> Deadlock:
    return Deadlock(f"the instruction list is not sound: {title}", grid(schedule, place))


def grid(schedule: Schedule, places: dict[int, int], around: int = 6) -> list[str]:
    """One line per position with ``>>`` before the instruction at ``places[position]``; long lists are cut around it
    (positions without a place: to their beginning)."""
    lines = []
    for position, line in enumerate(schedule):
        at = places.get(position)
        first = max((at or 0) - around, 0)
        last = (at or 0) + around + 1
        words = [f">>{word}" if first + i == at else str(word) for i, word in enumerate(line[first:last])]
        if at is not None and at >= len(line):
            words.append(">>end")
        left = f"... ({first}) " if first else ""
        right = f" ... ({len(line) - last})" if last < len(line) else ""
        lines.append(f"[{position}] {left}{' '.join(words)}{right}")
    return lines
