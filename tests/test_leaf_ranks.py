"""Leaves on real ranks: steps of AdamW are those of one device, also where ranks go different ways inside a leaf and
where a part of it is not used at all; leaves travel to workers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardplan as sp
from shardplan.planner.export import trace_model
from shardplan.rewrite import compile
from tests import leaf_models as lm
from tests.plans import random_plan
from tests.ranks import pool
from tests.test_engine import adamw, assert_near, train
from tests.test_leaf import made

CASES = [
    ("experts", {"dp": 2}, 1),
    ("experts", {"tp": 2}, 1),
    ("experts", {"pp": 2}, 2),
    ("layers", {"dp": 2}, 2),
    ("batch", {"dp": 2}, 1),
    ("statistics", {"pp": 2}, 1),
    ("statistics", {"dp": 2}, 1),
]


def decayed(model, x, y, steps):
    """Losses and state after steps of AdamW, which shrinks a parameter unless it has no gradient at all."""
    optimizer = adamw(model.parameters())
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = lm.loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model.state_dict()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "degrees", "microbatches"), CASES)
def test_ranks_with_leaves_match_one_device(name, degrees, microbatches):
    model, x, y = made(name)
    if name == "experts":
        with torch.no_grad():
            model.part.gate.bias[0] += 2.0  # the halves of the batch use different experts
            model.part.gate.bias[2] -= 1e3  # and nobody uses this one
    trace = trace_model(model, (x,), loss_fn=lm.loss, target=y)
    plan = random_plan(trace, **degrees, microbatches=microbatches, seed=3)
    programs = {"train": compile(trace, plan)}
    state = {n: v.detach().clone() for n, v in [*model.named_parameters(), *model.named_buffers()]}
    batch = {"x": x, "target": y}
    answer = pool(programs["train"].world_size).run(train, programs, state, batch, 3)[0]
    unused = {n for n, p in model.named_parameters() if "experts.2" in n and name == "experts"}
    losses, after = decayed(model, x, y, 3)
    assert answer["losses"] == pytest.approx(losses, rel=1e-9)
    assert not unused & set(answer["gradients"])
    for key, value in after.items():
        if key in dict(model.named_parameters()):
            assert_near(answer["state"][key], value, 1e-9, 1e-3, key)


@pytest.mark.timeout(120)
def test_a_leaf_of_a_local_class_travels_to_workers():
    class Local(lm.Experts):
        def forward(self, x):
            return super().forward(x) * 2

    torch.manual_seed(0)
    model = lm.Around(Local())
    x, y = torch.randn(2, 8, lm.DIM)
    constraints = [sp.degrees(dp=2, tp=1, pp=1), sp.memory("1 GiB")]
    given = plan_for(model, x, y, constraints)
    with sp.auto_parallel(model, 2, {"x": x, "target": y}, lm.loss, adamw, plan=given) as parallel:
        found = [float(parallel.train_step(x, target=y)) for _ in range(2)]
        last = parallel.train_step(x[:6], target=y[:6])  # another call is traced with the same leaf
        outputs = parallel(x)
    losses, _ = decayed(model, x, y, 2)
    assert found == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(last, lm.loss(model(x[:6]), y[:6]).detach(), rtol=1e-5, atol=1e-6)
    decayed(model, x[:6], y[:6], 0)
    assert outputs.shape == x.shape and nn.functional.mse_loss(outputs, model(x)) < 1e-2


def plan_for(model, x, y, constraints):
    from shardplan.planner.cluster import Cluster
    from shardplan.planner.search import SolveOptions, solve
    from tests.prices import SimplePrices

    trace, cluster = trace_model(model, (x,), loss_fn=lm.loss, target=y), Cluster.cpu(2)
    return solve(trace, cluster, SimplePrices(cluster), SolveOptions(constraints=tuple(constraints)))
