"""The three plan moves on prices measured and recorded by ``benchmarks/plan_moves.py --record tests/recorded``: a link
that pays, one 100 times slower, and a memory limit that one device cannot keep."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees, memory
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.costs.recorded import RecordedCosts
from shardplan.planner.export import trace_model
from shardplan.planner.plan import Plan
from shardplan.planner.search import SolveOptions, solve

HERE = Path(__file__).resolve().parent


def token_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


@cache
def traced():
    example = runpy.run_path(str(HERE.parent / "examples" / "train_byte_gpt.py"))
    ids = torch.randint(256, (8, 128))
    return trace_model(example["ByteGPT"](layers=6), (ids,), loss_fn=token_loss, target=ids)


@cache
def prices(name: str) -> RecordedCosts:
    """As recorded; what a search asks besides is modelled."""
    cluster = Cluster.cpu(2, "8 GiB")
    links = LinkModel(cluster.slower_links(100) if name == "slow" else cluster, None)
    rest = CostModel(cluster, links, None, measure=False)
    return RecordedCosts.parse((HERE / "recorded" / f"plan_moves_{name}.json").read_text(), rest)


def planned(name: str, *constraints) -> Plan:
    return solve(traced(), Cluster.cpu(2, "8 GiB"), prices(name), SolveOptions(constraints=constraints))


def used(plan: Plan) -> int:
    return sum(len(stage.ranks) for stage in plan.stages)


def test_a_link_that_pays_is_used_and_a_slow_one_is_not():
    fast, slow = planned("measured"), planned("slow")
    assert used(fast) == 2
    assert [s.ranks for s in fast.stages] != [s.ranks for s in slow.stages]
    single = planned("measured", degrees(dp=1, tp=1, pp=1))
    assert fast.step_seconds < single.step_seconds
    if used(slow) == 2:
        assert slow.step_seconds < single.step_seconds
    else:
        same = next(b for b in slow.baselines if b.name == "single device")
        assert slow.step_seconds == pytest.approx(same.seconds)


def test_a_memory_limit_below_one_device_moves_the_plan():
    held = planned("measured", degrees(dp=1, tp=1, pp=1)).memory()[0]
    limit = (held.parameters + held.gradients + held.optimizer) * 9 // 10
    plan = planned("measured", memory(limit))
    assert used(plan) == 2
    assert all(0 < m.peak_nbytes <= limit for m in plan.memory())
    assert plan.stages != planned("measured").stages
