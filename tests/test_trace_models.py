"""What people write in models: hooks, parametrizations, checkpoints, autocast, compiled parts, side effects. Each is
traced and computes under a plan what eager computes, or is refused with a reason; nothing is silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from shardplan.errors import NotTraceable, ShardplanError
from shardplan.planner.export import trace_model
from shardplan.planner.trace import Trace
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests.plans import random_plan

D = 8


def linear() -> nn.Linear:
    return nn.Linear(D, D)


class Body(nn.Module):
    """Two linear layers; the subclasses say what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linear(), linear()


class Keywords(Body):
    def forward(self, x, **options):
        return self.last(self.first(x) * options.get("scale", 2.0) + options["bias"])


@dataclass
class Result:
    y: torch.Tensor
    count: int = 3


class ReturnsDataclass(nn.Linear):
    def forward(self, x):
        return Result(super().forward(x))


class InnerDataclass(Body):
    def __init__(self) -> None:
        super().__init__()
        self.inner = ReturnsDataclass(D, D)

    def forward(self, x):
        found = self.inner(x)
        return self.last(found.y) * found.count


class CachedProperties(Body):
    @cached_property
    def table(self):
        return torch.arange(D).double() / D

    @cached_property
    def doubled(self):
        return self.first.weight * 2

    def forward(self, x):
        return self.last(x) * self.table + x @ self.doubled.t()


class Hooks(Body):
    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(lambda module, args, output: output * 2)
        self.last.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        self.last.register_full_backward_hook(lambda module, into, out: tuple(g * 2 for g in into if g is not None))

    def forward(self, x):
        return self.last(self.first(x).relu())


class Checkpoints(Body):
    def forward(self, x):
        h = checkpoint(lambda y: self.first(y).relu(), x, use_reentrant=False)
        return checkpoint_sequential(nn.Sequential(self.last, self.first), 2, h, use_reentrant=False)


class Autocast(Body):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = F.linear(x.float(), self.first.weight.float()).relu()
            with torch.autocast("cpu", enabled=False):
                h = h.double() * 2
        return self.last(h)


class NoGrad(Body):
    @torch.no_grad()
    def frozen(self, x):
        return self.first(x)

    def forward(self, x):
        with torch.inference_mode():
            doubled = x * 2
        return self.last(x) + self.frozen(x) + doubled.clone()


class Rounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class StraightThrough(nn.Module):
    def forward(self, x):
        return Rounds.apply(x * 3)


