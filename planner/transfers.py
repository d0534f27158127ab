"""What ranks of one stage send to ranks of another so that a tensor on the one mesh becomes a tensor on the other.

`boundary` says how the tensor lies when it leaves and when it arrives; `transfers` lists the boxes that go from rank to
rank. Meshes may differ in every way; both have the same axis "mb", on which a tensor keeps its state. The executor, the
reference run and the cost model all use these lists, so what is priced is what is sent.

=========  ==============================  =====================================================
state      on the sending mesh             on the receiving mesh
=========  ==============================  =====================================================
``S``      a rank sends of its slice       a rank receives what its slice has in common
``R D``    one of the ranks that have it   every rank receives it
``P``      every rank; receivers add up    the first rank receives it, the others have zeros
=========  ==============================  =====================================================

The gradient goes the other way, from the arrived to the departed tensor, with ``P`` and ``D`` exchanged: it is a
summand where the value is whole and the reader's share differs (``D``), and whole where the value is a summand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from shardplan.planner.placement import (
    MICROBATCH_AXIS,
    D,
    Layout,
    Mesh,
    P,
    Placement,
    R,
    S,
    fits,
    local_shape,
    local_slices,
)

_DUAL = {P: D, D: P}


@dataclass(frozen=True, slots=True)
class Side:
    """A tensor on a stage. layout: along `mesh`, whose axes may include "mb"; ranks: in row-major order of the mesh
    without "mb"."""

    layout: Layout
    mesh: Mesh
    ranks: tuple[int, ...]

    def dual(self) -> Side:
        """The same place, for the tensor's gradient."""
        return Side(tuple(_DUAL.get(p, p) for p in self.layout), self.mesh, self.ranks)

    def places(self) -> list[dict[str, int]]:
        """Axis -> index of every rank, "mb" left out."""
        axes = [(a, n) for a, n in zip(self.mesh.axes, self.mesh.sizes, strict=True) if a != MICROBATCH_AXIS]
        return [dict(zip((a for a, _ in axes), index, strict=True)) for index in product(*(range(n) for _, n in axes))]

    def on(self, kind: str) -> list[str]:
        """Axes of more than one rank on which the tensor is in this state, "mb" left out."""
        return [
            axis
            for axis, size, p in zip(self.mesh.axes, self.mesh.sizes, self.layout, strict=True)
            if p.kind == kind and size > 1 and axis != MICROBATCH_AXIS
        ]


Slices = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor that goes from one rank to another, or stays where both are the same.

    source, target: ranks of the job. there, here: where it lies in the source's and in the target's local tensor (of
    one microbatch). numel: elements.
    """

    source: int
    target: int
    there: Slices
    here: Slices
    numel: int


def transfers(shape: Sequence[int], source: Side, target: Side) -> tuple[Box, ...]:
    """The boxes that a tensor of global `shape` goes in, of one microbatch. By target, then source, in a fixed order.

    Where a value is needed by several ranks and several have it, the n-th that needs it gets it from the n-th share of
    those that have it; a rank that has it itself takes its own. Boxes of one target overlap only where the source has
    summands, see `summed`.
    """
    if _alike(source, target):
        local = tuple(slice(0, extent) for extent in local_shape(shape, source.layout, source.mesh))
        ranks = zip(source.ranks, target.ranks, strict=True)
        return tuple(Box(a, b, local, local, _numel(local)) for a, b in ranks) if _numel(local) else ()
    kept = _kept(source, target)
    froms, tos = source.places(), target.places()
    have = [local_slices(shape, source.layout, source.mesh, place) for place in froms]
    want = [local_slices(shape, target.layout, target.mesh, place) for place in tos]
    only_first = [axis for axis in target.on("P") if axis not in kept]
    apart = [axis for axis in (*source.on("S"), *source.on("P")) if axis not in kept]
    # Senders that have the same part (a value, or the same summand of it) stand in for each other.
    classes: dict[tuple[int, ...], list[int]] = {}
    for sender, place in enumerate(froms):
        classes.setdefault(tuple(place[axis] for axis in apart), []).append(sender)
    found: list[Box] = []
    for alike in classes.values():
        blocks = [list(overlaps(have[alike[0]], pieces)) for pieces in want]
        needing = [
            r for r, place in enumerate(tos) if blocks[r] and not any(place[axis] for axis in only_first)
        ]  # fmt: skip
        for receiver in needing:
            able = [s for s in alike if all(froms[s][axis] == tos[receiver][axis] for axis in kept)]
            peers = [r for r in needing if all(tos[r][axis] == tos[receiver][axis] for axis in kept)]
            own = [s for s in able if source.ranks[s] == target.ranks[receiver]]
            sender = own[0] if own else able[peers.index(receiver) * len(able) // len(peers)]
            found += (
                Box(source.ranks[sender], target.ranks[receiver], there, here, _numel(there))
                for there, here in blocks[receiver]
            )
    order = {rank: index for index, rank in enumerate(target.ranks)}
    return tuple(sorted(found, key=lambda box: (order[box.target], box.source)))


def summed(source: Side, target: Side) -> bool:
    """Whether a receiver adds up what it gets (the source has summands) instead of putting it in place."""
    kept = _kept(source, target)
    return any(axis not in kept for axis in source.on("P"))


def _alike(source: Side, target: Side) -> bool:
    """Whether every rank sends all it has to the rank at its place."""
    same = source.mesh == target.mesh and source.layout == target.layout
    return same and (source.ranks == target.ranks or set(source.ranks).isdisjoint(target.ranks))


def _kept(source: Side, target: Side) -> list[str]:
    """Axes of the same size on which both have summands: every rank's goes to the rank of the same index."""
    theirs = target.on("P")
    return [a for a in source.on("P") if a in theirs and source.mesh.size(a) == target.mesh.size(a)]


