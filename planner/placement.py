"""How a tensor lies on one axis of a device mesh, and what it costs to change that.

On one mesh axis of size n a tensor is in one of four states. A state fixes the value *and its gradient*:

====================  ==============================  =====================================
state                 forward value on a rank         gradient on a rank
====================  ==============================  =====================================
``R``  Replicate      the whole tensor                the whole gradient
``S(d)`` Shard        the rank's slice of dim d       the same slice of the gradient
``P``  Partial        a summand of the tensor         the whole gradient
``D``  Dual           the whole tensor                a summand of the gradient
====================  ==============================  =====================================

``D`` is the dual of ``P``: it is what a replicated tensor becomes when sharded compute reads it (the input of a
column-parallel linear, a weight under data parallelism). Making it a state of its own lets a search count one backward
all-reduce for many readers, and lets a parameter's reduction be deferred to the end of the step.

Every pair of states has one conversion (`conversion`), with a forward and a backward collective.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Placement:
    """State of a tensor on one mesh axis. Build with `R`, `P`, `D` and `S(dim)`; prints as text that `parse` reads.

    dim: the sharded tensor dimension (non-negative) for kind "S", else -1.
    sections: sizes of consecutive sections of that dimension, each of which is split evenly over the axis (a fused
        query-key-value weight has three); empty for a plain contiguous split.
    """

    kind: str
    dim: int = -1
    sections: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("R", "S", "P", "D"):
            raise ValueError(f"unknown placement kind {self.kind!r}")
        if (self.kind == "S") != (self.dim >= 0):
            raise ValueError(f"placement {self.kind} with dim {self.dim}")
        if self.sections and self.kind != "S":
            raise ValueError("only a shard has sections")

    @property
    def is_shard(self) -> bool:
        return self.kind == "S"

    def __str__(self) -> str:
        if self.kind != "S":
            return self.kind
        runs = [(size, sum(1 for _ in same)) for size, same in groupby(self.sections)]
        text = ",".join(str(size) if count == 1 else f"{count}x{size}" for size, count in runs)
        return f"S({self.dim}|{text})" if text else f"S({self.dim})"


R = Placement("R")
P = Placement("P")
D = Placement("D")


@lru_cache(maxsize=4096)
def S(dim: int, sections: tuple[int, ...] = ()) -> Placement:
    """Shard of tensor dimension `dim` (non-negative)."""
    return Placement("S", dim, tuple(sections))


_TEXT = re.compile(r"^S\((\d+)(?:\|((?:\d+x)?\d+(?:,(?:\d+x)?\d+)*))?\)$")


@lru_cache(maxsize=4096)
def parse(text: str) -> Placement:
    """Inverse of ``str(placement)``. Raises ValueError on anything else."""
    if text in ("R", "P", "D"):
        return Placement(text)
    found = _TEXT.match(text)
    if not found:
        raise ValueError(f"not a placement: {text!r}")
    sections: list[int] = []
    for part in found[2].split(",") if found[2] else ():
        count, _, size = part.rpartition("x")
        sections += [int(size)] * int(count or 1)
    return S(int(found[1]), tuple(sections))


Layout = tuple[Placement, ...]
"""One placement per mesh axis, in the mesh's axis order. Where two axes shard the same dim, the earlier axis is the
outer split."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Named axes with sizes, e.g. ``Mesh(("mb", "dp", "tp"), (4, 2, 2))``.

    The axis ``mb`` is time: its "ranks" are the microbatches of one step. No collective exists on it.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.sizes) or len(set(self.axes)) != len(self.axes):
            raise ValueError(f"mesh axes {self.axes} do not match sizes {self.sizes}")
        if any(size < 1 for size in self.sizes):
            raise ValueError(f"mesh sizes must be positive, not {self.sizes}")

    def size(self, axis: str) -> int:
        return self.sizes[self.axes.index(axis)] if axis in self.axes else 1


MICROBATCH_AXIS = "mb"


def divides(shape: Sequence[int], placement: Placement, size: int) -> bool:
    """Whether a tensor of this shape (as it stands on the axis) can lie in this state on an axis of `size` ranks."""
    if not placement.is_shard:
        return True
    if placement.dim >= len(shape):
        return False
    if placement.sections:
        scale = sum(placement.sections) // max(shape[placement.dim], 1)
        return (
            scale >= 1
            and sum(placement.sections) == shape[placement.dim] * scale
            and all(part % (size * scale) == 0 for part in placement.sections)
        )
    return shape[placement.dim] % size == 0 and shape[placement.dim] >= size


def fits(shape: Sequence[int], layout: Layout, mesh: Mesh) -> bool:
    """Whether every shard of the layout divides evenly (nested splits of one dim included).

    Sections split a dim only where no earlier axis splits it in another way: what a rank then has of the dim does not
    consist of those sections.
    """
    current = list(shape)
    split: dict[int, tuple[int, ...]] = {}
    for placement, size in zip(layout, mesh.sizes, strict=True):
        if not divides(current, placement, size):
            return False
        if placement.is_shard and size > 1:
            if placement.sections and split.get(placement.dim, placement.sections) != placement.sections:
                return False
            split[placement.dim] = placement.sections
            current[placement.dim] //= size
    return True


