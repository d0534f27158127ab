"""Replicas that run different numbers of microbatches: exact as one device is, simulated and on real ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from shardplan.errors import PlanMismatch
from shardplan.planner.export import trace_model
from shardplan.planner.placement import Mesh
from shardplan.planner.plan import Plan
from shardplan.planner.search import SolveOptions, solve
from shardplan.planner.search.mixed_shares import shares_of
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests.exactness import Case, Planned, close, eager
from tests.plans import random_plan
from tests.prices import KindPrices
from tests.ranks import pool
from tests.test_engine import train
from tests.test_exactness_losses import LOSSES, UNEVEN, Tagger, tokens
from tests.test_exactness_ranks import noisy
from tests.test_mixed import cluster_of, kind


def shared(planned: Planned, shares: tuple[int, ...], **plan: Any) -> Plan:
    """A plan of one replica, its microbatches run by several."""
    made = random_plan(planned.trace, microbatches=sum(shares), **plan)
    (stage,) = made.stages
    tp = stage.mesh.size("tp")
    mesh, ranks = Mesh(("dp", "tp"), (len(shares), tp)), tuple(range(len(shares) * tp))
    return replace(made, stages=(replace(stage, ranks=ranks, mesh=mesh, shares=shares),))


def tagger(name: str) -> Planned:
    ids, target = tokens(UNEVEN)
    return Planned(Case(Tagger().double(), (ids,), LOSSES[name], target))


@pytest.mark.parametrize("name", ["masked mean", "weighted and smoothed", "mean of rows"])
def test_losses_are_weighted_over_the_whole_batch(name):
    planned = tagger(name)
    expected = eager(planned.case)
    for shares, tp in (((3, 1), 1), ((1, 2, 1), 1), ((1, 3), 2)):
        program = compile(planned.trace, shared(planned, shares, tp=tp))
        found = run_program(program, planned.state, planned.batch)
        close(found.loss, expected.loss, 1e-9, 1e-12, f"{shares}: loss")
        for parameter, gradient in expected.gradients.items():
            close(found.gradients[parameter], gradient, 1e-9, 1e-6, f"{shares}: {parameter}")


def test_real_ranks_draw_and_train_as_one():
    planned = noisy()
    start = planned.run()
    alone = pool(2).run(train, {"train": compile(planned.trace, random_plan(planned.trace, tp=2))}, planned.state,
                        planned.batch, 2)[0]  # fmt: skip
    program = compile(planned.trace, shared(planned, (3, 1)))
    answers = pool(2).run(train, {"train": program}, planned.state, planned.batch, 2)
    for answer in answers:
        close(answer["loss"], start.loss, 1e-9, 1e-12, "loss")
        assert answer["losses"] == pytest.approx(alone["losses"], rel=1e-7)
    for parameter, gradient in start.gradients.items():
        close(answers[0]["gradients"][parameter], gradient, 1e-8, 1e-8, parameter)


def test_shares_follow_speed():
    """The faster device runs more microbatches; the result is that of one device."""
    assert shares_of([1.0, 3.0], 4) == (3, 1) and shares_of([1.0, 1.0, 2.5], 5) == (2, 2, 1)
    cluster = cluster_of((kind("fast", 0.03), 1), (kind("slow", 0.01), 1), inside=1e11, between=1e11)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).double()
    batch, target = torch.randn(512, 32, dtype=torch.float64), torch.randn(512, 8, dtype=torch.float64)
    trace = trace_model(model, (batch,), {}, loss_fn=torch.nn.functional.mse_loss, target=target)
    plan = solve(trace, cluster, KindPrices(cluster), SolveOptions())
    (stage,) = plan.stages
    fast = next(n for n, rank in zip(stage.shares, stage.ranks, strict=True) if plan.devices[rank].kind == "fast")
    assert sum(stage.shares) == plan.microbatches and fast > plan.microbatches - fast
    assert plan.status.lower_bound <= plan.step_seconds * (1 + 1e-9)
    assert plan.step_seconds < min(b.seconds for b in plan.baselines if b.seconds is not None)
    program = compile(trace, plan)
    given = dict(zip((spec.name for spec in program.inputs), (batch, target), strict=True))
    found = run_program(program, dict(model.state_dict()), given)
    loss = torch.nn.functional.mse_loss(model(batch), target)
    loss.backward()
    close(found.loss, loss.detach(), 1e-12, 0, "loss")
    for name, parameter in model.named_parameters():
        close(found.gradients[name], parameter.grad, 1e-9, 1e-9, name)


def test_shares_that_would_not_be_exact_are_refused():
    planned = tagger("masked mean")
    good = shared(planned, (3, 1))
    (stage,) = good.stages
    for shares in ((2, 1), (4, 0), (2, 1, 1)):
        with pytest.raises(PlanMismatch, match="shares"):
            compile(planned.trace, replace(good, stages=(replace(stage, shares=shares),)))
    assert Plan.from_json(good.to_json()) == good
