"""The engine on gloo ranks, for random strategies: loss, every gradient, parameters after AdamW steps, outputs and
checkpoints are those of one device."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from shardplan.planner.export import trace_model
from shardplan.rewrite import compile
from tests import models
from tests.plans import random_plan
from tests.ranks import pool

CASES = [
    ("bytegpt", {"pp": 2}, 4),
    ("bytegpt", {"tp": 2}, 1),
    ("gpt2", {"pp": 2}, 2),
    ("gpt2", {"dp": 2}, 2),
    ("mlp", {"dp": 2, "tp": 2}, 1),
    ("bytegpt", {"dp": 2, "tp": 2}, 2),
    ("gpt2", {"tp": 2, "pp": 2}, 2),
    ("t5", {"dp": 2, "pp": 2}, 2),
]


@cache
def traced(name):
    case = models.make(name)
    trace = trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)
    state = {k: v.detach().clone() for k, v in case.model.state_dict(keep_vars=True).items()}
    state |= {k: v.detach().clone() for k, v in case.model.named_buffers()}
    return case, trace, state


def inputs(case, trace):
    return {s.name: case.batch[s.name] for s in trace.sources.values() if s.kind == "input"}


def adamw(parameters):
    # The true gradient of a key bias is zero; a usual eps would make steps of its rounding errors.
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)


def train(rank, programs, state, batch, steps, clip=None, save=None, load=None):
    """Runs in every rank: gradients of one step, then optimizer steps. Rank 0 answers with whole tensors."""
    import torch.distributed as dist

    from shardplan.runtime.engine import Engine

    world = programs["train"].world_size
    engine = Engine(programs, rank, dist.get_world_size(), "cpu", adamw, clip)
    engine.load_full(state)
    assert world <= dist.get_world_size()
    answer = {}
    if load:
        engine.load(load)
    answer["loss"] = engine.step(batch)
    answer["gradients"] = engine.full_gradients()
    engine.step(batch)
    answer["twice"] = engine.full_gradients()
    answer["losses"] = [float(engine.train_step(batch)) for _ in range(steps)]
    answer["state"] = engine.full_state_dict()
    if "forward" in programs:
        answer["outputs"] = engine.forward(batch)
    if save:
        engine.save(save, {"note": 1})
    engine.close()
    return answer


def one_device(case, steps, clip=None):
    model = case.model
    start = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = adamw(model.parameters())
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = models.loss_of(model(**case.kwargs)) if case.loss_fn is None else None
        if loss is None:
            first = next(iter(case.kwargs.values()))
            loss = case.loss_fn(model(first), case.target)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    after = {k: v.detach().clone() for k, v in model.state_dict().items()}
    model.load_state_dict(start)
    model.zero_grad()
    return losses, after


def assert_near(mine, theirs, tolerance, floor, where):
    error = float((mine - theirs).norm()) / max(float(theirs.norm()), floor)
    assert error < tolerance, f"{where}: relative error {error:.2e}"


@pytest.mark.parametrize(("name", "degrees", "microbatches"), CASES)
def test_ranks_match_one_device(name, degrees, microbatches):
    case, trace, state = traced(name)
    plan = random_plan(trace, **degrees, microbatches=microbatches, seed=1)
    programs = {"train": compile(trace, plan), "forward": compile(trace, plan, "forward")}
    world = programs["train"].world_size
    clip = 0.5 if name == "gpt2" else None
    answers = pool(world).run(train, programs, state, inputs(case, trace), 3, clip)
    eager = models.run_eager(case)
    losses, after = one_device(case, 3, clip)
    floor = 1e-3 * max(float(g.norm()) for g in eager.gradients.values())
    for rank, answer in enumerate(answers):
        assert_near(answer["loss"], eager.loss, 1e-5, 0, f"loss on rank {rank}")
        assert answer["losses"] == pytest.approx(losses, rel=1e-4)
    answer = answers[0]
    for parameter, gradient in eager.gradients.items():
        assert_near(answer["gradients"][parameter], gradient, 1e-5, floor, parameter)
        assert_near(answer["twice"][parameter], 2 * gradient, 1e-5, floor, f"accumulated {parameter}")
    for key, value in after.items():
        assert_near(answer["state"][key].to(value.dtype), value, 1e-4, 1e-6, f"{key} after three steps")
    assert not answers[1]["gradients"]


def test_outputs_and_idle_ranks():
    case, trace, state = traced("bytegpt")
    plan = random_plan(trace, tp=2, seed=3)
    programs = {"train": compile(trace, plan), "forward": compile(trace, plan, "forward")}
    answers = pool(4).run(train, programs, state, inputs(case, trace), 0)
    eager = models.run_eager(case)
    for answer in answers:
        assert_near(answer["loss"], eager.loss, 1e-5, 0, "loss")
        torch.testing.assert_close(answer["outputs"][1], eager.outputs[0], rtol=1e-4, atol=1e-5)


def test_checkpoint_loads_under_another_plan(tmp_path):
    case, trace, state = traced("bytegpt")
    batch = inputs(case, trace)
    first = {"train": compile(trace, random_plan(trace, tp=2, dp=2, seed=5))}
    second = {"train": compile(trace, random_plan(trace, pp=2, microbatches=2, seed=6))}
    path = str(tmp_path / "state")
    pool(4).run(train, first, state, batch, 2, None, path)
    pool(4).run(train, first, state, batch, 2, None, path)  # an older checkpoint is replaced
    zeros = {k: torch.zeros_like(v) for k, v in state.items()}
    answers = pool(2).run(train, second, zeros, batch, 2, None, None, path)
    losses, after = one_device(case, 4)
    assert answers[0]["losses"] == pytest.approx(losses[2:], rel=1e-4)
    for key, value in after.items():
        assert_near(answers[0]["state"][key], value, 1e-4, 1e-6, key)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state"]


def test_torn_checkpoint_is_refused(tmp_path):
    from shardplan.errors import CheckpointError
    from shardplan.runtime.checkpoint import Reader

    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        Reader(tmp_path / "missing")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "index.json").write_text('{"format": 1, "facts"')
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        Reader(tmp_path / "torn")
