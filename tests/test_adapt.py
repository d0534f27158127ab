"""A plan carried over to another call: parameters stay where they are, and the numbers are those of one device."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from shardplan.errors import InputMismatch
from shardplan.planner.adapt import adapt
from shardplan.planner.export import trace_model
from shardplan.planner.plan import Plan
from shardplan.planner.trace import Trace
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests import models
from tests.plans import random_plan

FAMILIES = ("llama", "gpt2", "t5", "vit", "resnet", "encoder")
MESHES = ({"dp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 2, "tp": 2}, {"tp": 2, "pp": 2}, {"dp": 2, "pp": 2})


def traced(case: models.Case, training: bool = True) -> Trace:
    target = case.target if case.loss_fn is not None else None
    return trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=target, training=training)


@pytest.fixture(scope="module")
def planned():
    made: dict[str, tuple[models.Case, Trace]] = {}

    def get(name: str) -> tuple[models.Case, Trace]:
        if name not in made:
            case = models.make(name)
            case.model.double()
            case.batch = {
                key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
                for key, value in case.batch.items()
            }
            made[name] = case, traced(case)
        return made[name]

    return get


def with_batch(case: models.Case, change: Any) -> models.Case:
    return replace(case, batch=pytree.tree_map_only(torch.Tensor, change, case.batch))


def check_step(case: models.Case, plan: Plan, trace: Trace, where: str) -> None:
    state = {k: v.detach().clone() for k, v in case.model.state_dict(keep_vars=True).items()}
    state |= {k: v.detach().clone() for k, v in case.model.named_buffers()}
    batch = {s.name: case.batch[s.name] for s in trace.sources.values() if s.kind == "input"}
    found = run_program(compile(trace, plan), state, batch)
    eager = models.run_eager(replace(case, model=copy.deepcopy(case.model)))
    assert found.loss is not None and eager.loss is not None
    torch.testing.assert_close(found.loss, eager.loss, rtol=1e-6, atol=1e-9, msg=f"{where}: loss")
    floor = 1e-3 * max(float(g.norm()) for g in eager.gradients.values())
    for name, gradient in eager.gradients.items():
        mine = found.gradients[name]
        assert mine is not None, f"{where}: no gradient of {name}"
        error = float((mine - gradient).norm()) / max(float(gradient.norm()), floor)
        assert error < 1e-6, f"{where}: gradient of {name}: {error:.1e}"


@pytest.mark.parametrize("degrees", MESHES, ids=lambda d: "x".join(f"{k}{v}" for k, v in d.items()))
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "t5"])  # slow; evaluated below
def test_smaller_batches_that_divide_and_that_do_not(planned, name, degrees):
    case, trace = planned(name)
    microbatches = 2 if name != "resnet" else 1
    plan = random_plan(trace, **degrees, microbatches=microbatches, seed=3)
    size = models.BATCH // (degrees.get("dp", 1) * microbatches)
    for batch in (5, 4):
        smaller = with_batch(case, lambda t, b=batch: t[:b])
        again = traced(smaller)
        adapted = adapt(plan, again)
        replicas = degrees.get("dp", 1) if batch % degrees.get("dp", 1) == 0 else 1
        assert batch // replicas // adapted.microbatches <= size or name == "resnet"
        assert [stage.ranks for stage in adapted.stages] == [stage.ranks for stage in plan.stages]
        for node, source in again.sources.items():
            if source.kind == "param":
                now, was = adapted.strategy("tp", node), plan.strategy("tp", node)
                if was is not None and was.outputs[0].is_shard:
                    assert now is not None and now.outputs == was.outputs
                    was and not was.outputs[0].is_shard
        check_step(smaller, adapted, again, f"{name} {degrees} batch {batch}")


@pytest.mark.parametrize("degrees", MESHES[1:5], ids=lambda d: "x".join(f"{k}{v}" for k, v in d.items()))
@pytest.mark.parametrize("name", ["llama", "gpt2", "encoder"])
def test_another_sequence_length(planned, name, degrees):
    case, trace = planned(name)
    plan = random_plan(trace, **degrees, microbatches=2, seed=4)
    for length in (7, 12):
        shorter = with_batch(case, lambda t, n=length: t[:, :n] if t.ndim > 1 else t)
        again = traced(shorter)
        check_step(shorter, adapt(plan, again), again, f"{name} {degrees} length {length}")


@pytest.mark.parametrize("degrees", MESHES, ids=lambda d: "x".join(f"{k}{v}" for k, v in d.items()))
@pytest.mark.parametrize("name", ["llama", "t5", "resnet", "encoder"])
def test_evaluation_without_labels(planned, name, degrees):
    """Another graph: no loss, no dropout, running statistics; the parameters lie as planned for training."""
    case, trace = planned(name)
    plan = random_plan(trace, **degrees, microbatches=1, seed=5)
    call = {k: v for k, v in case.batch.items() if k not in ("target", "labels")}
    evaluated = copy.deepcopy(case.model).eval()
    if name == "t5":
        call["decoder_input_ids"] = case.batch["labels"].clamp(min=0)
    again = trace_model(evaluated, (), call, training=False)
    program = compile(again, adapt(plan, again), "forward")
    state = {k: v.detach() for k, v in evaluated.state_dict(keep_vars=True).items()}
    state |= {k: v.detach() for k, v in evaluated.named_buffers()}
    batch = {s.name: call[s.name] for s in again.sources.values() if s.kind == "input"}
    found = run_program(program, state, batch)
    with torch.no_grad():
        expected = [t for t in pytree.tree_leaves(evaluated(**call)) if torch.is_tensor(t)]
    assert len(found.outputs) == len(expected) > 0
    for mine, theirs in zip([found.outputs[i] for i in sorted(found.outputs)], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_call_that_reads_what_its_stage_does_not_hold(planned):
    case, trace = planned("llama")
    plan = random_plan(trace, pp=2)
    moved = {
        name: replace(summary, stages=(1,) if summary.op == "param" and "embed" in summary.name else summary.stages)
        for name, summary in plan.nodes.items()
    }
    smaller = with_batch(case, lambda t: t[:4])
    with pytest.raises(InputMismatch, match="carry over"):
        adapt(replace(plan, nodes=moved), traced(smaller))


def test_stages_of_unequal_meshes_and_several_a_rank(planned):
    case, trace = planned("t5")
    plans = [
        random_plan(trace, meshes=((2, 1), (1, 2)), microbatches=2, seed=1, schedule="zb"),
        random_plan(trace, meshes=((1, 2),) * 4, microbatches=2, seed=1, schedule="interleaved", chunks=2),
    ]
    for plan in plans:
        for count in (4, 3):
            smaller = with_batch(case, lambda t, count=count: t[:count].clone())
            call = traced(smaller)
            adapted = adapt(plan, call)
            assert [stage.mesh for stage in adapted.stages] == [stage.mesh for stage in plan.stages]
            check_step(smaller, adapted, call, f"{plan.schedule}, {count} samples")
