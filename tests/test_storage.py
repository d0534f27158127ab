"""Parameters that are split for storage (ZeRO 1, 2 and 3): whatever the level, loss, gradients, parameters after
optimizer steps, outputs and checkpoints are those of one device, and a rank holds as little as the level says."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shardplan.errors import ConflictingConstraints, UsageError
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees as fixed_degrees
from shardplan.planner.constraints import memory, zero
from shardplan.planner.export import trace_model
from shardplan.planner.placement import local_shape
from shardplan.planner.plan import Plan
from shardplan.planner.search import SolveOptions, solve
from shardplan.planner.search.elimination import eliminate
from shardplan.planner.search.problem import Option, Price, SegmentProblem, Weights, total_price
from shardplan.planner.storage import Storage, best_dim
from shardplan.planner.trace import Trace
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests import models
from tests.plans import random_plan
from tests.prices import SimplePrices
from tests.ranks import pool
from tests.test_engine import assert_near, inputs, one_device, train
from tests.test_engine import traced as traced_model


def stored(trace: Trace, plan: Plan, level: int | None, axis: str = "dp", seed: int = 0) -> Plan:
    """The plan with every parameter that can be split for storage on the axis so split. level None: one at random for
    each."""
    rng = random.Random(seed)
    found: dict[str, Storage] = {}
    program = compile(trace, plan)
    for spec in program.parameters:
        mesh = program.placement[spec.stages[0]].mesh
        dim = best_dim(local_shape(spec.shape, spec.layout, mesh), mesh.size(axis))
        if dim is not None and not spec.layout[mesh.axes.index(axis)].is_shard:
            found[spec.name] = Storage(level or rng.choice((1, 2, 3)), axis, dim)
    return replace(plan, storage=found)


class Odd(nn.Module):
    """Extents that nothing divides, a parameter that two distant places read, a frozen one, a scalar, and one whose
    value is read but which gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.first = nn.Linear(7, 5)
        self.second = nn.Linear(5, 7, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.randn(7, 7), requires_grad=False)
        self.apart = nn.Parameter(torch.randn(3, 7))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, seq] -> logits [batch, seq, 13]."""
        x = self.embed(ids) @ self.frozen
        x = x + self.second(F.gelu(self.first(x))) * self.scale + self.apart.detach().sum(0)
        return x @ self.embed.weight.t()


@cache
def traced(name: str):
    if name != "odd":
        return traced_model(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = models.tokens(13, models.BATCH, 6)
        case = models.Case(Odd(), {"ids": ids, "target": models.ragged_labels(ids)}, models.token_loss)
    trace = trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)
    return case, trace, {k: v.detach().clone() for k, v in case.model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("level", [1, 2, 3, None])
@pytest.mark.parametrize(
    ("name", "degrees", "microbatches", "recompute"),
    [
        ("odd", {"dp": 4}, 2, False),
        ("odd", {"dp": 2, "tp": 2}, 1, True),
        ("gpt2", {"dp": 2, "pp": 2}, 2, False),
        ("t5", {"dp": 2, "tp": 2}, 2, True),
        ("resnet", {"dp": 2}, 1, False),
    ],
)
def test_gradients_on_simulated_ranks(name, degrees, microbatches, recompute, level):
    case, trace, state = traced(name)
    names = [segment.name for segment in trace.segments] if recompute else ()
    plan = random_plan(trace, **degrees, microbatches=microbatches, seed=3, rematerialize=names)
    program = compile(trace, stored(trace, plan, level, seed=5))
    assert any(spec.storage is not None for spec in program.parameters)
    result = run_program(program, state, inputs(case, trace))
    eager = models.run_eager(case)
    assert_near(result.loss, eager.loss, 1e-5, 0, "loss")
    floor = 1e-3 * max(float(g.norm()) for g in eager.gradients.values())
    assert {n for n, g in result.gradients.items() if g is not None} == set(eager.gradients)
    for parameter, gradient in eager.gradients.items():
        assert_near(result.gradients[parameter], gradient, 1e-5, floor, parameter)


@pytest.mark.parametrize(
    ("name", "degrees", "microbatches", "level", "recompute", "clip"),
    [
        ("odd", {"dp": 4}, 2, 1, False, 0.5),
        ("odd", {"dp": 4}, 1, 2, False, None),
        ("odd", {"dp": 4}, 2, 3, False, 0.5),
        ("odd", {"dp": 2}, 1, 3, True, None),
        ("gpt2", {"dp": 2, "pp": 2}, 2, 3, False, 0.5),
        ("bytegpt", {"dp": 2, "tp": 2}, 2, None, False, 0.5),
        ("t5", {"dp": 2, "pp": 2}, 2, None, True, None),
    ],
)
def test_ranks_match_one_device(name, degrees, microbatches, level, recompute, clip):
    """As `test_engine.test_ranks_match_one_device`: gradients, twice accumulated ones, three AdamW steps, outputs."""
    case, trace, state = traced(name)
    names = [segment.name for segment in trace.segments] if recompute else ()
    plan = random_plan(trace, **degrees, microbatches=microbatches, seed=1, rematerialize=names)
    plan = stored(trace, plan, level)
    programs = {"train": compile(trace, plan), "forward": compile(trace, plan, "forward")}
    answers = pool(programs["train"].world_size).run(train, programs, state, inputs(case, trace), 3, clip)
    eager = models.run_eager(case)
    losses, after = one_device(case, 3, clip)
    floor = 1e-3 * max(float(g.norm()) for g in eager.gradients.values())
    for answer in answers:
        assert_near(answer["loss"], eager.loss, 1e-5, 0, "loss")
        assert answer["losses"] == pytest.approx(losses, rel=1e-4)
    answer = answers[0]
    assert set(answer["gradients"]) == set(eager.gradients)
    for parameter, gradient in eager.gradients.items():
        assert_near(answer["gradients"][parameter], gradient, 1e-5, floor, parameter)
        assert_near(answer["twice"][parameter], 2 * gradient, 1e-5, floor, f"accumulated {parameter}")
    for key, value in after.items():
        assert_near(answer["state"][key].to(value.dtype), value, 1e-4, 1e-6, f"{key} after three steps")


def restart(rank, programs, state, batch, clip, load, save):
    """Loads the whole training state if asked, takes a step, saves it both ways. -> (loss, whole state)."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from shardplan.runtime.engine import Engine
    from tests.test_engine import adamw

    engine = Engine(programs, rank, dist.get_world_size(), "cpu", adamw, clip)
    engine.load_full(state)
    if load:
        engine.load(f"{load}/own")
        mine = engine.full_state_dict()
        held = engine.state_dict()
        with torch.no_grad():
            for value in held.values():
                (value.to_local() if hasattr(value, "to_local") else value).fill_(7)
        dcp.load(held, checkpoint_id=f"{load}/dcp")
        engine.load_state_dict(held)
        assert all(torch.equal(value, mine[name]) for name, value in engine.full_state_dict().items())
    loss = engine.train_step(batch)
    engine.save(f"{save}/own")
    held = engine.state_dict()
    shapes = {name: (tuple(value.shape), str(getattr(value, "placements", ""))) for name, value in held.items()}
    dcp.save(held, checkpoint_id=f"{save}/dcp")
    answer = float(loss), engine.full_state_dict(), shapes
    engine.close()
    return answer


