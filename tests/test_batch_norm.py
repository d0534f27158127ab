"""Batch normalisation: over the whole batch by default, by the statistics of each replica and microbatch on request."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import shardplan as sp
from shardplan.cli import run
from shardplan.errors import UsageError
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees
from shardplan.planner.plan import Plan
from shardplan.planner.propagate import REPLICA_NORM
from shardplan.planner.search import SolveOptions, solve
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests.exactness import PLANS, Case, Planned, check, close, eager
from tests.prices import SimplePrices
from tests.ranks import pool
from tests.test_engine import train

BATCH = 8


class Convolutions(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d, momentum: float = 0.3) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = norm(8, momentum=momentum)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.other = norm(8, affine=False)
        self.flat = nn.BatchNorm1d(8, track_running_stats=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.other(self.second(x)).relu()
        return self.head(self.flat(x.mean((2, 3))))


def case(norm: type[nn.Module] = nn.BatchNorm2d, batch: int = BATCH) -> Case:
    torch.manual_seed(0)
    model = Convolutions(norm).double().train()
    x = torch.randn(batch, 3, 6, 6, dtype=torch.float64) + torch.arange(batch).view(-1, 1, 1, 1)
    return Case(model, (x,), F.cross_entropy, torch.randint(0, 4, (batch,)), whole=("mb",))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_statistics_are_those_of_the_batch(norm):
    check(case(norm), PLANS)


def test_a_process_group_does_not_change_what_is_traced(tmp_path):
    """SyncBatchNorm communicates by itself where there is a group, as under torchrun."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        made = Planned(case(nn.SyncBatchNorm))
    finally:
        dist.destroy_process_group()
    assert made.trace.fingerprint == Planned(case(nn.SyncBatchNorm)).trace.fingerprint


def by_parts(given: Case, replicas: int, microbatches: int):
    """What `replica` means, step by step on one device: (loss, gradients, buffers)."""
    model = copy.deepcopy(given.model)
    x, target = given.args[0], given.target
    parts = replicas * microbatches
    total = torch.zeros((), dtype=torch.float64)
    for xs, targets in zip(x.chunk(microbatches), target.chunk(microbatches), strict=True):
        before = copy.deepcopy({n: b for n, b in model.named_buffers()})
        after = []
        for part, labels in zip(xs.chunk(replicas), targets.chunk(replicas), strict=True):
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
            loss = F.cross_entropy(model(part), labels) / parts
            loss.backward()
            total += loss.detach()
            after.append(copy.deepcopy({n: b for n, b in model.named_buffers()}))
        for name, buffer in model.named_buffers():
            values = torch.stack([held[name] for held in after])
            buffer.copy_(values.mean(0) if values.is_floating_point() else values[0])
    return total, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("replicas, microbatches, stages", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2)])
def test_statistics_of_each_replica_and_microbatch(replicas, microbatches, stages):
    given = case()
    planned = Planned(given)
    planned.trace.batch_norm = "replica"
    found = planned.run(dp=replicas, microbatches=microbatches, pp=stages)
    loss, gradients, buffers = by_parts(given, replicas, microbatches)
    assert found.loss is not None
    close(found.loss, loss, 1e-10, 1e-12, "loss")
    if replicas * microbatches > 1:
        assert abs(float(loss - eager(given).loss)) > 1e-3, "the same as over the whole batch"
    for name, gradient in gradients.items():
        close(found.gradients[name], gradient, 1e-8, 1e-4, name)
    for name, value in buffers.items():
        close(found.buffers[name].double(), value.double(), 1e-10, 1e-12, name)


def planned_by_search(batch_norm: str, microbatches: int = 2, dp: int = 2, pp: int = 1) -> tuple[Planned, Plan]:
    planned, cluster = Planned(case()), Cluster.cpu(dp * pp)
    planned.trace.batch_norm = batch_norm
    options = SolveOptions(constraints=(degrees(dp=dp, tp=1, pp=pp),), microbatches=microbatches, rematerialize=False)
    return planned, solve(planned.trace, cluster, SimplePrices(cluster), options)


def test_the_plan_says_so():
    planned, plan = planned_by_search("replica", pp=2)
    assert plan.microbatches == 2 and plan.batch_norm == "replica"
    assert any(REPLICA_NORM in text for text in plan.splits["mb"].values())
    (note,) = [n for n in plan.notes if "not equal to one device" in n]
    assert note.startswith("not equal to one device: 3 batch normalisations") and "replica and microbatch" in note
    assert Plan.from_json(plan.to_json()) == plan
    found = run_program(compile(planned.trace, plan), planned.state, planned.batch)
    loss, _, _ = by_parts(planned.case, 2, 2)
    assert found.loss is not None
    close(found.loss, loss, 1e-10, 1e-12, "loss")


def test_a_plan_over_the_whole_batch_says_nothing():
    _, plan = planned_by_search("global", 1, pp=2)
    assert plan.batch_norm == "global" and not any("not equal" in note for note in plan.notes)


def test_on_real_ranks():
    planned, plan = planned_by_search("replica")
    loss, gradients, _ = by_parts(planned.case, 2, 2)
    for answer in pool(2).run(train, {"train": compile(planned.trace, plan)}, planned.state, planned.batch, 0):
        close(answer["loss"], loss, 1e-9, 1e-12, "loss")
        for name, gradient in gradients.items() if answer["gradients"] else ():
            close(answer["gradients"][name], gradient, 1e-8, 1e-4, name)


def test_other_words_are_refused():
    given = case()
    with pytest.raises(UsageError, match="batch_norm"):
        sp.plan(given.model, 2, (*given.args, given.target), given.loss_fn, batch_norm="local")


def test_the_command_line_asks_for_it(tmp_path, capsys):
    output = tmp_path / "plan.json"
    arguments = [
        "plan", "tests.test_batch_norm:target", "--devices", "2xh100", "--dp", "2", "--tp", "1", "--pp", "1",
        "--batch-norm", "replica", "--no-cache", "-o", str(output),
    ]  # fmt: skip
    assert run(arguments) == 0
    assert "not equal to one device" in capsys.readouterr().out
    assert Plan.load(output).batch_norm == "replica"


def target() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor], Any]:
    """For the command line."""
    given = case()
    return given.model, (*given.args, given.target), given.loss_fn
