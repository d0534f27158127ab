"""Mixtures of experts as one op (`planner.mixture`): found in graphs, split by execution, run as planned."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import fx, nn

from shardplan.planner.costs import mixtures as costs
from shardplan.planner.export import trace_model
from shardplan.planner.mixture import MIXTURE, by_expert, is_mixture, is_product, parse_steps, run, run_own, steps_text
from shardplan.planner.placement import Mesh, P, S
from shardplan.planner.rules import local_call, strategies
from tests.execution import op_of, verify


@pytest.fixture(autouse=True)
def library():
    """Registers the op. Not in the model: classes of a library that is first imported while a graph is traced are not
    known as containers of tensors afterwards, and outputs of other tests would be lost."""
    importlib.import_module("transformers.integrations.moe")


HIDDEN, INNER, EXPERTS, CHOICES = 8, 16, 4, 2


def grouped(rows: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """PyTorch's traces in bfloat16 only; this is what libraries use for float32."""
    return torch.ops.transformers.grouped_mm_fallback(rows, weights, offs)


class Experts(nn.Module):
    """Written with plain torch: argsort, bincount-free ends, products of groups, a bias an expert, and the way back."""

    def __init__(self, bias: bool = False, put_back: str = "argsort") -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.3)
        self.bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN)) if bias else None
        self.put_back = put_back

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, chosen = self.router(tokens).softmax(-1).topk(CHOICES, -1)
        ids = chosen.reshape(-1)
        ordered, order = torch.sort(ids)
        ends = torch.cumsum(torch.histc(ordered.float(), EXPERTS, 0, EXPERTS - 1), 0, dtype=torch.int32)
        rows = tokens[order // CHOICES]
        gate, up = grouped(rows, self.gate_up.mT, offs=ends).chunk(2, -1)
        made = grouped(torch.nn.functional.silu(gate) * up, self.down.mT, offs=ends)
        if self.bias is not None:
            made = made + self.bias[ordered]
        made = made * weights.reshape(-1)[order].unsqueeze(-1)
        if self.put_back == "argsort":
            back = torch.argsort(order)
        else:
            back = torch.empty_like(order)
            back[order] = torch.arange(order.shape[0])
        return made[back].view(-1, CHOICES, HIDDEN).sum(1).reshape(x.shape)


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.experts = Experts(**options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.experts(x)).square().mean()


def traced(**options):
    torch.manual_seed(0)
    model, x = Model(**options), torch.randn(8, 4, HIDDEN)
    return trace_model(Wrapped(model), (x,), {})


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.model(x)}


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"put_back": "index"}], ids=str)
def test_is_found_and_says_how_it_splits(options):
    trace = traced(**options)
    (node,) = [n for n in trace.nodes() if is_mixture(n)]
    assert not any("sort" in n.name for n in trace.nodes())
    names = {strategy.name: strategy for strategy in strategies(node)}
    held = node.args[5]
    assert len(held) == 2 + ("bias" in options)
    assert by_expert(node.args[0]) == set(range(len(held)))
    assert all(p == S(0) for p in names["e"].inputs[-len(held) :]) and names["e"].outputs == (P,)
    assert ("h" in names) == ("bias" not in options)  # a bias is no summand behind a split product
    assert steps_text(parse_steps(node.args[0])) == node.args[0]


def op(bias: bool = False):
    trace = traced(bias=bias)
    (node,) = [n for n in trace.nodes() if is_mixture(n)]
    torch.manual_seed(1)
    ids = torch.randint(0, EXPERTS, (16,))
    rows = [torch.randn(8, HIDDEN), torch.randn(16)]
    held = [torch.randn(EXPERTS, 2 * INNER, HIDDEN).mT, torch.randn(EXPERTS, HIDDEN, INNER).mT]
    held += [torch.randn(EXPERTS, HIDDEN)] if bias else []
    order = {tuple(t.shape[1:]): i for i, t in enumerate(rows)}
    given = [rows[order[tuple(a.meta["val"].shape[1:])]] for a in node.args[4]]
    weights = [next(h for h in held if h.shape == a.meta["val"].shape) for a in node.args[5]]
    return op_of(MIXTURE, node.args[0], EXPERTS, list(node.args[2]), ids, given, weights)


