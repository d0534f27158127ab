"""What a model returns, however it is nested and split, comes back whole and in its own form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from shardplan.planner.export import trace_model
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests.exactness import close
from tests.plans import random_plan

BATCH, LENGTH, WIDTH = 8, 6, 12
PLANS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2},
    "m4": {"microbatches": 4},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2 tp2 pp2 m2": {"dp": 2, "tp": 2, "pp": 2, "microbatches": 2},
}


@dataclass
class Output:
    hidden: torch.Tensor
    pair: tuple[torch.Tensor, None]
    name: str


pytree.register_dataclass(Output)


class Nested(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH)
        self.form = form

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.first(x).tanh()
        y = self.second(hidden)
        if self.form == "dataclass":
            return Output(hidden, (y, None), "named")
        if self.form == "not led by the batch":
            return {"swapped": y.transpose(0, 1), "last": hidden.movedim(0, -1), "flat": y.flatten(0, 1)}
        if self.form == "of the whole batch":
            return {"mean": y.mean(), "sums": hidden.sum(0), "greatest": y.amax(), "count": (y > 0).sum()}
        if self.form == "the same twice":
            return [y, y, (hidden, {"again": hidden, "input": x})]
        return {
            "a": (y, (hidden, None)),
            "none": None,
            "b": [y.argmax(-1), y > 0],
            "number": 3,
            "parameter": self.first.bias,
        }


def run(form: str, **plan: Any) -> tuple[Any, Any]:
    """(what the model returns, what the plan does), in the model's own form."""
    torch.manual_seed(0)
    model = Nested(form).double().eval()
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    trace = trace_model(model, (x,), training=False)
    state = {n: p.detach() for n, p in model.named_parameters()}
    batch = {s.name: x for s in trace.sources.values() if s.kind == "input"}
    found = run_program(compile(trace, random_plan(trace, **plan), "forward"), state, batch).outputs
    leaves = [found[leaf] if isinstance(leaf, int) else leaf[0] for leaf in trace.output_leaves]
    with torch.no_grad():
        return model(x), pytree.tree_unflatten(leaves, trace.out_spec)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("form", ["dict of tuples", "dataclass", "not led by the batch", "the same twice"])
def test_outputs_in_every_form(form, plan):
    expected, found = run(form, **PLANS[plan])
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for mine, theirs in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(theirs, torch.Tensor):
            close(mine, theirs.detach(), 1e-9, 1e-12, f"{form} {plan}")
        else:
            assert mine == theirs


@pytest.mark.parametrize("plan", ["dp2", "tp2", "pp2"])
def test_outputs_of_the_whole_batch(plan):
    expected, found = run("of the whole batch", **PLANS[plan])
    for name, value in expected.items():
        close(found[name], value, 1e-9, 1e-12, f"{name} {plan}")
