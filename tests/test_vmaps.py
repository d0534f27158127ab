"""Models that call `torch.func.vmap`: the trace, and plans that split it, equal eager execution."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from shardplan.errors import NotTraceable
from shardplan.planner.export import trace_model
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests import models
from tests.plans import random_plan
from tests.test_trace import assert_same, trace_case

pytestmark = pytest.mark.timeout(60)


class PerSample(nn.Module):
    """A function of one sample, with parameters of the module, over the batch."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        def one(sample):
            y = F.softmax(self.norm(self.linear(sample)), -1)
            y = y.clone()
            y[0] += 1
            return y.outer(sample).sum(0), y

        return sum(vmap(one)(x))


class Elsewhere(nn.Module):
    """What is mapped over is elsewhere than in front."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.a(x).view(-1, 2, 4)
        rows = vmap(lambda row, other: row * other.sin(), in_dims=(2, 1))
        return self.b(x) + rows(h.flip(-1), x[:, :4, None]).transpose(0, 1).flatten(1)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return vmap(vmap(lambda a: a * a))(self.linear(x))


class Ensemble(nn.Module):
    """Several models as one with stacked parameters."""

    def __init__(self):
        super().__init__()
        members = [nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(4)]
        state, _ = stack_module_state(members)
        self.state = nn.ParameterDict({k.replace(".", "_"): nn.Parameter(v.detach()) for k, v in state.items()})
        self.names = {k.replace(".", "_"): k for k in state}
        self.member = [members[0].to("meta")]

    def forward(self, x):
        state = {self.names[k]: v for k, v in self.state.items()}
        return vmap(lambda s: functional_call(self.member[0], s, (x,)))(state).mean(0)


class Gradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return torch.func.grad(lambda x: self.linear(x).square().sum())(x)


@pytest.mark.parametrize("kind", [PerSample, Elsewhere, Nested, Ensemble])
def test_vmaps_equal_eager(kind):
    torch.manual_seed(0)
    case = models.Case(kind(), {"x": torch.randn(8, 8), "target": torch.randn(8, 8)}, F.mse_loss)
    trace = trace_case(case)
    assert_same(case, trace)
    eager = models.run_eager(case)
    for degrees in ({"dp": 2}, {"tp": 2}):
        program = compile(trace, random_plan(trace, **degrees))
        found = run_program(program, dict(case.model.named_parameters()), case.batch)
        torch.testing.assert_close(found.loss, eager.loss)
        for name, gradient in eager.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_other_transforms_are_refused():
    x = torch.randn(8, 8)
    with pytest.raises(NotTraceable):
        trace_model(Gradient(), (x,), loss_fn=F.mse_loss, target=x)