class Energy(nn.Module):
    """Forces: the gradient of an energy, within the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = linear(), nn.Linear(D, 1, bias=False)

    def forward(self, x):
        x = x.detach().requires_grad_()
        energy = self.out(torch.tanh(self.inner(x))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


class GradientHook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x):
        h = self.inner(x)
        if h.requires_grad:
            h.register_hook(lambda grad: grad * 2)
        return h


class Around(Body):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.last(self.part(self.first(x)))


class CompiledInPlace(Around):
    def __init__(self) -> None:
        super().__init__(linear())
        self.part.compile()


class Counts(Body):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.shapes = 0, []

    def forward(self, x):
        self.calls += 1
        self.shapes.append(x.shape)
        self.kept = self.first(x)
        return self.last(self.kept) * (1 if self.calls < 100 else 2)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(D, D, batch_first=True)

    def forward(self, x):
        steps = x.unsqueeze(1).expand(-1, 3, -1)
        packed = nn.utils.rnn.pack_padded_sequence(steps, torch.full((len(x),), 3), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0][:, -1]


def sequence(made: nn.Module) -> nn.Module:
    return nn.Sequential(made, nn.ReLU(), linear())


RUNS = {
    "inner dataclass": (InnerDataclass, False),
    "cached properties": (CachedProperties, False),
    "hooks": (Hooks, True),
    "checkpoints": (Checkpoints, False),
    "autocast": (Autocast, False),
    "no_grad": (NoGrad, False),
    "weight_norm": (lambda: sequence(parametrizations.weight_norm(linear())), False),
    "spectral_norm": (lambda: sequence(parametrizations.spectral_norm(linear())), True),
    "orthogonal": (lambda: sequence(parametrizations.orthogonal(linear())), False),
    "pruned": (lambda: sequence(prune.random_unstructured(linear(), "weight", 0.5)), False),
    "custom backward": (lambda: Around(StraightThrough()), True),
    "energy": (lambda: nn.Sequential(Energy(), linear()), True),
    "gradient hook": (lambda: Around(GradientHook()), True),
    "compiled part": (lambda: Around(torch.compile(linear())), False),
    "compiled in place": (CompiledInPlace, False),
    "compiled whole": (lambda: torch.compile(sequence(linear())), False),
    "side effects": (Counts, False),
    "packed sequence": (lambda: Around(Packed()), True),
}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(4, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, y


def compare(model: nn.Module, trace: Trace, batch: dict[str, torch.Tensor], eager: Callable[[], torch.Tensor]) -> None:
    """eager: the loss of the model itself."""
    state = {n: v.detach().clone() for n, v in [*model.named_parameters(), *model.named_buffers()]}
    names = [s.name for s in trace.sources.values() if s.kind == "input"]
    given = {name: batch.get(name, batch["x"]) for name in names}
    result = run_program(compile(trace, random_plan(trace, dp=2, seed=0)), state, given)
    rtol, atol = (2e-2, 2e-3) if "bfloat16" in str(trace.graph) else (1e-7, 1e-7)
    loss = eager()
    torch.testing.assert_close(result.loss, loss.detach(), rtol=rtol, atol=atol)
    loss.backward()
    for name, parameter in model.named_parameters():
        found = result.gradients[name]
        assert (found is None) == (parameter.grad is None), name
        if found is not None:
            torch.testing.assert_close(found, parameter.grad, rtol=rtol, atol=atol)
    for name, buffer in model.named_buffers():
        if name in result.buffers:
            torch.testing.assert_close(result.buffers[name], buffer, check_dtype=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
@pytest.mark.parametrize("name", RUNS)
def test_models_as_people_write_them(name):
    make, leaf = RUNS[name]
    torch.manual_seed(0)
    model, (x, y) = make().double(), data()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    trace = trace_model(model, (x,), loss_fn=F.mse_loss, target=y)
    assert bool(trace.leaves()) == leaf, trace.notes
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert getattr(model, "calls", 0) == 0
    eager = model._orig_mod if name == "compiled whole" else model
    torch.compiler.set_stance("force_eager")
    try:
        compare(model, trace, {"x": x, "target": y}, lambda: F.mse_loss(eager(x), y))
    finally:
        torch.compiler.set_stance("default")


def test_keywords_and_a_dataclass_as_output():
    torch.manual_seed(0)
    model, (x, y) = Keywords().double(), data()
    trace = trace_model(model, (), {"x": x, "bias": y[0], "scale": 3.0}, loss_fn=F.mse_loss, target=y)
    batch = {"x": x, "bias": y[0], "target": y}
    compare(model, trace, batch, lambda: F.mse_loss(model(x, bias=y[0], scale=3.0), y))
    whole = ReturnsDataclass(D, D).double()
    trace = trace_model(whole, (x,), loss_fn=lambda found, target: F.mse_loss(found.y, target), target=y)
    compare(whole, trace, {"x": x, "target": y}, lambda: F.mse_loss(whole(x).y, y))


@pytest.mark.parametrize("form", ["transposed", "expanded"])
def test_inputs_in_any_layout(form):
    torch.manual_seed(0)
    model, (x, y) = sequence(linear()).double(), data()
    x = torch.randn(D, 4, dtype=torch.float64).t() if form == "transposed" else x[:1].expand(4, -1)
    trace = trace_model(model, (x,), loss_fn=F.mse_loss, target=y)
    compare(model, trace, {"x": x, "target": y}, lambda: F.mse_loss(model(x), y))


def hooked() -> nn.Module:
    made = linear()
    made.weight.register_hook(lambda grad: grad * 2)
    return made


class Generates(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: StraightThroughRoot(D, D), "has a backward of its own"),
        (lambda: Energy(), "has a backward of its own"),
        (lambda: GradientHook(), "has a backward of its own"),
        (hooked, "weight has a hook on its gradient"),
        (lambda: nn.DataParallel(linear()), "the model is a DataParallel"),
        (lambda: Generates(D, D), "neither a tensor nor a number"),
    ],
)
def test_what_is_refused_says_why(make, text):
    x, y = data()
    with pytest.raises(ShardplanError) as caught:
        trace_model(make().double(), (x,), loss_fn=F.mse_loss, target=y)
    assert text in caught.value.title and caught.value.hints
    if isinstance(caught.value, NotTraceable):
        assert caught.value.details[0].startswith(__file__)


class StraightThroughRoot(nn.Linear):
    def forward(self, x):
        return Rounds.apply(super().forward(x))
