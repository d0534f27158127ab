"""`Plan.with_`: the same job under further constraints, without the model. Determinism of plans."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch

import shardplan as sp
from shardplan.errors import ConflictingConstraints, NotSupported, UsageError
from shardplan.planner.export import trace_model
from tests import models
from tests.determinism import digests, of_process

CLUSTER = "4xh100"


def planned(**settings) -> sp.Plan:
    case = models.make("bytegpt")
    example = {**case.kwargs, "target": case.target} if case.loss_fn else case.kwargs
    return sp.plan(case.model, CLUSTER, example, loss_fn=case.loss_fn, cache=False, **settings)


@pytest.fixture(scope="module")
def first() -> sp.Plan:
    return planned()


def test_with_solves_again_without_the_model():
    case = models.make("bytegpt")
    example = {**case.kwargs, "target": case.target} if case.loss_fn else case.kwargs
    plan = sp.plan(case.model, CLUSTER, example, loss_fn=case.loss_fn, cache=False)
    gone = weakref.ref(case.model)
    del case, example
    gc.collect()
    assert gone() is None, "a plan does not keep the model alive"
    other = plan.with_(sp.degrees(pp=2), sp.pin("embed", stage=0))
    assert len({stage.ranks for stage in other.stages}) == 2
    assert other.constraints == ("degrees(pp=2)", "pin('embed', stage=0)")
    assert other.to_json() == planned(constraints=[sp.degrees(pp=2), sp.pin("embed", stage=0)]).to_json()
    third = other.with_(microbatches=4, schedule="gpipe")
    assert third.microbatches == 4 and third.schedule == "gpipe" and third.constraints == other.constraints
    assert "microbatches" in other.diff(third)


def test_with_says_what_it_cannot(first, tmp_path):
    with pytest.raises(ConflictingConstraints):
        first.with_(sp.degrees(pp=2)).with_(sp.degrees(pp=1))
    with pytest.raises(UsageError, match="does not take colour"):
        first.with_(colour=1)
    with pytest.raises(NotSupported, match="another trace"):
        first.with_(sp.leaf("blocks.0"))
    with pytest.raises(NotSupported, match="another trace"):
        first.with_(objective="infer")
    first.save(tmp_path / "plan.json")
    for copied in (sp.Plan.load(tmp_path / "plan.json"), pickle.loads(pickle.dumps(first))):
        assert copied == first and copied.to_json() == first.to_json()
        with pytest.raises(NotSupported, match="read from a file"):
            copied.with_(sp.degrees(pp=2))


def test_order_of_arguments_does_not_matter():
    case = models.make("llama")
    shuffled = dict(reversed(case.kwargs.items()))
    assert list(shuffled) != list(case.kwargs)
    traces = [trace_model(case.model, (), k, loss_fn=case.loss_fn, target=case.target) for k in (case.kwargs, shuffled)]
    assert traces[0].fingerprint == traces[1].fingerprint
    assert [n.name for n in traces[0].nodes()] == [n.name for n in traces[1].nodes()]

    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(4, 4)

        def forward(self, x, **others):
            return (self.up(x) * others["a"] + others["b"]).sum()

    x = torch.randn(8, 4)
    texts = {
        sp.plan(Sum(), "2xh100", dict(items), cache=False).to_json()
        for items in ([("x", x), ("a", x), ("b", x)], [("b", x), ("a", x), ("x", x)])
    }
    assert len(texts) == 1


def test_plans_of_two_processes_are_the_same_bytes():
    """Other hash seeds, inputs and devices in another order; equal and mixed devices (`make determinism`: 20 runs)."""
    assert of_process(1).splitlines() == digests(2)
