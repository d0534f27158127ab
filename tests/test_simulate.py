"""The event simulation against formulas and a naive fixpoint; Chrome traces."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.errors import Deadlock
from shardplan.planner.instructions import Instruction, Op, Schedule, parse_schedule
from shardplan.planner.schedules import build
from shardplan.planner.simulate import Message, Simulation, StageTimes, simulate
from shardplan.planner.timeline import chrome_trace
from tests.test_schedules import chain, pipelines


def fixpoint(
    schedule: Schedule, times: list[StageTimes], links: dict[tuple[int, int], float]
) -> dict[Instruction, float]:
    """End of every instruction by relaxing all constraints until nothing moves (one stage per position)."""
    ends = {i: 0.0 for line in schedule for i in line}
    pairs: dict[tuple[int, int], list[tuple[Instruction, Instruction]]] = {}
    for line in schedule:
        for i in line:
            if i.is_send:
                op = Op.RECV_ACT if i.op is Op.SEND_ACT else Op.RECV_GRAD
                receive = Instruction(op, i.peer, i.microbatch, i.stage)
                pairs.setdefault((i.stage, i.peer), []).append((i, receive))
    arrivals: dict[Instruction, float] = {}
    while True:
        before = dict(ends), dict(arrivals)
        for pair, messages in pairs.items():
            free = 0.0
            for send, receive in messages:
                free = arrivals[receive] = max(free, ends[send], ends[receive]) + links.get(pair, 0.0)
        for line in schedule:
            now = 0.0
            for i in line:
                if i.op in (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT):
                    kind = Op.RECV_ACT if i.op is Op.FORWARD else Op.RECV_GRAD
                    now = max([now, *(arrivals[r] for r in line if r.op is kind and r.microbatch == i.microbatch)])
                now += times[i.stage].seconds(i.op)
                ends[i] = now
        if before == (ends, arrivals):
            return ends


@settings(max_examples=80, deadline=None)
@given(pipelines(), st.randoms(use_true_random=False))
def test_equals_the_fixpoint(case: tuple, rng: object) -> None:
    kind, stages, microbatches, edges, back = case
    pick = rng.choice  # type: ignore[attr-defined]
    schedule = build(kind, stages, microbatches, edges, grad_edges=back)
    times = [
        StageTimes(pick([0.0, 1.0, 2.5]), pick([0.0, 2.0, 4.5]), 0.0, pick([0.0, 3.0]), 1.0) for _ in range(stages)
    ]
    links = {pair: pick([0.0, 0.5, 6.0]) for edge in edges for pair in (edge, edge[::-1])}
    found = simulate(schedule, times, {pair: Message(seconds) for pair, seconds in links.items()})
    ends = fixpoint(schedule, times, links)
    assert {s.instruction: s.end_seconds for line in found.spans for s in line} == pytest.approx(
        {i: end for i, end in ends.items() if i.peer < 0}
    )
    assert found.step_seconds == pytest.approx(max(ends.values()))


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (1, 5), (2, 1), (3, 7), (4, 4), (5, 2)])
def test_equal_stages_take_the_known_time(kind: str, stages: int, microbatches: int) -> None:
    """t = (m + S - 1)(f + b), bubble (S - 1) / (m + S - 1)."""
    found = simulate(build(kind, stages, microbatches, chain(stages)), [StageTimes(1.0, 2.0)] * stages)
    assert found.step_seconds == pytest.approx((microbatches + stages - 1) * 3.0)
    assert found.bubble_share == pytest.approx((stages - 1) / (microbatches + stages - 1))


def test_slow_stage_sets_the_pace() -> None:
    """sum_s t_s + (m - 1) max_s t_s for GPipe-like flows whose slowest stage is the last."""
    times = [StageTimes(1.0), StageTimes(2.0), StageTimes(5.0)]
    found = simulate(build("1f1b", 3, 10, chain(3), training=False), times)
    assert found.step_seconds == pytest.approx(8.0 + 9 * 5.0)


def test_a_link_carries_one_message_at_a_time_and_overlaps_compute() -> None:
    found = simulate(
        build("gpipe", 2, 3, {(0, 1)}, training=False), [StageTimes(1.0), StageTimes(1.0)], {(0, 1): Message(4.0)}
    )
    assert [(t.start_seconds, t.end_seconds) for t in found.transfers] == [(1.0, 5.0), (5.0, 9.0), (9.0, 13.0)]
    assert found.step_seconds == 14.0
    assert [s.end_seconds for s in found.spans[0]] == [1.0, 2.0, 3.0]


def test_a_message_starts_when_both_sides_are_there() -> None:
    """Stage 1 posts receive 2 only after its first forward."""
    found = simulate(
        build("gpipe", 2, 3, {(0, 1)}, training=False), [StageTimes(1.0), StageTimes(10.0)], {(0, 1): Message(1.0)}
    )
    assert [t.start_seconds for t in found.transfers] == [1.0, 2.0, 12.0]


def test_directions_do_not_disturb_each_other() -> None:
    schedule = parse_schedule("0RECV_GRAD0<1 0F0 0SEND_ACT0>1 0B0\n1RECV_ACT0<0 1F0 1B0 1SEND_GRAD0>0")
    found = simulate(schedule, [StageTimes(1.0, 1.0)] * 2, {(0, 1): Message(2.0), (1, 0): Message(3.0)})
    assert found.step_seconds == 1 + 2 + 1 + 1 + 3 + 1
    assert [(t.source, t.activation) for t in found.transfers] == [(0, True), (1, False)]


def test_the_next_message_follows_while_the_latency_passes() -> None:
    links = {(0, 1): Message(4.0, latency=3.0)}
    found = simulate(build("gpipe", 2, 3, {(0, 1)}, training=False), [StageTimes(1.0), StageTimes(0.5)], links)
    assert [(t.start_seconds, t.end_seconds) for t in found.transfers] == [(1.0, 5.0), (2.0, 6.0), (5.5, 9.5)]


def test_messages_slow_the_compute_beside_them() -> None:
    """Message 0 travels from 1 to 5 and takes a quarter of the sender's speed while it computes, and half of the
    receiver's, which waits for it and loses nothing."""
    schedule = parse_schedule("0F0 0SEND_ACT0>1 0F1\n1RECV_ACT0<0 1F0")
    found = simulate(schedule, [StageTimes(2.0), StageTimes(1.0)], {(0, 1): Message(4.0, 0.0, 0.25, 0.5)})
    assert [s.end_seconds for s in found.spans[0]] == [2.0, 4.5]
    assert [(s.start_seconds, s.end_seconds) for s in found.spans[1]] == [(6.0, 7.0)]
    # Both compute while messages arrive: what came in during the first forward is paid by the second.
    schedule = parse_schedule("0F0 0SEND_ACT0>1 0F1 0SEND_ACT1>1\n1RECV_ACT0<0 1RECV_ACT1<0 1F0 1F1")
    found = simulate(schedule, [StageTimes(1.0), StageTimes(4.0)], {(0, 1): Message(1.0, 0.0, 0.0, 0.5)})
    assert [(t.start_seconds, t.end_seconds) for t in found.transfers] == [(1.0, 2.0), (2.0, 3.0)]
    assert [(s.start_seconds, s.end_seconds) for s in found.spans[1]] == [(2.0, 6.5), (6.5, 10.5)]


