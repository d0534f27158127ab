"""Pipeline schedules as instruction lists.

A schedule is made in two steps. `compute_order` says in which order a stage runs its forwards and backwards; `weave`
puts the messages in: sends right after the compute that makes the value, receives posted one compute ahead of the one
that needs them, so that

* between an ordered pair of stages both sides list the same messages in the same order;
* a receive is posted before its position can block on anything of that time, so that the list finishes even where a
  send completes only once its receive is posted (`planner.simulate.check` proves it for every list).

Over a skip edge the far stage runs ahead, and could wait in sending a gradient for a stage that itself waits to send it
an activation; receives are posted earlier there (`post_earlier`).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

from shardplan.errors import Deadlock, UsageError
from shardplan.planner.instructions import Instruction, Op, Schedule, schedule_text
from shardplan.planner.v_schedule import v_orders, v_position

KINDS = ("gpipe", "1f1b", "interleaved", "zb", "zbv")
"""What can be built, simulated and run."""
CHUNKED = ("interleaved", "zbv")
"""Those of several stages a position."""
_BACKWARDS = (Op.BACKWARD, Op.BACKWARD_INPUT)

Edge = tuple[int, int]
"""(source stage, target stage) of an activation; source < target."""


def build(
    kind: str,
    stages: int,
    microbatches: int,
    edges: Collection[Edge],
    training: bool = True,
    grad_edges: Collection[Edge] | None = None,
    chunks: int = 1,
) -> Schedule:
    """The instruction list of a step, one line per position; where a stage stands says `position_of`.

    kind: one of `KINDS`; without training all are the same list of forwards, "interleaved" excepted. edges: which
    stages send activations to which, skip edges included; a message carries every tensor of one microbatch between two
    stages. grad_edges: those whose gradients go back (target to source), default all. chunks: stages of a position,
    any number under "interleaved", two under "zbv", else one. In training every stage ends with ``REDUCE_GRADS`` and
    ``OPTIMIZER_STEP``.

    Raises UsageError on a kind, count or edge that makes no sense.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown schedule {kind!r}", hints=[f"use one of {', '.join(KINDS)}"])
    if stages < 1 or microbatches < 1:
        raise UsageError(f"a schedule needs a stage and a microbatch, not {stages} and {microbatches}")
    wrong = sorted(edge for edge in edges if not 0 <= edge[0] < edge[1] < stages)
    if wrong:
        raise UsageError(f"activations go to later stages of {stages}, not along {wrong}")
    if grad_edges is not None and not set(grad_edges) <= set(edges):
        raise UsageError(f"gradients without activations: {sorted(set(grad_edges) - set(edges))}")
    back = frozenset(edges if grad_edges is None else grad_edges) if training else frozenset[Edge]()
    _check_chunks(kind, stages, chunks)
    return _build(kind, stages, microbatches, frozenset(edges), training, back, chunks)


def _check_chunks(kind: str, stages: int, chunks: int) -> None:
    if kind == "zbv":
        if chunks != 2 or stages % 2:
            raise UsageError(f"schedule 'zbv' has two stages a position, not {stages} stages in {chunks} chunks")
        return
    if chunks == 1:
        return
    if kind != "interleaved":
        raise UsageError(f"schedule {kind!r} has one stage a position, not {chunks}")
    if chunks < 1 or stages % chunks or stages == chunks:
        raise UsageError(f"{stages} stages do not make {chunks} chunks of at least two positions")


@lru_cache(maxsize=32)
def _build(
    kind: str,
    stages: int,
    microbatches: int,
    edges: frozenset[Edge],
    training: bool,
    grad_edges: frozenset[Edge],
    chunks: int,
) -> Schedule:
    positions = stages // chunks
    orders = compute_orders(kind, positions, microbatches, chunks, training)
    lines = weave(orders, edges, grad_edges)
    if chunks > 1:
        lines = post_earlier(lines)
    if not training:
        return lines
    once = (Op.REDUCE_GRADS, Op.OPTIMIZER_STEP)
    return tuple(
        (
            *line,
            *(Instruction(op, s) for op in once for s in range(stages) if position_of(kind, s, positions) == position),
        )
        for position, line in enumerate(lines)
    )


