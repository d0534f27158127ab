"""Leaves by hand, models without values, random numbers, recomputation, prices, and what cannot be a leaf."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import shardplan as sp
from shardplan.errors import LeafChanged, NoMatch, NotTraceable, UsageError
from shardplan.planner import casts
from shardplan.planner.cluster import Cluster
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.export import trace_model
from shardplan.planner.leaf_op import is_leaf
from shardplan.planner.placement import Mesh
from shardplan.planner.report import render_text
from shardplan.planner.rules import local_call
from shardplan.planner.search import SolveOptions, solve
from shardplan.planner.trace import leaf_of
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests import leaf_models as lm
from tests.plans import random_plan
from tests.prices import SimplePrices
from tests.test_leaf import compare, leaves, made


def traced(part: nn.Module, around=lm.Around, **options):
    torch.manual_seed(0)
    model = around(part).double()
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, lm.DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    return model, x, y, trace_model(model, (x,), loss_fn=lm.loss, target=y, **options)


# -- by hand -----------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(lm.Around(nn.Sequential(nn.Linear(lm.DIM, lm.DIM), nn.GELU())) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("globs", "names"),
    [
        (["blocks.1"], ["blocks.1"]),
        (["blocks"], ["blocks.0", "blocks.1", "blocks.2"]),
        (["blocks.*.part", "blocks.2"], ["blocks.0.part", "blocks.1.part", "blocks.2"]),
    ],
)
def test_leaves_by_hand(globs, names):
    torch.manual_seed(0)
    model, x, y = Deep().double(), *torch.randn(2, 8, lm.DIM, dtype=torch.float64)
    trace = trace_model(model, (x,), loss_fn=lm.loss, target=y, leaves=globs)
    assert [leaf_of(node).leaf.name for node in leaves(trace)] == names
    assert all(leaf_of(node).reason == "asked for" and leaf_of(node).splits for node in leaves(trace))
    compare(model, trace, x, y, random_plan(trace, dp=2, pp=2, microbatches=2, seed=0))


def test_leaves_by_hand_that_are_not_there():
    model, x, y = made("experts")
    with pytest.raises(NoMatch, match="did you mean 'part'"):
        trace_model(model, (x,), loss_fn=lm.loss, target=y, leaves=["pert"])
    model.spare = nn.Linear(3, 3)
    with pytest.raises(UsageError, match="does not call it"):
        trace_model(model, (x,), loss_fn=lm.loss, target=y, leaves=["spare"])


def test_a_plan_names_its_leaves_and_their_share():
    model, x, y = made("statistics")
    trace, cluster = trace_model(model, (x,), loss_fn=lm.loss, target=y, leaves=["before"]), Cluster.cpu(2)
    constraints = (sp.leaf("before"), sp.degrees(dp=2))
    plan = solve(trace, cluster, SimplePrices(cluster), SolveOptions(constraints=constraints))
    assert [(name, why[:9]) for name, _, why, _ in plan.leaves] == [("before", "asked for"), ("part", lm.__file__[:9])]
    assert all(0 < share < 1 for _, share, _, _ in plan.leaves)
    assert [how for *_, how in plan.leaves] == ["batch split", "whole: changes its buffers"]
    assert type(plan).from_json(plan.to_json()) == plan
    assert "Submodules kept whole" in render_text(plan)


# -- models without values ---------------------------------------------------------------------------------------------


def test_models_on_the_meta_device_are_run_on_random_numbers():
    with torch.device("meta"):
        model, x, y = lm.Layers(2), torch.empty(8, lm.DIM), torch.empty(8, lm.DIM)
    trace = trace_model(model, (x,), loss_fn=lm.loss, target=y)
    assert [leaf_of(n).leaf.name for n in leaves(trace)] == ["layers.0.part", "layers.1.part"]
    assert all(leaf_of(n).splits for n in leaves(trace))
    real = lm.Layers(2).double()
    x, y = torch.randn(2, 8, lm.DIM, dtype=torch.float64)
    again = trace_model(real, (x,), loss_fn=lm.loss, target=y)
    assert len(again.segments) == len(trace.segments)


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, lm.DIM)

    def forward(self, ids, lengths):
        rows = [self.table(row[:length]).sum(0) for row, length in zip(ids, lengths.tolist(), strict=True)]
        return torch.stack(rows)


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.after = Embeds(), nn.Linear(lm.DIM, lm.DIM)

    def forward(self, ids, lengths):
        return self.after(self.part(ids, lengths))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_integer_inputs(device):
    torch.manual_seed(0)
    model, y = Ids().double(), torch.randn(4, lm.DIM, dtype=torch.float64)
    ids, lengths = torch.randint(0, 11, (4, 6)), torch.tensor([3, 6, 1, 2])
    trace = trace_model(model, (ids.to(device), lengths.to(device)), loss_fn=lm.loss, target=y.to(device))
    (node,) = leaves(trace)
    assert leaf_of(node).splits
    state = {n: v.detach().clone() for n, v in model.named_parameters()}
    batch = {"ids": ids, "lengths": lengths, "target": y}
    result = run_program(compile(trace, random_plan(trace, dp=2, seed=0)), state, batch)
    lm.loss(model(ids, lengths), y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(result.gradients[name], parameter.grad)


# -- what is inside ----------------------------------------------------------------------------------------------------


class Draws(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5) if x.sum().item() < 1e9 else x


def test_random_numbers_follow_from_the_seed_and_are_the_same_on_replicas():
    model, x, y, trace = traced(Draws())
    (node,) = leaves(trace)
    assert leaf_of(node).draws and leaf_of(node).unsplit == "draws random numbers"
    assert "it draws random numbers" in " ".join(trace.notes)
    state = {n: v.detach().clone() for n, v in model.named_parameters()}
    found = []
    for degrees in ({}, {"dp": 2}, {"tp": 2}):
        before = torch.random.get_rng_state()
        program = compile(trace, random_plan(trace, **degrees, seed=0))
        found.append(run_program(program, state, {"x": x, "target": y}))
        assert torch.equal(before, torch.random.get_rng_state())
    for other in found[1:]:
        torch.testing.assert_close(other.loss, found[0].loss)
        torch.testing.assert_close(other.gradients["before.weight"], found[0].gradients["before.weight"])


@pytest.mark.parametrize("part", [lm.Experts, lm.RowRouter, Draws])
def test_recomputed_leaves(part):
    model, x, y, trace = traced(part())
    names = [segment.name for segment in trace.segments]
    state = {n: v.detach().clone() for n, v in model.named_parameters()}
    kept = run_program(compile(trace, random_plan(trace, dp=2, seed=0)), state, {"x": x, "target": y})
    program = compile(trace, random_plan(trace, dp=2, seed=0, rematerialize=names))
    assert "checkpoint(recomputed_" in program.stages[0].source
    again = run_program(program, state, {"x": x, "target": y})
    torch.testing.assert_close(again.loss, kept.loss)
    for name, gradient in kept.gradients.items():
        torch.testing.assert_close(again.gradients[name], gradient)


def test_layers_of_one_kind_are_segments_of_one_kind():
    torch.manual_seed(0)
    model, x, y = lm.Layers(5).double(), *torch.randn(2, 8, lm.DIM, dtype=torch.float64)
    trace = trace_model(model, (x,), loss_fn=lm.loss, target=y)
    kinds = [s.kind for s in trace.segments if any(is_leaf(trace.node(n)) for n in s.nodes)]
    assert len(kinds) == 5 and len(set(kinds[2:])) == 1  # the first has a frozen gate, the second reads an input


def test_tracing_leaves_the_model_as_it_was():
    model, x, y = made("statistics")
    model.part.register_forward_hook(lambda module, args, output: output * 2)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    trace = trace_model(model, (x,), loss_fn=lm.loss, target=y)
    assert torch.equal(state, torch.random.get_rng_state())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])
    assert "forward" not in vars(model.part) and len(model.part._forward_hooks) == 1
    compare(model, trace, x, y, random_plan(trace, dp=2, seed=0))  # the hook belongs to the leaf


# -- prices ------------------------------------------------------------------------------------------------------------


def test_leaves_are_measured_and_modelled_whole():
    _, _, _, trace = traced(lm.Experts())
    (node,) = leaves(trace)
    note, mesh = leaf_of(node), Mesh(("dp", "tp"), (2, 1))
    whole, half = local_call(node, {}, mesh), local_call(node, {"dp": note.splits[0]}, mesh)
    assert whole.target is half.target is note.leaf
    assert [value.shape for value in (half.inputs[0], half.outputs[0])] == [(4, lm.DIM)] * 2
    assert note.leaf.flops > 0 and note.saves.inputs[0]
    cluster = Cluster.cpu(2)
    costs = CostModel(cluster, LinkModel(cluster, None))
    priced = costs.op(whole, 0)
    assert priced.source == "measured" and priced.forward_seconds > 0 and priced.backward_seconds > 0
    far = CostModel(Cluster.parse("2xh100"), LinkModel(Cluster.parse("2xh100"), None)).op(whole, 0)
    assert far.source == "modelled" and 0 < far.forward_seconds < 1e-2


@pytest.mark.parametrize("name", ["experts", "statistics"])
def test_the_planner_plans_around_leaves(name):
    model, x, y = made(name)
    trace = trace_model(model, (x,), loss_fn=lm.loss, target=y)
    for fixed in (sp.degrees(dp=2, tp=1, pp=1), sp.degrees(dp=1, tp=1, pp=2), sp.degrees(dp=1, tp=2, pp=1)):
        cluster = Cluster.cpu(2)
        plan = solve(trace, cluster, SimplePrices(cluster), SolveOptions(constraints=(fixed,)))
        compare(model, trace, x, y, plan)
        model, x, y = made(name)


# -- what cannot be ----------------------------------------------------------------------------------------------------


class Picks(nn.Module):
    def forward(self, x):
        return x[x > 0]


class WritesInput(nn.Module):
    def forward(self, x):
        return x.add_(1) if x.sum().item() < 1e9 else x


class WritesParameter(nn.Linear):
    def forward(self, x):
        if x.sum().item() < 1e9:
            self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class Counts(nn.Module):
    def forward(self, x):
        return x, int((x > 0).sum())


class AroundPicks(lm.Around):
    def forward(self, x):
        return self.after(self.before(x)) + self.part(self.before(x)).cumsum(0).mean()


class AroundCounts(lm.Around):
    def forward(self, x):
        y, count = self.part(self.before(x))
        return self.after(y) * count


@pytest.mark.parametrize(
    ("part", "around", "why"),
    [
        (Picks(), AroundPicks, "shapes depend on the numbers in its input"),
        (WritesInput(), lm.Around, "changes its input [8, 8] in place"),
        (WritesParameter(8, 8), lm.Around, "changes its parameter weight"),
        (Counts(), AroundCounts, "plain values that depend on the numbers"),
    ],
)
def test_what_cannot_be_a_leaf_says_why(part, around, why):
    with pytest.raises(NotTraceable) as caught:
        traced(part, around)
    assert "part cannot be kept whole" in caught.value.title and why in caught.value.title
    assert __file__ in caught.value.details[0]


class Grows(nn.Module):
    """Another shape for inputs that no example shows."""

    def forward(self, x):
        return x if x.abs().max().item() < 1e3 else x[:1]


def test_a_leaf_that_changes_its_shape_in_a_step_says_so():
    _, x, y, trace = traced(Grows())
    state = {n: v.detach().clone() for n, v in traced(Grows())[0].named_parameters()}
    state["before.weight"] *= 0
    state["before.bias"] += 1
    program = compile(trace, random_plan(trace, seed=0))
    run_program(program, state, {"x": x, "target": y})
    (leaf,) = program.leaves.values()
    leaf.module.forward = lambda x: x[:1]
    with pytest.raises(LeafChanged, match="part returned shapes"):
        run_program(program, state, {"x": x, "target": y})


class Branches(nn.Module):
    def forward(self, x, positive):
        return x * 2 if positive else -x


class Decides(nn.Module):
    """Gives its part a number that depends on data; holds another that returns one."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x):
        if isinstance(self.part, Branches):
            return self.part(x, x.sum().item() > 0)
        y, count = self.part(x)
        return y * count


