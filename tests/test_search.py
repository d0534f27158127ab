"""The search: integer programs against brute force, plans that move for the right reason, constraints, errors."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from functools import cache

import pulp
import pytest

from shardplan.errors import (
    BatchNotDivisible,
    ConflictingConstraints,
    NoFeasiblePlan,
    NoMatch,
    SolverUnavailable,
    UsageError,
)
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees, memory, pin, replicate, split, together, within_node
from shardplan.planner.export import trace_model
from shardplan.planner.plan import Plan
from shardplan.planner.search import SolveOptions, solve
from shardplan.planner.search import stage_ilp as stages
from shardplan.planner.search.problem import Option, Price, SegmentProblem, Weights, total_price
from shardplan.planner.search.segment_ilp import solve_segment
from shardplan.planner.search.solver import Budget
from shardplan.planner.search.stage_dp import Known, certified, solve_quickly
from shardplan.planner.search.stage_ilp import solve_program
from shardplan.planner.search.stages import solve_stages
from tests import models
from tests.prices import SimplePrices


@cache
def traced(name="bytegpt"):
    case = models.make(name)
    return trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)


def planned(cluster, *constraints, name="bytegpt", **options) -> Plan:
    return solve(traced(name), cluster, SimplePrices(cluster), SolveOptions(constraints=constraints, **options))


# -- brute force -------------------------------------------------------------------------------------------------------


def random_segment(rng: random.Random) -> SegmentProblem:
    """A small random graph: ops with up to 3 options and 2 results, values read by several ops."""
    states, ops, values = 3, [], []
    for o in range(rng.randint(2, 5)):
        results = rng.randint(1, 2)
        reads = rng.sample(values, min(len(values), rng.randint(0, 2)))
        options = tuple(
            Option(
                Price(rng.random(), rng.random(), rng.random(), rng.random(), rng.random()),
                tuple(rng.randrange(states) for _ in range(results)),
                tuple((value, rng.randrange(states)) for value in reads),
            )
            for _ in range(rng.randint(1, 3))
        )
        ops.append(options)
        values += [(o, r) for r in range(results)]
    conversions = {
        (value, s, t): Price(rng.random(), rng.random() * rng.randint(0, 1), 0.0, 0.0, rng.random())
        for value in values
        for s in range(states)
        for t in range(states)
        if s != t and rng.random() < 0.85
    }
    return SegmentProblem(tuple(f"op{o}" for o in range(len(ops))), tuple(ops), conversions, ("R", "S(0)", "P"))


def test_segment_program_against_brute_force():
    rng = random.Random(0)
    impossible = 0
    for _ in range(120):
        problem = random_segment(rng)
        weights = Weights(once=rng.random(), nbytes=rng.random() * rng.randint(0, 1), in_flight=rng.randint(1, 3))
        prices = [total_price(problem, c) for c in itertools.product(*(range(len(o)) for o in problem.ops))]
        best = min((weights.of(p) for p in prices if p is not None), default=math.inf)
        found = solve_segment(problem, weights, Budget())
        if found is None:
            assert best == math.inf
            impossible += 1
            continue
        price = total_price(problem, found.options)
        assert price is not None
        assert weights.of(price) == pytest.approx(best, rel=1e-6)
    assert 0 < impossible < 60


def random_column(rng: random.Random) -> Price:
    """Of a column; half of them gather something while they run."""
    gathered = 1e9 * rng.random() * rng.randint(0, 1)
    held = 1e9 * rng.random(), 1e9 * rng.random(), 1e8 + gathered
    return Price(rng.random(), rng.random(), rng.random(), *held, gathered_nbytes=gathered)


def random_stages(rng: random.Random) -> stages.StageProblem:
    count = rng.randint(2, 5)
    layouts = [1] + [rng.randint(1, 2) for _ in range(count - 1)] + [1]
    made: dict[tuple[int, int, int], tuple[stages.Column, ...]] = {}
    columns = tuple(
        made.setdefault(
            (layouts[i], layouts[i + 1], rng.randint(0, 1)),  # some segments are alike
            tuple(
                stages.Column(
                    random_column(rng),
                    enters,
                    leaves,
                    recomputed=rng.random() < 0.4,
                )
                for enters in range(layouts[i])
                for leaves in range(layouts[i + 1])
                for _ in range(rng.randint(1, 2))
            ),
        )
        for i in range(count)
    )
    number = rng.randint(1, min(3, count))
    return stages.StageProblem(
        columns,
        number,
        rng.randint(1, 4),
        tuple({k: rng.random() for k in range(layouts[i + 1])} for i in range(count - 1)),
        tuple({k: 1e8 * rng.random() for k in range(layouts[i + 1])} for i in range(count - 1)),
        tuple(rng.uniform(1e9, 6e9) for _ in range(number)),
        tuple(range(number, 0, -1)),
        Price(forward_seconds=rng.random() * 0.1, activation_nbytes=1e7),
        least_transients=(1e8,) * (count * rng.randint(0, 1)),
    )


def brute_force(problem: stages.StageProblem) -> float:
    best = math.inf
    count = len(problem.columns)
    for cuts in itertools.combinations(range(1, count), problem.stages - 1):
        home = [sum(i >= cut for cut in cuts) for i in range(count)]
        if any(home[i] != s for i, s in problem.pinned) or any(len({home[i] for i in g}) > 1 for g in problem.together):
            continue
        for choice in itertools.product(*(range(len(c)) for c in problem.columns)):
            chosen = [problem.columns[i][k] for i, k in enumerate(choice)]
            if any(a.leaves != b.enters for a, b in itertools.pairwise(chosen)):
                continue
            needed = stages.memory(problem, (0, *cuts), choice)
            if all(n <= limit for n, limit in zip(needed, problem.limits, strict=True)):
                best = min(best, stages.objective(problem, (0, *cuts), choice))
    return best


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_stage_program_against_brute_force(solver):
    rng = random.Random(1)
    infeasible = 0
    for _ in range(60 if solver == "highs" else 15):
        problem = random_stages(rng)
        best = brute_force(problem)
        found = solve_program(problem, Budget(solver))
        if found is None:
            assert best == math.inf
            infeasible += 1
            continue
        assert found.objective == pytest.approx(best, rel=1e-5)
        assert found.bound <= best * (1 + 1e-6)
        needed = stages.memory(problem, found.bounds, found.columns)
        assert all(n <= limit * (1 + 1e-6) for n, limit in zip(needed, problem.limits, strict=True))
    assert infeasible < 40


def test_dynamic_program_against_brute_force():
    """Its bounds never exceed the optimum, those over all columns neither; within the gap where it says so; and with
    the integer program behind it, the optimum."""
    rng = random.Random(2)
    feasible = quick_optima = 0
    for number in range(150):
        problem = random_stages(rng)
        if number % 5 == 0 and len(problem.columns) > 2:
            problem = replace(problem, pinned=((1, rng.randrange(problem.stages)),), together=((0, 1),))
        best = brute_force(problem)
        quick, both = solve_quickly(problem, 0.01), solve_stages(problem, Budget(gap=1e-9))
        some = Known((1e-10, 1e-9, 1e-8), (1, problem.stages), True, shares=(1.0, 0.5, 1 / 3))
        for known in (some, replace(some, shares=()), Known((1e-10,), (problem.stages,), shares=(0.5,)), Known()):
            assert certified(problem, known, 0.01).bound <= best * (1 + 1e-9)
        certificate = certified(problem, some, 0.01, best)
        assert certificate.bound <= best * (1 + 1e-9)
        if best == math.inf:
            assert quick is None and both is None
            continue
        assert both is not None and both.objective == pytest.approx(best, rel=1e-5)
        feasible += 1
        if quick is None:
            continue
        assert quick.bound <= best * (1 + 1e-9) <= quick.objective * (1 + 2e-9)
        assert not quick.optimal or quick.objective <= best * 1.0101
        needed = stages.memory(problem, quick.bounds, quick.columns)
        assert all(n <= limit * (1 + 1e-9) for n, limit in zip(needed, problem.limits, strict=True))
        quick_optima += quick.objective <= best * (1 + 1e-9)
    assert feasible > 90 and quick_optima > 0.8 * feasible


# -- plans -------------------------------------------------------------------------------------------------------------


def test_plan_moves_for_the_right_reason():
    cluster = Cluster.cpu(2)
    fast = planned(cluster)
    assert len(fast.stages[0].ranks) == 2, "on a good link both devices work"
    slow = planned(cluster.slower_links(1000))
    assert len(slow.devices) == 2 and sum(len(s.ranks) for s in slow.stages) == 1, "on a bad one nobody sends"
    single = next(b for b in slow.baselines if b.name == "single device")
    held = slow.stages[0].memory
    limit = held.parameters + held.gradients + held.optimizer
    assert limit < single.peak_nbytes
    tight = planned(cluster.slower_links(1000), memory(limit))
    assert sum(len(s.ranks) for s in tight.stages) == 2, "one device cannot hold it, whatever it recomputes"
    assert all(m.peak_nbytes <= limit for m in tight.memory())
    recomputed = planned(cluster.slower_links(1000), memory(int(single.peak_nbytes * 0.8)), microbatches=1, zero=0)
    assert len(recomputed.stages[0].ranks) == 1
    assert recomputed.stages[0].rematerialized, "recomputing is cheaper than a bad link"


def test_certificate_and_baselines():
    plan = planned(Cluster.cpu(4))
    assert plan.status.outcome == "optimal" and plan.status.gap <= 0.01
    assert 0 < plan.status.lower_bound <= plan.step_seconds
    seconds = [b.seconds for b in plan.baselines if b.seconds is not None]
    assert len(seconds) == 6 and plan.step_seconds <= min(seconds)
    assert all(other.seconds >= plan.step_seconds for other in plan.runners_up)


def test_same_input_same_bytes():
    cluster = Cluster.cpu(4)
    texts = {planned(cluster, degrees(tp=2, pp=2)).to_json() for _ in range(3)}
    assert len(texts) == 1
    assert Plan.from_json(texts.copy().pop()).to_json() in texts


def test_strategies_fit_together():
    """Every value that an op reads can be converted to what it wants, and every shard divides: rewriting finds out."""
    from shardplan.rewrite import compile

    for name in ("llama", "gpt2", "vit"):
        cluster = Cluster.cpu(4).slower_links(1e-3)
        plan = planned(cluster, degrees(dp=2, tp=2), name=name)
        assert any("S(" in text for text in plan.splits["tp"].values())
        assert compile(traced(name), plan).world_size == 4


def test_constraints_are_honoured():
    cluster = Cluster.cpu(2)
    plan = planned(cluster, degrees(pp=2), pin("blocks.1*", stage=0))
    assert any(name.startswith("blocks.1") for name in plan.stages[0].blocks)
    plan = planned(cluster, degrees(pp=2), together("embed", "blocks.1.*"))
    first = plan.stages[0].blocks
    assert any("embed" in b for b in first) == any(b.startswith("blocks.1") for b in first)
    fast = cluster.slower_links(1e-3)
    trace = traced()
    up = trace.parameters()["blocks.0.up.weight"].name
    plan = planned(fast, degrees(tp=2), split("*.up.weight", dim=1))
    assert plan.splits["tp"][up].endswith("S(1)")
    plan = planned(fast, degrees(tp=2), replicate("blocks.*.up.weight"))
    assert "S(" not in plan.splits["tp"].get(up, "")
    assert "replicate('blocks.*.up.weight')" in plan.constraints
    nodes = Cluster.parse("4xh100", devices_per_node=2)
    plan = planned(nodes, within_node("tp"), degrees(dp=2, tp=2))
    assert plan.stages[0].mesh.size("tp") == 2


def test_constraints_that_cannot_be():
    cluster = Cluster.cpu(2)
    with pytest.raises(NoMatch, match=r"did you mean 'blocks\.0\.up"):
        planned(cluster, pin("blocks.0.upp.weight", stage=0))
    with pytest.raises(ConflictingConstraints):
        planned(cluster, degrees(pp=2), degrees(pp=1))
    with pytest.raises(ConflictingConstraints):
        planned(cluster, degrees(tp=4))
    with pytest.raises(BatchNotDivisible, match="batch of 8"):
        planned(Cluster.cpu(3), degrees(dp=3))
    with pytest.raises(BatchNotDivisible):
        planned(cluster, microbatches=3)
    with pytest.raises(ConflictingConstraints, match="batch_norm"):
        planned(cluster, microbatches=2, name="resnet")
    with pytest.raises((SolverUnavailable, UsageError)):
        planned(cluster, solver="nothing")


def test_infeasible_says_by_how_much():
    cluster = Cluster.cpu(2)
    with pytest.raises(NoFeasiblePlan) as caught:
        planned(cluster, memory("60 KB"), degrees(dp=2))
    text = str(caught.value)
    assert "SP301" in text and "over" in text and "Conflict: memory(device 0)" in text
    assert "Hint: memory_limit=" in text and "degrees(dp=2)" in text
    limit = text.split("memory_limit='")[1].split("'")[0]
    plan = planned(cluster, memory(limit), degrees(dp=2))
    assert max(m.peak_nbytes for m in plan.memory()) <= plan.devices[0].limit_nbytes


def test_least_maximum_is_that_of_all_partitions():
    from shardplan.planner.search.search import _least_maximum

    rng = random.Random(2)
    for _ in range(100):
        values = [rng.random() for _ in range(rng.randint(1, 7))]
        parts = rng.randint(1, len(values))
        best = min(
            max(sum(values[a:b]) for a, b in itertools.pairwise((0, *cuts, len(values))))
            for cuts in itertools.combinations(range(1, len(values)), parts - 1)
        )
        assert _least_maximum(values, parts) == pytest.approx(best, rel=1e-6)
        assert _least_maximum(values, parts) <= best * (1 + 1e-9)


def test_bound_holds_when_memory_binds():
    """A larger pool of columns may find a better plan; no plan may undercut the bound."""
    cluster = Cluster.cpu(4)
    free = planned(cluster, degrees(tp=2, pp=2), microbatches=2)
    peak = max(m.peak_nbytes for m in free.memory())
    tight = planned(cluster, degrees(tp=2, pp=2), memory(int(peak * 0.72)), microbatches=2)
    assert free.step_seconds <= tight.step_seconds
    closest = planned(cluster, degrees(tp=2, pp=2), memory(int(peak * 0.72)), microbatches=2, gap=0.0)
    assert tight.status.lower_bound <= closest.step_seconds * (1 + 1e-9)


def test_settings_that_make_no_sense():
    cluster = Cluster.cpu(2)
    for wrong in ({"microbatches": 0}, {"microbatches": "some"}, {"objective": "fun"}, {"schedule": "mine"}):
        with pytest.raises(UsageError):
            planned(cluster, **wrong)
    with pytest.raises(ConflictingConstraints):
        planned(cluster, degrees(tp=1), split("*.up.weight", dim=0))
    with pytest.raises(ConflictingConstraints):
        planned(Cluster.cpu(3), degrees(dp=1, pp=1, tp=3), split("*.up.weight", dim=0))


def test_a_solver_that_breaks_is_named(monkeypatch):
    """Whatever PuLP or the solver's own library raises, or a time limit without an incumbent."""
    problem = random_stages(random.Random(3))
    for raised in (RuntimeError("segment violation"), OSError("no such file"), ValueError("bad basis")):

        def broken(*_, raised=raised):
            raise raised

        monkeypatch.setattr(pulp.HiGHS, "actualSolve", broken)
        with pytest.raises(SolverUnavailable, match=r"highs failed(.|\n)*" + str(raised)):
            solve_program(problem, Budget("highs"))
