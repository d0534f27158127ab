"""A model that draws random numbers computes the same under every plan: loss and every gradient, for a seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shardplan.planner.export import trace_model
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests.plans import random_plan

PLANS = {
    "dp2": {"dp": 2},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2xtp2": {"dp": 2, "tp": 2},
    "m2": {"microbatches": 2},
    "m4": {"microbatches": 4},
    "dp2 pp2 m2": {"dp": 2, "pp": 2, "microbatches": 2},
    "tp2 pp2 m4 recomputed": {"tp": 2, "pp": 2, "microbatches": 4, "rematerialize": True},
    "recomputed": {"rematerialize": True},
}


class Noisy(nn.Module):
    """Dropout in every form a layer may have it: on hidden states, inside attention, recurrent, of channels, noise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.gru = nn.GRU(16, 16, 2, dropout=0.3, batch_first=True)
        self.features = nn.Dropout1d(0.2)
        self.head = nn.Linear(16, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = self.layer(x)
        x = x + self.gru(x)[0]
        x = self.features(x) + 0.1 * torch.randn_like(x)
        gate = torch.empty_like(x[..., :1]).bernoulli_(0.8)
        logits = self.head(F.rrelu(x * gate, training=True))
        return F.gumbel_softmax(logits, tau=2.0)


def loss_of(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(y.clamp_min(1e-6).log().flatten(0, 1), target.flatten())


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    model = Noisy().double().train()
    ids = torch.randint(0, 32, (8, 6))
    target = torch.randint(0, 32, (8, 6))
    trace = trace_model(model, (ids,), {}, loss_fn=loss_of, target=target)
    state = {k: v.detach().clone() for k, v in model.state_dict(keep_vars=True).items()}
    named = {"ids": ids, "target": target}
    batch = {s.name: named[s.name] for s in trace.sources.values() if s.kind == "input"}

    def run(seed: int = 0, **plan):
        if plan.get("rematerialize"):
            plan["rematerialize"] = [s.name for s in trace.segments]
        return run_program(compile(trace, random_plan(trace, **plan)), state, batch, seed=seed)

    return run


@pytest.fixture(scope="module")
def alone(traced):
    return traced()


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_draws_the_same(traced, alone, name):
    found = traced(**PLANS[name])
    torch.testing.assert_close(found.loss, alone.loss, rtol=1e-10, atol=1e-12)
    for parameter, gradient in alone.gradients.items():
        torch.testing.assert_close(found.gradients[parameter], gradient, rtol=1e-8, atol=1e-12, msg=parameter)


def test_another_seed_draws_others(traced, alone):
    other, again = traced(seed=1, dp=2), traced()
    assert torch.equal(again.loss, alone.loss)
    assert float((other.loss - alone.loss).abs()) > 1e-3
