"""`shardplan.rule`: rules that users write for operators of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardplan as sp
from shardplan.errors import UsageError
from shardplan.planner.export import trace_model
from shardplan.planner.rules import families, is_discovered, strategies
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests.plans import random_plan


@torch.library.custom_op("ownrules::scale", mutates_args=())
def scale(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return x * by


@scale.register_fake
def _(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


scale.register_autograd(
    lambda ctx, grad: (grad * ctx.saved_tensors[1], (grad * ctx.saved_tensors[0]).sum(0)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.by, self.down = nn.Linear(8, 16), nn.Parameter(torch.rand(16)), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(scale(self.up(x), self.by)).square().mean()


@pytest.fixture
def rules():
    before = dict(families.RULES)
    yield
    families.RULES.clear()
    families.RULES.update(before)


def test_a_written_rule_splits_an_operator_and_computes_the_same(rules):
    sp.rule("ownrules::scale", "b n, n -> b n")
    torch.manual_seed(0)
    model, x = Scaled().double(), torch.randn(4, 8).double()
    trace = trace_model(model, (x,), {})
    (node,) = (n for n in trace.nodes() if "scale" in str(n.target))
    assert not is_discovered(node) and {s.name for s in strategies(node)} >= {"-", "b", "n"}
    loss = model(x)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    names = [source.name for source in trace.sources.values() if source.kind == "input"]
    for degrees in ({"dp": 2}, {"tp": 2}):
        result = run_program(compile(trace, random_plan(trace, **degrees, seed=1)), state, {names[0]: x})
        assert result.loss is not None and result.loss.item() == pytest.approx(loss.item())
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(result.gradients[name], gradient)


def test_the_operator_itself_names_it(rules):
    sp.rule(scale, "... n, n -> ... n", sums="")
    assert torch.ops.ownrules.scale.default in families.RULES


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("ownrules::nothing", "b -> b"), "there is no operator"),
        (("nothing", "b -> b"), "there is no operator"),
        (("ownrules::scale", "b n, n"), "cannot read the rule"),
        (("ownrules::scale", "b n, n -> b n", "k"), "cannot read the rule"),
    ],
)
def test_what_cannot_be_a_rule(rules, arguments, words):
    with pytest.raises(UsageError, match=words):
        sp.rule(*arguments)


def test_a_rule_that_does_not_fit_the_tensors_says_what_they_are(rules):
    sp.rule("ownrules::scale", "b n m, n -> b n m")
    trace = trace_model(Scaled(), (torch.randn(4, 8),), {})
    (node,) = (n for n in trace.nodes() if "scale" in str(n.target))
    with pytest.raises(UsageError, match="does not fit") as caught:
        strategies(node)
    assert "[2, 1] dims" in str(caught.value)
