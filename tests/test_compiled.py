"""Stages through torch.compile: one graph with the collectives inside, the same numbers."""

from __future__ import annotations

import logging

import pytest
import torch

from shardplan.planner.placement import Mesh
from shardplan.rewrite import compile
from shardplan.rewrite.program import StageRanks
from tests.plans import random_plan
from tests.ranks import pool
from tests.test_engine import inputs, traced


def steps(rank, program, state, batch, backend):
    import torch.distributed as dist

    from shardplan.runtime.engine import Engine

    engine = Engine({"train": program}, rank, dist.get_world_size(), "cpu", backend=backend)
    engine.load_full(state)
    losses = [engine.step(batch)]
    gradients = engine.full_gradients()
    engine.zero_grad()
    losses.append(engine.step(batch))
    runs = engine.executor("train").runs
    functions = [(type(run.function).__name__, getattr(run.function, "reason", "")) for run in runs]
    engine.close()
    return losses, gradients, functions


@pytest.mark.parametrize(("name", "degrees"), [("mlp", {"tp": 2})])
def test_compiled_stages_are_exact(name, degrees):
    case, trace, state = traced(name)
    program = compile(trace, random_plan(trace, **degrees, microbatches=1, seed=1))
    wanted, right, _ = pool(program.world_size).run(steps, program, state, inputs(case, trace), None)[0]
    answers = pool(program.world_size).run(steps, program, state, inputs(case, trace), "aot_eager")
    for losses, _, functions in answers:
        torch.testing.assert_close(losses, wanted)
        assert functions == [("CompiledStage", "")]
    for parameter, gradient in right.items():
        torch.testing.assert_close(answers[0][1][parameter], gradient)


def both(rank, ranks):
    from shardplan.runtime.comm import DistComm
    from shardplan.runtime.compiled import FunctionalComm
    from shardplan.runtime.groups import Groups

    placement = StageRanks(Mesh(("mb", "dp", "tp"), (3, 2, 2)), ranks)
    groups = Groups()
    for axis in ("dp", "tp"):
        groups.of_stage(placement, (axis,))
    one, other = DistComm(placement, rank, groups), FunctionalComm(placement, rank, groups)
    x = (torch.arange(32.0).reshape(4, 8) + 100 * rank).t().contiguous().t()
    for axis in ("dp", "tp", "none"):
        assert (one.size(axis), one.index(axis)) == (other.size(axis), other.index(axis))
        for dim in (0, 1):
            assert torch.equal(one.all_gather(x, dim, axis), other.all_gather(x, dim, axis))
            assert torch.equal(one.reduce_scatter(x, dim, axis), other.reduce_scatter(x, dim, axis))
            assert torch.equal(one.all_to_all(x, dim, 1 - dim, axis), other.all_to_all(x, dim, 1 - dim, axis))
        for op in ("sum", "max"):
            assert torch.equal(one.all_reduce(x, axis, op), other.all_reduce(x, axis, op))
    groups.close()


@pytest.mark.parametrize("ranks", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_functional_collectives_are_the_others(ranks):
    pool(4).run(both, ranks)


def test_what_cannot_be_compiled_runs_as_it_is(caplog):
    from shardplan.runtime.compiled import CompiledStage, compiled

    class Code:
        source = "random_ops.dropout(comm, 3, x)"

    def stage(comm, device, x):
        if x.sum() > 0:
            return (x + 1,)
        return (x - 1,)

    with caplog.at_level(logging.WARNING, "shardplan"):
        assert compiled(stage, Code, None, "stage 0", "eager") is stage
        Code.source = ""
        found = compiled(stage, Code, None, "stage 1", "eager")
        assert isinstance(found, CompiledStage)
        for _ in range(2):
            assert torch.equal(found(None, torch.device("cpu"), torch.ones(2))[0], torch.full((2,), 2.0))
    assert "random numbers" in caplog.text and "stage 1 is not compiled" in caplog.text and found.reason
