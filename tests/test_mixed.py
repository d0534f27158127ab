"""Unequal devices: the stage program against all choices one by one, plans, constraints, exactness; forward only."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from shardplan.errors import NoFeasiblePlan
from shardplan.planner.cluster import Cluster, Device, DeviceKind, Link, Wiring
from shardplan.planner.constraints import degrees, memory, pin, split, together, within_node
from shardplan.planner.export import trace_model
from shardplan.planner.plan import Plan
from shardplan.planner.search import SolveOptions, solve
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests import models
from tests.brute_force import difference
from tests.prices import KindPrices
from tests.test_reference import batch_of, compare


@pytest.mark.parametrize("seed", range(12))
def test_program_against_all_choices(seed):
    assert difference(seed) in (None, "infeasible")


def kind(name: str, speed: float, nbytes: int = 1 << 30) -> DeviceKind:
    return DeviceKind(name, "cpu", nbytes, 1e9 * speed, {"fp32": 2e9 * speed})


def cluster_of(*nodes: tuple[DeviceKind, int], inside: float = 1e9, between: float = 1e9) -> Cluster:
    devices = tuple(Device(kind, node) for node, (kind, count) in enumerate(nodes) for _ in range(count))
    return Cluster(devices, tuple(Wiring(Link(inside, 1e-6), Link(between, 2e-6)) for _ in nodes))


FAST, SLOW = kind("fast", 3.0), kind("slow", 1.0)


@cache
def job():
    case = models.make("bytegpt")
    case.model.double()
    state = {k: v.detach().clone() for k, v in case.model.state_dict(keep_vars=True).items()}
    state |= {k: v.detach().clone() for k, v in case.model.named_buffers()}
    trace = trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)
    return case, trace, models.run_eager(case), state


def planned(cluster: Cluster, *constraints, **options) -> Plan:
    return solve(job()[1], cluster, KindPrices(cluster), SolveOptions(constraints=constraints, **options))


@pytest.mark.parametrize(
    "nodes, stages, microbatches",
    [(((FAST, 1), (SLOW, 2)), 2, 2), (((SLOW, 2), (FAST, 2)), 2, 1), (((SLOW, 1), (FAST, 1), (SLOW, 2)), 3, 2)],
)
def test_plans_of_unequal_devices_are_exact(nodes, stages, microbatches):
    case, trace, eager, state = job()
    plan = planned(cluster_of(*nodes), degrees(pp=stages), microbatches=microbatches)
    assert len(plan.stages) == stages
    assert plan.status.lower_bound <= plan.step_seconds * (1 + 1e-9)
    ranks = [rank for stage in plan.stages for rank in stage.ranks]
    assert len(set(ranks)) == len(ranks), "no device works for two stages"
    assert Plan.from_json(plan.to_json()) == plan
    compare(run_program(compile(trace, plan), state, batch_of(case, trace)), eager, 1e-9, plan.degrees())


def test_the_faster_device_gets_more():
    plan = planned(cluster_of((SLOW, 1), (FAST, 1)), degrees(pp=2), microbatches=4)
    by_kind = {plan.devices[stage.ranks[0]].kind: stage for stage in plan.stages}
    assert by_kind["fast"].last - by_kind["fast"].first > by_kind["slow"].last - by_kind["slow"].first
    assert planned(cluster_of((SLOW, 1), (FAST, 1), between=1e3)).stages[0].ranks == (1,), "the fast one alone"


def test_limits_of_each_kind_are_kept():
    roomy = planned(cluster_of((SLOW, 1), (FAST, 1)), degrees(pp=2), microbatches=4)
    fast = next(s for s in roomy.stages if roomy.devices[s.ranks[0]].kind == "fast")
    small = cluster_of((SLOW, 1), (kind("fast", 3.0, int(fast.memory.peak_nbytes * 0.7)), 1))
    tight = planned(small, degrees(pp=2), microbatches=4)
    moved = next(s for s in tight.stages if tight.devices[s.ranks[0]].kind == "fast")
    assert moved.memory.peak_nbytes < fast.memory.peak_nbytes
    assert (moved.last - moved.first, moved.rematerialized) != (fast.last - fast.first, fast.rematerialized)
    with pytest.raises(NoFeasiblePlan, match="over"):
        planned(cluster_of((SLOW, 1), (FAST, 1)), memory(10_000))


def test_constraints_on_unequal_devices():
    cluster = cluster_of((FAST, 1), (SLOW, 2))
    last = len(job()[1].segments) - 1
    plan = planned(cluster, pin("head", stage=0), degrees(pp=1))
    assert len(plan.stages) == 1
    plan = planned(cluster, pin("blocks.0", stage=1), microbatches=2)
    held = next(i for i, s in enumerate(plan.stages) for name in s.blocks if name.startswith("blocks.0"))
    assert held == 1
    plan = planned(cluster, together("blocks.0", "blocks.1"), degrees(pp=2), microbatches=2)
    homes = {i for i, s in enumerate(plan.stages) for name in s.blocks if name.startswith("blocks.")}
    assert len(homes) == 1 and last > 0
    plan = planned(cluster, degrees(tp=2))
    assert all(stage.mesh.size("tp") == 2 for stage in plan.stages)
    plan = planned(cluster, within_node("tp"), within_node("dp"))
    for stage in plan.stages:
        assert len({cluster.devices[rank].node for rank in stage.ranks}) == 1
    plan = planned(cluster, split("blocks.*.up.weight", dim=0))
    assert any(stage.mesh.size("tp") == 2 for stage in plan.stages)


def test_the_same_input_gives_the_same_plan():
    cluster = cluster_of((FAST, 1), (SLOW, 2))
    assert planned(cluster).to_json() == planned(cluster).to_json()


def test_forward_only():
    """Weights alone in memory, no gradients on links, and the outputs of one device."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).eval()
    batch = torch.randn(8, 16)
    trace = trace_model(model, (batch,), {}, training=False)
    for cluster in (cluster_of((FAST, 2)), cluster_of((FAST, 1), (SLOW, 2))):
        for constraint in (degrees(pp=2), degrees(tp=2)):
            plan = solve(
                trace, cluster, KindPrices(cluster), SolveOptions(objective="infer", constraints=(constraint,))
            )
            assert all(m.gradients == m.optimizer == 0 for m in plan.memory())
            assert all(link.grad_seconds == 0 for link in plan.links)
            program = compile(trace, plan, "forward")
            found = run_program(program, dict(model.state_dict()), {s.name: batch for s in program.inputs})
            (out,) = found.outputs.values()
            torch.testing.assert_close(out, model(batch))
