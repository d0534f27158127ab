"""Passes on models that write in place, switch gradients and precision on and off, or build their own masks."""

from __future__ import annotations

import contextlib
import functools

import models
import pytest
import torch
from plans import random_plan
from test_trace import assert_same, trace_case
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shardplan.planner import capture, export, passes
from shardplan.planner.passes import BrokenGraph, Draft, verify
from shardplan.planner.passes.fold_masks import mask_form
from shardplan.planner.passes.known import Evaluator
from shardplan.planner.placement import Mesh
from shardplan.planner.propagate import follow
from shardplan.planner.trace import is_tensor, mutated, needs_grad
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program

pytestmark = pytest.mark.timeout(60)


class Odd(nn.Module):
    """Two linears, two buffers, and a forward that is a function of (self, x)."""

    def __init__(self, function):
        super().__init__()
        self.function = [function]
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("history", torch.zeros(3, 8))
        self.attribute = torch.linspace(0, 1, 8)

    def forward(self, x):
        return self.function[0](self, x)


def write_slices(m, x):
    y = m.a(x)
    z = torch.zeros_like(y)
    z[:, 1:] = y[:, :-1]
    z[:, 0] += y[:, 3]
    z[2:4, 2:6] *= 2
    return m.b(z)


def copy_into_unused_view(m, x):
    y = m.a(x).clone()
    view = y[:, 2:4]
    view.copy_(m.b(x)[:, :2])
    y[:, 7].fill_(1.5)
    return m.b(y)


def write_base_and_views(m, x):
    y = m.a(x) * 1
    v = y.view(-1, 2, 4)
    w = v.transpose(1, 2)
    y.mul_(2)
    w.add_(1)
    return m.b(y) + w.sum() + v[:, 0].sum(-1, keepdim=True)


def write_pieces(m, x):
    y = x * 1
    p, q = y.chunk(2, -1)
    p.mul_(3)
    q += p
    y.unbind(0)[1].zero_()
    return m.b(m.a(y))


def write_complex(m, x):
    z = torch.fft.fft(m.a(x).view(-1, 2, 2, 2), dim=1)
    z = z.transpose(1, 2).contiguous()
    z[:, 0] *= 2j
    z[..., 1:] = z[..., :1].conj()
    torch.diagonal(z, 0, 2, 1).copy_(z[:, :, 0] * 1j)
    return m.b(z.real.flatten(1) + z.imag.flatten(1))


def write_by_index(m, x):
    y = m.a(x) * 1
    i = torch.tensor([0, 2])
    y[i] = m.b(x)[:2]
    y[:, i] = 0.5
    y[torch.tensor([True, False] * 4)] = 1.0
    return m.b(y)


def copy_keeps_its_source(m, x):
    y, z = x * 1, m.b(m.a(x)) * 1
    y.copy_(z)
    z.add_(1)
    return y * z


def in_place_activations(m, x):
    y = F.silu(m.b(F.relu_(m.a(x))), inplace=True)
    y.masked_fill_(y > 0.3, 0.1)
    y.clamp_(min=-0.2)
    y.unsqueeze_(1)
    return m.b(y).squeeze(1)


def write_buffers(m, x):
    y = m.a(x)
    m.average.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
    m.history[1] = m.average
    m.history[2].add_(1)
    return m.b(y) * m.average + m.history.sum()


def read_old_buffer(m, x):
    y = m.a(x)
    old = m.average.clone()
    m.average.copy_(y.detach().mean(0) + 1)
    return m.b(y) * m.average + old * y


def write_input(m, x):
    x.mul_(2)
    x[:, 0] = 1
    return m.b(m.a(x))


def no_grad_inside(m, x):
    y = m.a(x)
    with torch.no_grad():
        z = m.b(y) * 2
        with torch.enable_grad():
            w = m.b(x)
        p, q = y.chunk(2, -1)
        r = torch.cat([q * p, p], -1)
    u, v = m.b(x).chunk(2, -1)
    with torch.no_grad():
        u = u * 2
    return y * z + w + m.a(y).detach() + r + torch.cat([u, v], -1)


def autocast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.a(x)
        z = F.softmax(y, -1)
        w = m.b(z)
        q = torch.cat([y, w.float()], -1)
        with torch.autocast("cpu", enabled=False):
            r = m.a(x)
        with torch.no_grad():
            s = m.b(x)
    return q.float()[:, :8] + r + w + s


def literals(m, x):
    t = torch.tensor([1.0, 2.0, 3.0, 4.0] * 2)
    return m.a(x) * t + m.b(x) * (torch.arange(8, device=x.device) / 8) + torch.tensor(2.5) * m.attribute


def same_module_twice(m, x):
    return m.b(m.a(m.a(x)))


