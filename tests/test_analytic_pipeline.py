"""The pipeline recurrence of table rows against the event simulation of the instruction lists, and closed forms."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.planner.analytic import pipeline
from shardplan.planner.analytic.layer import Seconds
from shardplan.planner.schedules import build
from shardplan.planner.simulate import Message, StageTimes, simulate

KINDS = ("1f1b", "gpipe", "interleaved", "zb")


def chain(stages: int) -> set[tuple[int, int]]:
    return {(s, s + 1) for s in range(stages - 1)}


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[str, int, int, list[Seconds]]:
    """kind, positions, microbatches, seconds of every stage."""
    kind, positions = draw(st.sampled_from(KINDS)), draw(st.integers(1, 5))
    chunks = draw(st.integers(2, 3)) if kind == "interleaved" and positions > 1 else 1
    microbatches = draw(st.integers(1, 4)) * positions if chunks > 1 else draw(st.integers(1, 12))
    part = st.integers(1, 8)
    stages = [Seconds(draw(part), draw(part), draw(part)) for _ in range(positions * chunks)]
    return kind if chunks > 1 or kind != "interleaved" else "1f1b", positions, microbatches, stages


def simulated(kind: str, positions: int, microbatches: int, stages: list[Seconds], send: float = 0.0):
    schedule = build(kind, len(stages), microbatches, chain(len(stages)), chunks=len(stages) // positions)
    times = [
        StageTimes(s.forward, s.backward, s.backward_weight, activation_nbytes=2**index)
        for index, s in enumerate(stages)
    ]
    links = {pair: Message(send) for a, b in chain(len(stages)) for pair in ((a, b), (b, a))}
    return simulate(schedule, times, links)


@settings(max_examples=150, deadline=None)
@given(pipelines())
def test_the_recurrence_is_the_simulation(case: tuple[str, int, int, list[Seconds]]) -> None:
    kind, positions, microbatches, stages = case
    exact = simulated(kind, positions, microbatches, stages)
    found = pipeline.run(kind, positions, microbatches, stages, [0.0] * positions)
    assert found.seconds == pytest.approx(exact.step_seconds)
    assert found.idle_share == pytest.approx(exact.bubble_share, abs=1e-9)
    held = pipeline.held_nbytes(kind, positions, microbatches, [2**index for index in range(len(stages))])
    for position in range(positions):
        assert held[position] == held_together([exact.memory[s] for s in range(position, len(stages), positions)])


def held_together(curves) -> int:
    """The most that several stages' memory curves add up to."""
    changes = sorted((seconds, nbytes - before) for curve in curves for (seconds, nbytes), (_, before) in steps(curve))
    total = most = 0
    for _, change in changes:  # at one moment what is freed goes first
        total += change
        most = max(most, total)
    return most


def steps(curve):
    return zip(curve, [(0.0, 0), *curve])


@settings(max_examples=60, deadline=None)
@given(pipelines(), st.integers(0, 3))
def test_messages_cost_what_the_simulation_says(case: tuple[str, int, int, list[Seconds]], send: int) -> None:
    """Without queues at a link the recurrence is a lower bound, and tight while a message is shorter than a compute."""
    kind, positions, microbatches, stages = case
    stages = [Seconds(s.forward + 3, s.backward_input + 3, s.backward_weight) for s in stages]
    exact = simulated(kind, positions, microbatches, stages, send).step_seconds
    found = pipeline.run(kind, positions, microbatches, stages, [float(send)] * positions).seconds
    assert found <= exact + 1e-9
    assert found == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", [2, 3, 4])
def test_many_microbatches_are_counted_from_a_few(kind: str, positions: int) -> None:
    chunks = 2 if kind == "interleaved" else 1
    stages = [Seconds(1.0 + 0.1 * s, 1.5, 0.5 + 0.05 * s) for s in range(positions * chunks)]
    times = tuple((s.forward, s.backward_input, s.backward_weight) for s in stages)
    for microbatches in (11 * positions, 12 * positions + (chunks == 1)):
        whole = pipeline._recur(kind, positions, microbatches, times, (0.05,) * positions)
        found = pipeline.run(kind, positions, microbatches, stages, [0.05] * positions).seconds
        assert found == pytest.approx(whole, rel=1e-9)


def test_closed_forms() -> None:
    """Narayanan et al. 2021: bubble (p - 1)/m of the ideal time, divided by the chunks; Qi et al. 2023 for ZB-H1."""
    p, m = 8, 32
    each = Seconds(1.0, 1.0, 1.0)
    for kind in ("1f1b", "gpipe"):
        assert pipeline.run(kind, p, m, [each] * p, [0.0] * p).seconds == pytest.approx(3 * (m + p - 1))
    half = pipeline.run("interleaved", p, m, [each.times(0.5)] * 2 * p, [0.0] * p)
    assert half.seconds == pytest.approx(3 * m + 3 * (p - 1) / 2)
    assert pipeline.run("zb", p, m, [each] * p, [0.0] * p).seconds == pytest.approx(3 * m + p - 1)
    assert pipeline.run("1f1b", 1, m, [each], [0.0]).idle_share == 0


def test_held_by_interleaved_first_position() -> None:
    """Korthikanti et al. 2022, section 4.2.3: the first position holds L (1 + (p - 1)/(p v)) layers' activations."""
    p, v, layers = 4, 3, 24
    held = pipeline.held_nbytes("interleaved", p, 8 * p, [layers / (p * v)] * (p * v))
    assert held[0] == pytest.approx(layers * (1 + (p - 1) / (p * v)))
    assert pipeline.held_nbytes("1f1b", p, 8 * p, [6.0] * p) == [24.0, 18.0, 12.0, 6.0]
    assert pipeline.held_nbytes("gpipe", p, 8 * p, [6.0] * p) == [192.0] * p
