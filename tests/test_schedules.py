"""Schedules: goldens, soundness of every small case, deadlock search by brute force."""

from __future__ import annotations

import itertools
import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.errors import Deadlock, UsageError
from shardplan.planner.deadlock import check
from shardplan.planner.instructions import Instruction, Op, Schedule, parse_schedule, schedule_text
from shardplan.planner.schedules import build, in_flight, position_of
from shardplan.planner.simulate import Message, StageTimes, simulate


def chain(stages: int) -> set[tuple[int, int]]:
    return {(s, s + 1) for s in range(stages - 1)}


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[str, int, int, set[tuple[int, int]], set[tuple[int, int]]]:
    """kind, stages, microbatches, edges with skips, grad edges."""
    stages = draw(st.integers(1, 7))
    pairs = [(a, b) for a in range(stages) for b in range(a + 1, stages)]
    edges = {pair for pair in pairs if draw(st.booleans())}
    back = {pair for pair in sorted(edges) if draw(st.integers(0, 3))}
    return draw(st.sampled_from(["gpipe", "1f1b", "zb"])), stages, draw(st.integers(1, 9)), edges, back


def test_golden_1f1b() -> None:
    text = schedule_text(build("1f1b", 2, 3, {(0, 1)}))
    assert text == (
        "0F0 0SEND_ACT0>1 0RECV_GRAD0<1 0F1 0SEND_ACT1>1 0B0 0RECV_GRAD1<1 0F2 0SEND_ACT2>1 0RECV_GRAD2<1 0B1 0B2 "
        "0REDUCE_GRADS 0OPTIMIZER_STEP\n"
        "1RECV_ACT0<0 1F0 1RECV_ACT1<0 1B0 1SEND_GRAD0>0 1F1 1RECV_ACT2<0 1B1 1SEND_GRAD1>0 1F2 1B2 1SEND_GRAD2>0 "
        "1REDUCE_GRADS 1OPTIMIZER_STEP"
    )


def test_golden_forward_only_with_a_skip() -> None:
    text = schedule_text(build("gpipe", 3, 2, {(0, 1), (1, 2), (0, 2)}, training=False))
    assert text == (
        "0F0 0SEND_ACT0>1 0SEND_ACT0>2 0F1 0SEND_ACT1>1 0SEND_ACT1>2\n"
        "1RECV_ACT0<0 1RECV_ACT1<0 1F0 1SEND_ACT0>2 1F1 1SEND_ACT1>2\n"
        "2RECV_ACT0<1 2RECV_ACT0<0 2RECV_ACT1<1 2RECV_ACT1<0 2F0 2F1"
    )


def test_every_small_pipeline_is_sound() -> None:
    """All edge sets of up to four stages, disconnected ones included."""
    for stages in range(1, 5):
        pairs = [(a, b) for a in range(stages) for b in range(a + 1, stages)]
        for mask, microbatches, kind in itertools.product(
            range(2 ** len(pairs)), (1, 2, 5, 8), ("gpipe", "1f1b", "zb")
        ):
            edges = {pair for i, pair in enumerate(pairs) if mask >> i & 1}
            check(build(kind, stages, microbatches, edges), edges)


@settings(max_examples=120, deadline=None)
@given(pipelines())
def test_random_pipelines_are_sound(case: tuple[str, int, int, set[tuple[int, int]], set[tuple[int, int]]]) -> None:
    kind, stages, microbatches, edges, back = case
    schedule = build(kind, stages, microbatches, edges, grad_edges=back)
    check(schedule, edges, back)
    check(build(kind, stages, microbatches, edges, training=False), edges)
    assert parse_schedule(schedule_text(schedule)) == schedule
    # Receives come ahead, but no receive of a neighbour by more than one compute.
    for line in schedule:
        computes = [i for i in line if i.peer < 0 and i.microbatch >= 0]
        backward = Op.BACKWARD_INPUT if kind == "zb" else Op.BACKWARD
        for at, instruction in enumerate(line):
            if instruction.is_recv and abs(instruction.peer - instruction.stage) == 1 and edges <= chain(stages):
                op = Op.FORWARD if instruction.op is Op.RECV_ACT else backward
                needed = computes.index(Instruction(op, instruction.stage, instruction.microbatch))
                done = sum(i.peer < 0 and i.microbatch >= 0 for i in line[:at])
                assert done == max(needed - 1, 0)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b", "zb"])