def checkpoints(m, x):
    y = checkpoint(lambda t: m.b(F.relu(m.a(t))), x, use_reentrant=False)
    return y + checkpoint(m.a, m.b(x), use_reentrant=True)


def assigns_attributes(m, x):
    m.last = m.a(x)
    m.calls = getattr(m, "calls", 0) + 1
    return m.b(m.last)


def neutral_ops(m, x):
    y = (m.a(x) + 0) * 1 / 1.0 - 0
    return F.dropout(m.b(y.float().contiguous().view(8, 8)[:].expand(8, 8)), 0.0).reshape(8, 8)


ODD = [
    write_slices,
    copy_into_unused_view,
    write_base_and_views,
    write_pieces,
    write_complex,
    write_by_index,
    copy_keeps_its_source,
    in_place_activations,
    write_buffers,
    read_old_buffer,
    write_input,
    no_grad_inside,
    autocast,
    literals,
    same_module_twice,
    checkpoints,
    assigns_attributes,
    neutral_ops,
]


def odd_case(function):
    torch.manual_seed(3)
    return models.Case(Odd(function), {"x": torch.randn(8, 8), "target": torch.randn(8, 8)}, F.mse_loss)


@pytest.mark.parametrize("function", ODD, ids=lambda f: f.__name__)
def test_odd_models_equal_eager(function, monkeypatch):
    monkeypatch.setattr(export, "normalize", functools.partial(passes.normalize, deep=True))
    case = odd_case(function)
    buffers = {name: b.clone() for name, b in case.model.named_buffers()}
    batch = {name: value.clone() for name, value in case.batch.items()}
    trace = trace_case(case)
    assert all(torch.equal(b, buffers[name]) for name, b in case.model.named_buffers())
    assert all(torch.equal(case.batch[name], batch[name]) for name in batch)
    for node in trace.nodes():
        writes = node.op == "call_function" and getattr(node.target, "_schema", None) and node.target._schema.is_mutable
        assert not writes or mutated(node), f"{node.name} writes in place"
    found = models.run_trace(trace, case.model, {k: v.clone() for k, v in batch.items()})
    case.batch = batch
    wanted_case = models.Case(case.model, {k: v.clone() for k, v in batch.items()}, case.loss_fn)
    if function is not write_input:
        assert_same(wanted_case, trace)
    else:
        wanted = models.run_eager(wanted_case)
        torch.testing.assert_close(found.loss, wanted.loss)
        assert any("input x in place" in note for note in trace.notes)


@pytest.mark.parametrize("function", [no_grad_inside, write_slices, checkpoints], ids=lambda f: f.__name__)
def test_regions_as_submodules_are_inlined(function, monkeypatch):
    monkeypatch.setattr(capture, "flat_regions", contextlib.nullcontext)
    monkeypatch.setattr(export, "normalize", functools.partial(passes.normalize, deep=True))
    case = odd_case(function)
    assert_same(case, trace_case(case))


def test_neutral_ops_are_gone():
    trace = trace_case(odd_case(neutral_ops))
    assert [n.name for n in trace.nodes() if n.op == "call_function"] == ["linear", "linear_1", "mse_loss"]


def test_nothing_under_no_grad_needs_a_gradient():
    trace = trace_case(odd_case(no_grad_inside))
    values = models.run_trace(trace, odd_case(no_grad_inside).model, odd_case(no_grad_inside).batch)
    assert values.gradients
    assert [n.name for n in trace.nodes() if "detach" in n.name]
    for node in trace.nodes():
        if "detach" in node.name:
            assert not needs_grad(node) and needs_grad(node.args[0])


def test_dropout_stays_and_is_not_shared():
    def noisy(m, x):
        return m.a(F.dropout(x, 0.5, m.training)) + torch.rand(8)

    trace = trace_case(odd_case(noisy))
    random = [n.name for n in trace.nodes() if n.op == "call_function" and ("dropout" in n.name or "rand" in n.name)]
    assert len(random) == 2 and not trace.shared.intersection(random)


def test_verifier_finds_broken_graphs():
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"),))
    draft = Draft(torch.fx.GraphModule(nn.Module(), graph), {}, {}, None)
    with pytest.raises(BrokenGraph, match="without a source"):
        verify(draft)


# -- masks -------------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """One head of attention under a mask that `build(length, batch)` makes."""

    def __init__(self, build):
        super().__init__()
        self.build = [build]
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        b, s, _ = x.shape
        mask = self.build[0](s, b)
        q, k = self.q(x).unsqueeze(1), self.k(x).unsqueeze(1)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask).squeeze(1)


def lower(s, b):
    return torch.ones(s, s, dtype=torch.bool).tril()


def compared(s, b):
    i = torch.arange(s)
    return (i[None, :] <= i[:, None])[None, None].expand(b, 1, s, s) & torch.ones((), dtype=torch.bool)