@pytest.mark.parametrize("part", [Branches, Counts])
def test_where_a_module_cannot_be_a_leaf_the_one_around_it_is(part):
    model, x, y, trace = traced(Decides(part()))
    (node,) = leaves(trace)
    assert leaf_of(node).leaf.name == "part" and __file__ in leaf_of(node).reason
    compare(model, trace, x, y, random_plan(trace, tp=2, seed=0))
    with pytest.raises(NotTraceable, match=r"part\.part"):
        traced(Decides(part()), leaves=["part.part"])


class Remembers(nn.Module):
    """Keeps what it saw on itself and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.all = None, []

    def forward(self, x):
        found = x if self.last is None or x.sum().item() > 1e9 else x + self.last + sum(self.all)
        self.last = found
        self.all.append(found)
        return found


def test_every_call_of_a_leaf_starts_from_what_the_module_was():
    model, x, y, trace = traced(Remembers(), leaves=["part"])
    state = {n: v.detach().clone() for n, v in model.named_parameters()}
    program = compile(trace, random_plan(trace, tp=2, seed=0))
    compare(model, trace, x, y, random_plan(trace, dp=2, microbatches=2, seed=0))
    first = run_program(program, state, {"x": x, "target": y})
    again = run_program(program, state, {"x": x, "target": y})  # not "backward a second time"
    assert torch.equal(first.loss, again.loss)


class Converts(nn.Module):
    """A router in single precision, as some models convert it in their forward."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(lm.DIM, lm.DIM)

    def forward(self, x):
        self.gate = self.gate.to(torch.float32)
        return x * self.gate(x.float()).to(x.dtype)


