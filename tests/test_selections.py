"""`x[mask]` under a loss: traced, exact against eager for loss and every gradient, also in parts of the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardplan.errors import NotTraceable
from shardplan.planner.export import trace_model
from shardplan.planner.placement import Mesh
from shardplan.planner.propagate import follow
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests.plans import random_plan

ROWS, TOKENS, DIM = 4, 6, 5

LOSSES = {
    "bce": lambda x, t, m: F.binary_cross_entropy_with_logits(x[m], (t[m] > 2).to(x.dtype).unsqueeze(-1) + 0 * x[m]),
    "binary": lambda x, t, m: F.binary_cross_entropy(x[..., :1][m].squeeze(-1).sigmoid(), (t[m] > 2).to(x.dtype)),
    "l1": lambda x, t, m: F.l1_loss(x[m], t[m].to(x.dtype).unsqueeze(1) + x.detach()[m]),
    "squares": lambda x, t, m: F.mse_loss(x[m], (x[m] * 2).detach()),
    "sum": lambda x, t, m: F.smooth_l1_loss(x[m], x[m].detach() + 1, reduction="sum"),
    "cross_entropy": lambda x, t, m: F.cross_entropy(x[m], t[m]),
    "some_ignored": lambda x, t, m: F.cross_entropy(x[m], t[m], ignore_index=3, label_smoothing=0.1),
    "mean": lambda x, t, m: (F.log_softmax(x[m], -1) ** 2 / 3).mean() + x[m].sum(),
    "select": lambda x, t, m: x.masked_select(m[..., None].expand_as(x)).square().mean(),
    "samples": lambda x, t, m: (lambda rows: F.mse_loss(rows, 2 * rows.detach()))(x[m[:, 0]]),
}
BEYOND = {
    "log": lambda x, t, m: x.sigmoid()[m].log().mean(),
    "order": lambda x, t, m: x[m].cumsum(0).mean(),
    "two masks": lambda x, t, m: x[m].sum() * x[~m].norm(),
    "size": lambda x, t, m: x[m].sum() / x[m].shape[0],
}


class Model(nn.Module):
    def __init__(self, loss) -> None:
        super().__init__()
        self.before, self.measure = nn.Linear(DIM, DIM), loss

    def forward(self, x, t):
        logits = self.before(x)
        return {"loss": self.measure(logits, t, t >= 0), "logits": logits}


def made(loss):
    torch.manual_seed(0)
    t = torch.randint(0, DIM, (ROWS, TOKENS))
    t[torch.rand(t.shape) < 0.4] = -100
    t[0, 0], t[1, 0], t[2, 0] = 1, -100, 2
    x = torch.randn(ROWS, TOKENS, DIM, dtype=torch.float64)
    return Model(loss).double(), {"x": x, "t": t}


def compare(model, batch, trace, plan):
    state = {n: v.detach().clone() for n, v in model.named_parameters()}
    found = run_program(compile(trace, plan), state, batch)
    model.zero_grad()
    loss = model(**batch)["loss"]
    loss.backward()
    torch.testing.assert_close(found.loss, loss.detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found.gradients[name], parameter.grad)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_selected_rows(name):
    model, batch = made(LOSSES[name])
    trace = trace_model(model, (), batch)
    assert "computed of all rows" in " ".join(trace.notes)
    for degrees in ({}, {"dp": 2}, {"tp": 2}):
        compare(model, batch, trace, random_plan(trace, **degrees, seed=0))


@pytest.mark.parametrize("name", ["squares", "sum", "cross_entropy", "samples"])
def test_microbatches(name):
    model, batch = made(LOSSES[name])
    trace = trace_model(model, (), batch)
    assert follow(trace, "mb", Mesh(("mb",), (2,))).reason is None
    compare(model, batch, trace, random_plan(trace, dp=2, microbatches=2, seed=0))


@pytest.mark.parametrize("name", BEYOND)
def test_what_needs_the_rows_themselves_is_refused(name):
    model, batch = made(BEYOND[name])
    with pytest.raises(NotTraceable, match="depends on the numbers"):
        trace_model(model, (), batch)


def test_rows_that_are_left_out_may_hold_anything():
    model, batch = made(lambda x, t, m: F.mse_loss(x.masked_fill(~m[..., None], float("inf"))[m], x[m].detach() + 1))
    trace = trace_model(model, (), batch)
    compare(model, batch, trace, random_plan(trace, seed=0))


def test_a_mean_of_many_rows_in_half_precision_does_not_overflow():
    model, batch = made(lambda x, t, m: F.mse_loss(x.bfloat16().half()[m] * 0 + 200, x.half()[m].detach() * 0))
    trace = trace_model(model, (), batch)
    found = run_program(
        compile(trace, random_plan(trace, seed=0)), {n: v.detach() for n, v in model.named_parameters()}, batch
    )
    torch.testing.assert_close(found.loss, torch.tensor(40000.0).half())
