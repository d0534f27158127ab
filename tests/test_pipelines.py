"""Pipelines on gloo ranks beyond equal stages of one rank each: stages of unequal meshes, several stages a rank. Loss,
every gradient, parameters after AdamW steps and outputs are those of one device."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.planner.deadlock import check
from shardplan.planner.instructions import Instruction
from shardplan.planner.stages import split_stages
from shardplan.rewrite import compile
from shardplan.rewrite.routes import routes
from tests import models
from tests.plans import random_plan
from tests.ranks import pool
from tests.test_engine import assert_near, inputs, one_device, traced, train

UNEQUAL = [
    ("bytegpt", ((1, 1), (2, 1), (1, 1)), 2),
    ("bytegpt", ((1, 2), (1, 1), (1, 1)), 4),
    ("t5", ((2, 1), (1, 2)), 2),
    ("gpt2", ((1, 2), (2, 1)), 2),
    ("gpt2", ((2, 1), (1, 1), (1, 1)), 4),
    ("vit", ((1, 1), (1, 2), (1, 1)), 2),
]
SPLIT = [("bytegpt", ((1, 1), (1, 1)), 4), ("gpt2", ((1, 2), (1, 2)), 2), ("t5", ((1, 1), (2, 1), (1, 1)), 4)]
CHUNKED = [
    ("interleaved", "bytegpt", (1, 1), 2, 2, 4),
    ("interleaved", "t5", (1, 1), 4, 2, 2),
    ("interleaved", "mlp", (1, 1), 2, 3, 2),
    ("zbv", "t5", (1, 1), 2, 2, 4),
    ("zbv", "gpt2", (1, 2), 2, 2, 2),
]
"""schedule, name, mesh of a position, positions, chunks, microbatches."""


@pytest.mark.parametrize(("name", "meshes", "microbatches"), UNEQUAL)
def test_stages_of_unequal_meshes(name, meshes, microbatches):
    compare(name, random_plan(traced(name)[1], meshes=meshes, microbatches=microbatches, seed=3))


@pytest.mark.parametrize(("schedule", "name", "mesh", "positions", "chunks", "microbatches"), CHUNKED)
def test_several_stages_a_rank(schedule, name, mesh, positions, chunks, microbatches):
    meshes = (mesh,) * (positions * chunks)
    plan = random_plan(
        traced(name)[1], meshes=meshes, microbatches=microbatches, seed=3, schedule=schedule, chunks=chunks
    )
    assert len(plan.devices) == positions * mesh[0] * mesh[1]
    compare(name, plan)


@pytest.mark.parametrize(("name", "meshes", "microbatches"), SPLIT)
def test_backward_in_two_parts(name, meshes, microbatches):
    trace = traced(name)[1]
    again = [s.name for s in trace.segments] if name == "gpt2" else []
    plan = random_plan(trace, meshes=meshes, microbatches=microbatches, seed=3, schedule="zb", rematerialize=again)
    compare(name, plan)


def compare(name, plan):
    """Run a plan on ranks and compare it with one device."""
    case, trace, state = traced(name)
    split = split_stages(trace, tuple(stage.first for stage in plan.stages))
    check(plan.instructions, split.edges(), split.grad_edges())
    programs = {"train": compile(trace, plan), "forward": compile(trace, plan, "forward")}
    answers = pool(programs["train"].world_size).run(train, programs, state, inputs(case, trace), 2, 0.5)
    eager = models.run_eager(case)
    losses, after = one_device(case, 2, 0.5)
    floor = 1e-3 * max(float(g.norm()) for g in eager.gradients.values())
    for rank, answer in enumerate(answers):
        assert_near(answer["loss"], eager.loss, 1e-5, 0, f"loss on rank {rank}")
        assert answer["losses"] == pytest.approx(losses, rel=1e-4)
    answer = answers[0]
    assert set(answer["gradients"]) == set(eager.gradients)
    for parameter, gradient in eager.gradients.items():
        assert_near(answer["gradients"][parameter], gradient, 1e-5, floor, parameter)
        assert_near(answer["twice"][parameter], 2 * gradient, 1e-5, floor, f"accumulated {parameter}")
    floor = 1e-2 * max(float(value.norm()) for value in after.values() if value.is_floating_point())
    for key, value in after.items():
        assert_near(answer["state"][key].to(value.dtype), value, 1e-4, floor, f"{key} after two steps")


# -- every rank's list -------------------------------------------------------------------------------------------------


def by_rank(program):
    """The lists of single ranks: the messages that a rank really has, as stages of their own."""
    width = 1 + max(rank for placement in program.placement for rank in placement.ranks)
    pairs: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for route in routes(program):
        there, back = (route.source, route.target), (route.target, route.source)
        for ends, boxes in ((there, route.values), (back, route.gradients)):
            pairs.setdefault(ends, set()).update((box.source, box.target) for box in boxes)
    lines = []
    for line in program.schedule:
        for rank in program.placement[line[0].stage].ranks:
            mine: list[Instruction] = []
            for i in line:
                peers = [-1]
                if i.is_send:
                    peers = [i.peer * width + t for s, t in sorted(pairs.get((i.stage, i.peer), ())) if s == rank]
                elif i.is_recv:
                    peers = [i.peer * width + s for s, t in sorted(pairs.get((i.peer, i.stage), ())) if t == rank]
                mine += (Instruction(i.op, i.stage * width + rank, i.microbatch, peer) for peer in peers)
            lines.append(tuple(mine))
    forward = {(a * width + s, b * width + t) for (a, b), found in pairs.items() if a < b for s, t in found}
    back = {(b * width + t, a * width + s) for (a, b), found in pairs.items() if a > b for s, t in found}
    return tuple(lines), forward, back


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_lists_of_single_ranks_are_sound(data):
    """A stage's list is sound, so are those of its ranks: whichever of them send and receive."""
    trace = traced("t5")[1]
    schedule = data.draw(st.sampled_from(["gpipe", "1f1b", "zb", "interleaved", "zbv"]))
    count = data.draw(st.integers(2, 5))
    mesh = st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
    meshes, chunks = data.draw(st.lists(mesh, min_size=count, max_size=count)), 1
    if schedule in ("interleaved", "zbv"):
        down = meshes[:2]
        meshes, chunks = [*down, *(down if schedule == "interleaved" else reversed(down))], 2
    plan = random_plan(
        trace, meshes=meshes, microbatches=data.draw(st.sampled_from([1, 2])), seed=data.draw(st.integers(0, 9)),
        schedule=schedule, chunks=chunks,
    )  # fmt: skip
    lines, forward, back = by_rank(compile(trace, plan))
    check(lines, forward, back)
