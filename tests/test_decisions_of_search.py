"""Schedules and the order of ranks as decisions: against enumeration, by execution, and as asked for."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardplan.errors import ConflictingConstraints, NotSupported
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees, memory, pin, within_node
from shardplan.planner.export import trace_model
from shardplan.planner.plan import Plan
from shardplan.planner.report import render_text
from shardplan.planner.schedules import KINDS
from shardplan.planner.search import SolveOptions, solve
from shardplan.planner.search.scheduling import Way, cut
from shardplan.planner.search.stage_ilp import Column, StageProblem
from shardplan.rewrite import compile as compile_program
from shardplan.rewrite.reference import run_program
from tests.prices import SimplePrices


class Deep(nn.Module):
    """Blocks in a row."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
                                    for _ in range(blocks))  # fmt: skip

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return F.mse_loss(x, y)


@cache
def deep(blocks: int = 8, width: int = 16, rows: int = 16):
    torch.manual_seed(0)
    model = Deep(blocks, width).double()
    batch = {"x": torch.randn(rows, width).double(), "y": torch.randn(rows, width).double()}
    return model, batch, trace_model(model, (), batch)


def planned(cluster: Cluster, *constraints, blocks: int = 8, width: int = 16, rows: int = 16, **options) -> Plan:
    trace = deep(blocks, width, rows)[2]
    return solve(trace, cluster, SimplePrices(cluster), SolveOptions(constraints=constraints, **options))


CPUS = Cluster.cpu(4).slower_links(0.01)
PIPELINE = degrees(pp=4, dp=1, tp=1)