def position_of(kind: str, stage: int, positions: int) -> int:
    """Where a stage stands: in turn, or down and back up."""
    return v_position(stage, positions) if kind == "zbv" else stage % positions


def in_flight(kind: str, stage: int, stages: int, microbatches: int) -> int:
    """Most microbatches whose activations a stage of its own position holds at once in training."""
    if kind == "gpipe":
        return microbatches
    return min(microbatches, stages if kind == "zb" else stages - stage)


def compute_orders(
    kind: str, positions: int, microbatches: int, chunks: int = 1, training: bool = True
) -> list[tuple[Instruction, ...]]:
    """The compute order of every position."""
    if kind == "zbv":
        return v_orders(positions, microbatches, training)
    if chunks > 1 and training and microbatches % positions:
        return _uneven_interleaved(positions, chunks, microbatches)
    if chunks > 1:
        return [interleaved_order(p, positions, chunks, microbatches, training) for p in range(positions)]
    return [compute_order(kind, stage, positions, microbatches, training) for stage in range(positions)]


def compute_order(kind: str, stage: int, stages: int, microbatches: int, training: bool) -> tuple[Instruction, ...]:
    """Forwards and backwards of one stage, without messages.

    "1f1b" (Narayanan et al. 2019, PipeDream-flush): ``stages - 1 - stage`` forwards ahead, then one forward and one
    backward in turn, then the backwards that are left. "gpipe" (Huang et al. 2019): all forwards, all backwards.
    "interleaved" with a single chunk is "1f1b". "zb" (Qi et al. 2023, ZB-H1): 1F1B with backwards in two parts; stage s
    puts off the weights' part by s microbatches, so that every stage holds as many as the first, and the gaps of the
    last backwards are filled with it.
    """
    forwards = [Instruction(Op.FORWARD, stage, microbatch) for microbatch in range(microbatches)]
    if not training:
        return tuple(forwards)
    if kind == "zb":
        return _zero_bubble_order(stage, stages, forwards)
    backwards = [Instruction(Op.BACKWARD, stage, microbatch) for microbatch in range(microbatches)]
    ahead = microbatches if kind == "gpipe" else min(microbatches, stages - 1 - stage)
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards):
        order += (forward, backward)
    return (*order, *backwards[microbatches - ahead :])


def _zero_bubble_order(stage: int, stages: int, forwards: list[Instruction]) -> tuple[Instruction, ...]:
    microbatches = len(forwards)
    ahead = min(microbatches, stages - 1 - stage)
    order = forwards[:ahead]
    done = 0  # weights' parts
    for microbatch in range(microbatches):
        order += forwards[microbatch + ahead : microbatch + ahead + 1]
        order.append(Instruction(Op.BACKWARD_INPUT, stage, microbatch))
        if microbatch - done >= stage or microbatch + ahead >= microbatches:
            order.append(Instruction(Op.BACKWARD_WEIGHT, stage, done))
            done += 1
    order += (Instruction(Op.BACKWARD_WEIGHT, stage, microbatch) for microbatch in range(done, microbatches))
    return tuple(order)


def interleaved_order(
    position: int, positions: int, chunks: int, microbatches: int, training: bool
) -> tuple[Instruction, ...]:
    """Interleaved 1F1B (Narayanan et al. 2021, section 2.2): chunk c of a position is stage c x positions + position;
    microbatches go through a chunk in groups of `positions`, first chunk first, in backward last chunk first. In
    training a multiple of positions."""
    forwards, backwards = _interleaved_work(position, positions, chunks, microbatches)
    if not training:
        return tuple(forwards)
    ahead = min(len(forwards), 2 * (positions - 1 - position) + (chunks - 1) * positions)
    if microbatches == positions:
        ahead = len(forwards)
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards):
        order += (forward, backward)
    return (*order, *backwards[len(forwards) - ahead :])