def test_state_moves_between_levels_and_plans(tmp_path):
    """Training goes on under another plan and level after every step: own checkpoints with the optimizer's state, and
    torch.distributed.checkpoint of the parameters; all as uninterrupted on one device."""
    case, trace, state = traced("odd")
    arrangements = [({"dp": 4}, 3), ({"dp": 2, "tp": 2}, 3), ({"dp": 4}, None)]
    losses, after = one_device(case, len(arrangements), 0.5)
    earlier, whole = None, {}
    for step, (degrees, level) in enumerate(arrangements):
        plan = stored(trace, random_plan(trace, **degrees, seed=2), level, seed=step)
        directory = str(tmp_path / str(step))
        programs = {"train": compile(trace, plan)}
        answers = pool(4).run(restart, programs, state, inputs(case, trace), 0.5, earlier, directory)
        loss, whole, shapes = answers[0]
        assert loss == pytest.approx(losses[step], rel=1e-5)
        assert shapes["embed.weight"][0] == (13, 7)
        earlier = directory
    assert shapes["first.weight"][1] == "(Shard(dim=1),)"  # 7 rows of 2 waste less than 5
    for key, value in after.items():
        assert_near(whole[key], value, 1e-4, 1e-6, key)


def test_rounded_parameters_are_stored_whole_in_float32_and_sent_rounded():
    """precision="bf16": masters are split, and what is gathered of them is bfloat16."""
    case, _, state = traced("bytegpt")
    trace = trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target, precision="bf16")
    plain = random_plan(trace, dp=2, microbatches=2, seed=1)
    whole = pool(2).run(train, {"train": compile(trace, plain)}, state, inputs(case, trace), 2)[0]
    for level in (2, 3):
        program = compile(trace, stored(trace, plain, level))
        assert "torch.bfloat16" in program.stages[0].source
        reference = run_program(program, state, inputs(case, trace))
        mine = pool(2).run(train, {"train": program}, state, inputs(case, trace), 2)[0]
        assert mine["losses"] == pytest.approx(whole["losses"], rel=1e-3)
        for name, gradient in whole["gradients"].items():
            assert mine["gradients"][name].dtype == torch.float32
            assert_near(mine["gradients"][name], gradient, 1e-2, 1e-3, name)
            assert_near(reference.gradients[name], gradient, 1e-2, 1e-3, name)
        for name, value in whole["state"].items():
            assert_near(mine["state"][name], value, 1e-2, 1e-2, name)


# -- planning ----------------------------------------------------------------------------------------------------------


def planned(*constraints, name="bytegpt", devices=2, **options) -> Plan:
    cluster = Cluster.cpu(devices)
    return solve(traced(name)[1], cluster, SimplePrices(cluster), SolveOptions(constraints=constraints, **options))