def test_in_flight_is_what_the_simulator_sees(kind: str) -> None:
    for stages, microbatches in itertools.product(range(1, 5), range(1, 7)):
        schedule = build(kind, stages, microbatches, chain(stages))
        seen = simulate(schedule, [StageTimes(1.0, 2.0)] * stages).peak_microbatches
        assert seen == {s: in_flight(kind, s, stages, microbatches) for s in range(stages)}


def test_interleaved_pipelines_are_sound_and_divide_the_bubble() -> None:
    """Narayanan et al. 2021, section 2.2: bubble (p - 1)(f + b)/v."""
    for positions, chunks, groups in itertools.product((2, 3, 4), (2, 3), (1, 2, 4)):
        stages, microbatches = positions * chunks, groups * positions
        schedule = build("interleaved", stages, microbatches, chain(stages), chunks=chunks)
        check(schedule, chain(stages))
        assert parse_schedule(schedule_text(schedule)) == schedule
        assert [{i.stage % positions for i in line} for line in schedule] == [{p} for p in range(positions)]
        found = simulate(schedule, [StageTimes(1.0 / chunks, 2.0 / chunks)] * stages).step_seconds
        assert found == pytest.approx(3 * microbatches + 3 * (positions - 1) / chunks)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(2, 3), st.integers(1, 9), st.randoms(use_true_random=False))
def test_interleaved_pipelines_of_any_microbatches_and_edges_are_sound(
    positions: int, chunks: int, microbatches: int, rng: random.Random
) -> None:
    stages = positions * chunks
    pairs = [(a, b) for a in range(stages) for b in range(a + 1, stages)]
    edges = {pair for pair in pairs if rng.random() < 0.3}
    back = {edge for edge in edges if rng.random() < 0.7}
    check(build("interleaved", stages, microbatches, edges, grad_edges=back, chunks=chunks), edges, back)
    check(build("interleaved", stages, microbatches, edges, training=False, chunks=chunks), edges)
    if chunks == 2:
        check(build("zbv", stages, microbatches, edges, grad_edges=back, chunks=2), edges, back)
        check(build("zbv", stages, microbatches, edges, training=False, chunks=2), edges)
    check(build("interleaved", stages, microbatches, chain(stages), chunks=chunks), chain(stages))


def test_v_shaped_zero_bubble() -> None:
    """Hardly any bubble, with the activations of 1F1B: no position holds more than 2p half-sized stages at once."""
    for positions, microbatches in itertools.product((1, 2, 3, 4, 6), (1, 2, 5, 8, 17)):
        stages = 2 * positions
        schedule = build("zbv", stages, microbatches, chain(stages), chunks=2)
        check(schedule, chain(stages))
        check(build("zbv", stages, microbatches, chain(stages), chunks=2, training=False), chain(stages))
        found = simulate(schedule, [StageTimes(1.0, 2.0, 1.0)] * stages)
        if microbatches >= positions:
            assert found.step_seconds <= 6 * microbatches + positions + 2
        for line, spans in zip(schedule, found.spans, strict=True):
            assert {position_of("zbv", i.stage, positions) for i in line} == {schedule.index(line)}
            starts = [s.start_seconds for s in spans if s.instruction.op is Op.FORWARD]
            ends = [s.end_seconds for s in spans if s.instruction.op is Op.BACKWARD_WEIGHT]
            assert all(sum(s <= at for s in starts) - sum(e <= at for e in ends) <= stages for at in starts)


def test_golden_interleaved() -> None:
    lines = build("interleaved", 4, 2, chain(4), chunks=2)
    computes = [" ".join(str(i) for i in line if i.peer < 0 and i.microbatch >= 0) for line in lines]
    assert computes == ["0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1", "1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1"]


def test_zero_bubble_keeps_the_memory_of_1f1b_and_a_third_of_its_bubble() -> None:
    """Qi et al. 2023, table 1: bubble (p - 1)(F + B - W) of ZB-H1, activations as the first stage of 1F1B."""
    for stages, more in itertools.product(range(1, 7), (0, 1, 5)):
        microbatches = stages + more
        schedule = build("zb", stages, microbatches, chain(stages))
        check(schedule, chain(stages))
        found = simulate(schedule, [StageTimes(1.0, 2.0, 1.0)] * stages)
        assert found.step_seconds == pytest.approx(3 * microbatches + stages - 1)
        assert max(found.peak_microbatches.values()) == stages