def test_sums_slow_the_backward_beside_them() -> None:
    schedule = parse_schedule("0F0 0B0 0REDUCE_GRADS")

    def step(reducing: float, *reductions: tuple[float, float]) -> float:
        return simulate(schedule, [StageTimes(1.0, 4.0, reductions=reductions, reducing=reducing)]).step_seconds

    assert step(0.5, (0.25, 2.0), (1.0, 1.0)) == 1 + 1 + 2 + 2 + 1  # 3 s of backward: 2 at half speed, 2 alone
    assert step(1.0, (0.25, 2.0)) == 1 + 4 + 2
    assert step(0.5, (0.25, 20.0)) == 1 + 1 + 20
    assert step(0.5) == 5.0


def test_memory_over_time() -> None:
    times = [StageTimes(1.0, 2.0, activation_nbytes=10, fixed_nbytes=100)] * 2
    found = simulate(build("1f1b", 2, 3, {(0, 1)}), times)
    assert found.peak_microbatches == {0: 2, 1: 1}
    assert found.peak_nbytes == {0: 120, 1: 110}
    assert found.memory[1] == ((0.0, 100), (1.0, 110), (4.0, 110), (7.0, 110), (10.0, 100))
    assert found.memory[0] == ((0.0, 110), (1.0, 120), (6.0, 120), (9.0, 110), (12.0, 100))


