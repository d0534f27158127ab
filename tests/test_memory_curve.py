"""Predicted memory: what ranks really hold at their fullest moment, and a curve with the right steps."""

from __future__ import annotations

import pytest
import torch

from shardplan.planner import schedules
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.export import trace_model
from shardplan.planner.instructions import Op
from shardplan.planner.memory_curve import StageBytes, curve, peak
from shardplan.planner.search import SolveOptions, solve
from shardplan.rewrite import compile as compile_program
from tests import models
from tests.ranks import pool

CASES = [
    ("bytegpt", {"dp": 2}, 1, False, 0.08),
    ("llama", {"pp": 2}, 4, False, 0.08),
    ("vit", {"tp": 2}, 2, False, 0.15),
    ("bytegpt", {"pp": 2}, 2, True, 0.08),
]


def held(rank, program, state, batch):
    from shardplan.runtime.engine import Engine

    engine = Engine({"train": program}, rank, 2, "cpu", torch.optim.AdamW)
    engine.load_full(state)
    found = engine.measure(batch, steps=1)["peak_nbytes"]
    engine.close()
    return found


@pytest.mark.parametrize("name, shape, microbatches, recomputed, tolerance", CASES)
def test_a_plans_peak_is_what_ranks_hold(name, shape, microbatches, recomputed, tolerance):
    case = models.make(name)
    trace = trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)
    cluster = Cluster.cpu(2)
    costs = CostModel(cluster, LinkModel(cluster), measure=False)
    full = {"dp": 1, "tp": 1, "pp": 1, **shape}
    options = SolveOptions(
        constraints=(degrees(**full),), microbatches=microbatches, rematerialize=recomputed, optimizer_factor=2.0
    )
    plan = solve(trace, cluster, costs, options)
    state = {n: t.detach() for n, t in (*case.model.named_parameters(), *case.model.named_buffers())}
    batch = {s.name: case.batch[s.name] for s in trace.sources.values() if s.kind == "input"}
    measured = pool(2).run(held, compile_program(trace, plan, "train"), state, batch)[0]
    assert [memory.peak_nbytes for memory in plan.memory()] == pytest.approx(measured, rel=tolerance)


def test_the_curve_follows_the_instructions():
    line = schedules.build("1f1b", 2, 4, [(0, 1)])[0]
    stage = StageBytes(100, 200, 50, kept=10, forward=12, first=60, later=15, step=7, returned={1: 3.0})
    moments = curve(line, {0: stage})
    assert [m.fixed for m in moments] == [300] * len(line)
    before = next(i for i, m in enumerate(moments) if m.instruction.op is Op.BACKWARD)
    assert all(m.gradients == 0 for m in moments[: before + 1]) and moments[-1].gradients == 50
    assert moments[before].nbytes == 300 + 2 * 10 + 60 - 10 + 3  # two in flight, a gradient arrived, others appear
    assert peak(moments).activations == 20
    assert max(m.activations for m in moments) == 20 and moments[-1].activations == 0
    assert curve(line, {0: stage}, cuda=True)[before].buffers == 2 << 20