def test_zero_bubble_with_published_times() -> None:
    """Qi et al. 2023, table 4 (1.5B on 8 stages, 24 microbatches): bubble 0.2431 under 1F1B, 0.1585 under ZB-H1."""
    forward, by_input, by_weight, send = 18.522, 18.086, 9.337, 0.601
    links = {pair: Message(send) for s in range(7) for pair in ((s, s + 1), (s + 1, s))}
    for kind, bubble in (("1f1b", 0.2431), ("zb", 0.1585)):
        times = [StageTimes(forward, by_input + by_weight, by_weight)] * 8
        found = simulate(build(kind, 8, 24, chain(8)), times, links)
        assert found.bubble_share == pytest.approx(bubble, abs=1e-3)


def test_wrong_arguments() -> None:
    with pytest.raises(UsageError, match="one stage a position"):
        build("zb", 4, 2, chain(4), chunks=2)
    with pytest.raises(UsageError, match="two positions"):
        build("interleaved", 2, 2, chain(2), chunks=2)
    with pytest.raises(UsageError, match="two stages a position"):
        build("zbv", 4, 2, chain(4))
    with pytest.raises(UsageError, match="unknown schedule"):
        build("1f2b", 2, 2, {(0, 1)})
    with pytest.raises(UsageError, match="later stages"):
        build("1f1b", 2, 2, {(1, 0)})
    with pytest.raises(UsageError, match="microbatch"):
        build("1f1b", 2, 0, {(0, 1)})
    with pytest.raises(UsageError, match="without activations"):
        build("1f1b", 3, 2, {(0, 1)}, grad_edges={(1, 2)})


# -- deadlock ----------------------------------------------------------------------------------------------------------


def finishes(schedule: Schedule, rendezvous: bool) -> bool:
    """Search over every order in which positions may advance: whether all of them end in the final state."""
    start = (0,) * len(schedule)
    seen, queue = {start}, deque([start])
    while queue:
        state = queue.popleft()
        done = {i for line, at in zip(schedule, state) for i in line[:at]}
        # Being at a send means that it is posted.
        offered = done | {line[at] for line, at in zip(schedule, state) if at < len(line)}
        moves = [
            p
            for p, at in enumerate(state)
            if at < len(schedule[p]) and able(schedule[p], at, done, offered, rendezvous)
        ]
        if not moves and any(at < len(line) for line, at in zip(schedule, state)):
            return False
        for position in moves:
            following = (*state[:position], state[position] + 1, *state[position + 1 :])
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return True


def able(
    line: tuple[Instruction, ...], at: int, done: set[Instruction], offered: set[Instruction], strict: bool
) -> bool:
    instruction = line[at]
    if instruction.is_send:
        return not strict or other(instruction) in done
    if instruction.is_recv or instruction.op not in (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT):
        return True
    kind = Op.RECV_ACT if instruction.op is Op.FORWARD else Op.RECV_GRAD
    needs = [i for i in line[:at] if i.op is kind and i.microbatch == instruction.microbatch]
    return all(other(receive) in offered for receive in needs)


def other(instruction: Instruction) -> Instruction:
    side = "RECV" if instruction.is_send else "SEND"
    op = Op(f"{side}{instruction.op.value[4:]}")
    return Instruction(op, instruction.peer, instruction.microbatch, instruction.stage)


def test_check_agrees_with_a_search_over_all_interleavings() -> None:
    """Small schedules, half of them with instructions exchanged; only the order is at stake here."""
    rng = random.Random(0)
    verdicts = {True: 0, False: 0}
    for _ in range(250):
        stages, microbatches = rng.choice([(2, 1), (2, 2), (3, 1), (3, 2)])
        pairs = [(a, b) for a in range(stages) for b in range(a + 1, stages)]
        edges = {pair for pair in pairs if rng.random() < 0.7}
        lines = [list(line) for line in build(rng.choice(["gpipe", "1f1b", "zb"]), stages, microbatches, edges)]
        for _ in range(rng.randrange(4)):
            line = rng.choice(lines)
            at = rng.randrange(len(line) - 2)
            line[at], line[at + 1] = line[at + 1], line[at]
        schedule = tuple(map(tuple, lines))
        try:
            check(schedule, edges)
            sound = True
        except Deadlock as error:
            if "not sound" in error.title:
                continue
            sound = False
        assert sound == (finishes(schedule, False) and finishes(schedule, True)), schedule_text(schedule)
        verdicts[sound] += 1
    assert min(verdicts.values()) >= 5, verdicts