@cache
def of_kind(schedule: str, microbatches: int) -> Plan:
    return planned(CPUS, PIPELINE, schedule=schedule, microbatches=microbatches)


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_the_fastest_schedule_is_chosen_and_one_that_is_asked_for_is_kept(microbatches):
    plans = {kind: of_kind(kind, microbatches) for kind in KINDS}
    auto = of_kind("auto", microbatches)
    for kind, plan in plans.items():
        assert plan.schedule == kind and plan.microbatches == microbatches
        assert plan.chunks == (1 if kind in ("gpipe", "1f1b", "zb") else len(plan.stages) // 4)
        assert auto.status.lower_bound <= plan.step_seconds * (1 + 1e-9)
        assert len(plan.memory()) == 4 and all(m.peak_nbytes <= m.limit for m in plan.memory())
    assert auto.step_seconds <= min(plan.step_seconds for plan in plans.values()) * (1 + 1e-9)
    assert auto.schedule in ("zb", "zbv", "interleaved"), "a deep pipeline with few microbatches stands idle"
    assert auto.step_seconds < 0.95 * plans["1f1b"].step_seconds
    text = render_text(auto)
    assert auto.schedule in text and Plan.from_json(auto.to_json()) == auto


@pytest.mark.parametrize("kind", ["zb", "interleaved", "zbv"])
def test_plans_of_every_schedule_compute_what_one_device_computes(kind):
    model, batch, trace = deep()
    model.zero_grad()
    loss = model(**batch)
    loss.backward()
    plan = of_kind(kind, 4)
    state = dict(model.named_parameters())
    result = run_program(compile_program(trace, plan), {k: v.detach() for k, v in state.items()}, batch)
    assert torch.allclose(result.loss, loss, rtol=1e-12)
    for name, parameter in state.items():
        assert torch.allclose(result.gradients[name], parameter.grad, rtol=1e-9, atol=1e-14), name


def test_memory_decides_between_schedules():
    free = of_kind("auto", 4)
    least = of_kind("1f1b", 4)
    limit = max(m.peak_nbytes for m in least.memory())
    assert limit < max(m.peak_nbytes for m in free.memory())
    tight = planned(CPUS, PIPELINE, memory(limit), microbatches=4)
    assert all(m.peak_nbytes <= limit for m in tight.memory())
    assert free.step_seconds <= tight.step_seconds <= least.step_seconds * (1 + 1e-9)


def test_what_a_schedule_needs():
    with pytest.raises(ConflictingConstraints):
        planned(CPUS, degrees(pp=1), schedule="interleaved")
    with pytest.raises(ConflictingConstraints):
        planned(CPUS, PIPELINE, blocks=4, schedule="zbv")
    mixed = Cluster.parse({"h100": 2, "a10g": 2})
    with pytest.raises(NotSupported, match="unequal devices"):
        planned(mixed, schedule="zbv")
    pinned = planned(CPUS, PIPELINE, pin("blocks.7", stage=3), schedule="interleaved", microbatches=4, blocks=16)
    assert any("blocks.7" in name for name in pinned.stages[3].blocks)


def test_cuts_against_enumeration():
    column = (Column(price=None),)  # type: ignore[arg-type]
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        count = int(torch.randint(4, 9, (1,), generator=generator))
        seconds = (torch.rand(count, generator=generator) + 0.1).tolist()
        pinned = ((int(torch.randint(0, count, (1,), generator=generator)), 1),) if seed % 3 == 0 else ()
        problem = StageProblem((column,) * count, 2, 1, (), (), (), (), pinned=pinned)
        best = math.inf
        for inner in itertools.combinations(range(1, count), 3):
            edges = (0, *inner, count)
            if all(edges[home] <= segment < edges[home + 1] for segment, home in pinned):
                best = min(best, max(sum(seconds[a:b]) for a, b in itertools.pairwise(edges)))
        bounds = cut(problem, seconds, Way("interleaved", 2, 0.5), 2)
        if bounds is None:
            assert best == math.inf
            continue
        edges = (*bounds, count)
        stages = [sum(seconds[a:b]) for a, b in itertools.pairwise(edges)]
        assert len(stages) == 4 and min(b - a for a, b in itertools.pairwise(edges)) > 0
        assert all(edges[home] <= segment < edges[home + 1] for segment, home in pinned)
        assert max(stages[0] + stages[2], stages[1] + stages[3]) <= 2 * best + 1e-9


NODES = """
schema = 1
[device.small]
torch_device = "cpu"
memory = "1 GB"
memory_bandwidth = "10 GB/s"
fp32 = "0.02 TFLOP/s"
[[node]]
count = 2
devices = "2 x small"
[link.node]
bandwidth = "10 GB/s"
latency = "1 us"
[link.cluster]
bandwidth = "BANDWIDTH GB/s per device"
latency = "20 us"
"""


def test_a_pipeline_lies_inside_a_node_where_activations_are_larger_than_parameters(tmp_path):
    def on(bandwidth: str, *constraints, **options) -> Plan:
        (tmp_path / "nodes.toml").write_text(NODES.replace("BANDWIDTH", bandwidth))
        cluster = Cluster.parse(str(tmp_path / "nodes.toml"))
        shape = {"width": 4, "rows": 4096, "microbatches": 4, "zero": 0}
        return planned(cluster, degrees(pp=2, dp=2, tp=1), *constraints, **shape, **options)

    slow = on("0.0001")
    assert [stage.ranks for stage in slow.stages[:2]] == [(0, 2), (1, 3)], "neighbours share a node"
    pinned = on("0.0001", within_node("dp"))
    assert [stage.ranks for stage in pinned.stages[:2]] == [(0, 1), (2, 3)]
    assert slow.step_seconds < pinned.step_seconds
    model, batch, trace = deep(8, 4, 4096)
    result = run_program(compile_program(trace, slow), {k: v.detach() for k, v in model.named_parameters()}, batch)
    assert torch.allclose(result.loss, model(**batch).detach(), rtol=1e-12)


def test_replicas_inside_a_node(tmp_path):
    (tmp_path / "nodes.toml").write_text(NODES.replace("BANDWIDTH", "1"))
    cluster = Cluster.parse(str(tmp_path / "nodes.toml"))
    plan = planned(cluster, degrees(dp=2, tp=2, pp=1), within_node("dp"))
    assert plan.stages[0].ranks == (0, 2, 1, 3), "rows of replicas: dp runs through a node"
    with pytest.raises(ConflictingConstraints):
        planned(cluster, degrees(dp=2, tp=2, pp=1), within_node("dp"), within_node("tp"))


def test_rounded_sums_are_priced():
    """Where the user allows it: a quarter of the bytes of float64, or the sums of every fourth step."""
    cluster = Cluster.cpu(2)
    shape = degrees(dp=2, tp=1, pp=1)
    exact, rounded, rarely = (
        planned(cluster, shape, width=256, zero=0, microbatches=1, **more)
        for more in ({}, {"reduction": "bf16"}, {"average_every": 4})
    )
    sums = [sum(seconds for _, seconds in plan.stages[0].reductions) for plan in (exact, rounded, rarely)]
    assert sums[1] < 0.75 * sums[0] and sums[2] == pytest.approx(sums[0] / 4)
    assert rounded.step_seconds < exact.step_seconds