def _interleaved_work(
    position: int, positions: int, chunks: int, microbatches: int
) -> tuple[list[Instruction], list[Instruction]]:
    """Forwards and backwards of a position, each in order; the last group of microbatches may be smaller."""
    work = [
        (chunk, i)
        for group in range(0, microbatches, positions)
        for chunk in range(chunks)
        for i in range(group, min(group + positions, microbatches))
    ]
    forwards = [Instruction(Op.FORWARD, chunk * positions + position, i) for chunk, i in work]
    return forwards, [Instruction(Op.BACKWARD, (chunks - 1 - chunk) * positions + position, i) for chunk, i in work]


def _uneven_interleaved(positions: int, chunks: int, microbatches: int) -> list[tuple[Instruction, ...]]:
    """As `interleaved_order` for any number of microbatches: every position runs the next of its backwards where it can
    begin, else the next of its forwards, else waits. It holds no more microbatches than with whole groups, unless
    nothing else can go on."""
    stages = positions * chunks
    work = [_interleaved_work(p, positions, chunks, microbatches) for p in range(positions)]
    limits = [2 * (positions - 1 - p) + (chunks - 1) * positions + 1 for p in range(positions)]
    orders: list[list[Instruction]] = [[] for _ in range(positions)]
    nexts = [[0, 0] for _ in range(positions)]
    done: set[Instruction] = set()

    def able(instruction: Instruction) -> bool:
        op, stage, microbatch = instruction.op, instruction.stage, instruction.microbatch
        if op is Op.FORWARD:
            return stage == 0 or Instruction(op, stage - 1, microbatch) in done
        after = Instruction(op, stage + 1, microbatch) if stage + 1 < stages else None
        return Instruction(Op.FORWARD, stage, microbatch) in done and (after is None or after in done)

    def chosen(position: int, limited: bool) -> Instruction | None:
        forwards, backwards = work[position]
        forward, backward = nexts[position]
        if backward < len(backwards) and able(backwards[backward]):
            return backwards[backward]
        if forward < len(forwards) and able(forwards[forward]):
            return forwards[forward] if not limited or forward - backward < limits[position] else None
        return None

    while any(len(order) < 2 * len(forwards) for order, (forwards, _) in zip(orders, work)):
        moves = [(p, found) for p in range(positions) if (found := chosen(p, True)) is not None]
        moves = moves or [(p, found) for p in range(positions) if (found := chosen(p, False)) is not None][:1]
        for position, instruction in moves:
            orders[position].append(instruction)
            nexts[position][instruction.op is Op.BACKWARD] += 1
            done.add(instruction)
    return [tuple(order) for order in orders]


def weave(
    orders: Sequence[Sequence[Instruction]], edges: Collection[Edge], grad_edges: Collection[Edge]
) -> tuple[tuple[Instruction, ...], ...]:
    """Puts the messages into the compute order of every position. See module docstring."""
    sources, targets = _neighbours(edges)
    grad_targets, grad_sources = _neighbours(grad_edges)
    lines = []
    for order in orders:
        posts: list[list[Instruction]] = [[] for _ in order]
        for at, compute in enumerate(order):
            stage, microbatch = compute.stage, compute.microbatch
            if compute.op is Op.FORWARD:
                op, peers = Op.RECV_ACT, sources.get(stage, ())
            elif compute.op in _BACKWARDS:
                op, peers = Op.RECV_GRAD, grad_sources.get(stage, ())
            else:
                continue
            posts[max(at - 1, 0)] += (Instruction(op, stage, microbatch, peer) for peer in peers)
        lines.append(_line(order, posts, targets, grad_targets))
    if all(target == source + 1 for source, target in edges):
        return tuple(lines)
    return post_earlier(lines)


