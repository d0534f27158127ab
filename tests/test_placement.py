"""Placements print and parse; slices tile the tensor; the conversion table is its own transpose."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.planner.placement import (
    D,
    Mesh,
    P,
    Placement,
    R,
    S,
    conversion,
    fits,
    local_shape,
    local_slices,
    parse,
)
from shardplan.planner.rules.strategy import Strategy

PLACEMENTS = st.one_of(
    st.sampled_from([R, P, D]),
    st.builds(S, st.integers(0, 3)),
    st.builds(S, st.integers(0, 3), st.lists(st.integers(1, 64), min_size=2, max_size=4).map(tuple)),
)


@given(PLACEMENTS)
def test_placement_round_trip(placement):
    assert parse(str(placement)) == placement


@given(
    st.sampled_from(["-", "d", "b", "n", "k2"]),
    st.lists(PLACEMENTS, max_size=4).map(tuple),
    st.lists(PLACEMENTS, max_size=3).map(tuple),
    st.sampled_from([None, "cross_entropy"]),
    st.booleans(),
)
def test_strategy_round_trip(name, inputs, outputs, impl, scale):
    strategy = Strategy(name, inputs, outputs, impl, scale)
    assert Strategy.parse(str(strategy)) == strategy


@pytest.mark.parametrize("text", ["", "S", "S(x)", "Q", "S(1|)", "r"])
def test_bad_placement(text):
    with pytest.raises(ValueError):
        parse(text)


def test_bad_states():
    for wrong in (("S", -1), ("R", 0), ("X", -1)):
        with pytest.raises(ValueError):
            Placement(*wrong)


@settings(deadline=None)
@given(
    st.sampled_from([R, D, P, S(0), S(1), S(0, (8, 16)), S(1, (4, 8))]),
    st.sampled_from([R, D, S(0), S(1)]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
)
def test_slices_tile_the_tensor(outer, inner, n, m):
    mesh, shape, layout = Mesh(("dp", "tp"), (n, m)), (24, 12), (outer, inner)
    if not fits(shape, layout, mesh):
        with pytest.raises(ValueError):
            local_shape(shape, layout, mesh)
        return
    seen = torch.zeros(shape, dtype=torch.int64)
    for i, j in product(range(n), range(m)):
        pieces = local_slices(shape, layout, mesh, {"dp": i, "tp": j})
        index = [torch.cat([torch.arange(a, b) for a, b in dim]) for dim in pieces]
        assert tuple(len(part) for part in index) == local_shape(shape, layout, mesh)
        seen[index[0][:, None], index[1][None]] += 1
    copies = (1 if outer.is_shard else n) * (1 if inner.is_shard else m)
    assert (seen == copies).all()


def test_backward_of_a_conversion_is_the_conversion_of_the_gradient():
    """Gradients lie as R for R and P, as a summand for D, as a shard for S: the backward entry of (a, b) has to be the
    forward entry of the gradients' states."""
    gradient = {"R": R, "P": R, "D": P, "S": S(0)}
    states = [R, P, D, S(0)]
    for source, target in product(states, states):
        if source == target:
            continue
        found = conversion(source, target)
        wanted = conversion(gradient[target.kind], gradient[source.kind])
        assert found.backward == wanted.forward, (source, target)


def test_without_gradient_dual_is_replicated():
    assert conversion(R, D, differentiable=False).forward == "identity"
    assert conversion(D, S(1), differentiable=False) == conversion(R, S(1), differentiable=False)
    assert conversion(S(0), R, differentiable=False).backward == "identity"
