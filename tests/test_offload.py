"""The optimizer on the host, and the optimizer of workers as their driver has it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import shardplan as sp
from shardplan.errors import UsageError
from shardplan.runtime.offload import Offloaded
from tests import jobs
from tests.ranks import pool
from tests.test_inexact import assert_close, batches, loss_of, model, program, train


def adam(params):
    return torch.optim.AdamW(params, lr=1e-2)


def test_steps_on_copies_are_steps_on_the_parameters():
    near, far = model(), model()
    held = dict(near.named_parameters())
    away = Offloaded(held)
    assert all(away.stepped[name] is parameter for name, parameter in held.items())
    made = Offloaded(held, always=True)
    assert not any(made.stepped[name] is parameter for name, parameter in held.items())
    one, two = adam(made.stepped.values()), adam(far.parameters())
    for x, target in batches(3):
        for net in (near, far):
            net.zero_grad()
            loss_of(net(x), target).backward()
        made.collect()
        one.step()
        made.give()
        two.step()
        assert_close(held, dict(far.named_parameters()))
    with torch.no_grad():
        nn.init.ones_(held["0.bias"])
    made.take()
    assert torch.equal(made.stepped["0.bias"].data, torch.ones(12))


def test_plans_with_the_optimizer_on_the_host(tmp_path):
    kept, exact, names = program(constraints=(sp.degrees(dp=1, tp=1, pp=2),))
    plan, made, _ = program(constraints=(sp.degrees(dp=1, tp=1, pp=2),), offload="optimizer")
    assert plan.offload == "optimizer" and any("on the host" in note for note in plan.notes)
    assert all(m.optimizer < k.optimizer for m, k in zip(plan.memory(), kept.memory(), strict=True))
    assert plan.memory()[0].peak_nbytes < kept.memory()[0].peak_nbytes
    on_cpu, *_ = program(devices=["cpu", "cpu"], constraints=(sp.degrees(dp=1, tp=1, pp=2),), offload="optimizer")
    assert all(m.optimizer > 0 for m in on_cpu.memory())
    path = str(tmp_path / "state")
    with_, without = (pool(2).run(train, p, names, 3, adam, 0, "", path + k) for p, k in ((made, "a"), (exact, "b")))
    for (mine, _), (wanted, _) in zip(with_, without, strict=True):
        assert_close(mine[-1], wanted[-1])
    # Checkpoints are the same with and without.
    swapped = (pool(2).run(train, p, names, 2, adam, 3, path + k) for p, k in ((made, "b"), (exact, "a")))
    for (mine, _), (wanted, _) in zip(*swapped, strict=True):
        assert_close(mine[-1], wanted[-1])
    with pytest.raises(UsageError, match="offload"):
        program(offload="parameters")


def test_a_driver_moves_the_learning_rate_of_its_workers():
    """A scheduler of the driver's optimizer against the same loop by hand."""
    samples, net = jobs.Samples(), jobs.model().eval()
    x, y = samples.x[: jobs.BATCH], samples.y[: jobs.BATCH]
    optimizer = adam(net.parameters())
    by_hand = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with jobs.start(jobs.plan(pp=2), scheduler=None, optimizer=adam, clip_norm=None) as pm:
        pm.eval()
        mine = pm.optimizer
        assert mine is not None and mine.param_groups[0]["lr"] == 1e-2
        assert mine.param_groups[0]["names"] == [name for name, _ in net.named_parameters()]
        assert [tuple(p.shape) for p in mine.param_groups[0]["params"]] == [tuple(p.shape) for p in net.parameters()]
        scheduler = torch.optim.lr_scheduler.StepLR(mine, 1, 0.5)
        for _ in range(4):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            by_hand.step()
            assert pm.train_step(x, target=y).item() == pytest.approx(loss.item(), rel=1e-5)
            scheduler.step()
        mine.param_groups[0]["weight_decay"] = 0.5
        again = pm.optimizer
        assert again is mine and again.param_groups[0]["weight_decay"] == 0.5
        assert copy.deepcopy(again.param_groups[0]["lr"]) == by_hand.get_last_lr()[0]