def test_levels_that_the_user_fixes():
    for level in (0, 1, 2, 3):
        plan = planned(fixed_degrees(dp=2, tp=1, pp=1), zero=level)
        assert {s.level for s in plan.storage.values()} == ({level} if level else set())
        assert Plan.from_json(plan.to_json()) == plan
    plan = planned(fixed_degrees(dp=2, tp=1, pp=1), zero(3, "blocks.*"), zero(0, "head.weight"))
    assert plan.storage["blocks.1.up.weight"] == Storage(3, "dp", 0) and "head.weight" not in plan.storage
    assert "all-gathered for every forward" in plan.explain("blocks.0.qkv.weight")
    assert "stored in parts" in str(plan)
    with pytest.raises(ConflictingConstraints):
        planned(zero(1, "head.weight"), zero(2, "head.*"))
    with pytest.raises(UsageError):
        SolveOptions(zero=4)


def test_memory_that_only_parts_fit_into():
    """With replicas alone (dp), what does not fit whole is stored in parts, at a price that is said."""
    fixed = fixed_degrees(dp=4, tp=1, pp=1)
    whole = planned(fixed, devices=4, zero=0, rematerialize=False)
    least = planned(fixed, devices=4, zero=3, rematerialize=False)
    assert least.memory()[0].peak_nbytes < whole.memory()[0].peak_nbytes
    limit = (whole.memory()[0].peak_nbytes + least.memory()[0].peak_nbytes) // 2
    plan = planned(fixed, memory(limit), devices=4, rematerialize=False)
    assert plan.storage and plan.memory()[0].peak_nbytes <= limit
    assert whole.step_seconds <= plan.step_seconds * (1 + 1e-9) and plan.status.gap <= 0.01
    names = {b.name: b for b in planned(devices=4).baselines}
    assert names["fully sharded"].peak_nbytes < names["data parallel"].peak_nbytes


def test_ways_of_one_placement_are_one_class():
    """Against all choices: options that leave and read the same states differ in price alone."""
    rng = random.Random(3)
    for _ in range(30):

        def options(needs, rng=rng):
            found = [(Price(*(rng.random() for _ in range(8))), (state,), needs) for state in (0, 1) for _ in range(3)]
            return tuple(Option(*each) for each in rng.sample(found, 5))

        ops = (options(()), options((((0, 0), rng.randint(0, 1)),)))
        problem = SegmentProblem(("a", "b"), ops, {((0, 0), 0, 1): Price(0.3), ((0, 0), 1, 0): Price(0.2)}, ("R", "D"))
        for weights in (
            Weights(),
            Weights(1.0, 2.0, 3.0),
            Weights(0.5, 0.1, 0.0, 2.0),
            Weights(0.5, 1.0, gathered=0.5),
        ):
            matrix = eliminate(problem, [Weights(0.1), weights])[1]
            prices = [total_price(problem, c) for c in itertools.product(range(5), range(5))]
            best = min(weights.of(price) for price in prices if price is not None)
            chosen = total_price(problem, matrix.options[0, 0])
            assert chosen is not None and weights.of(chosen) == pytest.approx(best)
            assert float(matrix.objective[0, 0]) == pytest.approx(best)


def peak_of_a_step(rank, program, state, batch):
    """The most bytes alive on this rank in a forward and backward, the optimizer's state included."""
    import torch.distributed as dist

    from shardplan.runtime.engine import Engine
    from shardplan.runtime.live_bytes import peak_of
    from tests.test_engine import adamw

    engine = Engine({"train": program}, rank, dist.get_world_size(), "cpu", adamw)
    engine.load_full(state)
    for _ in range(2):
        engine.train_step(batch)
    engine.zero_grad()
    shards, state_of = engine.shards, engine.optimizer.state
    held = [*shards.parameters.values(), *shards.used().values()]
    held += [v for p in shards.parameters.values() for v in state_of[p].values() if torch.is_tensor(v)]
    peak = peak_of(lambda: engine.step(batch), torch.device("cpu"), held)
    engine.close()
    return peak


def test_a_rank_holds_what_the_plan_says():
    """Bytes alive at the peak of forward and backward on real ranks, within 8 % of the plan's memory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.ByteGPT(width=96, layers=6)
    case = traced("bytegpt")[0]
    trace = trace_model(model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)
    cluster, peaks = Cluster.cpu(2), {}
    for level in (1, 2, 3):
        options = SolveOptions((fixed_degrees(dp=2, tp=1, pp=1),), zero=level, microbatches=1, rematerialize=False)
        plan = solve(trace, cluster, SimplePrices(cluster), options)
        answers = pool(2).run(peak_of_a_step, compile(trace, plan), model.state_dict(), inputs(case, trace))
        peaks[level] = answers[0]
        assert answers[0] == pytest.approx(plan.memory()[0].peak_nbytes, rel=0.08), level
    assert peaks[3] < peaks[2] < peaks[1]