@pytest.mark.parametrize("globs", [(), ("part",), ("before",)], ids=["in the graph", "in a leaf", "beside a leaf"])
def test_modules_that_are_converted_in_a_forward(globs):
    model, x, y, trace = traced(Converts(), leaves=globs)
    assert model.part.gate.weight.dtype == torch.float64  # no run on trial has converted it
    assert ("stay as they are" in " ".join(trace.notes)) == (globs != ("part",))
    state = {n: v.detach().clone() for n, v in model.named_parameters()}
    found = run_program(compile(trace, random_plan(trace, tp=2, seed=0)), state, {"x": x, "target": y})
    lm.loss(model(x), y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found.gradients[name].float(), parameter.grad.float(), rtol=1e-5, atol=1e-6)


class Reversed(torch.autograd.Function):
    """y = x + f(x) whose backward runs f again, which adds to the gradients of its parameters."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.save_for_backward(x)
        ctx.module = module
        return x + module.inner(x)

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore
        (x,) = ctx.saved_tensors
        assert ctx.module.last == x.shape, "the backward sees what the forward left"
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            ctx.module.inner(again).backward(gradient)
        return gradient + again.grad, None


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(lm.DIM, lm.DIM), None

    def forward(self, x):
        self.last = x.shape
        return Reversed.apply(x, self)


@pytest.mark.parametrize("rematerialize", [False, True])
def test_a_backward_that_runs_the_module_again(rematerialize):
    model, x, y, trace = traced(Reversible())
    (node,) = leaves(trace)
    assert leaf_of(node).leaf.later and leaf_of(node).splits
    names = [segment.name for segment in trace.segments] if rematerialize else ()
    plan = random_plan(trace, dp=2, microbatches=2, seed=0, rematerialize=names)
    state = {n: v.detach().clone() for n, v in model.named_parameters()}
    random_state = torch.random.get_rng_state()
    found = run_program(compile(trace, plan), state, {"x": x, "target": y})
    assert torch.equal(random_state, torch.random.get_rng_state())
    lm.loss(model(x), y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found.gradients[name], parameter.grad)


class Attends(lm.Experts):
    """Also reads a mask of the whole batch, which the model makes."""

    def forward(self, x, mask):
        return super().forward(x * mask)


class Masked(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attends() for _ in range(count))

    def forward(self, x):
        mask = torch.ones(x.shape[0], 1, dtype=x.dtype).tril()
        for layer in self.layers:
            x = layer(x, mask)
        return x


def test_the_part_of_a_mask_goes_with_the_part_of_the_batch_in_every_layer():
    torch.manual_seed(0)
    model, x, y = Masked(7).double(), *torch.randn(2, 8, lm.DIM, dtype=torch.float64)
    trace = trace_model(model, (x,), loss_fn=lm.loss, target=y)
    assert [bool(leaf_of(node).splits) for node in leaves(trace)] == [True] * 7
    compare(model, trace, x, y, random_plan(trace, dp=2, microbatches=2, seed=0))


def test_other_threads_convert_modules_as_ever():
    own, other = nn.Module._apply, nn.Linear(2, 2)
    with casts.as_ops():
        thread = threading.Thread(target=other.double)
        thread.start()
        thread.join()
        inside = nn.Linear(2, 2)
        before = inside.weight
        inside.double()
    assert nn.Module._apply is own and isinstance(other.weight, nn.Parameter) and other.weight.dtype == torch.float64
    assert before.dtype == torch.float32 and inside.weight.dtype == torch.float64
