"""How a parameter is stored, apart from how it is used: ZeRO stages 1 to 3, fully sharded data parallelism.

An axis on which a parameter is replicated for its use (placement R or D, mainly "dp") may split what is stored of it:

=====  ========================  =======================================================================================
level  split over the axis       what is sent
=====  ========================  =======================================================================================
1      optimizer state           once a step: gradients reduce-scattered, updated parts all-gathered
2      and gradients             every microbatch: a segment's gradients reduce-scattered; once a step: all-gather
3      and the parameter itself  every microbatch: a segment's parameters gathered before its forward and again before
                                 its backward, its gradients reduce-scattered
=====  ========================  =======================================================================================

The split is along one dim of the *local* tensor (the part that the other axes leave to a rank), inside all other
splits: rank i of n has rows ``[i c, (i + 1) c)`` with ``c = ceil(extent / n)``, as `torch.chunk` and DTensor's Shard
have it. The last parts may be shorter or empty; only messages are padded. A scalar is never split. Buffers are not
either: ops write to them. Frozen parameters have no gradient and no optimizer state, so only level 3 does something.

Several microbatches: levels 2 and 3 reduce-scatter the gradient of every microbatch and add up the parts, so that no
whole gradient outlives its segment's backward; level 1 adds up whole gradients and sends once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Pieces = list[list[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Storage:
    """level: 1, 2 or 3 (see module docstring). axis: the mesh axis over which it is split. dim: of the local tensor."""

    level: int
    axis: str = "dp"
    dim: int = 0

    def __post_init__(self) -> None:
        if self.level not in (1, 2, 3) or self.dim < 0 or not self.axis:
            raise ValueError(f"no such storage: {self}")

    def __str__(self) -> str:
        what = {1: "optimizer state", 2: "gradients and optimizer state", 3: "parameter, gradient and optimizer state"}
        return f"{what[self.level]} split along dim {self.dim} over {self.axis}"


def best_dim(shape: Sequence[int], size: int) -> int | None:
    """The dim of a local tensor along which the largest of `size` parts is smallest, the first of equals; None for a
    scalar."""
    if not shape:
        return None
    return min(range(len(shape)), key=lambda dim: (part_extent(shape[dim], size) / max(shape[dim], 1), dim))


def part_extent(extent: int, size: int) -> int:
    """Rows of the largest part of a dim."""
    return -(-extent // size)


def span(extent: int, size: int, index: int) -> tuple[int, int]:
    """(start, stop) of part `index` of a dim."""
    rows = part_extent(extent, size)
    return min(index * rows, extent), min((index + 1) * rows, extent)


def part_shape(shape: Sequence[int], dim: int, size: int, index: int = 0) -> tuple[int, ...]:
    """Shape of a part of a local tensor; part 0 is a largest one."""
    start, stop = span(shape[dim], size, index)
    return (*shape[:dim], stop - start, *shape[dim + 1 :])


def part_pieces(pieces: Pieces, dim: int, size: int, index: int) -> Pieces:
    """Where part `index` of a local tensor lies in the whole. pieces: where the local tensor lies, per dim the (start,
    stop) runs (see `placement.local_slices`)."""
    low, high = span(sum(stop - start for start, stop in pieces[dim]), size, index)
    found: list[tuple[int, int]] = []
    position = 0
    for start, stop in pieces[dim]:
        left, right = max(low, position), min(high, position + stop - start)
        if left < right:
            found.append((start + left - position, start + right - position))
        position += stop - start
    return [*pieces[:dim], found or [(0, 0)], *pieces[dim + 1 :]]