@pytest.mark.parametrize("bias", [False, True])
def test_every_split_is_exact(bias):
    case = op(bias)
    for strategy in strategies(case.node):
        verify(case, {"tp": strategy}, Mesh(("tp",), (2,)))
    by_name = {s.name: s for s in strategies(case.node)}
    for inner in ("e", "a", "h"):
        if inner in by_name:
            verify(case, {"dp": by_name["t"], "tp": by_name[inner]}, Mesh(("dp", "tp"), (2, 2)))


def test_an_expert_that_nobody_chose():
    case = op()
    steps, experts, fans = case.node.args[:3]
    ids = torch.full((16,), 1)
    rows, held = case.values[1:3], [v.detach().requires_grad_() for v in case.values[3:]]
    whole = run(steps, experts, fans, ids, rows, held)
    parts = [run_own(steps, first, 2, fans, ids, rows, [h[first : first + 2] for h in held]) for first in (0, 2)]
    torch.testing.assert_close(sum(parts), whole)
    sum(part.sum() for part in parts).backward()
    assert all(h.grad is not None and not h.grad[2:].any() for h in held)


class Leaky(Experts):
    """Rows that read their neighbours: sorted order is part of the result."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, HIDDEN)
        ids = self.router(tokens).argmax(-1)
        ordered, order = torch.sort(ids)
        ends = torch.cumsum(torch.histc(ordered.float(), EXPERTS, 0, EXPERTS - 1), 0, dtype=torch.int32)
        made = grouped(tokens[order].cumsum(0), self.gate_up.mT, offs=ends)
        return made[torch.argsort(order)].reshape(*x.shape[:-1], -1)


def test_what_is_none_stays_as_it_is():
    model = Model()
    model.experts = Leaky()
    model.forward = lambda x: model.experts(x).square().mean()
    trace = trace_model(Wrapped(model), (torch.randn(8, 4, HIDDEN),), {})
    assert not any(is_mixture(n) for n in trace.nodes())


def test_parts_of_the_experts_take_their_part():
    trace = traced()
    (node,) = [n for n in trace.nodes() if is_mixture(n)]
    names = {s.name: s for s in strategies(node)}
    mesh = Mesh(("tp",), (4,))
    whole, own, sent, inner = (local_call(node, {"tp": names[n]}, mesh) for n in ("-", "e", "a", "h"))

    def products(call):
        return [part for part in costs.parts(call) if is_product(part.target)]

    assert [p.inputs[0].shape[0] for p in products(whole)] == [64, 64]
    assert [p.inputs[0].shape[0] for p in products(own)] == [16, 16]
    assert [p.inputs[0].shape[0] for p in products(sent)] == [16, 16]
    assert [p.inputs[1].shape for p in products(sent)] == [p.inputs[1].shape for p in products(own)]
    # Rows of 8 and a weight of 4 bytes a number, the id; 8 numbers come back.
    assert costs.sent_nbytes(sent) == (16 * (8 + 4 * 8 + 4), 16 * 4 * 8)
    assert [p.inputs[1].shape for p in products(inner)] == [(4, 8, 8), (4, 4, 8)]
    assert costs.kept_nbytes(own) * 4 == costs.kept_nbytes(whole) > costs.kept_nbytes(inner)


def test_graph_is_plain_data():
    trace = traced()
    assert isinstance(trace.graph, fx.Graph)
    (node,) = [n for n in trace.nodes() if is_mixture(n)]
    assert all(isinstance(a, (str, int, list, tuple, fx.Node)) for a in node.args)
