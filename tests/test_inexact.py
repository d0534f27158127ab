"""What users ask for that is not what one device computes: factors instead of gradients, replicas that step alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shardplan as sp
from shardplan.errors import NotSupported, UsageError
from shardplan.planner.export import trace_model
from shardplan.planner.wire import Wire
from shardplan.rewrite import compile as compile_program
from tests.ranks import pool
from tests.test_reduction import chain, expected, weights

BATCH, WIDTH = 8, 6


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH))


def loss_of(output, target):
    return (output - target).square().mean()


def batches(count):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(count, BATCH, WIDTH, generator=draw)
    return list(zip(x, x.flip(-1) * 0.5, strict=True))


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.5)


def program(**settings):
    x, target = batches(1)[0]
    plan = sp.plan(
        model(), settings.pop("devices", "2xh100"), (x, target), loss_of, sgd, settings.pop("constraints", ()),
        microbatches=1, cache=False, **settings,
    )  # fmt: skip
    trace = trace_model(model(), (x,), loss_fn=loss_of, target=target)
    names = [s.name for s in trace.sources.values() if s.kind == "input"]
    return plan, compile_program(trace, plan), names


def train(rank, made, names, count, factory=sgd, start=0, path="", save="", world=2):
    """Parameters and losses after each of `count` steps from the batch `start` on."""
    from shardplan.runtime.engine import Engine

    engine = Engine({"train": made}, rank, world, "cpu", factory)
    engine.load_full(dict(model().named_parameters()))
    if path:
        engine.load(path)
    found, losses = [], []
    for x, target in batches(start + count)[start:]:
        losses.append(float(engine.train_step({n: target if n == "target" else x for n in names})))
        found.append({n: p.detach().clone() for n, p in engine.named_parameters()})
    if save:
        engine.save(save)
    engine.close()
    return found, losses


def replica(net, optimizer, x, target):
    optimizer.zero_grad()
    loss_of(net(x), target).backward()
    optimizer.step()


def by_hand(every, count):
    """Two replicas on their halves of the batches."""
    nets = [model(), model()]
    optimizers = [sgd(net.parameters()) for net in nets]
    for step, (x, target) in enumerate(batches(count), 1):
        for net, optimizer, mine, wanted in zip(nets, optimizers, x.chunk(2), target.chunk(2), strict=True):
            replica(net, optimizer, mine, wanted)
        if step % every == 0:
            with torch.no_grad():
                for one, two in zip(*(net.parameters() for net in nets), strict=True):
                    mean = (one + two) / 2
                    one.copy_(mean)
                    two.copy_(mean)
    return [dict(net.named_parameters()) for net in nets]


def assert_close(found, wanted):
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-6)


DP = (sp.degrees(dp=2, tp=1, pp=1),)


@pytest.mark.parametrize("every", [1, 3])
def test_replicas_that_step_alone(every):
    plan, made, names = program(constraints=DP, average_every=every)
    assert plan.average_every == every and any("average their parameters" in note for note in plan.notes)
    wanted = by_hand(every, 4)
    for (found, _), replica in zip(pool(2).run(train, made, names, 4), wanted, strict=True):
        assert_close(found[-1], replica)


def plain(params):
    return torch.optim.SGD(params, lr=0.1)


def test_an_average_after_every_step_of_plain_sgd_is_data_parallel():
    _, made, names = program(constraints=DP, average_every=1)
    net = model()
    optimizer = plain(net.parameters())
    for x, target in batches(3):
        replica(net, optimizer, x, target)
    for found, _ in pool(2).run(train, made, names, 3, plain):
        assert_close(found[-1], dict(net.named_parameters()))


def test_replicas_go_on_from_a_checkpoint(tmp_path):
    """Between two averages: each with what it had; under another plan, from the average."""
    _, made, names = program(constraints=DP, average_every=3)
    whole = [found[-1] for found, _ in pool(2).run(train, made, names, 5)]
    pool(2).run(train, made, names, 2, sgd, 0, "", str(tmp_path / "state"))
    for (found, _), wanted in zip(
        pool(2).run(train, made, names, 3, sgd, 2, str(tmp_path / "state")), whole, strict=True
    ):
        assert_close(found[-1], wanted)
    _, one, names = program(devices="1xh100")
    mean = {n: (a + b) / 2 for (n, a), b in zip(by_hand(3, 2)[0].items(), by_hand(3, 2)[1].values(), strict=True)}
    found, _ = pool(2).run(loaded, one, str(tmp_path / "state"))[0]
    assert_close(found, mean)


def loaded(rank, made, path):
    from shardplan.runtime.engine import Engine

    engine = Engine({"train": made}, rank, 2, "cpu", sgd)
    engine.load_full(dict(model().named_parameters()))
    engine.load(path)
    found = {n: p.detach().clone() for n, p in engine.named_parameters()}
    engine.close()
    return found, 0


def test_what_does_not_go_together_is_refused():
    wrong = [{"average_every": 0}, {"average_every": 2, "zero": 1}, {"average_every": 2, "reduction": "bf16"}]
    wrong += [{"reduction": "low_rank:0"}, {"reduction": "x"}, {"reduction": "low_rank", "zero": 3}]
    for given_ in wrong:
        with pytest.raises(UsageError):
            program(**given_)
    with pytest.raises(NotSupported, match="storage"):
        _, made, _ = program(constraints=(*DP, sp.zero(1, "*")), reduction="exact")
        from shardplan.runtime import replicas

        replicas.check(replace(made, average_every=2))


# -- factors -----------------------------------------------------------------------------------------------------------


class Alone:
    """A group of one rank."""

    def allreduce(self, tensors):
        return self

    def wait(self):
        pass


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(1, 8), st.integers(1, 8))
def test_factors_of_full_rank_are_the_gradient(rows, columns, rank):
    from shardplan.runtime.low_rank import LowRankBucket

    torch.manual_seed(rows * 100 + columns * 10 + rank)
    rank = min(rank, rows, columns)
    leaf = torch.zeros(rows, columns, dtype=torch.float64)
    kept = {}
    exact, sent = torch.zeros_like(leaf), torch.zeros_like(leaf)
    for _ in range(3):
        leaf.grad = torch.randn_like(leaf)
        exact += leaf.grad
        bucket = LowRankBucket(Alone(), [leaf], rank, kept)
        bucket.start()
        bucket.launch()
        bucket.proceed()
        bucket.wait()
        sent += leaf.grad
        assert torch.linalg.matrix_rank(leaf.grad) <= rank
        left = kept[leaf].error
        torch.testing.assert_close(sent + left, exact)
        if rank == min(rows, columns):
            torch.testing.assert_close(left, torch.zeros_like(leaf), atol=1e-6, rtol=0)


def errors_of(rank, made, state, x, count):
    from shardplan.runtime.engine import Engine

    engine = Engine({"train": made}, rank, 2, "cpu")
    engine.load_full(state)
    total = {}
    for _ in range(count):
        engine.zero_grad()
        engine.step({"x": x})
        for name, parameter in engine.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + parameter.grad
    parameters = dict(engine.named_parameters())
    left = {n: engine.attached.factors[p].error for n, p in parameters.items() if p in engine.attached.factors}
    engine.close()
    return total, left


def test_what_factors_leave_out_comes_later():
    """Over steps: what was sent and what ranks have left out is the sum of the gradients."""
    state, x, count = weights(), torch.randn(8, 4), 3
    made = replace(chain(2), reduction="low_rank:1")
    (one, left_one), (two, left_two) = pool(2).run(errors_of, made, state, x, count)
    assert {"a", "b", "c", "d", "big"} <= left_one.keys()
    for name, gradient in expected(state, x).items():
        if gradient is not None:
            assert torch.equal(one[name], two[name])
            whole = one[name] + left_one[name] + left_two[name]
            torch.testing.assert_close(whole, gradient * count, rtol=1e-4, atol=1e-4)


def test_training_with_factors_converges_and_resumes(tmp_path):
    plan, made, names = program(constraints=DP, reduction="low_rank:2")
    assert plan.reduction == "low_rank:2" and any("rank 2" in note for note in plan.notes)
    assert Wire.parse(plan.reduction).factored((12, WIDTH)) == 2
    _, exact, _ = program(constraints=DP)
    _, losses = pool(2).run(train, made, names, 60)[0]
    _, wanted = pool(2).run(train, exact, names, 60)[0]
    assert losses[-1] < 0.6 * losses[0] and losses[-1] < 1.15 * wanted[-1]
    pool(2).run(train, made, names, 3, sgd, 0, "", str(tmp_path / "state"))
    _, resumed = pool(2).run(train, made, names, 4, sgd, 3, str(tmp_path / "state"))[0]
    assert resumed == pytest.approx(losses[3:7], rel=1e-5)
