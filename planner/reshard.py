"""From one layout to another on a mesh of several axes, as single-axis conversions in an order that is right.

Where two axes split the same dim, the later axis is the inner split: an inner split has to be undone before the outer
one changes, and is made after it.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardplan.planner.placement import Layout, Mesh, Placement, R


@dataclass(frozen=True, slots=True)
class Step:
    """One conversion on one axis."""

    axis: str
    source: Placement
    target: Placement


def steps(source: Layout, target: Layout, mesh: Mesh) -> tuple[Step, ...]:
    """Conversions that turn `source` into `target`, in order. Axes of size 1 are left out."""
    current = list(source)
    axes = [i for i, size in enumerate(mesh.sizes) if size > 1]
    changed = [i for i in axes if source[i] != target[i]]
    found: list[Step] = []

    def go(axis: int, placement: Placement) -> None:
        if current[axis] != placement:
            found.append(Step(mesh.axes[axis], current[axis], placement))
            current[axis] = placement

    for inner in reversed(axes):
        dim = source[inner].dim
        if dim >= 0 and any(dim in (source[outer].dim, target[outer].dim) for outer in changed if outer < inner):
            go(inner, R if target[inner].is_shard else target[inner])
    for axis in axes:
        go(axis, target[axis])
    return tuple(found)
