"""When a message is known to have arrived: from the instruction lists alone, without asking the network.

A sent tensor has to live until its receiver has it, and gloo can only say so by waiting. But a message that the peer
sent after it consumed ours proves that ours arrived; having received the one, waiting for the other takes no time.
Where the peer is several ranks and another of them sent the proof, waiting may take a little; it cannot be in vain,
because a list is sound only if it finishes even where every send waits at once (`planner.deadlock`).
"""

from __future__ import annotations

from collections.abc import Callable

from shardplan.planner.instructions import Instruction, Op, Schedule

_CONSUMERS = {Op.SEND_ACT: (Op.FORWARD,), Op.SEND_GRAD: (Op.BACKWARD, Op.BACKWARD_INPUT)}


def receipts(schedule: Schedule, position: int, carries: Callable[[Instruction], bool]) -> dict[int, tuple[int, ...]]:
    """Index of a computing instruction of `position` -> indices of its earlier sends that have arrived by then.

    carries: whether a send carries any tensor at all (an empty one proves nothing). Sends without proof before the end
    of the list are left out.
    """
    mine = schedule[position]
    here = {i.stage for i in mine}
    home = {i.stage: p for p, line in enumerate(schedule) for i in line}
    waited = _places(mine)
    found: dict[int, list[int]] = {}
    for peer in sorted({home[i.peer] for i in mine if i.is_send} - {position}):
        theirs = schedule[peer]
        consumed = _places(theirs)
        # proof[j]: where this position first waits for something that the peer sends at its index j or later.
        proof = [len(mine)] * (len(theirs) + 1)
        for index in reversed(range(len(theirs))):
            proof[index] = proof[index + 1]
            sent = theirs[index]
            if sent.is_send and sent.peer in here and carries(sent):
                proof[index] = min(proof[index], _consumer(sent, waited))
        for index, sent in enumerate(mine):
            if sent.is_send and home[sent.peer] == peer:
                arrived = proof[_consumer(sent, consumed)]
                if index < arrived < len(mine):
                    found.setdefault(arrived, []).append(index)
    return {index: tuple(sends) for index, sends in found.items()}


def _places(instructions: tuple[Instruction, ...]) -> dict[tuple[Op, int, int], int]:
    return {(i.op, i.stage, i.microbatch): index for index, i in enumerate(instructions)}


def _consumer(sent: Instruction, places: dict[tuple[Op, int, int], int]) -> int:
    """Where the receiver waits for a message."""
    keys = [(op, sent.peer, sent.microbatch) for op in _CONSUMERS[sent.op]]
    return next(places[key] for key in keys if key in places)
