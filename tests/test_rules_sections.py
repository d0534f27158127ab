"""Fused projections are split on every tensor from the parameter to the op that takes them apart, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardplan.planner.export import trace_model
from shardplan.planner.placement import D, Mesh, P, R, S, conversion, fits
from shardplan.planner.rules import Strategy, strategies
from shardplan.planner.trace import Trace, info, is_tensor, needs_grad, resolve, tensor_args
from tests import models

MESH = Mesh(("tp",), (2,))


class Gated(nn.Module):
    """A gated mlp with one fused matrix; how it is taken apart differs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.up(x)
        if self.how == "slice":
            gate, value = both[..., :16], both[..., 16:]
        elif self.how == "chunk":
            gate, value = both.chunk(2, -1)
        elif self.how == "split":
            gate, value = both.split([16, 16], -1)
        else:
            gate, value = both.unflatten(-1, (2, 16)).unbind(-2)
        return self.down(nn.functional.silu(gate) * value)


class Attention(nn.Module):
    """Self-attention over a fused projection; how it is taken apart differs."""

    def __init__(self, how: str, heads: int = 4, grouped: int = 4) -> None:
        super().__init__()
        self.how, self.heads, self.grouped = how, heads, grouped
        self.qkv = nn.Linear(16, 4 * (heads + 2 * grouped))
        self.out = nn.Linear(4 * heads, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        fused = self.qkv(x)
        if self.how == "view":
            q, k, v = fused.view(batch, length, 3, self.heads, 4).permute(2, 0, 3, 1, 4)
        else:
            sizes = [4 * self.heads, 4 * self.grouped, 4 * self.grouped]
            q, k, v = (part.view(batch, length, -1, 4).transpose(1, 2) for part in fused.split(sizes, -1))
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.grouped != self.heads
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


def traced(model: nn.Module, width: int) -> Trace:
    return trace_model(
        model,
        (torch.randn(4, 6, width),),
        {},
        loss_fn=lambda y, t: ((y - t) ** 2).sum(),
        target=torch.randn(4, 6, width),
    )


def free_split(trace: Trace, wanted: dict[str, str]) -> dict[str, Strategy]:
    """A choice of strategies with these placements of parameters in which nothing is converted but summands are added
    up and replicated values read by split compute. Raises AssertionError where there is none."""
    chosen: dict[str, Strategy] = {}

    def state(value):
        maker, index = resolve(value)
        return chosen[maker.name].outputs[index]

    def price(node, strategy) -> float:
        total = 0.0
        for argument, placement in zip(tensor_args(node), strategy.inputs, strict=True):
            step = conversion(state(argument), placement, needs_grad(argument))
            if state(argument).is_shard and state(argument) != placement:
                return float("inf")
            if placement.is_shard and not state(argument).is_shard:
                return float("inf")
            total += 1.0 * (step.forward == "all_reduce") + 0.1 * (step.backward == "all_reduce")
        return total

    for node in trace.nodes():
        if node.op == "placeholder":
            name = trace.sources[node.name].name
            options = {str(s.outputs[0]): s for s in strategies(node)}
            chosen[node.name] = options[wanted.get(name, "R")]
        elif node.op == "call_function" and resolve(node)[0] is node:
            shapes = [info(a).shape for a in tensor_args(node)]
            legal = [
                s for s in strategies(node) if all(fits(z, (p,), MESH) for z, p in zip(shapes, s.inputs, strict=True))
            ]
            best = min(legal, key=lambda s: (price(node, s), any(p == P for p in s.outputs)))
            assert price(node, best) < float("inf"), f"{node.name} {[str(state(a)) for a in tensor_args(node)]}"
            chosen[node.name] = best
    return chosen


def reductions(trace: Trace, chosen: dict[str, Strategy]) -> int:
    """Forward all-reduces."""
    count = 0
    for node in trace.nodes():
        if node.op == "call_function" and resolve(node)[0] is node:
            for argument, placement in zip(tensor_args(node), chosen[node.name].inputs, strict=True):
                maker, index = resolve(argument)
                count += conversion(chosen[maker.name].outputs[index], placement).forward == "all_reduce"
    return count


@pytest.mark.parametrize("how", ["chunk", "split", "slice", "unbind"])
def test_gated(how):
    trace = traced(Gated(how), 8)
    fused = str(S(0, (16, 16)))
    chosen = free_split(trace, {"up.weight": fused, "up.bias": fused, "down.weight": "S(1)", "down.bias": "R"})
    assert reductions(trace, chosen) == 1


@pytest.mark.parametrize("how, grouped", [("split", 4), ("split", 2), ("view", 4)])
def test_attention(how, grouped):
    trace = traced(Attention(how, grouped=grouped), 16)
    fused = str(S(0, (16, 4 * grouped, 4 * grouped)))
    chosen = free_split(trace, {"qkv.weight": fused, "qkv.bias": fused, "out.weight": "S(1)", "out.bias": "R"})
    assert reductions(trace, chosen) == 1


@pytest.mark.parametrize("name", ["gpt2", "encoder"])
def test_models_have_fused_parameters(name):
    """GPT-2's Conv1D and the fused projection of nn.MultiheadAttention."""
    case = models.make(name)
    trace = trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)
    found = {}
    for parameter, node in trace.parameters().items():
        sections = {p.sections for s in strategies(node) for p in s.outputs if p.sections}
        if sections:
            found[parameter] = sections
    attention = [p for p in found if "c_attn" in p or "in_proj" in p]
    layers = 2
    assert len(attention) == 2 * layers, f"{sorted(found)}"
    for parameter in attention:
        assert any(len(s) == 3 and len(set(s)) == 1 for s in found[parameter])


def test_sections_stay_where_they_are_wanted():
    trace = traced(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), 8)
    for node in trace.nodes():
        if node.op != "output" and is_tensor(node):
            assert not any(p.sections for s in strategies(node) for p in (*s.inputs, *s.outputs)), node.name


def test_strategies_are_few_and_parse_back():
    for name in ("llama", "gpt2", "encoder"):
        case = models.make(name)
        trace = trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)
        for node in trace.nodes():
            found = strategies(node)
            assert len(found) <= 16, f"{node.name}: {[str(s) for s in found]}"
            assert all(Strategy.parse(str(s)) == s for s in found)
            if found:
                assert all(p == R for p in (*found[0].inputs, *found[0].outputs))
            assert not any(p == D for s in found if not needs_grad(node) for p in s.outputs)