def test_separate_weight_gradients() -> None:
    """Activations live until the weight gradient is done."""
    schedule = parse_schedule("0F0 0I0 0F1 0I1 0W0 0W1 0REDUCE_GRADS 0OPTIMIZER_STEP")
    found = simulate(schedule, [StageTimes(1.0, 5.0, 2.0, 0.5, 0.25)])
    assert found.step_seconds == 12.75
    assert found.peak_microbatches == {0: 2}


def test_reductions_go_on_during_the_last_backward() -> None:
    """The first sum starts when its gradients are final, the next behind it; the rest is waited for."""
    schedule = parse_schedule("0F0 0B0 0F1 0B1 0REDUCE_GRADS 0OPTIMIZER_STEP")

    def step(*reductions: tuple[float, float], after: float = 0.0) -> float:
        times = StageTimes(1.0, 4.0, reduce_seconds=after, optimizer_seconds=0.25, reductions=reductions)
        return simulate(schedule, [times]).step_seconds

    assert step() == 10.25
    assert step((0.25, 1.0), (0.5, 1.0)) == 10.25  # done at 9 of 10 s
    assert step((0.25, 2.5), (0.5, 1.0), (1.0, 1.0)) == 11.75
    assert step((0.25, 4.0), (0.5, 4.0), after=0.5) == 15.75


def test_forward_only_keeps_nothing() -> None:
    found = simulate(build("1f1b", 2, 4, {(0, 1)}, training=False), [StageTimes(1.0, activation_nbytes=7)] * 2)
    assert found.peak_microbatches == {0: 1, 1: 1}


def test_a_list_that_cannot_finish() -> None:
    with pytest.raises(Deadlock, match="cannot finish"):
        simulate(parse_schedule("0F0\n1RECV_ACT0<0 1F0"), [StageTimes(1.0)] * 2)


def test_times_are_checked() -> None:
    with pytest.raises(ValueError, match="negative"):
        StageTimes(-1.0)
    with pytest.raises(ValueError, match="part of"):
        StageTimes(1.0, 1.0, 2.0)


def test_large_pipelines_are_quick() -> None:
    schedule = build("1f1b", 16, 1024, chain(16))
    start = time.process_time()
    found = simulate(schedule, [StageTimes(1.0, 2.0)] * 16, {(s, s + 1): Message(0.1) for s in range(15)})
    assert time.process_time() - start < 5
    assert found.peak_microbatches[0] == 16
    assert found.step_seconds > (1024 + 15) * 3.0


def example() -> Simulation:
    times = [StageTimes(0.001, 0.002, 0.0, 0.0005, 0.0, 10, 100)] * 2
    return simulate(build("1f1b", 2, 2, {(0, 1)}), times, {(0, 1): Message(0.0001), (1, 0): Message(0.0001)})


def test_chrome_trace() -> None:
    found = example()
    records = json.loads(chrome_trace([found.timeline(), found.timeline("measured")]))["traceEvents"]
    bars = [r for r in records if r["ph"] == "X"]
    assert len(bars) == 2 * (sum(map(len, found.spans)) + len(found.transfers))
    first = next(r for r in bars if r["name"] == "0F1")
    assert first == {"ph": "X", "name": "0F1", "cat": "forward", "pid": 0, "tid": 0, "ts": 1000.0, "dur": 1000.0}
    names = {(r["pid"], r["args"]["name"]) for r in records if r["name"] in ("process_name", "thread_name")}
    assert {(0, "predicted"), (1, "measured"), (0, "stage 1"), (0, "link 0>1")} <= names
    assert max(r["ts"] + r["dur"] for r in bars) == pytest.approx(found.step_seconds * 1e6)
    assert {r["args"]["bytes"] for r in records if r["ph"] == "C"} == {100, 110, 120}