def _neighbours(edges: Iterable[Edge]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """For every stage: sources and targets, the nearest stage first (it is the next to need or to give the value)."""
    sources: dict[int, list[int]] = {}
    targets: dict[int, list[int]] = {}
    for source, target in sorted(edges):
        sources.setdefault(target, []).insert(0, source)
        targets.setdefault(source, []).append(target)
    return sources, targets


def _line(
    order: Sequence[Instruction],
    posts: Sequence[Sequence[Instruction]],
    targets: dict[int, list[int]],
    grad_targets: dict[int, list[int]],
) -> tuple[Instruction, ...]:
    line: list[Instruction] = []
    for compute, posted in zip(order, posts, strict=True):
        stage, microbatch = compute.stage, compute.microbatch
        line += posted
        line.append(compute)
        if compute.op is Op.FORWARD:
            line += (Instruction(Op.SEND_ACT, stage, microbatch, peer) for peer in targets.get(stage, ()))
        elif compute.op in _BACKWARDS:
            line += (Instruction(Op.SEND_GRAD, stage, microbatch, peer) for peer in grad_targets.get(stage, ()))
    return tuple(line)


def post_earlier(lines: Sequence[Sequence[Instruction]]) -> tuple[tuple[Instruction, ...], ...]:
    """Moves receives forward, as few as needed, until the lines finish where a send waits for its receive to be posted.

    Runs the lines under that rule. Where nothing moves, a position waits in a send; the receive that it waits for is
    posted where its position stands. With every receive posted no send waits, so this ends for any lines that finish
    when sends return at once.
    """
    home = {instruction.stage: position for position, line in enumerate(lines) for instruction in line}
    pending: dict[Edge, deque[Instruction]] = defaultdict(deque)
    for line in lines:
        for instruction in line:
            if instruction.is_recv:
                pending[instruction.peer, instruction.stage].append(instruction)
    made: list[list[Instruction]] = [[] for _ in lines]
    posted: set[Instruction] = set()
    sent: set[Instruction] = set()
    needs: dict[tuple[int, bool, int], list[Instruction]] = defaultdict(list)
    cursors = [0] * len(lines)

    def post(receive: Instruction) -> None:
        pending[receive.peer, receive.stage].remove(receive)
        posted.add(receive)
        needs[receive.stage, receive.op is Op.RECV_ACT, receive.microbatch].append(_other_side(receive))
        made[home[receive.stage]].append(receive)

    def advance(position: int) -> bool:
        line, start = lines[position], cursors[position]
        while cursors[position] < len(line):
            instruction = line[cursors[position]]
            if instruction.is_recv:
                if instruction not in posted:
                    post(instruction)
            else:
                if instruction.is_send:
                    sent.add(instruction)
                    if home[instruction.peer] != position and _other_side(instruction) not in posted:
                        break
                elif instruction.op is not Op.BACKWARD_WEIGHT:
                    key = (instruction.stage, instruction.op is Op.FORWARD, instruction.microbatch)
                    if any(send not in sent for send in needs.get(key, ())):
                        break
                made[position].append(instruction)
            cursors[position] += 1
        return cursors[position] > start

    while any(cursor < len(line) for cursor, line in zip(cursors, lines)):
        if any([advance(position) for position in range(len(lines))]):
            continue
        waiting = [lines[p][at] for p, at in enumerate(cursors) if at < len(lines[p]) and lines[p][at].is_send]
        if not waiting:
            raise Deadlock("the order of computes cannot finish", schedule_text(tuple(map(tuple, lines))).splitlines())
        # A gradient first: its buffer moves from one stage to the other, an activation's would be one more.
        wanted = _other_side(min(waiting, key=lambda send: (send.op is Op.SEND_ACT, send.microbatch, send.stage)))
        queue = pending[wanted.peer, wanted.stage]
        while wanted not in posted:
            post(queue[0])
    return tuple(map(tuple, made))


_SIDES = {
    Op.SEND_ACT: Op.RECV_ACT,
    Op.RECV_ACT: Op.SEND_ACT,
    Op.SEND_GRAD: Op.RECV_GRAD,
    Op.RECV_GRAD: Op.SEND_GRAD,
}


def _other_side(instruction: Instruction) -> Instruction:
    """The receive of a send, the send of a receive."""
    return Instruction(_SIDES[instruction.op], instruction.peer, instruction.microbatch, instruction.stage)
