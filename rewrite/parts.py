"""Parts of tensors: a rank's part of a whole tensor, and the whole from the parts."""

from __future__ import annotations

from collections.abc import Mapping

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
    whole = torch.zeros(shape, dtype=first.dtype)
    summed = "D" if gradient else "P"
    for place, part in parts.items():
        coordinate = dict(place)
        replica = any(
            not p.is_shard and p.kind != summed and coordinate.get(axis, 0) > 0
            for axis, p in zip(mesh.axes, layout, strict=True)
        )
        if replica:
            continue
        if not shape:
            whole += part
            continue
        pieces = local_slices(shape, layout, mesh, coordinate)
        held = [torch.cat([torch.arange(start, stop) for start, stop in dim]) for dim in pieces]
        whole[torch.meshgrid(*held, indexing="ij")] += part
    return whole
