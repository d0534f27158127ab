"""Parts of tensors: a rank's part of a whole tensor, and the whole from the parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch

from shardplan.planner.placement import Layout, Mesh, local_slices


def part_of(whole: torch.Tensor, layout: Layout, mesh: Mesh, coordinate: Mapping[str, int]) -> torch.Tensor:
    """One rank's part of a whole tensor (everything for R, D and P)."""
    for dim, pieces in enumerate(local_slices(whole.shape, layout, mesh, coordinate)):
        if pieces != [(0, whole.shape[dim])]:
            whole = torch.cat([whole.narrow(dim, start, stop - start) for start, stop in pieces], dim)
    return whole.contiguous()


def assemble(
    parts: Mapping[tuple[tuple[str, int], ...], torch.Tensor],
    layout: Layout,
    mesh: Mesh,
    shape: tuple[int, ...],
    gradient: bool = False,
) -> torch.Tensor:
    """The whole tensor from the parts of all coordinates (axis-index pairs, "mb" included where it is split).

    Shards are put in place; replicas are taken once; summands (P of a value, D of a gradient) are added up.
    """
    first = next(iter(parts.values()))
    whole = torch.zeros(shape, dtype=first.dtype, device=first.device)
    summed = "D" if gradient else "P"
    for place, part in parts.items():
        coordinate = dict(place)
        replica = any(
            not p.is_shard and p.kind != summed and coordinate.get(axis, 0) > 0
            for axis, p in zip(mesh.axes, layout, strict=True)
        )
        if replica:
            continue
        for there, here in runs(local_slices(shape, layout, mesh, coordinate)):
            whole[there] += part[here]
    return whole


Slices = tuple[slice, ...]


def runs(pieces: Sequence[Sequence[tuple[int, int]]]) -> Iterator[tuple[Slices, Slices]]:
    """The blocks of a part, given per dim as (start, stop) pieces of the whole: (where in the whole, where in the
    part)."""
    per_dim = []
    for dim in pieces:
        position, found = 0, []
        for start, stop in dim:
            found.append((slice(start, stop), slice(position, position + stop - start)))
            position += stop - start
        per_dim.append(found)
    for combination in product(*per_dim):
        yield tuple(whole for whole, _ in combination), tuple(part for _, part in combination)
