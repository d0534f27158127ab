"""A wrong strategy is found by name, forward and backward; right plans differ nowhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shardplan.planner.export import trace_model
from shardplan.planner.placement import D, R, S
from shardplan.planner.plan import Plan
from shardplan.planner.rules import Strategy, strategies
from shardplan.planner.trace import Trace
from shardplan.planner.unsplit import unsplit
from shardplan.rewrite import compile
from shardplan.rewrite.compare import first_difference, relative_error
from shardplan.rewrite.reference import run_program
from tests import models
from tests.plans import random_plan


@pytest.fixture(scope="module")
def job():
    case = models.make("bytegpt")
    case.model.double()
    trace = trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)
    state = {k: v.detach().clone() for k, v in case.model.state_dict(keep_vars=True).items()}
    state |= {k: v.detach().clone() for k, v in case.model.named_buffers()}
    batch = {s.name: case.batch[s.name] for s in trace.sources.values() if s.kind == "input"}
    return case, trace, state, batch


def broken(plan: Plan, node: str, strategy: Strategy) -> Plan:
    return replace(plan, splits={**plan.splits, "tp": {**plan.splits["tp"], node: str(strategy)}})


def test_the_unsplit_plan_is_the_model(job):
    case, trace, state, batch = job
    found = run_program(compile(trace, unsplit(trace)), state, batch)
    eager = models.run_eager(case)
    assert found.loss is not None and eager.loss is not None
    assert relative_error(found.loss, eager.loss) < 1e-12
    for name, gradient in eager.gradients.items():
        mine = found.gradients[name]
        assert mine is not None and relative_error(mine, gradient, 1e-9) < 1e-9


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"dp": 2, "pp": 2}, {"tp": 2, "pp": 2, "microbatches": 2}], ids=str)
def test_right_plans_differ_nowhere(job, degrees, monkeypatch):
    _, trace, state, batch = job
    monkeypatch.setattr("shardplan.rewrite.compare.CHUNK_NBYTES", 1 << 16)  # several chunks
    assert first_difference(trace, random_plan(trace, **degrees, seed=1), state, batch, 1e-9) is None


def column_parallel(trace: Trace) -> dict[str, Strategy]:
    """Linear layer -> the strategy that splits the rows of its weight."""
    return {
        node.name: next(s for s in strategies(node) if s.inputs[1] == S(0))
        for node in trace.nodes()
        if node.target is torch.ops.aten.linear.default
    }


def test_a_wrong_forward_is_named(job):
    """A result that is scaled down once too often."""
    _, trace, state, batch = job
    plan = random_plan(trace, tp=2, seed=2)
    node, strategy = list(column_parallel(trace).items())[1]
    found = first_difference(trace, broken(plan, node, replace(strategy, scale=True)), state, batch, 1e-9)
    assert found is not None and (found.phase, found.node) == ("forward", node)
    assert found.op == "aten.linear" and found.module and found.error == pytest.approx(0.5)
    assert node in str(found) and ".py:" in found.place and "/n" in found.splits["tp"]


def test_a_wrong_backward_is_named(job):
    """The gradient of a shared input stays a part of the sum: forward is right, and backward is not."""
    _, trace, state, batch = job
    plan = random_plan(trace, tp=2, seed=2)
    for node, strategy in list(column_parallel(trace).items())[1:3]:
        assert first_difference(trace, broken(plan, node, strategy), state, batch, 1e-9) is None
        assert strategy.inputs[0] == D
        wrong = replace(strategy, inputs=(R, *strategy.inputs[1:]))
        found = first_difference(trace, broken(plan, node, wrong), state, batch, 1e-9)
        assert found is not None and (found.phase, found.node) == ("backward", node)


def test_relative_error_of_odd_values():
    x = torch.tensor([1.0, float("inf"), 2.0])
    assert relative_error(x, x.clone()) == 0.0
    assert relative_error(torch.tensor([1.0, 3.0, 2.0]), x) == float("inf")
    assert relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(3)) == float("inf")
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    assert relative_error(torch.tensor([1e-9]), torch.tensor([0.0]), floor=1.0) == pytest.approx(1e-9)
