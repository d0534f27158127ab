"""precision="bf16": the arithmetic is that of one device with rounded parameters, and gradients add up in float32."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardplan.errors import NotSupported, UsageError
from shardplan.planner import precision
from shardplan.planner.export import trace_model
from shardplan.planner.trace import info
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests import models
from tests.plans import random_plan
from tests.ranks import pool

BF16 = torch.bfloat16


class Normed(nn.Module):
    """Floating inputs, a convolution, a norm with statistics, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        self.register_buffer("scale", torch.tensor(0.1))

    def forward(self, x, y):
        h = F.relu(self.bn(self.conv(x))).mean((2, 3)) * self.scale
        return F.cross_entropy(self.head(self.norm(h)), y)


class Case:
    def __init__(self, name):
        if name == "normed":
            torch.manual_seed(0)
            self.model, self.loss_fn, self.target = Normed(), None, None
            self.kwargs = {"x": torch.randn(8, 3, 8, 8), "y": torch.randint(5, (8,))}
        else:
            made = models.make(name)
            self.model, self.loss_fn, self.target, self.kwargs = made.model, made.loss_fn, made.target, made.kwargs
        self.trace = trace_model(
            self.model, (), self.kwargs, loss_fn=self.loss_fn, target=self.target, precision="bf16"
        )
        self.state = {n: t.detach().clone() for n, t in [*self.model.named_parameters(), *self.model.named_buffers()]}
        everything = self.kwargs if self.target is None else {**self.kwargs, "target": self.target}
        self.batch = {s.name: everything[s.name] for s in self.trace.sources.values() if s.kind == "input"}

    def one_device(self, dtype):
        """(loss, gradients) of the model, with its parameters in `dtype` (None: as they are)."""
        model = copy.deepcopy(self.model)
        if dtype is not None:
            precision.lower(model, dtype)
        output = model(**self.kwargs)
        loss = self.loss_fn(output, self.target) if self.loss_fn is not None else models.loss_of(output)
        loss.backward()
        return loss.detach(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


case = cache(Case)
CASES = [("bytegpt", {"dp": 2, "tp": 2}, 1), ("llama", {"tp": 2, "pp": 2}, 2), ("normed", {"dp": 2}, 1)]


def assert_near(mine, theirs, tolerance):
    assert set(mine) == set(theirs)
    largest = max(float(g.norm()) for g in theirs.values())
    for name, gradient in theirs.items():
        error = float((mine[name].float() - gradient).norm()) / max(float(gradient.norm()), 0.02 * largest)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def train(rank, program, state, batch, steps, save=None, load=None):
    import torch.distributed as dist

    from shardplan.runtime.engine import Engine

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    engine = Engine({"train": program}, rank, dist.get_world_size(), "cpu", sgd)
    engine.load_full(state)
    if load:
        engine.load(load)
    loss = engine.step(batch)
    gradients = engine.full_gradients()
    engine.step(batch)
    twice = engine.full_gradients()
    losses = [float(engine.train_step(batch)) for _ in range(steps)]
    used = {n: (t.dtype, torch.equal(t.float(), engine.shards.parameters[n].to(t.dtype).float()))
            for n, t in engine.shards.rounded.items()}  # fmt: skip
    dtypes = {p.dtype for _, p in engine.named_parameters()} | {p.grad.dtype for _, p in engine.named_parameters()}
    whole = engine.full_state_dict()
    if save:
        engine.save(save)
    engine.close()
    return loss, gradients, twice, losses, used, dtypes, whole


@pytest.mark.parametrize(("name", "degrees", "microbatches"), CASES)
def test_arithmetic_is_that_of_one_device_with_rounded_parameters(name, degrees, microbatches):
    made = case(name)
    plan = random_plan(made.trace, **degrees, microbatches=microbatches, seed=2)
    program = compile(made.trace, plan)
    rounded_loss, rounded = made.one_device(BF16)
    exact_loss, exact = made.one_device(None)
    reference = run_program(program, made.state, made.batch)
    assert reference.loss.dtype == torch.float32
    found = {n: g for n, g in reference.gradients.items() if g is not None}
    assert all(g.dtype == torch.float32 for g in found.values())
    assert float(reference.loss) == pytest.approx(float(rounded_loss), rel=2e-3)
    assert float(reference.loss) == pytest.approx(float(exact_loss), rel=2e-2)
    assert_near(found, rounded, 0.05)
    assert_near(found, exact, 0.08)
    answers = pool(program.world_size).run(train, program, made.state, made.batch, 2)
    for loss, *_ in answers:
        assert float(loss) == pytest.approx(float(reference.loss), rel=1e-3)
    _, gradients, twice, losses, used, dtypes, state = answers[0]
    assert_near(gradients, found, 0.02)
    assert_near(twice, {n: 2 * g for n, g in gradients.items()}, 1e-5)
    assert losses[1] < losses[0] and used and dtypes == {torch.float32}
    assert all(dtype == BF16 and equal for dtype, equal in used.values())
    assert any(not torch.equal(state[n], state[n].to(BF16).float()) for n in used)  # masters are not rounded


def test_gradients_of_many_microbatches_add_up_in_float32():
    """A sum of equal summands that bfloat16 cannot hold: 1 + 1/256 is 1 there."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return (self.w * x).float().sum()

    x = torch.tensor([[1.0], *[[1 / 256]] * 7])
    trace = trace_model(Scale(), (), {"x": x}, precision="bf16")
    program = compile(trace, random_plan(trace, microbatches=8))
    answers = pool(2).run(train, program, {"w": torch.ones(1)}, {"x": x}, 1)
    assert answers[0][1]["w"].item() == 1 + 7 / 256
    assert run_program(program, {"w": torch.ones(1)}, {"x": x}).gradients["w"].item() == 1 + 7 / 256


def test_checkpoints_move_between_precisions(tmp_path):
    made = case("bytegpt")
    batch, state = made.batch, made.state
    low = compile(made.trace, random_plan(made.trace, dp=2, seed=1))
    trace = trace_model(made.model, (), made.kwargs, loss_fn=made.loss_fn, target=made.target)
    full = compile(trace, random_plan(trace, tp=2, seed=1))
    after = pool(2).run(train, low, state, batch, 2, str(tmp_path / "low"))[0]
    zeros = {n: torch.zeros_like(t) for n, t in state.items()}
    wide = pool(2).run(train, full, zeros, batch, 0, str(tmp_path / "wide"), str(tmp_path / "low"))[0]
    assert all(torch.equal(after[6][n], wide[6][n]) for n in state)
    back = pool(2).run(train, low, zeros, batch, 0, None, str(tmp_path / "wide"))[0]
    assert all(torch.equal(after[6][n], back[6][n]) for n in state)
    assert float(wide[0]) == pytest.approx(float(back[0]), rel=1e-2)


def test_check_compares_with_the_rounded_model():
    from shardplan.checking import check

    x, y = torch.randn(8, 16), torch.randn(8, 4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))
    found = check(model, 2, (x, y), F.mse_loss, precision="bf16", microbatches=2)
    assert found.equal, str(found)
    assert any("bfloat16" in note for note in found.plan.notes)


def test_what_is_rounded():
    trace = case("normed").trace
    dtypes = {source.name: info(trace.node(n)).dtype for n, source in trace.sources.items()}
    assert {n for n, dtype in dtypes.items() if dtype == BF16} == set(trace.masters)
    assert dtypes["conv.weight"] == dtypes["norm.weight"] == BF16
    assert dtypes["bn.weight"] == dtypes["bn.running_mean"] == dtypes["scale"] == dtypes["x"] == torch.float32
    assert case("normed").model.conv.weight.dtype == torch.float32
    losses = [n for n in trace.nodes() if "cross_entropy" in str(n.target)]
    assert [info(n).dtype for n in losses] == [torch.float32]


def test_other_precisions_are_refused():
    for name in ("fp16", "half"):
        with pytest.raises(NotSupported, match="bf16"):
            precision.compute_dtype(name)
    with pytest.raises(UsageError, match="fp7"):
        precision.compute_dtype("fp7")
    with pytest.raises(NotSupported, match="leaf"):
        trace_model(case("normed").model, (), case("normed").kwargs, leaves=["head"], precision="bf16")
