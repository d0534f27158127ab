"""On real ranks: totals that are taken before the first microbatch, and random numbers that no plan and no restart
changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardplan.rewrite import compile
from shardplan.rewrite.program import Program
from tests.exactness import Case, Planned, close, eager
from tests.plans import random_plan
from tests.ranks import pool
from tests.test_engine import train
from tests.test_exactness_losses import LOSSES, UNEVEN, Tagger, tokens
from tests.test_random_plans import Noisy, loss_of


def program(planned: Planned, **plan: Any) -> dict[str, Program]:
    return {"train": compile(planned.trace, random_plan(planned.trace, **plan))}


@pytest.mark.parametrize("name", ["masked mean", "weighted and smoothed", "mean of rows"])
def test_losses_over_uneven_tokens(name):
    ids, target = tokens(UNEVEN)
    case = Case(Tagger().double(), (ids,), LOSSES[name], target)
    planned, expected = Planned(case), eager(case)
    for plan in ({"dp": 2, "microbatches": 2}, {"pp": 2, "microbatches": 4}):
        answers = pool(2).run(train, program(planned, **plan), planned.state, planned.batch, 0)
        for answer in answers:
            close(answer["loss"], expected.loss, 1e-9, 1e-12, f"{name} {plan}: loss")
        for parameter, gradient in expected.gradients.items():
            close(answers[0]["gradients"][parameter], gradient, 1e-9, 1e-6, f"{name} {plan}: {parameter}")
            assert gradient is not None
            close(answers[0]["twice"][parameter], 2 * gradient, 1e-9, 1e-6, f"{name} {plan}: {parameter} twice")


def noisy() -> Planned:
    torch.manual_seed(0)
    model = Noisy().double().train()
    return Planned(Case(model, (torch.randint(0, 32, (8, 6)),), loss_of, torch.randint(0, 32, (8, 6))))


def test_every_plan_trains_alike_and_goes_on_where_it_stopped(tmp_path):
    """Each step draws anew, the same under every plan; a checkpoint remembers how many there were."""
    planned = noisy()
    plans = {"dp2 m2": {"dp": 2, "microbatches": 2}, "tp2": {"tp": 2}, "pp2 m4": {"pp": 2, "microbatches": 4}}
    made = {name: program(planned, **plan) for name, plan in plans.items()}
    start = planned.run()
    assert start.loss is not None
    found = {name: pool(2).run(train, programs, planned.state, planned.batch, 2)[0] for name, programs in made.items()}
    for name, answer in found.items():
        close(answer["loss"], start.loss, 1e-9, 1e-12, f"{name}: loss of the first step")
        for parameter, gradient in start.gradients.items():
            close(answer["gradients"][parameter], gradient, 1e-8, 1e-8, f"{name}: {parameter}")
        assert answer["losses"] == pytest.approx(found["tp2"]["losses"], rel=1e-7), name
    path = str(tmp_path / "checkpoint")
    before = pool(2).run(train, made["dp2 m2"], planned.state, planned.batch, 1, None, path)[0]
    assert before["losses"][0] == pytest.approx(found["tp2"]["losses"][0], rel=1e-7)
    after = pool(2).run(train, made["tp2"], planned.state, planned.batch, 0, None, None, path)[0]
    assert float(after["loss"]) == pytest.approx(found["tp2"]["losses"][1], rel=1e-7)
