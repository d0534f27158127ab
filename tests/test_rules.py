"""Every dimension rule, by execution: forward and backward, for all gradients, frozen weights and no gradients."""

from __future__ import annotations

import pytest
import torch

from shardplan.planner.placement import Mesh
from shardplan.planner.rules import has_rule, strategies
from tests.execution import can_run, op_of, verify
from tests.rule_cases import CASES, Recipe, build

aten = torch.ops.aten


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")  # torch's own mse backward
@pytest.mark.parametrize("names, target, args, kwargs", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_rule(names, target, args, kwargs):
    torch.manual_seed(0)
    made: dict[Recipe, torch.Tensor] = {}
    args, kwargs = build(args, made), build(kwargs, made)
    op = op_of(target, *args, **kwargs)
    assert has_rule(op.node)
    found = strategies(op.node)
    assert str(found[0]).startswith("-: ")
    assert len(set(map(str, found))) == len(found)
    missing = set(names.split()) - {s.name for s in found}
    assert not missing, f"no strategy {missing} among {[str(s) for s in found]}"
    count = len(op.values)
    for grads in dict.fromkeys([None, tuple(k == 0 for k in range(count)), (False,) * count]):
        op = op_of(target, *args, grads=grads, **kwargs)
        for strategy in strategies(op.node, inner=True):
            for size in (2, 4) if grads is None else (2,):
                mesh = Mesh(("tp",), (size,))
                if can_run(op, {"tp": strategy}, mesh):
                    verify(op, {"tp": strategy}, mesh)
