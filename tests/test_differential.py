"""The main promise on real ranks: for six families and every combination of degrees, and for the plan the planner chose
itself, loss, every gradient and the parameters after three AdamW steps are those of one device on the global batch."""

from __future__ import annotations

import pytest

from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees
from shardplan.planner.search import SolveOptions, solve
from shardplan.rewrite import compile
from tests import models
from tests.prices import SimplePrices
from tests.ranks import pool
from tests.test_engine import assert_near, inputs, one_device, traced, train

FAMILIES = ("llama", "gpt2", "bert", "t5", "vit", "resnet")
DEGREES = {
    "dp2": degrees(dp=2, tp=1, pp=1),
    "tp2": degrees(dp=1, tp=2, pp=1),
    "pp2": degrees(dp=1, tp=1, pp=2),
    "dp2xtp2": degrees(dp=2, tp=2, pp=1),
    "tp2xpp2": degrees(dp=1, tp=2, pp=2),
    "dp2xpp2": degrees(dp=2, tp=1, pp=2),
    "own choice": None,
}
# Where microbatches are exact (batch normalisation is not), pipelines run several.
PIPELINED = {"pp2": 4, "tp2xpp2": 2, "dp2xpp2": 2}


@pytest.mark.parametrize("arrangement", DEGREES)
@pytest.mark.parametrize("name", FAMILIES)
def test_planned_job_matches_one_device(name, arrangement):
    case, trace, state = traced(name)
    fixed = DEGREES[arrangement]
    world = 2 if fixed is not None and fixed.dp * fixed.tp * fixed.pp == 2 else 4
    cluster = Cluster.cpu(world)
    if "tp2" in arrangement:
        cluster = cluster.slower_links(1e-3)  # on a real link nobody would split models this small
    microbatches = PIPELINED.get(arrangement, "auto") if name != "resnet" else "auto"
    options = SolveOptions(
        constraints=(fixed,) if fixed else (), microbatches=microbatches, rematerialize=False, schedule="1f1b"
    )
    plan = solve(trace, cluster, SimplePrices(cluster), options)
    programs = {"train": compile(trace, plan)}
    if fixed is not None:
        assert programs["train"].world_size == world
        assert (len(plan.stages), plan.stages[0].mesh.sizes) == (fixed.pp, (fixed.dp, fixed.tp))
    if "tp2" in arrangement:
        assert any("S(" in text for text in plan.splits["tp"].values()), "nothing is split"
    answer = pool(world).run(train, programs, state, inputs(case, trace), 3)[0]
    eager = models.run_eager(case)
    losses, after = one_device(case, 3)
    floor = 1e-3 * max(float(g.norm()) for g in eager.gradients.values())
    assert_near(answer["loss"], eager.loss, 1e-5, 0, "loss")
    assert answer["losses"] == pytest.approx(losses, rel=1e-4)
    assert set(answer["gradients"]) == set(eager.gradients)
    for parameter, gradient in eager.gradients.items():
        assert_near(answer["gradients"][parameter], gradient, 1e-5, floor, f"gradient of {parameter}")
    parameters = dict(case.model.named_parameters())
    floor = 1e-2 * max(float(after[name].norm()) for name in parameters)
    for key, value in after.items():
        if key in parameters:
            assert_near(answer["state"][key], value, 1e-4, floor, f"{key} after three steps")
