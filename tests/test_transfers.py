"""Transfers between meshes: what arrives is what was sent, values and gradients, for any layouts on any meshes."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.planner.placement import D, Layout, Mesh, P, Placement, R, S, fits
from shardplan.planner.transfers import Side, boundary, summed, traffic, transfers
from shardplan.rewrite.parts import assemble, part_of
from shardplan.rewrite.routes import deliver
from tests.execution import spread

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (4, 1), (3, 1), (1, 3), (2, 3)]


def drawn(
    rng: random.Random, shape: tuple[int, ...], mesh: Mesh, kinds: str, on_time: Placement | None = None
) -> Layout:
    while True:
        layout = [on_time] if on_time else []
        for axis in mesh.axes[len(layout) :]:
            kind = rng.choice("RS" if axis == "mb" else kinds)
            dim = rng.randrange(len(shape))
            sections = rng.choice([(), (), (shape[dim] // 2,) * 2])
            layout.append({"R": R, "P": P, "D": D}.get(kind) or S(dim, sections))
        if fits(shape, tuple(layout), mesh):
            return tuple(layout)


def sides(seed: int, equal: bool = False) -> tuple[tuple[int, ...], Side, Side]:
    rng = random.Random(seed)
    shape = (24, 12, 48)[: rng.randint(1, 3)]
    first, second = (Mesh(("mb", "dp", "tp"), (2, *rng.choice(MESHES))) for _ in range(2))
    second = first if equal else second
    one = drawn(rng, shape, first, "RSPD")
    two = drawn(rng, shape, second, "RSDD" if rng.random() < 0.8 else "RSDP", one[0])
    ranks = list(range(12))
    rng.shuffle(ranks)
    width = prod(first.sizes[1:])
    start = rng.choice([0, width, width // 2])  # some, none or all of the ranks are the same
    return (
        shape,
        Side(one, first, tuple(ranks[:width])),
        Side(two, second, tuple(ranks[start:][: prod(second.sizes[1:])])),
    )


def held(whole: torch.Tensor, side: Side) -> dict[int, torch.Tensor]:
    """What every rank of a side has of a tensor in the first microbatch."""
    parts = spread(whole, side.layout, side.mesh, "P")
    places = [(0, *place.values()) for place in side.places()]
    return {rank: parts[place] for rank, place in zip(side.ranks, places, strict=True)}


@given(st.integers(0, 10_000), st.booleans())
@settings(deadline=None, max_examples=150)
def test_values_arrive(seed: int, equal: bool):
    shape, source, target = sides(seed, equal)
    whole = torch.randn(shape, dtype=torch.float64)
    boxes = transfers(shape, source, target)
    got = deliver(boxes, held(whole, source), target.ranks, {r: local(shape, target) for r in target.ranks})
    expected = part_of(whole, (source.layout[0], *(R for _ in source.layout[1:])), source.mesh, {"mb": 0})
    parts = {tuple(place.items()): got[rank] for rank, place in zip(target.ranks, target.places(), strict=True)}
    inner = Mesh(target.mesh.axes[1:], target.mesh.sizes[1:])
    if not any(p.kind == "S" and p.sections for p in (source.layout[0], *target.layout)):
        torch.testing.assert_close(assemble(parts, target.layout[1:], inner, tuple(expected.shape)), expected)
    for rank, place in zip(target.ranks, target.places(), strict=True):  # every replica has its own, not only the first
        if not target.on("P"):
            torch.testing.assert_close(got[rank], part_of(whole, target.layout, target.mesh, {**place, "mb": 0}))


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=100)
def test_gradients_go_back(seed: int):
    """Every rank of the source has the whole gradient of its part, whatever summands the target has; where the source
    itself has summands of the gradient they add up to it."""
    shape, source, target = sides(seed)
    gradient = torch.randn(shape, dtype=torch.float64)
    back = transfers(shape, target.dual(), source.dual())
    got = deliver(back, held(gradient, target.dual()), source.ranks, {r: local(shape, source) for r in source.ranks})
    summands = source.on("D")
    for place in source.places():
        if any(place[axis] for axis in summands):
            continue
        alike = [p for p in source.places() if all(p[a] == i for a, i in place.items() if a not in summands)]
        total = torch.stack([got[source.ranks[source.places().index(p)]] for p in alike]).sum(0)
        torch.testing.assert_close(total, part_of(gradient, source.layout, source.mesh, {**place, "mb": 0}))


def local(shape: tuple[int, ...], side: Side) -> tuple[int, ...]:
    return tuple(part_of(torch.empty(shape), side.layout, side.mesh, {"mb": 0}).shape)


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        (((2, 1), (S(0), R)), ((1, 2), (R, R)), {(0, 2): 48, (0, 3): 48, (1, 2): 48, (1, 3): 48}),
        (((1, 2), (R, R)), ((1, 1), (R, R)), {(0, 2): 96}),
        (((1, 1), (R, R)), ((1, 2), (R, S(1))), {(0, 1): 48, (0, 2): 48}),
        (((1, 2), (R, R)), ((1, 4), (R, R)), {(0, 2): 96, (0, 3): 96, (1, 4): 96, (1, 5): 96}),
        (((2, 2), (S(0), R)), ((2, 2), (S(0), R)), {(0, 4): 48, (1, 5): 48, (2, 6): 48, (3, 7): 48}),
        (((4, 1), (S(0), R)), ((2, 1), (S(0), R)), {(0, 4): 24, (1, 4): 24, (2, 5): 24, (3, 5): 24}),
    ],
)
def test_who_sends_what(one, two, expected):
    meshes = [Mesh(("mb", "dp", "tp"), (1, *sizes)) for sizes, _ in (one, two)]
    width = prod(one[0])
    source = Side((R, *one[1]), meshes[0], tuple(range(width)))
    target = Side((R, *two[1]), meshes[1], tuple(range(width, width + prod(two[0]))))
    assert traffic(transfers((8, 12), source, target)) == expected


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=60)
def test_alike_sides_send_to_their_twins(seed: int):
    """What is said without looking at slices is what the slices say."""
    shape, source, _ = sides(seed)
    target = Side(source.layout, source.mesh, tuple(rank + 100 for rank in source.ranks))
    found = transfers(shape, source, target)
    assert [(box.source, box.target) for box in found] == list(zip(source.ranks, target.ranks, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardplan.planner.transfers._alike", lambda *_: False)
        assert transfers(shape, source, target) == found


def test_summands_are_added_before_they_leave():
    one, two = Mesh(("mb", "dp", "tp"), (2, 2, 2)), Mesh(("mb", "dp", "tp"), (2, 1, 3))
    leaves, arrives = boundary((8, 12), (S(0), S(0), P), one, [(S(0), R, S(1)), (S(0), R, S(1))], two)
    assert leaves == (S(0), S(0), S(1))
    assert arrives == (S(0), R, S(1))
    assert boundary((8, 12), (S(0), S(0), P), one, [(S(0), S(0), R)], one) == ((S(0), S(0), P),) * 2
    sides = Side(leaves, one, (0, 1, 2, 3)), Side(arrives, two, (4, 5, 6))
    assert not summed(*sides)
    assert not summed(sides[1].dual(), sides[0].dual())
