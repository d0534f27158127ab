"""Cuts moved by the simulator: no cut beside the chosen one is faster."""

from __future__ import annotations

from dataclasses import replace

from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees, pin
from shardplan.planner.export import trace_model
from shardplan.planner.search import SolveOptions, solve
from shardplan.planner.search.moving import _beside
from shardplan.planner.search.problem import Price
from shardplan.planner.search.stage_ilp import Column, StageProblem
from tests import models
from tests.prices import SimplePrices


def test_the_cut_is_the_fastest_of_all():
    case = models.make("bytegpt")
    trace = trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)
    cluster = Cluster.cpu(2, memory="4GiB")
    options = SolveOptions(
        constraints=(degrees(dp=1, tp=1, pp=2),), microbatches=2, schedule="1f1b", zero=0, time_limit=20.0
    )
    chosen = solve(trace, cluster, SimplePrices(cluster), options)
    names = [segment.name for segment in trace.segments]
    every = {}
    for cut in range(1, len(names)):
        pins = pin(names[cut - 1], 0), pin(names[cut], 1)
        found = solve(
            trace, cluster, SimplePrices(cluster), replace(options, constraints=(*options.constraints, *pins))
        )
        assert found.stages[1].first == cut
        every[cut] = found.step_seconds
    assert chosen.step_seconds == min(every.values())
    assert chosen.stages[1].first == min(every, key=every.__getitem__)


def test_segments_stay_where_they_have_to_be():
    columns = ((Column(Price()),),) * 6
    problem = StageProblem(columns, 3, 2, ({},) * 5, ({},) * 5, (1.0,) * 3, (3, 2, 1))
    assert set(_beside(problem, (0, 2, 4))) == {(0, 1, 4), (0, 3, 4), (0, 2, 3), (0, 2, 5)}
    assert set(_beside(replace(problem, pinned=((3, 1),)), (0, 2, 4))) == {(0, 1, 4), (0, 3, 4), (0, 2, 5)}
    assert set(_beside(replace(problem, together=((1, 0),)), (0, 2, 4))) == {(0, 3, 4), (0, 2, 3), (0, 2, 5)}