def local_shape(shape: Sequence[int], layout: Layout, mesh: Mesh) -> tuple[int, ...]:
    """Shape of one rank's part. Raises ValueError where a shard does not divide."""
    if not fits(shape, layout, mesh):
        raise ValueError(f"shape {tuple(shape)} does not divide as {layout_text(layout)} on {mesh}")
    current = list(shape)
    for placement, size in zip(layout, mesh.sizes, strict=True):
        if placement.is_shard:
            current[placement.dim] //= size
    return tuple(current)


def local_slices(
    shape: Sequence[int], layout: Layout, mesh: Mesh, coordinate: Mapping[str, int]
) -> list[list[tuple[int, int]]]:
    """Per tensor dim, the (start, stop) pieces of the global tensor that the rank at `coordinate` holds, in order.

    Concatenating the pieces along each dim gives the local tensor. P and D hold everything.
    """
    pieces = [[(0, extent)] for extent in shape]
    for axis, placement, size in zip(mesh.axes, layout, mesh.sizes, strict=True):
        if not placement.is_shard or size == 1:
            continue
        index = coordinate.get(axis, 0)
        pieces[placement.dim] = _take(pieces[placement.dim], placement.sections, index, size)
    return pieces


def _take(pieces: list[tuple[int, int]], sections: tuple[int, ...], index: int, size: int) -> list[tuple[int, int]]:
    """The index-th of `size` equal parts of a dim made of `pieces` (of every section where there are sections)."""
    total = sum(stop - start for start, stop in pieces)
    if sections:
        scale = sum(sections) // total
        lengths = [part // scale for part in sections]
    else:
        lengths = [total]
    wanted: list[tuple[int, int]] = []
    offset = 0
    for length in lengths:
        part = length // size
        wanted.append((offset + index * part, offset + (index + 1) * part))
        offset += length
    result: list[tuple[int, int]] = []
    for low, high in wanted:
        position = 0
        for start, stop in pieces:
            length = stop - start
            left, right = max(low, position), min(high, position + length)
            if left < right:
                piece = (start + left - position, start + right - position)
                if result and result[-1][1] == piece[0]:
                    piece = (result.pop()[0], piece[1])
                result.append(piece)
            position += length
    return result


def layout_text(layout: Layout) -> str:
    return "[" + ", ".join(map(str, layout)) + "]"


@dataclass(frozen=True, slots=True)
class Conversion:
    """What changing the state of a tensor on one axis does.

    forward / backward: one of "identity", "slice", "zero_pad", "mask", "all_gather", "all_reduce", "reduce_scatter",
        "all_to_all". Only the last four communicate. The gradient's collective is what backward of the conversion runs.
    """

    forward: str
    backward: str


COLLECTIVES = frozenset({"all_gather", "all_reduce", "reduce_scatter", "all_to_all"})

# (source kind, target kind) -> forward, backward. "mask": keep on the first rank of the axis, zeros elsewhere (on the
# microbatch axis: divide by the number of microbatches). "zero_pad": a slice put into zeros.
_CONVERSIONS: dict[tuple[str, str], Conversion] = {
    ("R", "S"): Conversion("slice", "all_gather"),
    ("R", "D"): Conversion("identity", "all_reduce"),
    ("R", "P"): Conversion("mask", "identity"),
    ("S", "R"): Conversion("all_gather", "slice"),
    ("S", "D"): Conversion("all_gather", "reduce_scatter"),
    ("S", "P"): Conversion("zero_pad", "slice"),
    ("P", "R"): Conversion("all_reduce", "identity"),
    ("P", "S"): Conversion("reduce_scatter", "all_gather"),
    ("P", "D"): Conversion("all_reduce", "all_reduce"),
    ("D", "R"): Conversion("identity", "mask"),
    ("D", "S"): Conversion("slice", "zero_pad"),
    ("D", "P"): Conversion("mask", "mask"),
}
_NOTHING = Conversion("identity", "identity")
_RESHUFFLE = Conversion("all_to_all", "all_to_all")


def conversion(source: Placement, target: Placement, differentiable: bool = True) -> Conversion:
    """The conversion between two states on one axis. Without a gradient R and D are the same state."""
    if not differentiable:
        source, target = (R if state == D else state for state in (source, target))
    if source == target:
        return _NOTHING
    found = _RESHUFFLE if source.is_shard and target.is_shard else _CONVERSIONS[source.kind, target.kind]
    return found if differentiable else Conversion(found.forward, "identity")


def global_nbytes(shape: Sequence[int], itemsize: int) -> int:
    """Bytes of a dense tensor of this shape."""
    return math.prod(shape) * itemsize
