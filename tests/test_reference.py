"""Any legal choice of strategies, stages and microbatches computes what one device computes: loss and every gradient.

Strategies are drawn at random, so conversions between all states occur; ranks are simulated in this process.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardplan.planner.export import trace_model
from shardplan.planner.trace import Trace
from shardplan.rewrite import compile
from shardplan.rewrite.reference import ReferenceResult, run_program
from tests import models
from tests.plans import random_plan

FAMILIES = ("llama", "gpt2", "bert", "t5", "vit", "resnet", "encoder", "bytegpt", "mlp")
MESHES = ({"dp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 2, "tp": 2}, {"tp": 2, "pp": 2}, {"dp": 2, "pp": 2})
UNEQUAL = (
    ((1, 1), (2, 1)), ((2, 1), (1, 1)), ((1, 2), (1, 1)), ((2, 1), (1, 2)), ((1, 2), (2, 1)), ((2, 2), (1, 2)),
    ((1, 2), (4, 1)), ((4, 1), (1, 1), (1, 2)), ((1, 2), (2, 1), (1, 1)),
)  # fmt: skip


@pytest.fixture(scope="module")
def traced():
    made: dict[str, tuple[models.Case, Trace, models.Result, dict[str, torch.Tensor]]] = {}

    def get(name: str):
        if name not in made:
            case = models.make(name)
            case.model.double()
            for key, value in case.batch.items():
                if torch.is_tensor(value) and value.is_floating_point():
                    case.batch[key] = value.double()
            state = {k: v.detach().clone() for k, v in case.model.state_dict(keep_vars=True).items()}
            state |= {k: v.detach().clone() for k, v in case.model.named_buffers()}
            trace = trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)
            made[name] = case, trace, models.run_eager(case), state
        return made[name]

    return get


# These compute a part of the model in fp32 whatever the parameters are, so the order of a sum shows.
ROUNDS_TO_FP32 = {"llama", "gpt2", "t5", "bert"}


def close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float, floor: float, where: str) -> None:
    """Relative to the tensor's norm, or to `floor` where that is larger (some true gradients are zero)."""
    error = float((mine - theirs).norm()) / max(float(theirs.norm()), floor)
    assert error < tolerance, f"{where}: relative error {error:.2e}"


@pytest.mark.parametrize("meshes", UNEQUAL, ids=lambda m: "|".join(f"{dp}x{tp}" for dp, tp in m))
@pytest.mark.parametrize("name", ("llama", "t5", "encoder", "resnet"))
def test_stages_of_unequal_meshes_match_one_device(traced, name, meshes):
    case, trace, eager, state = traced(name)
    microbatches = 1 if name == "resnet" or max(dp for dp, _ in meshes) > 2 else 2
    plan = random_plan(trace, meshes=meshes, microbatches=microbatches, seed=len(meshes))
    result = run_program(compile(trace, plan), state, batch_of(case, trace))
    where = f"{name} {meshes}"
    compare(result, eager, 1e-6 if name in ROUNDS_TO_FP32 else 1e-9, where)


@pytest.mark.parametrize("degrees", MESHES, ids=lambda d: "x".join(f"{k}{v}" for k, v in d.items()))
@pytest.mark.parametrize("name", FAMILIES)
def test_random_plans_match_one_device(traced, name, degrees):
    case, trace, eager, state = traced(name)
    exact = name != "resnet"  # batch statistics of microbatches are not those of the batch
    for seed in range(2):
        microbatches = 2 if exact and (seed or degrees.get("pp", 1) > 1) else 1
        plan = random_plan(trace, **degrees, microbatches=microbatches, seed=seed)
        program = compile(trace, plan)
        result = run_program(program, state, batch_of(case, trace))
        where = f"{name} {degrees} m{microbatches} seed {seed}"
        compare(result, eager, 1e-6 if name in ROUNDS_TO_FP32 else 1e-9, where)


def compare(result: ReferenceResult, eager: models.Result, tolerance: float, where: str) -> None:
    """Loss, every gradient and every buffer."""
    assert result.loss is not None and eager.loss is not None
    close(result.loss, eager.loss, tolerance, 1e-12, f"{where}: loss")
    floor = 1e-3 * max(float(g.norm()) for g in eager.gradients.values())
    for parameter, gradient in eager.gradients.items():
        mine = result.gradients[parameter]
        assert mine is not None, f"{where}: no gradient of {parameter}"
        close(mine, gradient, tolerance, floor, f"{where}: gradient of {parameter}")
    for buffer, value in eager.buffers.items():
        if buffer in result.buffers and value.is_floating_point():
            close(result.buffers[buffer], value, tolerance, 1e-12, f"{where}: buffer {buffer}")


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "resnet"])
def test_recomputed_segments_match_one_device(traced, name):
    """Activations dropped and recomputed, on one device and split; segments that write to buffers are left alone."""
    case, trace, eager, state = traced(name)
    for degrees, microbatches in (({}, 1), ({"tp": 2}, 1), ({"dp": 2, "pp": 2}, 1 if name == "resnet" else 2)):
        names = [segment.name for segment in trace.segments]
        plan = random_plan(trace, **degrees, microbatches=microbatches, seed=7, rematerialize=names)
        program = compile(trace, plan)
        assert name == "resnet" or all("checkpoint(recomputed_" in code.source for code in program.stages)
        result = run_program(program, state, batch_of(case, trace))
        close(result.loss, eager.loss, 1e-6, 1e-12, f"{name} {degrees}: loss")
        floor = 1e-3 * max(float(g.norm()) for g in eager.gradients.values())
        for parameter, gradient in eager.gradients.items():
            mine = result.gradients[parameter]
            assert mine is not None
            close(mine, gradient, 1e-6, floor, f"{name} {degrees}: gradient of {parameter}")


def batch_of(case: models.Case, trace: Trace) -> dict[str, torch.Tensor]:
    return {s.name: case.batch[s.name] for s in trace.sources.values() if s.kind == "input"}


def test_programs_of_a_plan_lay_parameters_alike():
    """A forward call without the target gives what needs none of it; parameters that it does not read stay in place."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = self.up(x).tanh()
            return {"loss": (self.down(hidden) - y).square().mean(), "hidden": hidden}

    trace = trace_model(Encoder(), (torch.randn(8, 4), torch.randn(8, 4)), {})
    plan = random_plan(trace, dp=2, pp=2, microbatches=2, seed=0, bounds=(0, 1))
    programs = [compile(trace, plan, "train"), compile(trace, plan, "forward", frozenset({"x"}))]
    places = [{spec.name: (spec.stages, spec.layout) for spec in program.parameters} for program in programs]
    assert {stages for stages, _ in places[0].values()} == {(0,), (1,)}
    assert places[1] == places[0]