def additive(s, b):
    return torch.full((s, s), float("-inf")).triu(1)


def filled(s, b):
    return torch.zeros(s, s).masked_fill(~torch.ones(s, s, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)


def everything(s, b):
    return torch.ones(b, 1, s, s, dtype=torch.bool)


def window(s, b):
    i = torch.arange(s)
    return (i[None] <= i[:, None]) & (i[None] > i[:, None] - 3)


def strict(s, b):
    i = torch.arange(s)
    return (i[None] < i[:, None]) | ((i[None] == 0) & (i[:, None] == 0))


def by_sample(s, b):
    return (torch.arange(s)[None, None, None] <= torch.arange(s)[None, None, :, None]).expand(b, 1, s, s) & (
        torch.arange(b)[:, None, None, None] >= 0
    ) | (torch.arange(b)[:, None, None, None] == 1)


@pytest.mark.parametrize(
    ("build", "form"),
    [
        (lower, "causal"),
        (compared, "causal"),
        (additive, "causal"),
        (filled, "causal"),
        (everything, "all"),
        (window, None),
        (strict, None),
        (by_sample, None),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_masks_are_told_apart(build, form):
    torch.manual_seed(0)
    case = models.Case(Masked(build), {"x": torch.randn(4, 6, 8), "target": torch.randn(4, 6, 8)}, F.mse_loss)
    trace = trace_case(case)
    (attention,) = [n for n in trace.nodes() if "scaled_dot_product" in str(n.target)]
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    assert (mask is None) == (form is not None)
    assert (len(attention.args) > 5 and attention.args[5] is True) == (form == "causal")
    assert_same(case, trace, 1e-5)


@pytest.mark.parametrize("length", [2048, 20000])
@pytest.mark.parametrize("build", [compared, window], ids=lambda f: f.__name__)
def test_long_masks_are_never_held(length, build):
    with torch._subclasses.FakeTensorMode():
        made = make_fx(lambda: build(length, 512), pre_dispatch=True)()
    value = Evaluator(Draft(made, {}, {}, None))(next(n for n in reversed(made.graph.nodes) if n.op == "call_function"))
    assert value is not None and value.data is None
    assert mask_form(value) == ("causal" if build is compared else None)


def test_padding_mask_at_identity_positions_is_a_reshape():
    def pad(m, x):
        mask = x[:, :, 0] > 0
        b, s = torch.arange(4)[:, None, None, None], torch.arange(8)[None, None, None]
        seen = mask[b, s] & torch.ones((), dtype=torch.bool)
        return m.a(x) * seen.reshape(4, 8, 1)

    torch.manual_seed(0)
    case = models.Case(Odd(pad), {"x": torch.randn(4, 8, 8), "target": torch.randn(4, 8, 8)}, F.mse_loss)
    trace = trace_case(case)
    names = [n.name for n in trace.nodes() if n.op == "call_function" and is_tensor(n)]
    assert not any(name.startswith(("index", "and", "arange")) for name in names)
    assert_same(case, trace)


def test_numbers_added_to_a_scalar_do_not_hold_up_microbatches():
    def loss(output, target):
        error = (output - target).square().mean()
        return (
            3 - torch.rsub(error, 1, alpha=2) + torch.add(error, 4, alpha=0.5) - 1 + 1e-3 * output.abs().mean().add(2)
        )

    torch.manual_seed(3)
    case = models.Case(nn.Linear(8, 8), {"input": torch.randn(8, 8), "target": torch.randn(8, 8)}, loss)
    trace = trace_case(case)
    assert_same(case, trace)
    assert follow(trace, "mb", Mesh(("mb",), (2,))).reason is None
    plan = random_plan(trace, dp=2, tp=2, microbatches=2)
    found = run_program(compile(trace, plan), dict(case.model.named_parameters()), case.batch)
    torch.testing.assert_close(found.loss, models.run_eager(case).loss)


def test_tensors_asked_for_their_form_are_no_operands():
    """A mask cast to the type of the activations does not tie how the two lie."""

    def cast(m, x):
        rows = (x > 0).any(-1, keepdim=True)
        y = m.a(x)
        return m.b(y * rows.type_as(y) + m.average.to(y).expand_as(y) * y.flatten().view_as(y))

    torch.manual_seed(0)
    case = models.Case(Odd(cast), {"x": torch.randn(4, 8), "target": torch.randn(4, 8)}, F.mse_loss)
    trace = trace_case(case)
    assert_same(case, trace)
    names = {str(node.target) for node in trace.nodes()}
    assert not any("_as." in name or "other" in name for name in names), names
    assert follow(trace, "mb", Mesh(("mb",), (2,))).reason is None