def test_a_deadlock_shows_the_grid_and_the_place() -> None:
    """Both sides send before they post: fine with buffers, stuck without."""
    text = (
        "0F0 0SEND_ACT0>1 0F1 0SEND_ACT1>1 0RECV_GRAD0<1 0B0 0RECV_GRAD1<1 0B1\n"
        "1RECV_ACT0<0 1F0 1B0 1SEND_GRAD0>0 1RECV_ACT1<0 1F1 1B1 1SEND_GRAD1>0"
    )
    with pytest.raises(Deadlock) as caught:
        check(parse_schedule(text), {(0, 1)})
    assert str(caught.value) == (
        "SP505 Deadlock: the instruction list cannot finish (a send completes once its receive is posted)\n"
        "  position 0 at 0SEND_ACT1>1 waits until activation 1 of stage 0 for stage 1 is received, at instruction 4 of "
        "position 1\n"
        "  position 1 at 1SEND_GRAD0>0 waits until gradient 0 of stage 1 for stage 0 is received, at instruction 4 of "
        "position 0\n"
        "  [0] 0F0 0SEND_ACT0>1 0F1 >>0SEND_ACT1>1 0RECV_GRAD0<1 0B0 0RECV_GRAD1<1 0B1\n"
        "  [1] 1RECV_ACT0<0 1F0 1B0 >>1SEND_GRAD0>0 1RECV_ACT1<0 1F1 1B1 1SEND_GRAD1>0"
    )


GOOD = ("0F0 0SEND_ACT0>1 0RECV_GRAD0<1 0B0 0REDUCE_GRADS", "1RECV_ACT0<0 1F0 1B0 1SEND_GRAD0>0 1REDUCE_GRADS")


@pytest.mark.parametrize(
    ("position", "old", "new", "message"),
    [
        (0, "0B0 ", "", "0B0 is missing"),
        (0, "0B0 ", "0B0 0B0 ", "follows F, B"),
        (1, "1F0 1B0", "1B0 1F0", "follows nothing"),
        (1, "1SEND_GRAD0>0 ", "", "gradients \\[0\\] from stage 1 to 0 are never sent"),
        (0, "0RECV_GRAD0<1 ", "", "never received"),
        (0, "0F0 0SEND_ACT0>1", "0SEND_ACT0>1 0F0", "before its value is computed"),
        (0, "0RECV_GRAD0<1 0B0", "0B0 0RECV_GRAD0<1", "after its value was needed"),
        (0, "0SEND_ACT0>1", "0SEND_ACT0>1 0SEND_ACT0>1", "stands twice"),
        (0, "0SEND_ACT0>1", "0SEND_ACT0>1 0SEND_ACT0>2", "has no edge"),
        (0, "0B0 0REDUCE_GRADS", "0REDUCE_GRADS 0B0", "after REDUCE_GRADS"),
        (0, "0REDUCE_GRADS", "0OPTIMIZER_STEP", "out of order"),
        (1, "1REDUCE_GRADS", "0REDUCE_GRADS", "positions 0 and 1"),
    ],
)
def test_unsound_lists_are_named(position: int, old: str, new: str, message: str) -> None:
    check(parse_schedule("\n".join(GOOD)), {(0, 1)})
    lines = list(GOOD)
    assert old in lines[position]
    lines[position] = lines[position].replace(old, new)
    with pytest.raises(Deadlock, match=message):
        check(parse_schedule("\n".join(lines)), {(0, 1)})


def test_different_message_order_is_named() -> None:
    lines = (
        "0F0 0F1 0SEND_ACT0>1 0SEND_ACT1>1",
        "1RECV_ACT1<0 1RECV_ACT0<0 1F0 1F1",
    )
    with pytest.raises(Deadlock, match="message 0 from stage 0 to 1 is activation 0 where it is sent"):
        check(parse_schedule("\n".join(lines)), {(0, 1)})