def _numel(box: Slices) -> int:
    return math.prod(part.stop - part.start for part in box)


def overlaps(
    mine: Sequence[Sequence[tuple[int, int]]], theirs: Sequence[Sequence[tuple[int, int]]]
) -> Iterator[tuple[Slices, Slices]]:
    """The blocks that two parts of one tensor, given per dim as (start, stop) pieces of the whole, have in common:
    (where in mine, where in theirs)."""
    per_dim = []
    for left, right in zip(mine, theirs, strict=True):
        found: list[tuple[slice, slice]] = []
        here = 0
        for start, stop in left:
            there = 0
            for low, high in right:
                first, last = max(start, low), min(stop, high)
                if first < last:
                    a = slice(first - start + here, last - start + here)
                    b = slice(first - low + there, last - low + there)
                    if found and found[-1][0].stop == a.start and found[-1][1].stop == b.start:
                        previous = found.pop()
                        a, b = slice(previous[0].start, a.stop), slice(previous[1].start, b.stop)
                    found.append((a, b))
                there += high - low
            here += stop - start
        per_dim.append(found)
    for combination in product(*per_dim):
        yield tuple(a for a, _ in combination), tuple(b for _, b in combination)


# -- how a tensor leaves and arrives -----------------------------------------------------------------------------------


def boundary(
    shape: Sequence[int], made: Layout, source: Mesh, readers: Sequence[Layout], target: Mesh
) -> tuple[Layout, Layout]:
    """(layout on the source's mesh when a tensor leaves, layout on the target's mesh when it arrives).

    made: as its op leaves it; readers: as the ops of the target want it. Between equal meshes a tensor is sent as it
    is made, rank by rank. Otherwise summands are added up before (into slices where a dim divides), and a rank receives
    the slice that all its readers want, or everything; gradients are added up before they go back. Converting from
    `made` and to what readers want is the stages' work.
    """
    if source == target:
        return made, made
    return _departure(shape, made, source), _arrival(shape, made, source, readers, target)


def _departure(shape: Sequence[int], made: Layout, mesh: Mesh) -> Layout:
    layout = list(made)
    for i, axis in enumerate(mesh.axes):
        if layout[i] != P or axis == MICROBATCH_AXIS:
            continue
        layout[i] = R
        taken = {p.dim for a, p in zip(mesh.axes, layout, strict=True) if p.is_shard and a != MICROBATCH_AXIS}
        for dim in range(len(shape)):
            tried = (*layout[:i], S(dim), *layout[i + 1 :])
            if dim not in taken and mesh.sizes[i] > 1 and fits(shape, tried, mesh):
                layout[i] = S(dim)
                break
    return tuple(layout)


def _arrival(shape: Sequence[int], made: Layout, source: Mesh, readers: Sequence[Layout], target: Mesh) -> Layout:
    on_time = _on_time(made, source)
    # A part of the batch within a part of time is another part than one of the whole.
    moved = {d for r in readers if (p := _on_time(r, target)) != on_time for d in (p.dim, on_time.dim)}
    layout = [on_time if axis == MICROBATCH_AXIS else R for axis in target.axes]
    for i, axis in enumerate(target.axes):
        wanted = {reader[i] for reader in readers}
        if axis == MICROBATCH_AXIS or target.sizes[i] == 1 or len(wanted) != 1:
            continue
        placement = next(iter(wanted))
        if placement.is_shard and placement.dim not in moved:
            tried = (*layout[:i], placement, *layout[i + 1 :])
            if fits(shape, tried, target):
                layout[i] = placement
    return tuple(layout)


def _on_time(layout: Layout, mesh: Mesh) -> Placement:
    return dict(zip(mesh.axes, layout, strict=True)).get(MICROBATCH_AXIS, R)


def traffic(boxes: Sequence[Box]) -> Mapping[tuple[int, int], int]:
    """(source rank, target rank) -> elements, of boxes that leave their rank."""
    found: dict[tuple[int, int], int] = {}
    for box in boxes:
        if box.source != box.target:
            found[box.source, box.target] = found.get((box.source, box.target), 0) + box.numel
    return found
