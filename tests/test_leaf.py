"""Opaque leaves: submodules that no graph can hold run whole, and still compute what one device computes."""

from __future__ import annotations

import pytest
import torch

from shardplan.planner.export import trace_model
from shardplan.planner.leaf_op import LeafResult, is_leaf
from shardplan.planner.placement import Mesh
from shardplan.planner.propagate import follow
from shardplan.planner.trace import leaf_of, mutated
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests import leaf_models as lm
from tests.plans import random_plan

SPLIT = {
    "rows": lambda: lm.Around(lm.RowRouter()),
    "experts": lambda: lm.Around(lm.Experts()),
    "numpy": lambda: lm.Around(lm.Numpy()),
    "nested": lambda: lm.AroundNested(lm.Nested()),
    "layers": lambda: lm.Layers(3),
}
WHOLE = {
    "batch": lambda: lm.Around(lm.BatchRouter()),
    "statistics": lambda: lm.Around(lm.Statistics()),
    "trap": lambda: lm.AroundNested(lm.NestedTrap()),
}
MESHES = [{}, {"dp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 2, "tp": 2}, {"dp": 2, "pp": 2}]


def made(name: str):
    torch.manual_seed(0)
    model = {**SPLIT, **WHOLE}[name]().double()
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, lm.DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    return model, x, y


def leaves(trace):
    return [node for node in trace.nodes() if is_leaf(node)]


def compare(model, trace, x, y, plan):
    """The program of the plan against eager: loss, every gradient, every buffer. A parameter that eager does not read
    has none."""
    state = {n: v.detach().clone() for n, v in [*model.named_parameters(), *model.named_buffers()]}
    result = run_program(compile(trace, plan), state, {"x": x, "target": y})
    model.zero_grad()
    loss = lm.loss(model(x), y)
    loss.backward()
    torch.testing.assert_close(result.loss, loss.detach())
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert result.gradients[name] is None, f"{name} has a gradient"
        else:
            assert result.gradients[name] is not None, f"{name} has no gradient"
            torch.testing.assert_close(result.gradients[name], parameter.grad, msg=lambda m, n=name: f"{n}: {m}")
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(result.buffers[name], buffer, check_dtype=False)


@pytest.mark.parametrize("degrees", MESHES, ids=lambda d: "x".join(f"{k}{v}" for k, v in d.items()) or "one")
@pytest.mark.parametrize("name", [*SPLIT, *WHOLE])
def test_leaves_match_one_device(name, degrees):
    model, x, y = made(name)
    trace = trace_model(model, (x,), loss_fn=lm.loss, target=y)
    assert leaves(trace)
    for microbatches in (1, 2) if name in SPLIT else (1,):
        plan = random_plan(trace, **degrees, microbatches=microbatches, seed=microbatches)
        compare(model, trace, x, y, plan)
        model, x, y = made(name)


@pytest.mark.parametrize("name", SPLIT)
def test_a_split_is_proven_and_taken(name):
    model, x, y = made(name)
    trace = trace_model(model, (x,), loss_fn=lm.loss, target=y)
    for axis in ("dp", "mb"):
        found = follow(trace, axis, Mesh((axis,), (2,)))
        assert found.reason is None
        for node in leaves(trace):
            assert found.strategies[node.name].name == "leaf" and "its batch is split" in " ".join(trace.notes)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("batch", "gives other results for parts of the batch"),
        ("statistics", "changes its buffers"),
        ("trap", "gives other results for parts of the batch"),
    ],
)
def test_a_leaf_without_a_proof_runs_whole(name, why):
    model, x, y = made(name)
    trace = trace_model(model, (x,), loss_fn=lm.loss, target=y)
    (node,) = leaves(trace)
    assert leaf_of(node).unsplit == why
    assert follow(trace, "dp", Mesh(("dp",), (2,))).strategies[node.name].name == "-"
    assert why in follow(trace, "mb", Mesh(("mb",), (2,))).reason
    assert len(mutated(node)) == (4 if name == "statistics" else 0)


@pytest.mark.parametrize("text", ["float32[4,8]*", "int64[]", "bool[3]"])
def test_results_print_and_parse(text):
    assert str(LeafResult.parse(text)) == text
