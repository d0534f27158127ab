"""Models of rarer ops, some of which no rule was written for: any plan computes what one device computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shardplan.planner.cluster import Cluster
from shardplan.planner.export import trace_model
from shardplan.planner.placement import Mesh
from shardplan.planner.plan import Plan
from shardplan.planner.propagate import follow
from shardplan.planner.rules import has_rule, is_discovered
from shardplan.planner.search import SolveOptions, solve
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests.plans import random_plan
from tests.prices import SimplePrices
from tests.test_discovery import custom

MESHES = ({"dp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 2, "tp": 2})
BATCH, LENGTH, WIDTH = 8, 6, 16


@custom
def gated_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = x * torch.sigmoid(gate)
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


@custom
def spread(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.cumsum(1), x.logsumexp(1)


class Custom(nn.Module):
    """Ops that a user registered."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 1)
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, gate = self.up(self.embed(ids)).chunk(2, -1)
        y, z = torch.ops.discovery.spread(torch.ops.discovery.gated_norm(x, gate, self.weight))
        return self.down(y + z.unsqueeze(1)).pow(2).mean()


class Pooled(nn.Module):
    """Bags of embeddings, and the last token of every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 4)
        self.bag, self.sums = nn.EmbeddingBag(32, WIDTH), nn.EmbeddingBag(32, WIDTH, mode="sum")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.head(self.embed(ids) + (self.bag(ids) + self.sums(ids))[:, None])
        last = (ids != 0).long().sum(-1).clamp(min=1) - 1
        return F.cross_entropy(hidden[torch.arange(ids.shape[0]), last], ids[:, 0] % 4)


class Spectral(nn.Module):
    """Fourier mixing over positions and features, and a Cholesky factor per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.filter = nn.Parameter(torch.randn(WIDTH))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = torch.fft.fft2(x, norm="ortho").real + x
        x = torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.filter, n=LENGTH, dim=1)
        x = self.head(x)
        gram = x @ x.mT + 2 * torch.eye(LENGTH, dtype=x.dtype)
        return torch.linalg.cholesky(gram).diagonal(dim1=-2, dim2=-1).log().sum(-1).mean()


def made(kind):
    torch.manual_seed(0)
    model = kind().double()
    ids = torch.randint(1, 32, (BATCH, LENGTH))
    ids[torch.arange(LENGTH) >= torch.randint(1, LENGTH + 1, (BATCH, 1))] = 0
    return model, {"ids": ids}


@pytest.mark.parametrize("degrees", MESHES, ids=lambda d: "x".join(f"{k}{v}" for k, v in d.items()))
@pytest.mark.parametrize("kind", [Custom, Pooled, Spectral])
def test_random_plans_match_one_device(kind, degrees):
    model, batch = made(kind)
    loss = model(**batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    trace = trace_model(model, (), batch)
    state = {name: value.detach().clone() for name, value in model.state_dict(keep_vars=True).items()}
    for seed in range(2):
        program = compile(trace, random_plan(trace, **degrees, microbatches=1 + seed, seed=seed))
        result = run_program(program, state, batch)
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-9, atol=1e-12)
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("kind", [Custom, Pooled, Spectral])
@pytest.mark.parametrize("axis", ["mb", "dp"])
def test_the_batch_is_split_all_the_way(kind, axis):
    model, batch = made(kind)
    trace = trace_model(model, (), batch)
    bare = [str(node.target) for node in trace.nodes() if not has_rule(node)]
    assert not bare
    if kind is Custom:
        assert sum(is_discovered(node) for node in trace.nodes()) == 2
    found = follow(trace, axis, Mesh((axis,), (4,)))
    assert found.reason is None
    whole = [n for n, s in found.strategies.items() if not s.is_split and n not in trace.shared]
    assert not [n for n in whole if trace.node(n).op == "call_function"], whole


@torch.library.custom_op("discovery::elsewhere", mutates_args=())
def elsewhere(x: torch.Tensor) -> torch.Tensor:
    """Has no kernel for the devices that there are."""
    raise NotImplementedError("made for another device")


elsewhere.register_fake(torch.empty_like)
elsewhere.register_autograd(lambda ctx, g: g)


class Elsewhere(Custom):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, gate = torch.ops.discovery.elsewhere(self.up(self.embed(ids))).chunk(2, -1)
        y, z = torch.ops.discovery.spread(torch.ops.discovery.gated_norm(x, gate, self.weight))
        return self.down(y + z.unsqueeze(1)).pow(2).mean()


def test_the_plan_says_what_was_discovered_and_what_could_not_be():
    """An op that cannot be run is replicated and listed, with its share of the time and the reason."""
    model, batch = made(Elsewhere)
    cluster = Cluster.cpu(2, "8 GiB")
    plan = solve(trace_model(model, (), batch), cluster, SimplePrices(cluster), SolveOptions())
    (bare,) = plan.replicated_ops
    assert bare[:2] == ("discovery.elsewhere", 1) and 0 < bare[2] <= 1
    assert bare[3] == "made for another device"
    assert {op: nodes for op, nodes, _ in plan.discovered_ops} == {"discovery.gated_norm": 1, "discovery.spread": 1}
    text = str(plan)
    assert "discovery.elsewhere" in text and "made for another device" in text and "S(0) S(0) D -> S(0)" in text
    assert Plan.from_json(plan.to_json()) == plan
