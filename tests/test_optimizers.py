"""Optimizers of torch.optim in all their implementations, clipping and accumulation: as on one device."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from shardplan.errors import UsageError
from shardplan.rewrite import compile
from tests.plans import random_plan
from tests.ranks import pool
from tests.test_engine import inputs, traced

optim = torch.optim
MADE = {
    **{f"adamw {how}": partial(optim.AdamW, lr=1e-2, eps=1e-3, **{how: True}) for how in ("foreach", "fused")},
    "adam amsgrad": partial(optim.Adam, lr=1e-2, eps=1e-3, amsgrad=True, foreach=False),
    "adam maximize": partial(optim.Adam, lr=1e-2, eps=1e-3, maximize=True),
    **{f"sgd {how}": partial(optim.SGD, lr=0.1, momentum=0.9, **{how: True}) for how in ("foreach", "fused")},
    "rmsprop": partial(optim.RMSprop, lr=1e-3, centered=True, eps=1e-3),
    "adagrad": partial(optim.Adagrad, lr=1e-2, eps=1e-3),
    "adadelta": partial(optim.Adadelta, eps=1e-3),
    "adamax": partial(optim.Adamax, lr=1e-2, eps=1e-3),
    "nadam": partial(optim.NAdam, lr=1e-2, eps=1e-3),
    "radam": partial(optim.RAdam, lr=1e-2, eps=1e-3),
    "asgd": partial(optim.ASGD, lr=1e-2),
}  # fmt: skip
CLIP = 0.05


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def train(rank, program, state, batch, names, clip):
    """Three optimizer steps, the last of twice the gradient; whole parameters, by optimizer."""
    import torch.distributed as dist

    from shardplan.runtime.engine import Engine

    found = {}
    for name in names:
        engine = Engine(
            {"train": program}, rank, dist.get_world_size(), "cpu", MADE[name], clip, scheduler_factory=halving
        )
        engine.load_full(state)
        engine.train_step(batch)
        engine.zero_grad()
        engine.step(batch)
        engine.optimizer_step()
        engine.zero_grad()
        engine.step(batch)
        engine.step(batch)
        engine.optimizer_step()
        found[name] = engine.full_state_dict()
        engine.close()
    return found


def one_device(case, name, clip):
    model = case.model
    start = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = MADE[name](model.parameters())
    scheduler = halving(optimizer)
    for times in (1, 1, 2):
        optimizer.zero_grad()
        for _ in range(times):
            case.loss_fn(model(**case.kwargs), case.target).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
    after = {k: v.detach().clone() for k, v in model.state_dict().items()}
    model.load_state_dict(start)
    model.zero_grad()
    return after


@pytest.mark.parametrize("degrees", [{"dp": 2}, {"tp": 2}, {"pp": 2}])
def test_every_optimizer_steps_as_on_one_device(degrees):
    case, trace, state = traced("mlp")
    program = compile(trace, random_plan(trace, **degrees, microbatches=2, seed=3))
    clip = CLIP if "dp" not in degrees else None
    found = pool(2).run(train, program, state, inputs(case, trace), list(MADE), clip)[0]
    for name in MADE:
        for parameter, value in one_device(case, name, clip).items():
            torch.testing.assert_close(found[name][parameter], value, rtol=2e-4, atol=2e-5, msg=f"{name}: {parameter}")


def without(rank, program, state):
    import torch.distributed as dist

    from shardplan.runtime.engine import Engine

    engine = Engine({"train": program}, rank, dist.get_world_size(), "cpu")
    engine.load_full(state)
    with pytest.raises(UsageError, match="optimizer_step needs an optimizer"):
        engine.optimizer_step()
    engine.close()


def test_a_step_without_an_optimizer_is_refused():
    _, trace, state = traced("mlp")
    pool(2).run(without, compile(trace, random_plan(trace, dp=2)), state)
