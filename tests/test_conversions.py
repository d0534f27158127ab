"""Every conversion between layouts on one and two axes: the value and its gradient stay what they were."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.planner.placement import D, Layout, Mesh, P, R, S, fits
from shardplan.planner.reshard import steps
from shardplan.rewrite.conversions import conversion_call
from shardplan.rewrite.parts import assemble, part_of
from shardplan.rewrite.threads import run_ranks

SHAPE = (24, 24)
STATES = [R, P, D, S(0), S(1), S(0, (8, 16)), S(1, (16, 8))]


def apply(comm, x: torch.Tensor, source: Layout, target: Layout, mesh: Mesh) -> torch.Tensor:
    for step in steps(source, target, mesh):
        function, args, kwargs = conversion_call(comm, x, step, differentiable=True)
        x = function(*args, **kwargs)
    return x


def place(whole: torch.Tensor, layout: Layout, mesh: Mesh, comm, summed: str) -> torch.Tensor:
    """A rank's part; on axes whose state is `summed` a summand whose sum over the axis is the whole."""
    part = part_of(whole, layout, mesh, comm.coordinate)
    for axis, placement in zip(mesh.axes, layout, strict=True):
        if placement.kind == summed:
            part = part * (comm.index(axis) + 1) / sum(range(1, mesh.size(axis) + 1))
    return part.clone()


def check(source: Layout, target: Layout, mesh: Mesh) -> None:
    torch.manual_seed(0)
    value = torch.randn(SHAPE, dtype=torch.float64)
    gradient = torch.randn(SHAPE, dtype=torch.float64)

    def rank(comm):
        x = place(value, source, mesh, comm, "P").requires_grad_()
        y = apply(comm, x, source, target, mesh)
        y.backward(place(gradient, target, mesh, comm, "D"))
        return tuple(comm.coordinate.items()), y.detach(), x.grad

    results = run_ranks(mesh, rank).values()
    got = assemble({c: y for c, y, _ in results}, target, mesh, SHAPE)
    torch.testing.assert_close(got, value)
    back = assemble({c: g for c, _, g in results}, source, mesh, SHAPE, gradient=True)
    torch.testing.assert_close(back, gradient)
    # Replicas agree: every rank holds what it should, not only the first.
    for coordinate, y, g in results:
        if all(p.kind != "P" for p in target):
            torch.testing.assert_close(y, part_of(value, target, mesh, dict(coordinate)))
        if all(p.kind != "D" for p in source):
            torch.testing.assert_close(g, part_of(gradient, source, mesh, dict(coordinate)))


@pytest.mark.parametrize("size", [2, 4])
def test_one_axis(size):
    mesh = Mesh(("tp",), (size,))
    for source, target in product(STATES, STATES):
        check((source,), (target,), mesh)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.tuples(*[st.sampled_from(STATES)] * 4))
def test_two_axes(states):
    mesh = Mesh(("dp", "tp"), (2, 2))
    source, target = states[:2], states[2:]
    if fits(SHAPE, source, mesh) and fits(SHAPE, target, mesh):
        check(source, target, mesh)
